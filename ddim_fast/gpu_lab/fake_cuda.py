"""A CUDA device without a GPU, and the rules of a captured step.

With it, the sampling loop is proved capturable on a machine without a GPU.

``FakeCuda`` gives tensors with ``device="cuda"`` and no memory (PyTorch's FakeTensorMode), on any
build of torch. Inside ``device.steady_state()`` every operation is checked against the rules of
CUDA graphs, and counted:

    with FakeCuda() as device:
        x = torch.empty(2, 4, 64, 64, device="cuda")
        model = device.tagged("model", make_unet().to("cuda"))
        with device.steady_state() as steady:
            one_step(x, model)
    print(steady)

The rules, from "CUDA Graphs" in the CUDA C++ programming guide (stream capture: prohibited and
unhandled operations) and from the notes on CUDA graphs in PyTorch's "CUDA semantics":

- The host never waits for the device: no ``.item()``, ``if`` on a tensor,
  ``torch.cuda.synchronize()``, nor the query of an event.
- No shape depends on a value: no ``nonzero``, ``unique``, nor indexing by a boolean mask.
- Nothing is copied between host and device, and so no CUDA tensor is made of Python data or indexed
  by host tensors. What a replay would copy is the memory that the host had at capture.
- What the host computes is computed once, at capture, and frozen into the graph: a captured step
  computes nothing on CPU tensors. Python numbers are frozen, too; ``ddim_fast.gpu_lab.replay``
  shows that only constants are frozen.
- Random numbers may come from the default CUDA generator, which every graph registers and whose
  offset moves on at each replay; from another CUDA generator only if it was registered with the
  graph; never from a generator of the host. Seeding is not allowed.

What happens inside a kernel or a composed CUDA operator is not seen, because a fake device runs
none. An operator that waits for the device inside its CUDA implementation, with nothing in its
schema that shows it, passes unless ``WAITING`` names it.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from .. import kernels
from ..kernels import layout
from ..sampling.cuda_graphs import WARM_UP_CALLS, CaptureError
from . import triton_internals
from .recorded_pool import RecordedPool
from .torch_internals import (
    CUDA_INITIALISERS,
    FakeTensor,
    PretendCudaMode,
    TorchDispatchMode,
    cuda_device_guard,
    forget_fake_tensors,
    implementation_of,
    no_device_memory,
    same_generator,
    schema_of,
    storage_key,
    tree_flatten,
)

OWN_NAMESPACE = "ddim_fast"
SAMPLER = "sampler"
"""The region of everything outside of other regions."""

WAITING = {
    "_local_scalar_dense": "reads a value back to the host",
    "equal": "compares on the device and answers on the host",
    "allclose": "compares on the device and answers on the host",
    "nonzero": "has as many results as the data say, which the host must learn",
    "nonzero_numpy": "has as many results as the data say, which the host must learn",
    "argwhere": "has as many results as the data say, which the host must learn",
    "masked_select": "has as many results as the data say, which the host must learn",
    "bincount": "has as many results as the data say, which the host must learn",
    "histc": "asks for the smallest and largest value on the host",
    "multinomial": "checks the probabilities on the host",
    "_linalg_check_errors": "asks on the host whether the factorization succeeded",
    "_pin_memory": "allocates host memory",
}
"""Operators that wait for the device, and why, beside those that torch tags as data-dependent."""

HOST_METHODS = {
    "tolist": "reads values back to the host",
    "numpy": "reads values back to the host",
    "__array__": "reads values back to the host",
    "__repr__": "prints values, which the host must read",
    "__format__": "prints values, which the host must read",
    "__reduce_ex__": "saves values, which the host must read",
    "pin_memory": "allocates host memory",
}
"""Methods of Tensor that wait for the device, some of them without a dispatched operator."""

UNINITIALIZED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
"""Operators that allocate and launch nothing."""

_COPIES = {"_to_copy", "copy_", "copy", "device_put"}
_NEVER_WAITS = "never waits for the device"
_STAY = "compute with the tensor on the device (torch.where, a mask as a factor), or read the value before the loop"
_RANDOM = (
    "use the default CUDA generator, or a CUDA generator registered with the graph, or seeds given to the step's kernel"
)


class NotCapturable(CaptureError):  # noqa: N818  (it names a property of an operation)
    """An operation that breaks a rule of captured steps.

    The message has the rule, what was called and where, and the remedy.

    Attributes:
        operator: such as "aten::_local_scalar_dense".
        kind: "sync", "copy", "random" or "host".
        where: ``file:line`` of the innermost frame outside torch and ddim_fast.
    """

    def __init__(self, operator: str, refusal: Refusal, called: str = "", where: str = ""):
        self.operator, self.kind, self.where = operator, refusal.kind, where.partition(", in ")[0]
        by = f" (called by {called})" if called and called.rpartition(".")[2] not in operator else ""
        super().__init__(
            f"a captured step {refusal.rule}, got {operator}{by}, which {refusal.what}, at {where or 'an unknown place'}: "
            f"{refusal.remedy}"
        )


@dataclass(frozen=True)
class Refusal:
    """The reason why an operator may not be captured.

    Attributes:
        kind: as in ``NotCapturable``.
        rule: what a captured step does or does not do.
        what: what this operator does instead.
        remedy: what to do.
    """

    kind: str
    rule: str
    what: str
    remedy: str


def function_name(function: Callable) -> str:
    """Return the name of a function, of what a ``functools.partial`` calls, or of a callable's
    class."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def hook_triton(stack: contextlib.ExitStack, hook: Callable[[str, Callable, tuple, dict], None]) -> None:
    """Have ``hook(name, run, args, options)`` called instead of each launch of a Triton kernel.

    ``run(*args, **options)`` is the launch. The name is in this package's namespace if the kernel
    is, or else in "triton::". Without Triton nothing is done.
    """

    def named(kernel: Any, run: Callable, args: tuple, options: dict) -> Any:
        module, name = triton_internals.name_of(kernel)
        own = module.partition(".")[0] == OWN_NAMESPACE
        return hook(f"{OWN_NAMESPACE if own else 'triton'}::{name}", run, args, options)

    triton_internals.hook_launches(stack, named)


def tensors_in(*trees: Any) -> list[Tensor]:
    """Return every tensor in nested arguments or results."""
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, Tensor)]


def written_tensors(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the tensors that an operator writes to, by its schema."""
    written = []
    for index, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only or index >= len(args) else args[index]
        written += tensors_in(value)
    return written


def _is_view(func) -> bool:
    returns = schema_of(func).returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def waiting_refusal(func, args: tuple, kwargs: dict) -> Refusal | None:
    """Return why this call waits for the device or has a data-dependent shape.

    None if it does not.
    """
    name = func.overloadpacket.__name__
    if name in ("item", "is_nonzero"):
        return None  # these call _local_scalar_dense
    why = WAITING.get(name)
    if why is None and name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        why = _mask_reason(name, args)
    if why is None and torch.Tag.dynamic_output_shape in func.tags and not _is_static(name, args, kwargs):
        why = "has as many results as the data say, which the host must learn"
    if why is None and torch.Tag.data_dependent_output in func.tags:
        why = "answers on the host what only the device knows"
    return None if why is None else Refusal("sync", _NEVER_WAITS, why, _STAY)


def _is_static(name: str, args: tuple, kwargs: dict) -> bool:
    """Return whether the number of results was given, instead of depending on data."""
    if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        return True  # only masks make these dynamic
    if name == "one_hot":
        return kwargs.get("num_classes", args[1] if len(args) > 1 else -1) >= 0
    return name == "repeat_interleave" and kwargs.get("output_size") is not None


def _mask_reason(name: str, args: tuple) -> str | None:
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return None
    if name.startswith(("index_put", "_index_put")):
        value, accumulate = args[2], len(args) > 3 and args[3]
        if len(masks) == 1 and value.numel() == 1 and value.device.type == "cpu" and not accumulate:
            return None  # a mask and one host number: a masked fill
    return "indexes by a boolean mask, and so has as many results as the mask has ones"


def generator_refusal(args: tuple, kwargs: dict, registered: Sequence[torch.Generator], device: str) -> Refusal | None:
    """Return why a captured step may not draw from the generator among these arguments.

    None if it may, or there is none.
    """
    for generator in tree_flatten((args, kwargs))[0]:
        if not isinstance(generator, torch.Generator) or any(same_generator(generator, r) for r in registered):
            continue
        what = f"draws from one on {generator.device} that is neither"
        return Refusal("random", "draws from the device's default generator or registered ones", what, _RANDOM)
    return None


PYTHON_DATA = Refusal(
    "copy",
    "makes no tensor of Python data",
    "copies the data from host to device",
    "make the tensor before the loop, or fill one on the device (torch.full, torch.arange)",
)
"""Refuses ``lift_fresh``, which torch.tensor, torch.as_tensor and indexing by a list begin with."""

_TORCH = (str(Path(torch.__file__).parent),)
_OWN = (str(Path(__file__).parents[1]), *(str(Path(path).resolve()) for path in kernels.__path__))
_LAB = (str(Path(__file__).parent),)
_STDLIB = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


def user_line() -> str:
    """Return ``file:line, in function: code`` of the innermost frame that is the user's.

    That is, outside of torch, ddim_fast and the standard library. The line of ddim_fast that it
    called follows in brackets, where there is one outside of the laboratory.
    """
    frame: FrameType | None = sys._getframe(1)
    own = ""
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if _is_in(_OWN, name):
            if not own and not _is_in(_LAB, name):
                own = f" (through {Path(name).name}:{line})"
        elif not (_is_in(_TORCH, name) or name.startswith("<frozen") or _in_stdlib(name)):
            code = linecache.getline(name, line).strip()
            return f"{name}:{line}, in {frame.f_code.co_name}: `{code}`{own}"
        frame = frame.f_back
    return own.strip(" ()").removeprefix("through ")


def _is_in(folders: Sequence[str], name: str) -> bool:
    """Return whether a file is in one of the folders.

    A folder whose name only begins alike is another.
    """
    return name.startswith(tuple(folder + os.sep for folder in folders))


def _in_stdlib(name: str) -> bool:
    return _is_in(_STDLIB, name) and "site-packages" not in name


@dataclass
class Region:
    """What one region of a steady state did: how often each operator ran."""

    launches: Counter[str] = field(default_factory=Counter)
    allocations: Counter[str] = field(default_factory=Counter)
    allocated_bytes: int = 0

    @property
    def own_launches(self) -> Counter[str]:
        """Launches of this package's own operators and kernels."""
        return Counter({name: n for name, n in self.launches.items() if name.startswith(f"{OWN_NAMESPACE}::")})


@dataclass
class Steady:
    """What happened in a steady state, by region.

    A launch is a Triton kernel, or an operator that would put at least one node into a graph: a
    kernel, a copy within the device, a fill. Views and uninitialised allocations are no launches.
    Operators of ours that are written in Python are looked into. An allocation is a result in new
    device memory; scratch memory inside a CUDA operator is not seen. In a graph's private pool the
    model may allocate at capture; the sampler's own part should not. Regions are those of
    ``device.region``, and "sampler" for the rest.

    Attributes:
        syncs, copies: descriptions of what waited for the device or crossed between host and
            device; empty, unless ``steady_state(refuse=False)`` let it pass.
        others: the same of other rules (host computation, random numbers).
    """

    regions: dict[str, Region] = field(default_factory=dict)
    syncs: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def region(self, name: str = SAMPLER) -> Region:
        return self.regions.get(name, Region())

    @property
    def launches(self) -> int:
        return sum(region.launches.total() for region in self.regions.values())

    @property
    def own_launches(self) -> int:
        return sum(region.own_launches.total() for region in self.regions.values())

    @property
    def allocations(self) -> int:
        return sum(region.allocations.total() for region in self.regions.values())

    def __str__(self) -> str:
        head = f"{len(self.syncs)} syncs, {len(self.copies)} copies between host and device"
        lines = [f"{self.launches} launches ({self.own_launches} of ours), {self.allocations} allocations, {head}"]
        for name, region in self.regions.items():
            lines.append(
                f"  {name}: {region.launches.total()} launches, {region.allocations.total()} allocations "
                f"({region.allocated_bytes} bytes)"
            )
            most = region.launches.most_common(8)
            if most:
                rest = ", ..." if len(region.launches) > len(most) else ""
                lines.append("    " + ", ".join(f"{count} x {operator}" for operator, count in most) + rest)
        lines += [f"  ! {finding}" for finding in (*self.syncs, *self.copies, *self.others)]
        return "\n".join(lines)


_active: FakeCuda | None = None


class FakeCuda:
    """A CUDA device without a GPU, with the rules of captured steps.

    Its tensors have no memory, and torch.cuda needs no driver:

        with FakeCuda() as device:
            ...

    Inside, every new tensor is fake, on the CPU, too, so that weights cannot be read from a file:
    build the model here without them, or load it before and move it here, after which it is fake
    for good. Tensors from outside are taken as fake ones when used. ``Tensor.data_ptr()`` gives
    addresses that do not overlap. Triton kernels are not run, only counted. Where torch has no
    support for CUDA, its own do-nothing device guard is registered for the duration.

    Args:
        capability: What ``torch.cuda.get_device_capability()`` answers.
        launchers: For launches outside torch and Triton. Each is a list in the launcher's module,
            which the launcher looks at before each launch: while the fake device is active it holds
            ``record_call``, to be called as ``record_call(function, *arguments, **options)``
            instead of ``function(*arguments, **options)``.

    Attributes:
        device: ``torch.device("cuda", 0)``.
        steady: The report being filled in; None outside of ``steady_state()``.

    Raises:
        RuntimeError: (on entry) a fake device is active already, or this torch has no way to
            register a device guard.
    """

    def __init__(self, *, capability: tuple[int, int] = (9, 0), launchers: Sequence[list[Callable]] = ()):
        self.device = torch.device("cuda", 0)
        self.steady: Steady | None = None
        self.mode = PretendCudaMode(allow_non_fake_inputs=True)
        self.functions = _Functions(self)
        self._capability, self._launchers = capability, launchers
        self._stack = contextlib.ExitStack()
        self._refuse = True
        self._generators: Sequence[torch.Generator] = ()
        self._regions = [SAMPLER]
        self._running: list[Any] = []  # the public functions that are running, for messages
        self._literals: set[int] = set()  # storages of host numbers that indexing made of Python numbers
        self._addresses: dict[int, tuple[int, int]] = {}
        self._next_address = 1 << 40

    def __enter__(self) -> FakeCuda:
        global _active
        if _active is not None:
            raise RuntimeError("one fake device can be active at a time, got a second: use the first")
        with contextlib.ExitStack() as stack:
            stack.enter_context(cuda_device_guard())
            _pretend(stack, self, self._capability)
            stack.enter_context(self.mode)
            stack.enter_context(self.functions)
            stack.enter_context(_Operators(self))
            hook_triton(stack, lambda name, run, args, options: self._launch(name, (args, options)))
            for launcher in self._launchers:
                launcher.append(self.record_call)
                stack.callback(launcher.remove, self.record_call)
            self._stack = stack.pop_all()
        _active = self
        return self

    def __exit__(self, *exception: Any) -> None:
        global _active
        _active = None
        self._stack.__exit__(*exception)

    @contextlib.contextmanager
    def steady_state(self, *, refuse: bool = True, generators: Sequence[torch.Generator] = ()) -> Iterator[Steady]:
        """Check every operation against the rules of a captured step, and count it.

        For numbers per step, open one for each step.

        Args:
            refuse: False counts what breaks a rule instead of raising; a value read back is then 0.
            generators: those that will be registered with the graph
                (``CUDAGraph.register_generator_state``).

        Raises:
            NotCapturable: an operation breaks a rule.
            RuntimeError: a steady state is open already.
        """
        if self.steady is not None:
            raise RuntimeError(
                "one steady state is open at a time, got a second: use region() to tell parts of it apart"
            )
        report = self.steady = Steady()
        self._refuse, self._generators = refuse, tuple(generators)
        try:
            yield report
        finally:
            self.steady, self._generators = None, ()

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count what happens inside under this name. Where regions nest, the innermost counts."""
        self._regions.append(name)
        try:
            yield
        finally:
            self._regions.pop()

    def tagged(self, name: str, function: Callable) -> Callable:
        """Return the same callable with each call a region. Other attributes are the callable's."""
        return _Tagged(self, name, function)

    def record_call(self, function: Callable, /, *arguments: Any, **options: Any) -> None:
        """Count a launch that does not pass through torch's dispatcher, without running it.

        See ``launchers`` of ``FakeCuda``.

        Raises:
            NotCapturable: an argument is a tensor of the host.
        """
        self._launch(f"{OWN_NAMESPACE}::{function_name(function)}", (arguments, options))

    def _launch(self, name: str, arguments: Any) -> None:
        for tensor in tensors_in(arguments) if self.steady is not None else ():
            if tensor.device.type != "cuda":
                rule = "gives kernels memory of the device only"
                what = f"was given a tensor on {tensor.device} of shape {tuple(tensor.shape)}"
                self.refuse(name, Refusal("copy", rule, what, f"move it to {self.device} before the loop"))
        self._count(name, [])

    def refuse(self, operator: str, refusal: Refusal) -> None:
        """Raise ``NotCapturable``, or add it to the report where the steady state does not refuse."""
        called = resolve_name(self._running[-1]) or "" if self._running else ""
        error = NotCapturable(operator, refusal, called, user_line())
        if self._refuse:
            raise error
        report = self.steady
        assert report is not None, "refusals belong to a steady state"
        kinds = {"sync": report.syncs, "copy": report.copies}
        kinds.get(refusal.kind, report.others).append(str(error))

    def host_call(self, operator: str, what: str) -> None:
        """Refuse, in a steady state, a call that bypasses the dispatcher and makes the host wait."""
        if self.steady is not None:
            self.refuse(operator, Refusal("sync", _NEVER_WAITS, what, "call it before or after the loop"))

    def address(self, storage: torch.UntypedStorage) -> int:
        """Return an address for a storage without memory.

        Storages that live at once do not overlap.
        """
        key, size = storage_key(storage), storage.nbytes()
        address, known_size = self._addresses.get(key, (0, -1))
        if size > known_size:
            address = self._next_address
            self._next_address += -(-max(size, 1) // 512) * 512
            self._addresses[key] = (address, size)
        return address

    def _dispatch(self, mode: TorchDispatchMode, func, args: tuple, kwargs: dict) -> Any:
        """Check, run and count one operator; decompose it where it only calls others."""
        name = func.overloadpacket.__name__
        if func.namespace == "prim" or self.steady is None:
            return func(*args, **kwargs)
        refusal = waiting_refusal(func, args, kwargs)
        if refusal is None:
            # Under inference mode, operators arrive here that autograd would have decomposed
            # before.
            with mode:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            refusal = generator_refusal(args, kwargs, self._generators, "cuda") or self._placement(func, args, kwargs)
        if refusal is not None:
            self.refuse(func.name(), refusal)
            if name in ("_local_scalar_dense", "equal", "allclose"):
                return 0
        implementation = implementation_of(func, "cuda") if func.namespace == OWN_NAMESPACE else None
        if implementation is not None:
            with self.functions, mode:  # what it launches counts, not that it was called
                return implementation(*args, **kwargs)
        inputs = {storage_key(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors_in(args, kwargs)}
        result = func(*args, **kwargs)
        if name == "lift_fresh":
            self._literals.update(storage_key(t.untyped_storage()) for t in tensors_in(result) if t.dim() == 0)
            return result
        outputs = [t for t in tensors_in(result) if t.device.type == "cuda"]
        new = {}
        for tensor in (*outputs, *written_tensors(func, args, kwargs)):
            storage = tensor.untyped_storage()
            if storage.nbytes() > inputs.get(storage_key(storage), 0):
                new[storage_key(storage)] = storage.nbytes()
        written = [t for t in written_tensors(func, args, kwargs) if t.numel()]
        fresh = [t for t in outputs if storage_key(t.untyped_storage()) not in inputs and t.numel()]
        is_view = bool(outputs) and not written and not fresh
        launches = not is_view and name not in UNINITIALIZED and name not in ("set_", "resize_")
        launches = launches and bool(written or fresh or not outputs)
        self._count(func.name(), new.values(), launches)
        return result

    def _count(self, operator: str, allocated: Any, launches: bool = True) -> None:
        if self.steady is None:
            return
        region = self.steady.regions.setdefault(self._regions[-1], Region())
        if launches:
            region.launches[operator] += 1
        for size in allocated:
            region.allocations[operator] += 1
            region.allocated_bytes += size

    def _placement(self, func, args: tuple, kwargs: dict) -> Refusal | None:
        """Return why the devices of an operator's tensors are not those of a captured step, or
        None."""
        name = func.overloadpacket.__name__
        tensors = tensors_in(args, kwargs)
        kinds = {t.device.type for t in tensors}
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if name == "lift_fresh":
            function = getattr(self._running[-1], "__name__", "") if self._running else ""
            if function == "__setitem__" and all(t.dim() == 0 for t in tensors):
                return None  # x[i] = 2.0: a fill with a constant
            return PYTHON_DATA
        if name in _COPIES and kinds | ({target} if target else set()) == {"cpu", "cuda"}:
            source = args[0 if name in ("_to_copy", "device_put") else 1].device.type
            way = "from device to host" if source == "cuda" else "from host to device"
            remedy = "keep what a step needs on the device, and copy before or after the loop"
            return Refusal("copy", "copies nothing between host and device", f"copies {way}", remedy)
        if "cuda" in kinds:
            hosts = [
                t for t in tensors if t.device.type == "cpu" and storage_key(t.untyped_storage()) not in self._literals
            ]
            if not hosts:
                return None
            widest = max(hosts, key=lambda t: t.dim())
            kind, fate = ("copy", "would be copied") if widest.dim() else ("host", "has a value that would be frozen")
            what = f"was given a host tensor of shape {tuple(widest.shape)}, which {fate}"
            return Refusal(kind, "gives operators tensors of the device only", what, "move it there before the loop")
        if tensors and _is_view(func):
            return None
        if kinds == {"cpu"} or target == "cpu" or (not kinds and target is None and schema_of(func).returns):
            if torch.Tag.nondeterministic_seeded in func.tags:
                return Refusal("random", "draws its random numbers on the device", "draws them on the host", _RANDOM)
            what = "would be computed once, at capture"
            return Refusal("host", "computes nothing on the host", what, "compute it on the device, or before the loop")
        return None


class _Tagged:
    def __init__(self, device: FakeCuda, name: str, function: Callable):
        self._device, self._name, self._function = device, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._device.region(self._name):
            return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


class FakeGraph:
    """What ``FakeGraphs`` captured: a report, ``steady``, and the function's result.

    There is nothing to replay; replays are counted.
    """

    def __init__(self, output: Any, steady: Steady):
        self.output, self.steady, self.replays = output, steady, 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.output = None


class FakeGraphs:
    """A ``ddim_fast.sampling.cuda_graphs.GraphBackend`` on the fake device.

    A capture is a steady state, and a replay is only counted.
    """

    def __init__(self, device: FakeCuda, generators: Sequence[torch.Generator] = ()):
        self._device, self._generators = device, generators

    def warm_up(self, function: Callable[[], Any], times: int = WARM_UP_CALLS) -> None:
        for _ in range(times):
            function()

    def fence(self, tensors: Sequence[Tensor]) -> None:
        """Return None: a replay is done when it returns."""

    def new_pool(self) -> RecordedPool:
        return RecordedPool()  # nothing is in it, since a fake tensor has no memory

    def capture(self, function: Callable[[], Any], pool: RecordedPool | None = None) -> FakeGraph:
        """Call ``function`` once in a steady state.

        Raises:
            NotCapturable: an operation breaks a rule.
        """
        with self._device.steady_state(generators=self._generators) as steady:
            return FakeGraph(function(), steady)


class _Operators(TorchDispatchMode):
    def __init__(self, device: FakeCuda):
        super().__init__()
        self._fake_device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._fake_device._dispatch(self, func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """A mode that sees public functions.

    It knows which one is running, refuses methods that read without an operator, and gives fake
    tensors addresses.
    """

    def __init__(self, device: FakeCuda):
        super().__init__()
        self._fake_device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        device, name = self._fake_device, getattr(func, "__name__", "")
        if name == "data_ptr" and isinstance(args[0], FakeTensor):
            tensor = args[0]
            if tensor.device.type != "cuda":
                raise RuntimeError(
                    f"an address is given to a fake tensor of the device only, got one on {tensor.device} of shape "
                    f"{tuple(tensor.shape)}: give host tensors to kernels outside fake_cuda()"
                )
            return device.address(tensor.untyped_storage()) + tensor.storage_offset() * tensor.element_size()
        device._running.append(func)
        try:
            if name in HOST_METHODS and device.steady is not None and isinstance(args[0], Tensor):
                device.host_call(f"Tensor.{name}", HOST_METHODS[name])
            return func(*args, **(kwargs or {}))
        finally:
            device._running.pop()


def fake_cuda(*, capability: tuple[int, int] = (9, 0), launchers: Sequence[list[Callable]] = ()) -> FakeCuda:
    """Return ``FakeCuda(...)``."""
    return FakeCuda(capability=capability, launchers=launchers)


def _event_class(device: FakeCuda) -> type:
    class Event:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def record(self, stream: Any = None) -> None:
            pass

        def wait(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            device.host_call("torch.cuda.Event.synchronize", "waits for an event")

        def query(self) -> bool:
            device.host_call("torch.cuda.Event.query", "asks an event")
            return True

        def elapsed_time(self, end: Any) -> float:
            device.host_call("torch.cuda.Event.elapsed_time", "asks an event")
            return 0.0

    return Event


def _stream_class(fake: FakeCuda, event_class: type) -> type:
    class Stream:
        cuda_stream, stream_id, device_index = 0, 0, 0

        def __init__(self, *args: Any, **kwargs: Any):
            self.device = fake.device

        def synchronize(self) -> None:
            fake.host_call("torch.cuda.Stream.synchronize", "waits for a stream")

        def query(self) -> bool:
            fake.host_call("torch.cuda.Stream.query", "asks a stream")
            return True

        def wait_stream(self, stream: Any) -> None:
            pass

        def wait_event(self, event: Any) -> None:
            pass

        def record_event(self, event: Any = None) -> Any:
            return event_class() if event is None else event

    return Stream


def _cuda_functions(device: FakeCuda, capability: tuple[int, int]) -> dict[str, Any]:
    """Return replacements for the functions and classes of ``torch.cuda`` that ask the driver, by
    name."""

    def waits(name: str, what: str, answer: Any = None) -> Callable:
        def function(*args: Any, **kwargs: Any) -> Any:
            device.host_call(f"torch.cuda.{name}", what)
            return answer

        return function

    def says(answer: Any) -> Callable:
        return lambda *args, **kwargs: answer

    major, minor = capability
    name = "pretended CUDA device"
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=80 << 30, multi_processor_count=132, warp_size=32
    )
    event = _event_class(device)
    stream = _stream_class(device, event)
    current = stream()
    seeded = "touches the state of the generator"
    return {
        "is_available": says(True),
        "is_initialized": says(True),
        "is_bf16_supported": says(True),
        "is_current_stream_capturing": lambda: device.steady is not None,
        **dict.fromkeys(CUDA_INITIALISERS, says(None)),
        "device_count": says(1),
        "current_device": says(0),
        "set_device": says(None),
        "get_device_name": says(name),
        "get_device_capability": says(capability),
        "get_device_properties": says(properties),
        "current_stream": says(current),
        "default_stream": says(current),
        "set_stream": says(None),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "device_of": contextlib.nullcontext,
        "Stream": stream,
        "Event": event,
        "memory_allocated": says(0),
        "max_memory_allocated": says(0),
        "memory_reserved": says(0),
        "reset_peak_memory_stats": says(None),
        "mem_get_info": says((80 << 30, 80 << 30)),
        "synchronize": waits("synchronize", "waits for the device"),
        "empty_cache": waits("empty_cache", "frees memory of the device"),
        "manual_seed": waits("manual_seed", seeded),
        "manual_seed_all": waits("manual_seed_all", seeded),
        "seed": waits("seed", seeded),
        "seed_all": waits("seed_all", seeded),
        "initial_seed": waits("initial_seed", seeded, 0),
        "get_rng_state": waits("get_rng_state", seeded),
        "set_rng_state": waits("set_rng_state", seeded),
    }


def _pretend(stack: contextlib.ExitStack, device: FakeCuda, capability: tuple[int, int]) -> None:
    """Let ``torch.cuda`` answer as with one idle GPU, and give fake tensors addresses."""
    stack.enter_context(no_device_memory())
    replacements = _cuda_functions(device, capability)
    for attribute, replacement in replacements.items():
        stack.enter_context(mock.patch.object(torch.cuda, attribute, replacement))
    stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", replacements["synchronize"]))

    swap = torch.utils.swap_tensors

    @functools.wraps(swap)
    def swap_tensors(first: Tensor, second: Tensor) -> None:
        forget_fake_tensors(device.mode)  # Module.to swaps, which weak references forbid
        swap(first, second)

    stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", swap_tensors))

    wraps = layout.is_wrapper  # kernels take plain tensors, which these stand for
    plain = mock.patch.object(layout, "is_wrapper", lambda t: not isinstance(t, FakeTensor) and wraps(t))
    stack.enter_context(plain)

    real_data_ptr = torch.UntypedStorage.data_ptr

    def data_ptr(storage: torch.UntypedStorage) -> int:
        return device.address(storage) if storage.device.type == "meta" else real_data_ptr(storage)

    stack.enter_context(mock.patch.object(torch.UntypedStorage, "data_ptr", data_ptr))
