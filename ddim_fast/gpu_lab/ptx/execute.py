"""Execute PTX on the CPU: every thread of a launch, in lock step, with every access checked.

    module = parse(ptx_text)
    execution = execute(module, "kernel", grid=(8,), arguments=[x, y, 1000], block=128)

Threads are NumPy vectors: a register is an array of the raw bits of all threads of a chunk of CTAs, or of one number where they all hold
the same. Threads that branch apart are run in groups, the one that is furthest behind in the text first, and join where they meet; a
barrier holds its CTA's threads until all have come, an instruction of a whole warp its warp's.

What is modelled, and what is not
    Instructions on registers: ``ptx_operations``, exact but for the approximate functions, whose hardware error is not modelled. Memory,
    and what orders two accesses: ``ptx_memory``. A program is right here only if it has no race, so that no other order of its threads
    could give another result. Atomics whose result depends on the order (floating-point sums) take threads in the order of their
    numbers.
    Bits that nothing has written are followed, because compilers do build registers of them: they may be moved, shuffled and thrown
    away, but not stored, used as an address, or decide a branch.
    Not modelled, and refused before anything runs: clusters, tensor descriptors and matrix multiplication, calls, generic addresses,
    volatile, acquire and release loads and stores, named barriers. A CTA that waits for another in a loop runs into ``max_steps``.
    Reported as a race although a GPU may get it right: a wait for an atomic of another CTA, and threads that read what another one
    overwrites and then ignore it. Two threads may store the same value to one place of *shared* memory in one instruction, as Triton's
    do; in global memory that is a race, too.

Source: PTX ISA, "Control Flow Instructions", "Parallel Synchronization and Communication Instructions", "Data Movement Instructions".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .decoder import Decoder
from .errors import (
    AddressError,
    DivergenceError,
    EndlessError,
    LaunchError,
    NotModelledError,
    PtxError,
    PtxSyntaxError,
    RaceError,
    UnspecifiedError,
    UnwrittenError,
)
from .memory import WARP, GlobalMemory, Region
from .parser import Kernel, Module, parse
from .scheduler import Chunk, Scheduler

__all__ = [
    "AddressError",
    "DivergenceError",
    "EndlessError",
    "Execution",
    "LaunchError",
    "NotModelledError",
    "PtxError",
    "PtxSyntaxError",
    "RaceError",
    "Region",
    "UnspecifiedError",
    "UnwrittenError",
    "execute",
    "parse",
]

THREADS_AT_A_TIME = 1 << 15
BYTES_AT_A_TIME = 1 << 28  # of registers, and of shared memory with its shadow


@dataclass
class Execution:
    """What a launch did. Counts are of instructions whose guard was true.

    Attributes:
        thread_instructions, warp_instructions: How often each instruction ran, by its name with all modifiers.
        barriers: ``bar.sync`` of whole CTAs.
        bytes_read, bytes_written: Of global memory, by all threads; atomics count as both.
        contractible: Names of floating-point instructions that ran without a rounding modifier. The assembler may contract these to
            fused multiply-adds: bits are only certain with contraction off, or where this is empty.
        approximate: Names of instructions whose hardware error is not modelled.
    """

    thread_instructions: Counter = field(default_factory=Counter)
    warp_instructions: Counter = field(default_factory=Counter)
    barriers: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    contractible: set[str] = field(default_factory=set)
    approximate: set[str] = field(default_factory=set)


class Program:
    """A kernel made ready for one launch: instructions decoded, parameters and variables placed."""

    def __init__(
        self, module: Module, kernel: Kernel, grid, block, arguments, regions, shared_bytes: int, execution: Execution
    ):
        self.kernel, self.grid, self.block, self.execution = kernel, grid, block, execution
        self.threads_per_cta = block[0] * block[1] * block[2]
        if self.threads_per_cta % WARP or not 0 < self.threads_per_cta <= 1024:
            raise LaunchError(f"a block must have a multiple of {WARP} threads, up to 1024, got {block}")
        self.total_threads = grid[0] * grid[1] * grid[2] * self.threads_per_cta
        if self.total_threads >= 1 << 30:
            raise LaunchError(f"a launch may have up to 2^30 threads here, got {self.total_threads}")
        decoder = Decoder(self, module)
        self.variables = decoder.place_variables(shared_bytes)
        self.shared_bytes, self.local_bytes = decoder.shared_bytes, decoder.local_bytes
        self.granules = decoder.granules()
        self.has_barriers = any(i.opcode in ("bar", "barrier") for i in kernel.instructions)
        self.memory = GlobalMemory(
            [*regions, *decoder.constants],
            self.granules["global"],
            self.describe,
            threads_per_cta=self.threads_per_cta,
            orders=self.has_barriers,
        )
        self.parameters = decoder.place_parameters(arguments)
        self.steps = decoder.steps()
        self.contractible, self.approximate = decoder.contractible, decoder.approximate
        registers = decoder.registers()
        self.blank_registers = {name: np.zeros(1, dtype) for name, dtype in registers.items()}
        self.blank_undefined = {name: ~np.zeros(1, dtype) for name, dtype in registers.items()}

    def ctas_at_a_time(self) -> int:
        """As many as keep NumPy busy and memory bounded; shadows take up to 36 bytes for each granule."""
        registers = sum(values.itemsize for values in self.blank_registers.values()) * self.threads_per_cta
        shared = self.shared_bytes * (1 + 36 // self.granules["shared"])
        return max(1, min(THREADS_AT_A_TIME // self.threads_per_cta, BYTES_AT_A_TIME // (registers + shared + 1)))

    def thread_name(self, thread: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        cta, inside = divmod(thread, self.threads_per_cta)
        return _coordinates(cta, self.grid), _coordinates(inside, self.block)

    def describe(self, user: int) -> str:
        """A user of a shadow's granule, in words."""
        if user > 0:
            return "CTA {}, thread {}".format(*self.thread_name(user - 1))
        if user == -(1 << 31):
            return "threads of several CTAs"
        if user <= -(1 << 30):
            return f"several threads of CTA {_coordinates(-(1 << 30) - user, self.grid)}"
        return f"several threads of warp {-1 - user} of the launch"


def _coordinates(number: int, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1])


def execute(
    module: Module,
    kernel_name: str,
    grid: Sequence[int],
    arguments: Sequence[object],
    regions: Sequence[Region] = (),
    *,
    block: int | Sequence[int] | None = None,
    shared_bytes: int = 0,
    max_steps: int = 2_000_000,
) -> Execution:
    """Run a kernel.

    Args:
        grid: Up to three numbers of CTAs.
        arguments: One for each parameter: a NumPy array, a CPU tensor or a ``Region`` for a pointer (None or 0 is the null pointer), an
            integer or a float otherwise.
        regions: More memory that the kernel may reach by pointers.
        block: Threads of a CTA; needed only where the kernel has no ``.reqntid``.
        shared_bytes: Dynamic shared memory of a CTA.
        max_steps: Instructions that a chunk of CTAs may take, counted once for all threads that run together.

    Raises:
        NotModelledError: Before anything runs, if the kernel has an instruction that is not modelled.
        LaunchError: Arguments, grid or block do not fit.
        PtxError: A check has failed; see ``ptx_errors``. Memory may have been changed by then.
    """
    if kernel_name not in module.kernels:
        raise LaunchError(f"there is no kernel {kernel_name}, only {', '.join(module.kernels)}")
    kernel = module.kernels[kernel_name]
    grid = _three(grid, "grid")
    asked = None if block is None else _three((block,) if isinstance(block, int) else block, "block")
    if kernel.block is not None and asked not in (None, kernel.block):
        raise LaunchError(f"{kernel_name} requires blocks of {kernel.block} threads, got {asked}")
    chosen = kernel.block or asked
    if chosen is None:
        raise LaunchError(f"{kernel_name} does not say its block (.reqntid): pass block=")
    execution = Execution()
    wrapped = [_as_argument(value, i) for i, value in enumerate(arguments)]
    memory = [*(value for value in wrapped if isinstance(value, Region)), *regions]
    try:
        program = Program(module, kernel, grid, chosen, wrapped, memory, shared_bytes, execution)
    except PtxError as error:
        error.kernel = kernel_name
        raise
    ctas = grid[0] * grid[1] * grid[2]
    at_a_time = program.ctas_at_a_time()
    with np.errstate(all="ignore"):
        for first in range(0, ctas, at_a_time):
            Scheduler(Chunk(program, first, min(at_a_time, ctas - first)), max_steps).run()
    for step in program.steps:
        if step.threads:
            execution.thread_instructions[step.name] += step.threads
            execution.warp_instructions[step.name] += step.warps
    execution.contractible = program.contractible & execution.thread_instructions.keys()
    execution.approximate = program.approximate & execution.thread_instructions.keys()
    return execution


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    numbers = tuple(int(n) for n in sizes)
    if not 1 <= len(numbers) <= 3 or any(n < 1 for n in numbers):
        raise LaunchError(f"{what} must be one to three positive numbers, got {tuple(sizes)}")
    return (*numbers, 1, 1)[:3]


def _as_argument(value: object, index: int) -> object:
    if value is None or isinstance(value, (int, float, np.generic, Region)):
        return value
    return Region.of(value, f"argument {index}")
