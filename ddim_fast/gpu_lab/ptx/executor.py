"""Execute PTX on the CPU: every thread of a launch, in lock step, with every access checked.

    module = parse(ptx_text)
    execution = execute(module, "kernel", grid=(8,), arguments=[x, y, 1000], block=128)

Threads are NumPy vectors: a register is an array of the raw bits of all threads of a chunk of CTAs,
or of one number where they all hold the same. Threads that branch apart run in groups, the one that
is furthest behind in the text first, and join where they meet. A barrier holds its CTA's threads
until all have arrived, an instruction of a whole warp those of its warp.

What is modelled, and what is not
    Instructions on registers: ``operations``, exact but for the approximate functions, whose
    hardware error is not modelled. Memory, and what orders two accesses: ``memory``. A program is
    right here only if it has no race, so that no other order of its threads could give another
    result. Atomics whose result depends on the order (floating-point sums) take threads in the
    order of their numbers. Unwritten bits are tracked, because compilers do build registers from
    them: they may be moved, shuffled and thrown away, but not stored, used as an address, or decide
    a branch. Not modelled, and refused before anything runs: clusters, tensor descriptors and
    matrix multiplication, calls, generic addresses, volatile, acquire and release loads and stores,
    named barriers. A CTA that waits for another in a loop runs into ``max_steps``. Reported as a
    race although a GPU may get it right: a wait for an atomic of another CTA, and threads that read
    what another one overwrites and then ignore it. Two threads may store the same value to one
    place of *shared* memory in one instruction, as Triton's do; in global memory that is a race,
    too.

Source: PTX ISA, "Control Flow Instructions", "Parallel Synchronization and Communication
Instructions", "Data Movement Instructions".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .decoder import Decoder
from .errors import LaunchError, PtxError
from .memory import Region
from .parser import Kernel, Module
from .program import LaunchShape, Program, Triple, place
from .scheduler import Chunk, Execution, Scheduler, Step

THREADS_AT_A_TIME = 1 << 15
BYTES_AT_A_TIME = 1 << 28  # of registers, and of shared memory with its shadow


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
        arguments: One for each parameter: a NumPy array, a CPU tensor or a ``Region`` for a pointer
            (None or 0 is the null pointer), an integer or a float otherwise.
        regions: More memory that the kernel may reach by pointers.
        block: Threads of a CTA; needed only where the kernel has no ``.reqntid``.
        shared_bytes: Dynamic shared memory of a CTA.
        max_steps: Instructions that a chunk of CTAs may take, counted once for all threads that run
            together.

    Raises:
        NotModelledError: Before anything runs, if the kernel has an instruction that is not
            modelled.
        LaunchError: Arguments, grid or block do not fit.
        PtxError: A check has failed; see ``errors``. Memory may have been changed by then.
    """
    if kernel_name not in module.kernels:
        raise LaunchError(f"there is no kernel {kernel_name}, only {', '.join(module.kernels)}")
    kernel = module.kernels[kernel_name]
    wrapped = [_as_argument(value, i) for i, value in enumerate(arguments)]
    memory = [*(value for value in wrapped if isinstance(value, Region)), *regions]
    execution = Execution()
    try:
        shape = LaunchShape(_three(grid, "grid"), _block(kernel, block))
        program = place(module, kernel, shape, wrapped, memory, shared_bytes)
        decoder = Decoder(program, execution)
        steps = decoder.steps()
    except PtxError as error:
        error.kernel = kernel_name
        raise
    at_a_time = _ctas_at_a_time(program)
    with np.errstate(all="ignore"):
        for first in range(0, shape.ctas, at_a_time):
            Scheduler(Chunk(program, first, min(at_a_time, shape.ctas - first)), steps, max_steps).run()
    _add_up(execution, steps)
    execution.contractible = decoder.contractible & execution.thread_instructions.keys()
    execution.approximate = decoder.approximate & execution.thread_instructions.keys()
    return execution


def _block(kernel: Kernel, asked: int | Sequence[int] | None) -> Triple:
    block = None if asked is None else _three((asked,) if isinstance(asked, int) else asked, "block")
    if kernel.block is not None and block not in (None, kernel.block):
        raise LaunchError(f"{kernel.name} requires blocks of {kernel.block} threads, got {block}")
    chosen = kernel.block or block
    if chosen is None:
        raise LaunchError(f"{kernel.name} does not say its block (.reqntid): pass block=")
    return chosen


def _ctas_at_a_time(program: Program) -> int:
    """Return as many as keep NumPy busy and memory bounded.

    Shadows take up to 36 bytes for each granule.
    """
    per_cta = program.shape.threads_per_cta
    registers = sum(dtype.itemsize for dtype in program.registers.values()) * per_cta
    shared = program.shared_bytes * (1 + 36 // program.granules["shared"])
    return max(1, min(THREADS_AT_A_TIME // per_cta, BYTES_AT_A_TIME // (registers + shared + 1)))


def _add_up(execution: Execution, steps: Sequence[Step]) -> None:
    for step in steps:
        if step.threads:
            execution.thread_instructions[step.name] += step.threads
            execution.warp_instructions[step.name] += step.warps


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    numbers = [int(n) for n in sizes]
    if not 1 <= len(numbers) <= 3 or any(n < 1 for n in numbers):
        raise LaunchError(f"{what} must be one to three positive numbers, got {tuple(sizes)}")
    x, y, z, *_ = (*numbers, 1, 1)
    return x, y, z


def _as_argument(value: object, index: int) -> object:
    if value is None or isinstance(value, (int, float, np.generic, Region)):
        return value
    return Region.of(value, f"argument {index}")
