"""Every undocumented name of Triton that the kernels use."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

_MOST_PREPARED = 1024
"""How many launches a kernel keeps prepared: new shapes make new ones."""
_KNOWN_LAUNCHES = ("3.6", "3.7")
"""Versions of Triton whose compiled kernels are known to take their arguments as ``_launch_of`` gives
them. In others they are called in the way that Triton has for users, which takes three times as long."""


def is_amd() -> bool:
    """Return whether kernels are compiled for an AMD GPU.

    Triton has no documented way to ask for its target. Where this one is missing, torch knows which
    kind of GPU it was built for.
    """
    try:
        from triton.runtime import driver

        return driver.active.get_current_target().backend == "hip"
    except (ImportError, AttributeError):
        import torch

        return torch.version.hip is not None


def is_watched(kernel: Any) -> bool:
    """Return whether somebody else looks at the launches of a kernel, or runs it: an interpreter, a
    profiler's hooks, whoever put something in place of Triton's ``run``.

    Whatever is not known to be Triton's own launch counts as somebody.
    """
    run = getattr(type(kernel), "run", None)
    home = getattr(sys.modules.get("triton.runtime.jit"), "__file__", None)
    made_in = getattr(getattr(run, "__code__", None), "co_filename", None)
    if made_in != home or getattr(kernel, "pre_run_hooks", True):
        return True
    settings = getattr(sys.modules.get("triton.knobs"), "runtime", None)
    before, after = getattr(settings, "launch_enter_hook", settings), getattr(settings, "launch_exit_hook", settings)
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


class Launches:
    """The launches of a kernel, each prepared by the first of its kind.

    Triton chooses the compiled kernel anew at each launch, from every argument. That takes ten
    times what the driver needs. Here a launch is looked up by what it was chosen for: the device,
    the dtype of each tensor and whether it begins at a multiple of 16 bytes, and ``key``. On AMD
    GPUs Triton asks more of a tensor, and nothing is prepared.

    Args:
        kernel: decorated by ``triton.jit``. Its pointers, whose names end in ``_ptr``, come first.
        describe: called as ``describe(pointers, *key)``, returns the grid, the values of the
            kernel's other arguments by name, and the number of warps.
        unspecialized: its ``do_not_specialize``, side by side: 32-bit numbers of any value.
        options: those of every launch.
    """

    def __init__(self, kernel: Any, describe: Callable[..., Any], unspecialized: Sequence[str] = (), **options: Any):
        self._kernel, self._describe, self._options = kernel, describe, options
        others = [name for name in inspect.signature(kernel.fn).parameters if not name.endswith("_ptr")]
        first = others.index(unspecialized[0]) if unspecialized else len(others)
        self._before, self._after = others[:first], others[first + len(unspecialized) :]
        self._prepared: dict[Any, Any] = {}
        self._driver = _driver()

    def __call__(self, pointers: Sequence[Any], unspecialized: Sequence[int], key: tuple[Any, ...]) -> None:
        """Launch the kernel.

        Args:
            pointers: tensors, or None, in the kernel's order.
            key: hashable; says all of a launch that pointers and ``unspecialized`` do not.
        """
        full_key = None
        if self._driver is not None and not is_watched(self._kernel):
            kinds = [None if each is None else (each.dtype, each.data_ptr() % 16) for each in pointers]
            full_key = self._driver.active.get_current_device(), key, *kinds
            prepared = self._prepared.get(full_key)
            if prepared is not None:
                launch, before, after = prepared
                launch(*pointers, *before, *unspecialized, *after)
                return
        grid, values, num_warps = self._describe(pointers, *key)
        before, after = ([values[name] for name in names] for names in (self._before, self._after))
        arguments = (*pointers, *before, *unspecialized, *after)
        compiled = self._kernel[grid](*arguments, num_warps=num_warps, **self._options)
        launch = None if full_key is None else _launch_of(compiled, (*grid, 1, 1)[:3], self._driver, full_key[0])
        if launch is not None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[full_key] = launch, before, after


def _driver() -> Any:
    """Return what knows the device that Triton launches on; None without the names."""
    try:
        from triton.runtime import driver
    except ImportError:
        return None
    return driver if hasattr(type(driver), "active") else None


def _launch_of(compiled: Any, grid: tuple[int, int, int], driver: Any, device: Any) -> Callable[..., None] | None:
    """Return a function that launches a compiled kernel with its arguments; None where it may hold
    for other arguments than Triton chose it for."""
    try:
        from triton import __version__
        from triton.compiler import CompiledKernel
    except ImportError:
        return None
    if not isinstance(compiled, CompiledKernel) or is_amd():
        return None
    if ".".join(__version__.split(".")[:2]) not in _KNOWN_LAUNCHES:
        return compiled[grid]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y, z = grid

    def launch(*arguments: Any) -> None:
        # As compiled[grid] does, without looking for hooks: there are none.
        run(x, y, z, driver.active.get_current_stream(device), function, metadata, None, None, None, *arguments)

    return launch
