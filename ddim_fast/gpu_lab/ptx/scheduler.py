"""Threads in lock step: registers, groups that branch apart and meet again, and barriers.

Source: PTX ISA, "Control Flow Instructions" and "Parallel Synchronization and Communication
Instructions".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import DivergenceError, EndlessError, PtxError, PtxSyntaxError, UnwrittenError
from .memory import WARP, ScratchMemory, Threads
from .parser import Instruction, Not
from .program import LOCAL_BASE, SHARED_BASE, Program

Lanes = np.ndarray | None
"""Positions within the chunk of the threads that take part, ascending; None: all threads."""

Read = Callable[["Chunk", Lanes], np.ndarray]
Run = Callable[["Chunk", Lanes], None]


@dataclass
class Execution:
    """What a launch did. Counts are of instructions whose guard was true.

    Attributes:
        thread_instructions, warp_instructions: How often each instruction ran, by its name with all
            modifiers.
        barriers: ``bar.sync`` of whole CTAs.
        bytes_read, bytes_written: Of global memory, by all threads; atomics count as both.
        contractible: Names of floating-point instructions that ran without a rounding modifier. The
            assembler may contract these to fused multiply-adds: bits are only certain with
            contraction off, or where this is empty.
        approximate: Names of instructions whose hardware error is not modelled.
    """

    thread_instructions: Counter[str] = field(default_factory=Counter)
    warp_instructions: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    contractible: set[str] = field(default_factory=set)
    approximate: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Step:
    """A decoded instruction.

    Attributes:
        instruction: What was decoded.
        run: Does it for some threads of a chunk; not called for branches and ends.
        kind: "plain", "branch" or "end".
        scope: Which threads must have arrived before it runs: those of the "cta" or of the "warp",
            or "" for none.
        target: Of a branch, the index of the next step.
        needs: Reads the member mask of an instruction of a warp.
        threads, warps: How often it ran.
    """

    instruction: Instruction
    run: Run
    kind: str = "plain"
    scope: str = ""
    target: int = -1
    needs: Read | None = None
    threads: int = 0
    warps: int = 0

    @property
    def name(self) -> str:
        return self.instruction.name


class Chunk:
    """Some CTAs of a launch while they run."""

    def __init__(self, program: Program, first_cta: int, ctas: int):
        self.program, self.ctas = program, ctas
        per_cta = program.shape.threads_per_cta
        self.size = ctas * per_cta
        self.first_thread = first_cta * per_cta
        self.lane_numbers = np.arange(self.size)
        self.who = (self.lane_numbers + (self.first_thread + 1)).astype(np.int32)
        self.registers = {name: np.zeros(1, dtype) for name, dtype in program.registers.items()}
        # Bits that nothing has written, of the registers that have any.
        self.undefined = {name: ~zero for name, zero in self.registers.items()}
        self.warp_epoch = np.zeros(self.size // WARP, np.int64)
        self.when: np.ndarray | None = np.zeros(self.size, np.int64) if program.has_barriers else None
        self.shared = self._scratch("shared", SHARED_BASE, program.shared_bytes, self.lane_numbers // per_cta)
        self.local = self._scratch("local", LOCAL_BASE, program.local_bytes, self.lane_numbers)
        self.copies = Copies()
        self.alive: np.ndarray | None = None  # None: no thread has ended

    def _scratch(self, space: str, base: int, nbytes: int, owner: np.ndarray) -> ScratchMemory:
        return ScratchMemory(
            f"{space} memory",
            base,
            nbytes,
            owner,
            self.program.granules[space],
            describe=self.program.shape.describe,
            threads_per_cta=self.program.shape.threads_per_cta,
        )

    # --- threads ---

    def threads(self, lanes: Lanes) -> Threads:
        if lanes is None:
            return Threads(self.lane_numbers, self.who, self.when)
        return Threads(lanes, self.who[lanes], None if self.when is None else self.when[lanes])

    def count(self, lanes: Lanes) -> int:
        return self.size if lanes is None else len(lanes)

    def warp_count(self, lanes: Lanes) -> int:
        if lanes is None:
            return self.size // WARP
        return int(np.count_nonzero(np.diff(lanes // WARP))) + 1 if len(lanes) else 0

    def end(self, lanes: Lanes) -> None:
        if self.alive is None:
            self.alive = np.ones(self.size, bool)
        self.alive[slice(None) if lanes is None else lanes] = False

    def special(self, name: str, axis: int, lanes: Lanes) -> np.ndarray:
        """Read %tid, %ntid, %ctaid, %nctaid or %laneid."""
        launch = self.program.shape
        if name in ("%ntid", "%nctaid"):
            return np.array([(launch.block if name == "%ntid" else launch.grid)[axis]])
        every = self.lane_numbers if lanes is None else lanes
        if name == "%laneid":
            return every % WARP
        cta, inside = np.divmod(every + self.first_thread, launch.threads_per_cta)
        number, shape = (inside, launch.block) if name == "%tid" else (cta, launch.grid)
        if axis == 2 or shape[axis] == 1:
            return number // (shape[0] * shape[1]) if shape[axis] > 1 else np.zeros(1, np.int64)
        return number % shape[0] if axis == 0 else number // shape[0] % shape[1]

    # --- registers ---

    def read(self, name: str, lanes: Lanes) -> np.ndarray:
        """Read a register that must be defined: an address, a predicate, a value that is stored."""
        if name in self.undefined:
            self._check_defined(name, lanes)
        return self.raw(name, lanes)

    def raw(self, name: str, lanes: Lanes) -> np.ndarray:
        values = self.registers[name]
        return values if lanes is None or len(values) == 1 else values[lanes]

    def undefined_bits(self, name: str, lanes: Lanes) -> np.ndarray | None:
        """Return ones where bits of the register are undefined; None if none are."""
        bits = self.undefined.get(name)
        return bits if bits is None or lanes is None or len(bits) == 1 else bits[lanes]

    def _check_defined(self, name: str, lanes: Lanes) -> None:
        bits = self.undefined_bits(name, lanes)
        if bits is not None and bits.any():
            first = int(np.argmax(bits != 0))
            raise UnwrittenError(
                f"register {name.split('@')[0]} is used, but this thread has not written it, or has computed it from "
                "what nothing has written",
                lane=first if lanes is None else int(lanes[first]),
            )

    def write(self, name: str, values: np.ndarray, lanes: Lanes, undefined: np.ndarray | None = None) -> None:
        if lanes is None:
            self.registers[name] = np.ascontiguousarray(values)
            if undefined is not None and undefined.any():
                self.undefined[name] = np.ascontiguousarray(undefined)
            else:
                self.undefined.pop(name, None)
            return
        new = np.array(
            np.broadcast_to(self.registers[name], self.size)
        )  # a copy: other registers may share the old array
        new[lanes] = values
        self.registers[name] = new
        if name in self.undefined or undefined is not None:
            old = self.undefined.get(name, np.zeros(1, values.dtype))
            bits = np.array(np.broadcast_to(old, self.size)).astype(new.dtype)
            bits[lanes] = 0 if undefined is None else undefined
            self.undefined[name] = bits
            if not bits.any():
                del self.undefined[name]

    # --- barriers ---

    def cta_barrier(self, lanes: Lanes) -> None:
        self.warp_epoch[slice(None) if lanes is None else np.unique(lanes // WARP)] += 1 << 32
        self.when = np.repeat(self.warp_epoch, WARP)

    def warp_barrier(self, lanes: Lanes) -> None:
        self.warp_epoch[slice(None) if lanes is None else np.unique(lanes // WARP)] += 1
        self.when = np.repeat(self.warp_epoch, WARP)


def _first(lanes: Lanes) -> int:
    return 0 if lanes is None else int(lanes[0])


class Copies:
    """Asynchronous copies to shared memory (``cp.async``) that have not been waited for.

    Groups belong to the whole chunk.
    """

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int) -> None:
        while len(self.groups) > keep:
            for finish in self.groups.pop(0):
                finish()


class Scheduler:
    """The scheduler of one chunk."""

    def __init__(self, chunk: Chunk, steps: Sequence[Step], max_steps: int):
        self.chunk, self.steps, self.max_steps = chunk, steps, max_steps
        self.waiting: dict[int, Lanes] = {0: None}  # groups that can run, by their next instruction
        self.parked: dict[int, np.ndarray] = {}  # threads that wait for others of their warp or CTA

    def run(self) -> None:
        taken = 0
        while self.waiting or self.parked:
            if not self.waiting:
                self._release_or_fail()
                continue
            here = min(self.waiting)
            lanes = self.waiting.pop(here)
            until = min(self.waiting, default=len(self.steps))
            while here < until:
                taken += 1
                if taken > self.max_steps:
                    raise self._located(
                        EndlessError(
                            f"more than {self.max_steps} instructions in a row: raise max_steps if it is not endless"
                        ),
                        here,
                    )
                step = self.steps[here]
                if step.kind == "plain" and not step.scope:
                    self._run_plain(here, step, lanes)
                    here += 1
                    continue
                self._run_special(here, step, lanes)
                break
            else:
                self._add(here, lanes)

    def _guarded(self, step: Step, lanes: Lanes) -> Lanes:
        guard = step.instruction.guard
        if guard is None:
            return lanes
        name = guard.register.name if isinstance(guard, Not) else guard.name
        true = self.chunk.read(name, lanes)
        if isinstance(guard, Not):
            true = ~true
        if true.all():
            return lanes
        if not true.any():
            return np.zeros(0, np.int64)
        return np.flatnonzero(true) if lanes is None else lanes[true]

    def _located(self, error: PtxError, here: int) -> PtxError:
        if error.line is None:
            instruction, program = self.steps[here].instruction, self.chunk.program
            error.line, error.instruction, error.kernel = instruction.line, instruction.text, program.kernel.name
            if error.lane is not None:
                error.cta, error.thread = program.shape.thread_name(self.chunk.first_thread + error.lane)
        return error

    def _run_plain(self, here: int, step: Step, lanes: Lanes) -> None:
        try:
            active = self._guarded(step, lanes)
            if active is not None and not len(active):
                return
            self._count(step, active)
            step.run(self.chunk, active)
        except PtxError as error:
            raise self._located(error, here) from None

    def _count(self, step: Step, lanes: Lanes) -> None:
        step.threads += self.chunk.count(lanes)
        step.warps += self.chunk.warp_count(lanes)

    def _run_special(self, here: int, step: Step, lanes: Lanes) -> None:
        try:
            active = self._guarded(step, lanes)
        except PtxError as error:
            raise self._located(error, here) from None
        rest = _without(lanes, active, self.chunk.size)
        if len(rest):
            self._add(here + 1, rest)
        if active is not None and not len(active):
            return
        if step.scope:
            self._arrive(here, step, active)
            return
        self._count(step, active)
        if step.kind == "branch":
            self._add(step.target, active)
        else:
            self.chunk.end(active)

    def _add(self, here: int, lanes: Lanes) -> None:
        if here >= len(self.steps):
            raise self._located(
                PtxSyntaxError("threads run past the last instruction", lane=_first(lanes)), len(self.steps) - 1
            )
        if here in self.waiting:
            lanes = _union(self.waiting[here], lanes)
        if lanes is not None and len(lanes) == self.chunk.size:
            lanes = None
        self.waiting[here] = lanes

    # --- instructions that wait for others ---

    def _arrive(self, here: int, step: Step, lanes: Lanes) -> None:
        everyone = lanes
        if here in self.parked:
            everyone = _union(self.parked.pop(here), lanes)
            everyone = None if everyone is not None and len(everyone) == self.chunk.size else everyone
        ready, left = self._complete(here, step, everyone)
        if ready is None or len(ready):
            self._run_collective(here, step, ready)
        if len(left):
            self.parked[here] = left

    def _complete(self, here: int, step: Step, lanes: Lanes) -> tuple[Lanes, np.ndarray]:
        """Return which of the arrived threads have all the others they need, and which must wait."""
        nobody = np.zeros(0, np.int64)
        size = self.chunk.size
        if lanes is None and step.needs is None:
            return None, nobody
        present = np.zeros(size, bool)
        present[slice(None) if lanes is None else lanes] = True
        if step.scope == "cta":
            alive = np.ones(size, bool) if self.chunk.alive is None else self.chunk.alive
            full = ~(alive & ~present).reshape(self.chunk.ctas, -1).any(axis=1)
            ready = np.repeat(full, self.chunk.program.shape.threads_per_cta)
        else:
            try:
                ready = self._has_members(step, lanes, present)
            except PtxError as error:
                raise self._located(error, here) from None
        ready &= present
        return (None, nobody) if ready.all() else (np.flatnonzero(ready), np.flatnonzero(present & ~ready))

    def _has_members(self, step: Step, lanes: Lanes, present: np.ndarray) -> np.ndarray:
        assert step.needs is not None, "an instruction of a warp names its members"
        mask = np.zeros(self.chunk.size, np.uint32)
        mask[slice(None) if lanes is None else lanes] = step.needs(self.chunk, lanes)
        members = as_masks(present)
        own = np.uint32(1) << (self.chunk.lane_numbers % WARP).astype(np.uint32)
        stranger = present & (mask & own == 0)
        if stranger.any():
            raise DivergenceError("a thread is not in its own member mask", lane=int(np.argmax(stranger)))
        return mask & ~members == 0

    def _run_collective(self, here: int, step: Step, lanes: Lanes) -> None:
        self._count(step, lanes)
        try:
            step.run(self.chunk, lanes)
        except PtxError as error:
            raise self._located(error, here) from None
        self._add(here + 1, lanes)

    def _release_or_fail(self) -> None:
        """Release threads that waited only for threads that have ended since, or raise."""
        for here in sorted(self.parked):
            ready, left = self._complete(here, self.steps[here], self.parked[here])
            if ready is None or len(ready):
                del self.parked[here]
                if len(left):
                    self.parked[here] = left
                self._run_collective(here, self.steps[here], ready)
                return
        here = min(self.parked)
        raise self._located(self._missing(here), here)

    def _missing(self, here: int) -> DivergenceError:
        step, parked = self.steps[here], self.parked[here]
        lane = int(parked[0])
        group = self.chunk.program.shape.threads_per_cta if step.scope == "cta" else WARP
        members = np.arange(lane // group * group, lane // group * group + group)
        absent = np.setdiff1d(members, parked)
        cta, thread = self.chunk.program.shape.thread_name(self.chunk.first_thread + int(absent[0]))
        elsewhere = "has ended"
        for other, lanes in self.parked.items():
            if absent[0] in lanes:
                elsewhere = f"waits at line {self.steps[other].instruction.line}"
        return DivergenceError(
            f"{len(absent)} of {group} threads of the {step.scope} do not reach this: CTA {cta}, thread {thread} {elsewhere}",
            lane=lane,
        )


def as_masks(flags: np.ndarray) -> np.ndarray:
    """Return a mask with one bit for each thread of a warp, to every thread of it."""
    packed = np.packbits(flags.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
    return np.repeat(packed[:, 0], WARP)


def _union(a: Lanes, b: Lanes) -> Lanes:
    return None if a is None or b is None else np.union1d(a, b)


def _without(lanes: Lanes, taken: Lanes, size: int) -> np.ndarray:
    if taken is None or taken is lanes:
        return np.zeros(0, np.int64)
    return np.setdiff1d(np.arange(size) if lanes is None else lanes, taken, assume_unique=True)
