"""Compile Triton kernels for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import triton_internals


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target.

    Attributes:
        name: The kernel's.
        target: Such as "sm_90" or "gfx942".
        assembly: What the compiler left, by kind: "ttir", "llir", and "ptx" and "cubin" for NVIDIA,
            "amdgcn" for AMD.
        num_warps, warp_size: A CTA has ``num_warps * warp_size`` threads.
        shared_bytes: Shared memory of a CTA.
    """

    name: str
    target: str
    assembly: dict[str, Any]
    num_warps: int
    warp_size: int
    shared_bytes: int
    _kernel: Any = field(repr=False)

    @property
    def ptx(self) -> str:
        """The PTX text.

        Raises:
            ValueError: The target is AMD's, and has none.
        """
        if "ptx" not in self.assembly:
            raise ValueError(f"only NVIDIA targets have PTX, got {self.target}: see assembly")
        return self.assembly["ptx"]

    def constant(self, name: str) -> Any:
        """Return the value of a constexpr parameter."""
        return triton_internals.constant_of(self._kernel, name)


def _compiled(kernel: Any, target: str) -> Compiled:
    data = kernel.metadata
    return Compiled(data.name, target, dict(kernel.asm), data.num_warps, data.warp_size, data.shared, kernel)


def compile(kernel: Any, *arguments: Any, target: str = "sm_90", **options: Any) -> Compiled:
    """Compile a kernel as ``kernel[grid](*arguments, **options)`` would, for a GPU that is not
    there.

    Args:
        kernel: A function decorated by ``triton.jit``.
        arguments: Of the kernel. They decide what Triton specialises on (dtypes, divisibility by
            16, numbers equal to 1). Tensors may be on the CPU or on "meta"; a dtype stands for a
            pointer to it.
        target: Such as "sm_90" or "gfx942".
        options: Constants, and options of the compiler such as ``num_warps``.

    Raises:
        ValueError: The target is unknown.
        ImportError: Triton is not installed, or too different.
        RuntimeError: Triton's interpreter is switched on.
    """
    triton_internals.check_compiles()
    with triton_internals.compile_only(target):
        return _compiled(kernel.warmup(*arguments, grid=(1,), **options), target)


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Let every kernel that is launched inside be compiled for the target instead, and list them.

    Raises:
        ValueError, ImportError, RuntimeError: As ``compile``.
    """
    triton_internals.check_compiles()
    compiled: list[Compiled] = []

    def keep(kernel: Any, run: Callable, arguments: tuple, options: dict) -> Any:
        result = run(*arguments, **options)
        compiled.append(_compiled(result, target))
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton_internals.compile_only(target))
        triton_internals.hook_launches(stack, keep)
        yield compiled
