"""One call of a module's forward as a CUDA graph: static arguments, the graph, and copies of what it
returns."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.torch_internals import tree_flatten, tree_unflatten, write_count
from .captured import Captured, unsteady
from .contents import Contents
from .cuda_graphs import CaptureError, GraphBackend, MemoryPool
from .graph_key import first_places, leaf_key
from .model_state import PLAIN, plain_key, same_device
from .static_tensors import copies_of, fill_leaves, is_plain, static_leaves


class Call:
    """A call of a module's forward, with its arguments, in the mode of gradients that it is made in.

    Args:
        function: computes it without a graph.
        names: of the positional arguments, for errors.
        context: what else its graph bakes in.
        on_refusal: called with this, the reason and the error, if there is one, where it is done
            without a graph.

    Attributes:
        leaves, structure: its arguments, and the containers that hold them.
        tensors: those among its arguments.
        device: that of its first tensor that is not on the host.
        grad_enabled: whether gradients are enabled around it.
        captures: how often it was captured.
    """

    is_brief = True

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Sequence[str] = (),
        context: Hashable = None,
        on_refusal: Callable[[Call, str, Exception | None], None] = lambda call, reason, error: None,
    ):
        self.model, self.function, self._names, self._context = model, function, names, context
        self._on_refusal = on_refusal
        self.captures = 0
        self.grad_enabled = torch.is_grad_enabled()
        self.leaves, self.structure = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        devices = [tensor.device for tensor in self.tensors if tensor.device.type != "cpu"]
        self.device = devices[0] if devices else torch.device("cpu")

    @cached_property
    def named_leaves(self) -> list[tuple[str, Any]]:
        """What it was given, piece by piece, each with the name of its place."""
        args, kwargs = tree_unflatten(self.leaves, self.structure)
        names = [*self._names[: len(args)], *(f"argument {n}" for n in range(len(self._names) + 1, len(args) + 1))]
        named = [*zip(names, args, strict=True), *kwargs.items()]
        return [pair for name, value in named for pair in _pieces(name, value)]

    @cached_property
    def signature(self) -> tuple[Hashable, ...]:
        """What its graph bakes in of its arguments: structure and which tensors are one, then each
        piece.

        Raises:
            TypeError: a piece is neither a tensor on the device nor a plain value.
        """
        # The names of all pieces are made for errors only: each costs more than a key.
        try:
            keys = [leaf_key(leaf, "arguments", self.device) for leaf in self.leaves]
        except TypeError:
            keys = [leaf_key(leaf, name, self.device) for name, leaf in self.named_leaves]
        return ((str(self.structure), first_places(self.leaves)), *keys)

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """Python's numbers among its arguments, by the names of their places."""
        return {name: leaf for name, leaf in self.named_leaves if _is_number(leaf)}

    @cached_property
    def signature_without_numbers(self) -> tuple[Hashable, ...]:
        """The signature of all calls that differ from this one in Python's numbers alone."""
        structure, *keys = self.signature
        pairs = zip(self.leaves, keys, strict=True)
        kinds: list[Any] = [type(leaf) if _is_number(leaf) else key for leaf, key in pairs]
        return structure, *kinds

    @property
    def shape(self) -> Hashable:
        """What tells calls apart for a reader: shapes, dtypes, and which arguments there are."""
        leaves: list[Any] = [
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in self.leaves
        ]
        return str(self.structure), *leaves

    def key(self) -> Hashable:
        """Return what its graph bakes in, apart from the module.

        Raises:
            TypeError: an argument is neither a tensor on the device nor a plain value.
        """
        return self.signature, self._context, self.grad_enabled

    def capture(self, graphs: GraphBackend, vouch: bool = False, pool: MemoryPool | None = None) -> CapturedCall:
        """Capture it."""
        self.captures += 1
        return CapturedCall(self, graphs, vouch, pool)

    def refused(self, reason: str, error: Exception | None, is_first: bool) -> None:
        """Tell its owner."""
        self._on_refusal(self, reason, error)

    def __str__(self) -> str:
        return ", ".join(f"{name} {_shown(leaf)}" for name, leaf in self.named_leaves) or "no arguments"


class CapturedCall(Captured):
    """Static arguments and outputs, and the graph that reads and writes them.

    Args:
        vouch: whether a module is refused for which nobody can vouch.
        pool: memory of the graph, beside the static tensors; None: its own.

    Raises:
        CaptureError: the module cannot be captured, does something else in each call, changes its
            arguments, or returns something that is neither a tensor of its device without gradients
            nor a plain value.
    """

    def __init__(self, call: Call, graphs: GraphBackend, vouch: bool = False, pool: MemoryPool | None = None):
        super().__init__(graphs, pool)
        self._function, self._structure, self._grad_enabled = call.function, call.structure, call.grad_enabled
        # Ordinary tensors, so that calls inside and outside of inference mode can share them.
        with torch.inference_mode(False), torch.no_grad():
            self._leaves = static_leaves(call.leaves)
        self._outputs: list[Any] = []
        self._output_structure: Any = None
        self._output_keys: list[Hashable] = []  # of each call of the function
        self._output_strides: list[Any] = []
        with torch.no_grad():
            self.load(call)
        self._capture(call.model, call.device, self._checked(call), self._run, vouch)

    def load(self, work: Call) -> None:
        """Copy the arguments of another call with the same key into the static ones, after the call
        before, whatever its stream. None of them requires gradients, or gradients are off."""
        self._wait()
        fill_leaves(self._leaves, work.leaves)

    def static_tensors(self) -> list[Tensor]:
        """Return the arguments and outputs that the graph works on."""
        return [leaf for leaf in (*self._leaves, *self._outputs) if isinstance(leaf, Tensor)]

    def _run(self) -> None:
        args, kwargs = tree_unflatten(self._leaves, self._structure)
        outputs, _ = self._computed(args, kwargs)
        # The first call may complete the module. A module that asks who looks on may return other
        # strides here than in the calls that were watched.
        keys, strides = self._output_keys[1:], self._output_strides[1:-1]
        if any(key != keys[0] for key in keys) or any(each != strides[0] for each in strides):
            raise unsteady("other outputs in the next call: their structure, layouts or plain values")
        fill_leaves(self._outputs, outputs)

    def _computed(self, args: Any, kwargs: Any) -> tuple[list[Any], Any]:
        """Call the function; return the pieces and the structure of its output."""
        with torch.set_grad_enabled(self._grad_enabled):
            outputs, structure = tree_flatten(self._function(*args, **kwargs))
        self._output_keys.append((str(structure), first_places(outputs), *map(_output_key, outputs)))
        self._output_strides.append([each.stride() for each in outputs if _is_known(each) and isinstance(each, Tensor)])
        return outputs, structure

    def _keep_outputs(self, outputs: list[Any], structure: Any, device: torch.device) -> None:
        """Make the tensors for the outputs, if a replay can fill them: in the layout of the first
        call, at which nobody looked on, unless that was another."""
        if self._output_keys[-1] == self._output_keys[0] and len(self._output_keys) > 1:
            return
        for output in outputs:
            if not _is_known(output):
                raise CaptureError(
                    "a captured call returns plain, dense tensors and plain values, in containers that torch knows, got a "
                    f"{type(output).__qualname__}: run it without graphs"
                )
            if isinstance(output, Tensor) and not same_device(output.device, device):
                raise CaptureError(
                    f"a captured call returns tensors on the device of its arguments, {device}, got one on {output.device}: "
                    "run it without graphs"
                )
            if isinstance(output, Tensor) and output.requires_grad and (self._grad_enabled or not output.is_leaf):
                raise CaptureError(
                    "a replay records no gradients, got a call whose output requires some: call it under torch.no_grad()"
                )
        with torch.inference_mode(False), torch.no_grad():
            self._outputs = static_leaves(outputs)
        self._output_structure = structure

    def _checked(self, call: Call) -> Callable[[], None]:
        """Return a call that raises an error where a replay would not do the same."""

        def checked() -> None:
            args, kwargs = tree_unflatten(self._leaves, self._structure)
            given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
            counts, contents = list(map(write_count, given)), Contents((), (), (), given)
            outputs, output_structure = self._computed(args, kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            is_same = len(leaves) == len(self._leaves) and all(
                a is b for a, b in zip(leaves, self._leaves, strict=True)
            )
            if not is_same or str(structure) != str(self._structure):
                raise CaptureError(
                    "a captured call leaves its arguments as they are, got one that changes a list or dictionary among "
                    f"{_names_of(call)}: run it without graphs"
                )
            names = [name for name, leaf in call.named_leaves if isinstance(leaf, Tensor)]
            changed = [
                name
                for name, tensor, count in zip(names, given, counts, strict=True)
                if write_count(tensor) != count or contents.is_changed(tensor)
            ]
            if changed:
                raise CaptureError(
                    f"a captured call leaves its arguments as they are, got one that writes to {', '.join(changed)}: run it "
                    "without graphs"
                )
            self._keep_outputs(outputs, output_structure, call.device)

        return checked

    def replay(self) -> Any:
        """Replay, and return what the call returns, in memory of its own.

        A replay fills the same memory again, and callers keep what they got: pipelines both outputs
        of guidance, multistep schedulers those of earlier steps.
        """
        self._graph.replay()
        return tree_unflatten(copies_of(self._outputs), self._output_structure)


def _names_of(call: Call) -> str:
    return ", ".join(dict.fromkeys(name.partition("[")[0] for name, _ in call.named_leaves))


def _pieces(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each piece of a nested argument with the name of its place, in the order of
    ``tree_flatten``."""
    if type(value) in (list, tuple):
        for n, item in enumerate(value):
            yield from _pieces(f"{name}[{n}]", item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from _pieces(f"{name}[{key!r}]", item)
    else:
        leaves, _ = tree_flatten(value)
        for n, leaf in enumerate(leaves):
            yield (name if leaf is value else f"{name}[{n}]"), leaf


def _is_known(output: Any) -> bool:
    return is_plain(output) if isinstance(output, Tensor) else isinstance(output, PLAIN)


def _output_key(output: Any) -> Hashable:
    if isinstance(output, Tensor):
        return type(output), output.layout, output.shape, output.dtype, output.device
    return plain_key(output) if isinstance(output, PLAIN) else (type(output),)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float)) and not isinstance(leaf, bool)


def _shown(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
    return f"{leaf!r:.40}"
