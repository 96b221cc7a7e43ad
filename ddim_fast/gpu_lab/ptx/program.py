"""A kernel placed for one launch: addresses of variables, bytes of parameters, memory, registers.

``Program`` is plain data. ``place`` makes one; the decoder reads it to make steps, the scheduler to
run them.

Source: PTX ISA, "State Spaces, Types, and Variables" and "Kernel Function Parameters".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import operations
from .errors import LaunchError
from .memory import WARP, GlobalMemory, Region, granule_of
from .operations import DTYPES, unsigned
from .parser import TYPE_BYTES, Address, Kernel, Module, Not, Operand, Pair, Parameter, Register, Variable, Vector

SHARED_BASE = LOCAL_BASE = 1024
"""Where shared and local memory begin in their windows: any multiple of the largest alignment."""

VECTORS = {"v2": 2, "v4": 4, "v8": 8}
"""Elements of a vector load or store, by its modifier."""

MAX_THREADS_PER_CTA = 1024
MAX_THREADS = 1 << 30

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class LaunchShape:
    """The CTAs of a launch and the threads of a CTA, each in three dimensions.

    Raises:
        LaunchError: The block is no multiple of a warp, or there are too many threads.
    """

    grid: Triple
    block: Triple

    def __post_init__(self) -> None:
        if self.threads_per_cta % WARP or not 0 < self.threads_per_cta <= MAX_THREADS_PER_CTA:
            raise LaunchError(
                f"a block must have a multiple of {WARP} threads, up to {MAX_THREADS_PER_CTA}, got {self.block}"
            )
        threads = self.ctas * self.threads_per_cta
        if threads >= MAX_THREADS:
            raise LaunchError(f"a launch must have fewer than 2^30 threads, got {threads}")

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads_per_cta(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    def thread_name(self, thread: int) -> tuple[Triple, Triple]:
        """Return the CTA's and the thread's coordinates from the thread's number in the launch."""
        cta, inside = divmod(thread, self.threads_per_cta)
        return _coordinates(cta, self.grid), _coordinates(inside, self.block)

    def describe(self, user: int) -> str:
        """Put a user of a shadow's granule (see ``memory.Shadow``) into words."""
        if user > 0:
            return "CTA {}, thread {}".format(*self.thread_name(user - 1))
        if user == -(1 << 31):
            return "threads of several CTAs"
        if user <= -(1 << 30):
            return f"several threads of CTA {_coordinates(-(1 << 30) - user, self.grid)}"
        return f"several threads of warp {-1 - user} of the launch"


def _coordinates(number: int, shape: Triple) -> Triple:
    return number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1])


@dataclass(frozen=True, eq=False)
class Program:
    """A kernel placed for one launch.

    Attributes:
        kernel: The parsed kernel.
        shape: Grid and block.
        variables: The address of each variable in its own state space.
        parameters: The bytes of each parameter, as one unsigned number in an array.
        shared_bytes, local_bytes: Shared memory of a CTA, and local memory of a thread.
        granules: The smallest access to each of "global", "shared" and "local", in bytes.
        registers: Every register that an instruction names, with the dtype that holds its bits.
        memory: The global and constant memory of the launch.
        has_barriers: Whether barriers order accesses, so that the shadow must keep times.
    """

    kernel: Kernel
    shape: LaunchShape
    variables: Mapping[str, int]
    parameters: Mapping[str, np.ndarray]
    shared_bytes: int
    local_bytes: int
    granules: Mapping[str, int]
    registers: Mapping[str, np.dtype]
    memory: GlobalMemory
    has_barriers: bool


def place(
    module: Module,
    kernel: Kernel,
    shape: LaunchShape,
    arguments: Sequence[object],
    regions: Sequence[Region],
    dynamic_shared_bytes: int,
) -> Program:
    """Place a kernel's variables, parameters and memory for one launch.

    Args:
        arguments: One for each parameter: a ``Region``, a number, or None.
        regions: The memory that the launch may use; regions among the arguments included.
        dynamic_shared_bytes: Shared memory of a CTA beyond its declared variables.

    Raises:
        LaunchError: The arguments do not fit the parameters.
        NotModelledError: An access has a size that is not modelled.
    """
    declared = [*module.variables.values(), *kernel.variables.values()]
    scratch, shared_bytes, local_bytes = _place_scratch(declared, dynamic_shared_bytes)
    constants = {v.name: _initial_memory(v) for v in declared if v.space not in ("shared", "local")}
    granules = cached(kernel, "granules", lambda: _granules(kernel))
    has_barriers = any(i.opcode in ("bar", "barrier") for i in kernel.instructions)
    memory = GlobalMemory(
        [*regions, *constants.values()],
        granules["global"],
        shape.describe,
        threads_per_cta=shape.threads_per_cta,
    )
    return Program(
        kernel=kernel,
        shape=shape,
        variables=scratch | {name: memory.virtual(region) for name, region in constants.items()},
        parameters=_parameters(kernel.parameters, arguments, memory),
        shared_bytes=shared_bytes,
        local_bytes=local_bytes,
        granules=granules,
        registers=cached(kernel, "registers", lambda: _registers(kernel)),
        memory=memory,
        has_barriers=has_barriers,
    )


def cached(kernel: Kernel, key: str, make: Callable[[], Any]) -> Any:
    """Return what is the same in every launch of the kernel, made by the first."""
    if key not in kernel.cache:
        kernel.cache[key] = make()
    return kernel.cache[key]


# --- variables ---


def _place_scratch(variables: Sequence[Variable], dynamic_bytes: int) -> tuple[dict[str, int], int, int]:
    """Return addresses of shared and local variables, and the bytes of either space.

    Dynamic shared memory follows the static.
    """
    placed: dict[str, int] = {}
    used = {"shared": 0, "local": 0}
    end_of_dynamic = 0
    for variable in sorted(variables, key=lambda v: v.nbytes is None):
        if variable.space not in used:
            continue
        start = -(-used[variable.space] // variable.align) * variable.align
        placed[variable.name] = start + (SHARED_BASE if variable.space == "shared" else LOCAL_BASE)
        if variable.space == "shared" and variable.nbytes is None:
            end_of_dynamic = max(end_of_dynamic, start + dynamic_bytes)
        else:
            used[variable.space] = start + (variable.nbytes or 0)
    return placed, max(used["shared"], end_of_dynamic), used["local"]


def _initial_memory(variable: Variable) -> Region:
    """Allocate a module's global or constant variable, with its initial value, for one launch."""
    data = np.zeros(max(variable.nbytes or 0, 1) + 64, np.uint8)
    data = data[-data.ctypes.data % 64 :][: variable.nbytes or 0]
    if variable.data:
        data[:] = np.frombuffer(variable.data, np.uint8)
    return Region.of(data, variable.name, writable=variable.space == "global")


# --- parameters ---


def _parameters(
    parameters: Sequence[Parameter], arguments: Sequence[object], memory: GlobalMemory
) -> dict[str, np.ndarray]:
    if len(arguments) != len(parameters):
        raise LaunchError(f"the kernel takes {len(parameters)} arguments, got {len(arguments)}")
    return {p.name: _parameter(p, value, memory) for p, value in zip(parameters, arguments, strict=True)}


def _parameter(parameter: Parameter, value: object, memory: GlobalMemory) -> np.ndarray:
    """Return a parameter's bytes. A pointer is the address that the kernel sees."""
    name, kind = parameter.name, parameter.type
    bits = 8 * TYPE_BYTES[kind]
    if value is None:
        value = 0
    if isinstance(value, Region):
        if bits != 64:
            raise LaunchError(f"parameter {name} has type {kind} and takes no pointer")
        return np.array([memory.virtual(value)], np.uint64)
    if not isinstance(value, (int, float, np.number, np.bool_)):
        raise LaunchError(f"an argument must be memory or a number, got {value!r} for parameter {name}")
    if parameter.is_pointer and value != 0:
        raise LaunchError(f"parameter {name} is a pointer: pass an array, a tensor or a Region, got {value!r}")
    if isinstance(value, (float, np.floating)):
        if kind[0] != "f":
            raise LaunchError(f"parameter {name} has type {kind}: pass an integer, or the bits of {value!r}")
        return np.array([value], DTYPES[kind]).view(unsigned(kind))
    if not -(1 << bits - 1) <= int(value) < 1 << bits:
        raise LaunchError(f"parameter {name} has {bits} bits, got {value}")
    return np.array([int(value) & (1 << bits) - 1], unsigned(kind))


# --- what the instructions need ---


def _granules(kernel: Kernel) -> dict[str, int]:
    sizes: dict[str, list[int]] = {"global": [], "shared": [], "local": []}
    for instruction in kernel.instructions:
        words = instruction.modifiers
        if instruction.opcode not in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp"):
            continue
        kind = next((w for w in reversed(words) if w in TYPE_BYTES), None)
        size = TYPE_BYTES[kind] if kind else 4
        size *= next((VECTORS[w] for w in words if w in VECTORS), 1)
        for space, found in sizes.items():
            if instruction.opcode == "cp" or any(w.startswith(space) for w in words):
                found.append(size)
    return {space: granule_of(found) for space, found in sizes.items()}


def _registers(kernel: Kernel) -> dict[str, np.dtype]:
    found = {operations.CARRY.name: np.dtype(np.bool_)}
    left: list[Operand | int | None] = [x for i in kernel.instructions for x in (i.guard, *i.operands)]
    while left:
        operand = left.pop()
        if isinstance(operand, Register):
            found[operand.name] = unsigned(operand.type)
        elif isinstance(operand, Vector):
            left += operand.elements
        elif isinstance(operand, (Not, Pair, Address)):
            left += operand
    return found
