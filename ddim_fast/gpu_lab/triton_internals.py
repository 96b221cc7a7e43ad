"""Everything undocumented of Triton that the laboratory needs, in one place.

Triton has no public way to launch on a device that is not there, so a driver is put in front of it:
an object that answers what Triton's compiler and launcher ask (``triton/backends/driver.py`` and
its callers). Triton 3.6 and 3.7 are known to fit. Where a name is missing, ``TritonChangedError``
says which one and what for.

Triton is imported by the functions that need it, so that this module loads without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

KNOWN_VERSIONS = "3.6 and 3.7"


class TritonChangedError(ImportError):
    """A name of Triton that the laboratory needs is missing."""


def _internal(module: str, name: str, purpose: str) -> Any:
    """Return an undocumented name of Triton.

    Raises:
        ImportError: Triton is not installed.
        TritonChangedError: Triton is installed, and lacks the name.
    """
    if find_spec("triton") is None:
        raise ImportError(f"{purpose} needs Triton, which is not installed: pip install triton")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        version = getattr(import_module("triton"), "__version__", "of an unknown version")
        raise TritonChangedError(
            f"{purpose} needs {module}.{name} (Triton {KNOWN_VERSIONS} have it), got Triton {version} without it: "
            "pip install triton==3.7.*"
        ) from None


def check_compiles() -> None:
    """Check that ``@triton.jit`` functions are compiled.

    Raises:
        RuntimeError: TRITON_INTERPRET makes them run in Triton's interpreter.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes"):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so Triton would interpret kernels and emit no PTX: unset it, in a process of its own"
        )


# --- the active driver ---


@contextlib.contextmanager
def active_driver(driver: Any) -> Iterator[None]:
    """Let Triton use ``driver`` inside the ``with`` block.

    ``set_active`` is public. What was active before is read from a private attribute, because the
    public one looks for a real GPU, and raises where there is none.
    """
    config = _internal("triton.runtime", "driver", "launching on a device that is not there")
    if not hasattr(config, "_active"):
        _internal("triton.runtime.driver", "_active", "launching on a device that is not there")
    before = config._active
    config.set_active(driver)
    try:
        yield
    finally:
        config.set_active(before)


def current_driver() -> Any:
    """Return the driver that Triton uses now."""
    return _internal("triton.runtime", "driver", "launching on a device that is not there").active


def gpu_target(target: str) -> Any:
    """Return Triton's description of a GPU such as "sm_90" or "gfx942". There is no public one.

    Raises:
        ValueError: The target is neither.
    """
    if re.fullmatch(r"sm_\d+|gfx\w+", target) is None:
        raise ValueError(f"target must be sm_ and a number, or gfx and a name, got {target!r}: such as sm_90 or gfx942")
    target_class = _internal("triton.backends.compiler", "GPUTarget", "compiling for a device that is not there")
    if target.startswith("gfx"):
        return target_class("hip", target, 64)
    return target_class("cuda", int(target.removeprefix("sm_")), 32)


class _EmulatedDriver:
    """A driver whose kernels are run by a launcher of ours.

    Args:
        key: Names the device in Triton's cache of compiled kernels.
        target: Such as "sm_90".
        properties: Of the device.
        launcher: The class of launchers.
        gpu: Kept for the launcher.
    """

    def __init__(self, key: str, target: str, properties: dict[str, int], launcher: type, gpu: Any):
        self._key, self._target, self.launcher_cls, self.gpu = key, gpu_target(target), launcher, gpu
        self.utils = _Utilities(properties)

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton never chooses it by itself

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return self._key

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> type:
        return _DeviceInterface

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("an emulated GPU has no launcher in C++")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return _run_once

    def get_empty_cache_for_benchmark(self) -> Any:
        import torch

        return torch.empty(0, dtype=torch.float32, device="cpu")

    def clear_cache(self, cache: object) -> None:
        pass


@functools.cache
def emulated_driver_class() -> Callable[..., Any]:
    """Return ``_EmulatedDriver`` with Triton's own base class, which is only loaded when it is
    first needed."""
    base = _internal("triton.backends.driver", "DriverBase", "an emulated GPU")
    return type("EmulatedDriver", (_EmulatedDriver, base), {})


def _run_once(kernel_call: Callable, *, quantiles: Collection[float] = (0.5,), **options: object) -> list[float]:
    """Run each configuration of an autotuned kernel once, instead of timing it: none is faster."""
    kernel_call()
    return [0.0] * len(quantiles)


class _DeviceInterface:
    """The part of ``torch.cuda`` that has a meaning without a GPU."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize(device: object = None) -> None:
        pass


class _Utilities:
    def __init__(self, properties: dict[str, int]):
        self._properties = properties

    def get_device_properties(self, device: object) -> dict[str, int]:
        return dict(self._properties)

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple:
        """Return module, function, registers, spills and the limit of threads.

        The binary is not used.
        """
        return None, name, 0, 0, 1024


class _NoLauncher:
    """Launches nothing."""

    def __init__(self, *args: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[None]:
    """Let kernels be compiled for the target inside, and not run."""
    properties = dict(max_shared_mem=1 << 20, max_num_regs=65536, multiprocessor_count=1)
    properties["warpSize"] = gpu_target(target).warp_size
    with active_driver(emulated_driver_class()(f"compiled for {target}", target, properties, _NoLauncher, None)):
        yield


# --- compiled kernels ---


def ptx_of(name: str, metadata: Any) -> str | None:
    """Return the PTX of a kernel that is being loaded; None if Triton did not keep it.

    It is read from the cache where compilation leaves it. A launcher gets the metadata of a kernel,
    but not its text, which is public only on the compiled kernel (``asm``).
    """
    get_cache_manager = _internal("triton.runtime.cache", "get_cache_manager", "reading a kernel's PTX")
    found = get_cache_manager(metadata.hash).get_file(f"{name[:150]}.ptx")
    return None if found is None else Path(found).read_text()


def constant_of(kernel: Any, name: str) -> Any:
    """Return the value of a constexpr parameter of a compiled kernel.

    No public attribute has it.
    """
    return kernel.src.constants[(kernel.src.fn.arg_names.index(name),)]


def nvidia_tool(name: str) -> str:
    """Return the path of a tool of NVIDIA's that Triton brings along, such as "cuobjdump"."""
    triton = import_module("triton")
    knobs = getattr(triton, "knobs", None)
    tool = getattr(getattr(knobs, "nvidia", None), name, None)
    if tool is not None:
        return str(tool.path)
    return str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name)


# --- launches ---


def hook_launches(stack: contextlib.ExitStack, hook: Callable[[Any, Callable, tuple, dict], None]) -> None:
    """Have ``hook(kernel, run, args, options)`` called instead of each launch, until the stack
    closes.

    ``run(*args, **options)`` is the launch. Compilations without a launch (``kernel.warmup``) are
    left alone. Without Triton nothing is done. The method ``run`` that is replaced is what
    ``kernel[grid](...)`` calls. Triton's launch hooks (``triton.knobs.runtime``) would not do: they
    are not called in the interpreter, and cannot keep a kernel from being launched.
    """
    if find_spec("triton") is None:
        return

    def hooked(run: Callable) -> Callable:
        def launch(kernel: Any, *args: Any, warmup: bool = False, **options: Any) -> Any:
            if warmup:
                return run(kernel, *args, warmup=True, **options)
            return hook(kernel, functools.partial(run, kernel, warmup=False), args, options)

        return launch

    purpose = "watching the launches of Triton kernels"
    kinds = [
        _internal("triton", "JITFunction", purpose),
        _internal("triton.runtime.interpreter", "InterpretedFunction", purpose),
    ]
    for kind in kinds:
        stack.enter_context(mock.patch.object(kind, "run", hooked(kind.run)))


def name_of(kernel: Any) -> tuple[str, str]:
    """Return a kernel's module and name."""
    return kernel.fn.__module__, kernel.fn.__name__
