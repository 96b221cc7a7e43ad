"""Run Triton kernels on CPU tensors: Triton compiles for the GPU asked for, ``ptx`` executes the
PTX.

    launch = run(kernel, grid, x, y, n, BLOCK_SIZE=1024, target="sm_90")
    launch.execution.thread_instructions

or, where a launcher of your own makes the launches:

    with emulated_gpu("sm_90") as gpu:
        kernel[grid](x, y, n, BLOCK_SIZE=1024)
    gpu.launches[0].execution.thread_instructions

Everything before the launch is Triton's own: specialisation of arguments (divisibility by 16,
equality to 1), compilation, and the assembler, which must accept the kernel. Every access of every
thread is checked while it runs: see ``ptx``.

``TRITON_INTERPRET=1`` makes ``@triton.jit`` functions run in Triton's interpreter instead, so it
must not be set in the process. Pointers are CPU tensors. Clusters, tensor descriptors and
everything else that ``ptx`` does not model are refused. An autotuned kernel runs once in each
configuration, so that each is checked; none counts as faster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import triton_internals
from .ptx import Execution, LaunchError, Module, NotModelledError, Region, execute, parse
from .ptx.floats import f64_to_bf16
from .ptx.memory import WARP


@dataclass(frozen=True)
class Target:
    """The limits of a GPU that Triton asks about."""

    capability: int
    shared_bytes: int  # that one CTA may have
    multiprocessors: int


# CUDA C++ Programming Guide, "Compute Capabilities". The number of multiprocessors is that of a
# typical card.
TARGETS = {
    "sm_80": Target(80, 166912, 108),
    "sm_89": Target(89, 101376, 128),
    "sm_90": Target(90, 232448, 132),
    "sm_100": Target(100, 232448, 148),
    "sm_120": Target(120, 101376, 170),
}


@dataclass
class Launch:
    """One ``kernel[grid](...)``.

    ``ptx`` is the text that ran, after any transformation. ``execution`` is None where a check
    failed.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    ptx: str
    execution: Execution | None = None


@dataclass
class EmulatedGpu:
    """The GPU that ``emulated_gpu`` yields: ``launches`` are in order."""

    name: str
    target: Target
    transform: Callable[[str], str] | None = None
    read_only: frozenset[str] = frozenset()
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def emulated_gpu(
    target: str = "sm_90", transform: Callable[[str], str] | None = None, read_only: Collection[str] = ()
) -> Iterator[EmulatedGpu]:
    """Make Triton launch on an emulated GPU until the end of the ``with`` block.

    Args:
        target: One of ``TARGETS``.
        transform: Changes the PTX of every launch before it runs; for tests that must fail.
        read_only: Names of kernel parameters whose tensors must not be written.

    Raises:
        ValueError: The target is unknown.
        ImportError: Triton is not installed.
        RuntimeError: Triton's interpreter is switched on.
        PtxError: (from a launch) a check failed; see ``ptx.errors``.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    driver_class = triton_internals.emulated_driver_class()
    triton_internals.check_compiles()
    gpu = EmulatedGpu(target, TARGETS[target], transform, frozenset(read_only))
    properties = dict(
        max_shared_mem=gpu.target.shared_bytes,
        max_num_regs=65536,
        multiprocessor_count=gpu.target.multiprocessors,
        warpSize=WARP,
    )
    with triton_internals.active_driver(driver_class(f"emulated {target}", target, properties, _Launcher, gpu)):
        yield gpu


def run(
    kernel: Any,
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]],
    *arguments: Any,
    target: str = "sm_90",
    transform: Callable[[str], str] | None = None,
    read_only: Collection[str] = (),
    **options: Any,
) -> Launch:
    """Run ``kernel[grid](*arguments, **options)`` on an emulated GPU, and return what it did.

    Args:
        kernel: A function decorated by ``triton.jit``.
        grid: As Triton takes it.
        arguments, options: Of the kernel; pointers are CPU tensors. Constants and ``num_warps`` may
            be options.
        target, transform, read_only: See ``emulated_gpu``.

    Raises:
        ValueError, ImportError, RuntimeError, PtxError: See ``emulated_gpu``; ValueError also where
            the grid is empty, so that nothing was launched.
    """
    with emulated_gpu(target, transform, read_only) as gpu:
        kernel[grid](*arguments, **options)
    if not gpu.launches:
        raise ValueError(f"a grid must have at least one CTA, got {grid}: nothing was launched")
    return gpu.launches[-1]


class _Launcher:
    """A launcher that calls the emulator.

    Triton makes one for each compiled kernel, and keeps it, so each launch asks for the active GPU.
    """

    def __init__(self, src: Any, metadata: Any):
        self.metadata = metadata
        self.signature = dict(src.signature)
        text = triton_internals.ptx_of(src.name, metadata)
        if text is None:
            raise LaunchError("Triton kept no PTX of this kernel: unset TRITON_STORE_BINARY_ONLY and clear its cache")
        self.ptx = text
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotModelledError(f"clusters are not modelled, got num_ctas={metadata.num_ctas}")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: object,
        function: object,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: Callable | None,
        exit_hook: Callable | None,
        *arguments: Any,
    ) -> None:
        gpu: EmulatedGpu = triton_internals.current_driver().gpu
        grid = (int(x), int(y), int(z))
        if 0 in grid:
            return  # as Triton's own launcher does
        if enter_hook is not None:
            enter_hook(launch_metadata)
        text = self.ptx if gpu.transform is None else gpu.transform(self.ptx)
        launch = Launch(self.metadata.name, grid, self.metadata.num_warps, self.metadata.shared, text)
        gpu.launches.append(launch)
        values = self._values(arguments, grid[0] * grid[1] * grid[2], gpu.read_only)
        launch.execution = execute(
            _parsed(text),
            self.metadata.name,
            grid,
            values,
            block=WARP * self.metadata.num_warps,
            shared_bytes=self.metadata.shared,
        )
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _values(self, arguments: tuple, ctas: int, read_only: frozenset[str]) -> list[object]:
        """Return the kernel's arguments without constants, then the scratch memory that Triton
        appends."""
        values: list[object] = []
        for (name, kind), value in zip(self.signature.items(), arguments, strict=True):
            _append(values, name, kind, value, read_only)
        for what in ("global_scratch", "profile_scratch"):
            nbytes = ctas * (getattr(self.metadata, f"{what}_size", 0) or 0)
            align = getattr(self.metadata, f"{what}_align", 1) or 1
            values.append(_scratch(what.replace("_", " "), nbytes, align) if nbytes else None)
        return values


def _append(values: list[object], name: str, kind: Any, value: Any, read_only: frozenset[str]) -> None:
    if isinstance(kind, tuple):
        for i, (inner_kind, inner) in enumerate(zip(kind, value, strict=True)):
            _append(values, f"{name}[{i}]", inner_kind, inner, read_only)
    elif kind.startswith("*"):
        value = getattr(value, "base", value) if not hasattr(value, "stride") else value
        values.append(Region.of(value, name, writable=name not in read_only and not kind.startswith("*k")))
    elif kind.startswith("tensordesc") or kind == "nvTmaDesc":
        raise NotModelledError(f"tensor descriptors are not modelled, got one for {name}")
    elif kind != "constexpr":
        values.append(_bits(name, kind, value))


def _bits(name: str, kind: str, value: Any) -> int:
    """Return the bits of a scalar, as an integer."""
    if kind[0] in "iu":
        return int(value)
    dtypes = {"fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64}
    if kind == "bf16":
        return int(f64_to_bf16(np.array([float(value)]))[0])
    if kind not in dtypes:
        raise LaunchError(f"a scalar of type {kind} is not modelled, got {name}")
    with np.errstate(over="ignore"):
        number = np.array([value], dtypes[kind])
    return int(number.view(f"u{number.itemsize}")[0])


def _scratch(name: str, nbytes: int, align: int) -> Region:
    data = np.full(nbytes + align, 0xA5, np.uint8)
    return Region.of(data[-data.ctypes.data % align :][:nbytes], name)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Module:
    return parse(text)
