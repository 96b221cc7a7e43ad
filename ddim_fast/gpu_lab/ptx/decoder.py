"""Decode instructions to steps that the scheduler runs: operands, and every access to memory.

Source: PTX ISA, "Instruction Operands", "Data Movement and Conversion Instructions" and "Parallel
Synchronization and Communication Instructions".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import floats, operations, warp
from .errors import NotModelledError, PtxError
from .memory import Threads, as_slice
from .operations import DTYPES, unsigned
from .parser import (
    TYPE_BYTES,
    Address,
    Instruction,
    Literal,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from .program import VECTORS, Program, cached
from .scheduler import Chunk, Execution, Lanes, Read, Run, Step

Write = Callable[..., None]
"""``write(chunk, values, lanes, undefined=None)`` puts values and undefined bits into a register."""

_CACHE = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}
_CACHE |= {f"L1::{how}" for how in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")}
_CACHE |= {f"L2::{how}" for how in ("evict_normal", "evict_first", "evict_last", "64B", "128B", "256B")}
_SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
_LARGEST_ACCESS = 32
_ATOMIC_ORDERS = {"relaxed", "acquire", "release", "acq_rel"}
_SCOPES = {"cta", "gpu", "sys"}


# --- operands ---


def reader(operand: Operand, kind: str, program: Program, *, defined: bool = True) -> Read:
    """Return a function that reads an operand's values as numbers of type ``kind``.

    The values must be defined, unless ``defined`` is false.
    """
    dtype = DTYPES[kind]
    if isinstance(operand, Literal):
        return _constant(_literal(operand, kind))
    if isinstance(operand, Special):
        return _special(operand.name, dtype)
    if isinstance(operand, Symbol):
        if operand.name not in program.variables:
            raise NotModelledError(f"the name {operand.name} has no address here")
        return _constant(np.array([program.variables[operand.name]], dtype))
    if isinstance(operand, Not):
        straight = reader(operand.register, kind, program, defined=defined)
        return lambda chunk, lanes: ~straight(chunk, lanes)
    if not isinstance(operand, Register):
        raise NotModelledError(f"an operand in a form that is not modelled: {operand}")
    name, held = operand.name, unsigned(operand.type)
    if (held == np.bool_) != (kind == "pred") or held.itemsize < dtype.itemsize:
        raise NotModelledError(f"register {name} of type {operand.type} cannot be read as {kind}")
    narrow, same = unsigned(kind), held.itemsize == dtype.itemsize
    if not defined:
        return lambda chunk, lanes: chunk.raw(name, lanes).astype(narrow, copy=False).view(dtype)
    if same:
        return lambda chunk, lanes: chunk.read(name, lanes).view(dtype)
    return lambda chunk, lanes: chunk.read(name, lanes).astype(narrow).view(dtype)


def _constant(value: np.ndarray) -> Read:
    return lambda chunk, lanes: value


def _literal(literal: Literal, kind: str) -> np.ndarray:
    if kind == "pred":
        return np.array([literal.bits != 0])
    if literal.kind != "int" and TYPE_BYTES[literal.kind] != TYPE_BYTES[kind]:
        raise NotModelledError(f"a constant of type {literal.kind} cannot be used as {kind}")
    if literal.kind == "int" and kind in ("f16", "f32", "f64", "bf16"):
        raise NotModelledError(f"an integer constant cannot be used as {kind}")
    bits = literal.bits & (1 << 8 * TYPE_BYTES[kind]) - 1
    return np.array([bits], unsigned(kind)).view(DTYPES[kind])


def _special(name: str, dtype: np.dtype) -> Read:
    """Return a reader of a special register that a result may depend on, in a grid without
    clusters.

    Source: PTX ISA, "Special Registers".
    """
    base, _, axis = name.partition(".")
    i = "xyz".find(axis)
    if base == "%laneid":
        return lambda chunk, lanes: chunk.special(base, 0, lanes).astype(dtype)
    if base not in ("%tid", "%ntid", "%ctaid", "%nctaid") or i < 0:
        raise NotModelledError(f"the special register {name} is not modelled")
    return lambda chunk, lanes: chunk.special(base, i, lanes).astype(dtype)


def undefined_reader(operand: Operand, kind: str) -> Callable[[Chunk, Lanes], np.ndarray | None]:
    """Return a function that reads an operand's undefined bits; it returns None if there are none.

    The bits are unsigned numbers as wide as ``kind``.
    """
    name = register_name(operand)
    if name is None:
        return lambda chunk, lanes: None
    narrow = unsigned(kind)

    def read(chunk: Chunk, lanes: Lanes) -> np.ndarray | None:
        bits = chunk.undefined_bits(name, lanes)
        return None if bits is None else bits.astype(narrow)

    return read


def register_name(operand: Operand) -> str | None:
    if isinstance(operand, Not):
        return operand.register.name
    return operand.name if isinstance(operand, Register) else None


def writer(operand: Operand, kind: str) -> Write:
    """Return a function that writes numbers of type ``kind`` to a register, extended to a wider
    one."""
    if isinstance(operand, Sink):
        return _throw_away
    if not isinstance(operand, Register):
        raise NotModelledError(f"a result in a form that is not modelled: {operand}")
    name, held, dtype = operand.name, unsigned(operand.type), DTYPES[kind]
    if (held == np.bool_) != (kind == "pred") or held.itemsize < dtype.itemsize:
        raise NotModelledError(f"register {name} of type {operand.type} cannot hold {kind}")
    if held.itemsize == dtype.itemsize:

        def write_same(chunk: Chunk, values: np.ndarray, lanes: Lanes, undefined: np.ndarray | None = None) -> None:
            chunk.write(name, values.view(held), lanes, undefined)

        return write_same
    wide = np.dtype(f"{dtype.kind if dtype.kind == 'i' else 'u'}{held.itemsize}")

    def extend(values: np.ndarray) -> np.ndarray:
        return values.astype(wide).view(held)

    def write(chunk: Chunk, values: np.ndarray, lanes: Lanes, undefined: np.ndarray | None = None) -> None:
        bits = None if undefined is None else extend(undefined.view(dtype if dtype.kind == "i" else undefined.dtype))
        chunk.write(name, extend(values), lanes, bits)

    return write


def _throw_away(chunk: Chunk, values: np.ndarray, lanes: Lanes, undefined: np.ndarray | None = None) -> None:
    pass


class Decoder:
    """A decoder of one placed kernel.

    ``contractible`` and ``approximate`` are complete after ``steps``.
    """

    def __init__(self, program: Program, execution: Execution):
        self.program, self.kernel, self.execution = program, program.kernel, execution
        # The same in every launch of the kernel. ``_runs`` has what runs an instruction on
        # registers alone, by the instruction's index.
        self.contractible: set[str] = cached(self.kernel, "contractible", set)
        self.approximate: set[str] = cached(self.kernel, "approximate", set)
        self._runs: dict[int, Run] = cached(self.kernel, "runs", dict)

    # --- instructions ---

    def steps(self) -> list[Step]:
        runs = self._runs
        return [
            Step(instruction, runs[i]) if i in runs else self._step(i, instruction)
            for i, instruction in enumerate(self.kernel.instructions)
        ]

    def _step(self, index: int, instruction: Instruction) -> Step:
        try:
            step = self._decode(index, instruction)
        except PtxError as error:
            error.line, error.instruction = instruction.line, instruction.text
            raise
        except (ValueError, TypeError) as error:  # a wrong number of operands
            wrong = NotModelledError(f"{instruction.name} has operands in a form that is not modelled ({error})")
            wrong.line, wrong.instruction = instruction.line, instruction.text
            raise wrong from None
        return step

    def _decode(self, index: int, instruction: Instruction) -> Step:
        operation = operations.decode(instruction)
        if operation is not None:
            run = self._on_registers(instruction, operation)
            if not any(isinstance(operand, Symbol) for operand, _ in operation.sources):  # its address is the launch's
                self._runs[index] = run
            return Step(instruction, run)
        special = {
            "bra": self._branch,
            "ret": self._end,
            "exit": self._end,
            "trap": self._trap,
            "bar": self._barrier,
            "barrier": self._barrier,
            "ld": self._load,
            "st": self._store,
            "atom": self._atomic,
            "red": self._atomic,
            "cp": self._copy,
            "shfl": self._shuffle,
            "vote": self._vote,
            "match": self._match,
            "redux": self._redux,
            "activemask": self._active_mask,
            "membar": self._fence,
            "fence": self._fence,
            "createpolicy": self._policy,
            "ldmatrix": self._load_matrix,
            "stmatrix": self._store_matrix,
        }.get(instruction.opcode)
        if special is None:
            raise NotModelledError(f"{instruction.name} is not modelled")
        return special(instruction)

    def _read(self, operand: Operand, kind: str) -> Read:
        return reader(operand, kind, self.program)

    def _on_registers(self, instruction: Instruction, operation: operations.Operation) -> Callable:
        sources = operation.sources
        if instruction.opcode != "cvt":  # PTX ISA, "Operand Size Exceeding Instruction-Type Size"
            _check_widths([*operation.results, *sources])
        reads = [reader(operand, kind, self.program, defined=False) for operand, kind in sources]
        masks = [undefined_reader(operand, kind) for operand, kind in sources]
        names = {register_name(operand) for operand, _ in sources} - {None}
        writes = [writer(operand, kind) for operand, kind in operation.results]
        several = len(writes) > 1 or (instruction.opcode == "mov" and isinstance(instruction.operands[0], Vector))
        apply, write = operation.apply, writes[0]
        widths = [unsigned(kind) for _, kind in sources]
        if operation.contractible:
            self.contractible.add(instruction.name)
        if operation.approximate:
            self.approximate.add(instruction.name)

        def run(chunk: Chunk, lanes: Lanes) -> None:
            values = [read(chunk, lanes) for read in reads]
            if not chunk.undefined.keys().isdisjoint(names):
                return run_with_undefined(chunk, lanes, values)
            result = _located(apply, values, lanes)
            if not several:
                return write(chunk, result, lanes)
            for put, part in zip(writes, result, strict=True):
                put(chunk, part, lanes)

        def run_with_undefined(chunk: Chunk, lanes: Lanes, values: list[np.ndarray]) -> None:
            found: list[np.ndarray] = []
            for read, width in zip(masks, widths, strict=True):
                mask = read(chunk, lanes)
                found.append(np.zeros(1, width) if mask is None else mask)
            result = apply(*values)
            bits = operation.undefined_results(values, found)
            for put, part, undefined in zip(writes, result if several else [result], bits, strict=True):
                put(chunk, part, lanes, undefined)

        return run

    # --- control flow and barriers ---

    def _branch(self, instruction: Instruction) -> Step:
        _only(instruction, {"uni"})
        (label,) = instruction.operands
        if not isinstance(label, Symbol):
            raise NotModelledError("a branch goes to a label")
        if label.name not in self.kernel.labels:
            raise NotModelledError(f"there is no label {label.name}")
        return Step(instruction, _never, kind="branch", target=self.kernel.labels[label.name])

    def _end(self, instruction: Instruction) -> Step:
        _only(instruction, set())
        return Step(instruction, _never, kind="end")

    def _trap(self, instruction: Instruction) -> Step:
        def run(chunk: Chunk, lanes: Lanes) -> None:
            raise NotModelledError("the program has trapped", lane=0 if lanes is None else int(lanes[0]))

        return Step(instruction, run)

    def _barrier(self, instruction: Instruction) -> Step:
        if instruction.modifiers == ("warp", "sync"):
            (members,) = instruction.operands
            step = Step(instruction, _warp_barrier(self._read(members, "u32")), scope="warp")
            step.needs = self._read(members, "u32")
            return step
        if instruction.modifiers not in (("sync",), ("sync", "aligned"), ("cta", "sync"), ("cta", "sync", "aligned")):
            raise NotModelledError(f"{instruction.name} is not modelled, only bar.sync and bar.warp.sync")
        if instruction.operands != (Literal(0),):
            raise NotModelledError("only barrier 0 of the whole CTA is modelled")
        execution, per_cta = self.execution, self.program.shape.threads_per_cta

        def run(chunk: Chunk, lanes: Lanes) -> None:
            chunk.cta_barrier(lanes)
            execution.barriers += chunk.ctas if lanes is None else len(np.unique(lanes // per_cta))

        return Step(instruction, run, scope="cta")

    def _fence(self, instruction: Instruction) -> Step:
        """Do nothing.

        A fence orders one thread's accesses, and only barriers order those of two threads.
        """
        _only(instruction, {"cta", "gl", "sys", "gpu", "sc", "acq_rel"})
        return Step(instruction, lambda chunk, lanes: None)

    # --- instructions of a warp ---

    def _collective(
        self,
        instruction: Instruction,
        function: Callable,
        sources: list,
        results: list,
        members: Operand,
        of_undefined: Callable | None = None,
    ) -> Step:
        """Return the step of an instruction of a whole warp.

        ``of_undefined`` computes the undefined bits of the first result from those of the first
        source; without it the first source must be defined.
        """
        value, kind = sources[0]
        first = reader(value, kind, self.program, defined=of_undefined is None)
        undefined_bits = undefined_reader(value, kind)
        reads = [self._read(operand, kind) for operand, kind in [*sources[1:], (members, "u32")]]
        writes = [writer(operand, kind) for operand, kind in results]

        def run(chunk: Chunk, lanes: Lanes) -> None:
            n = chunk.count(lanes)
            others = [np.broadcast_to(read(chunk, lanes), n) for read in reads]
            outcome = function(chunk, lanes, np.broadcast_to(first(chunk, lanes), n), *others)
            bits = undefined_bits(chunk, lanes)
            if of_undefined is None:
                bits = None  # the source has been found to be defined
            elif bits is not None:
                bits = of_undefined(chunk, lanes, np.broadcast_to(bits, n), *others) if bits.any() else None
            for put, values in zip(writes, outcome if isinstance(outcome, tuple) else (outcome,), strict=True):
                put(chunk, values, lanes, bits)
                bits = None

        step = Step(instruction, run, scope="warp")
        step.needs = reads[-1]
        return step

    def _shuffle(self, instruction: Instruction) -> Step:
        words = instruction.modifiers
        if len(words) != 3 or words[0] != "sync" or words[1] not in ("up", "down", "bfly", "idx") or words[2] != "b32":
            raise NotModelledError(f"{instruction.name} is not modelled")
        d, a, b, c, members = instruction.operands
        d, inside = (d.first, d.second) if isinstance(d, Pair) else (d, Sink())
        sources = [(a, "b32"), (b, "u32"), (c, "u32")]
        function = warp.shuffle(words[1])
        results = [(d, "b32"), (inside, "pred")]
        return self._collective(instruction, function, sources, results, members, lambda *x: function(*x)[0])

    def _vote(self, instruction: Instruction) -> Step:
        words = instruction.modifiers
        forms = {("sync", mode, "pred") for mode in ("all", "any", "uni")} | {("sync", "ballot", "b32")}
        if words not in forms:
            raise NotModelledError(f"{instruction.name} is not modelled")
        d, predicate, members = instruction.operands
        return self._collective(instruction, warp.vote(words[1]), [(predicate, "pred")], [(d, words[2])], members)

    def _match(self, instruction: Instruction) -> Step:
        words = instruction.modifiers
        if len(words) != 3 or words[0] not in ("any", "all") or words[1] != "sync" or words[2] not in ("b32", "b64"):
            raise NotModelledError(f"{instruction.name} is not modelled")
        d, a, members = instruction.operands
        pair = d if isinstance(d, Pair) else Pair(d, Sink())
        results = [(pair.first, "b32"), (pair.second, "pred")][: 2 if words[0] == "all" else 1]
        return self._collective(instruction, warp.match(words[0]), [(a, words[2])], results, members)

    def _redux(self, instruction: Instruction) -> Step:
        words = list(instruction.modifiers)
        kind = words.pop()
        absolute, nan = "abs" in words, "NaN" in words
        words = [w for w in words if w not in ("abs", "NaN")]
        allowed = {
            "s32": ("add", "min", "max"),
            "u32": ("add", "min", "max"),
            "b32": ("and", "or", "xor"),
            "f32": ("min", "max"),
        }
        if len(words) != 2 or words[0] != "sync" or words[1] not in allowed.get(kind, ()):
            raise NotModelledError(f"{instruction.name} is not modelled")
        if (absolute or nan) and kind != "f32":
            raise NotModelledError(f"{instruction.name} is not modelled: .abs and .NaN are for f32")
        d, a, members = instruction.operands
        function = warp.reduction(words[1], absolute, nan)
        return self._collective(instruction, function, [(a, kind)], [(d, kind)], members, warp.undefined_reduction)

    def _active_mask(self, instruction: Instruction) -> Step:
        _only(instruction, {"b32"})
        put = writer(instruction.operands[0], "b32")
        return Step(instruction, lambda chunk, lanes: put(chunk, warp.active_mask(chunk, lanes), lanes))

    def _policy(self, instruction: Instruction) -> Step:
        """Return any number: a cache policy has no effect on results."""
        put = writer(instruction.operands[0], "b64")
        return Step(instruction, lambda chunk, lanes: put(chunk, np.zeros(1, np.uint64), lanes))

    # --- loads and stores ---

    def _address(self, operand: Operand, space: str) -> Read:
        """Return a reader of addresses.

        They have 64 bits in global memory, and elsewhere are as wide as the register.
        """
        if not isinstance(operand, Address):
            raise NotModelledError("an address must be in brackets")
        base, offset = operand
        kind = "u64" if space in ("global", "const") else "u32"
        if isinstance(base, Register) and unsigned(base.type).itemsize == 8:
            kind = "u64"
        read, shift = self._read(base, kind), DTYPES[kind].type(offset & (1 << 8 * DTYPES[kind].itemsize) - 1)
        return (lambda chunk, lanes: read(chunk, lanes) + shift) if offset else read

    def _access(self, instruction: Instruction) -> tuple[str, int, str]:
        """Return the space, the number of elements and their type of a load or store."""
        words = list(instruction.modifiers)
        kind = words.pop()
        if kind not in TYPE_BYTES:
            raise NotModelledError(f"{instruction.name}: the type .{kind} is not modelled")
        space = next((w for w in words if w in _SPACES), None)
        if space is None:
            raise NotModelledError(f"{instruction.name}: generic addresses are not modelled")
        elements = next((VECTORS[w] for w in words if w in VECTORS), 1)
        left = [w for w in words if w not in _CACHE and w not in VECTORS and w not in (space, "weak", "L2::cache_hint")]
        if left:
            raise NotModelledError(f"{instruction.name}: the modifier .{left[0]} is not modelled")
        if elements * TYPE_BYTES[kind] > _LARGEST_ACCESS:
            raise NotModelledError(f"{instruction.name}: an access has at most {_LARGEST_ACCESS} bytes")
        return space.removesuffix("::cta"), elements, kind

    def _load(self, instruction: Instruction) -> Step:
        space, elements, kind = self._access(instruction)
        result, address = instruction.operands[:2]
        if len(instruction.operands) > 2 + ("L2::cache_hint" in instruction.modifiers):
            raise NotModelledError(f"{instruction.name} has more operands than are modelled")
        parts = result.elements if isinstance(result, Vector) else (result,)
        if len(parts) != elements:
            raise NotModelledError(f"{instruction.name} needs {elements} results, got {len(parts)}")
        writes = [writer(part, kind) for part in parts]
        if space == "param":
            return Step(instruction, self._load_parameter(address, elements, kind, writes))
        dtype = DTYPES[kind]
        read, load = self._address(address, space), self._loader(space, elements, unsigned(kind))

        def run(chunk: Chunk, lanes: Lanes) -> None:
            data = load(chunk, read(chunk, lanes), lanes)
            for i, put in enumerate(writes):
                put(chunk, data[:, i].view(dtype), lanes)

        return Step(instruction, run)

    def _load_parameter(self, address: Operand, elements: int, kind: str, writes: list[Write]) -> Callable:
        if not isinstance(address, Address) or not isinstance(address.base, Symbol) or elements != 1:
            raise NotModelledError("a parameter is read by its name, one number at a time")
        data = self.program.parameters.get(address.base.name, np.zeros(0, np.uint8)).view(np.uint8)
        start, size = address.offset, TYPE_BYTES[kind]
        if start % size or not 0 <= start <= len(data) - size:
            raise NotModelledError(
                f"byte {start} of {address.base.name}, of {len(data)} bytes, cannot be read as {kind}"
            )
        value = data[start : start + size].view(DTYPES[kind])
        return lambda chunk, lanes: writes[0](chunk, value, lanes)

    def _loader(self, space: str, elements: int, dtype: np.dtype) -> Callable:
        size, memory, execution = elements * dtype.itemsize, self.program.memory, self.execution

        def load_global(chunk: Chunk, addresses: np.ndarray, lanes: Lanes) -> np.ndarray:
            threads = chunk.threads(lanes)
            execution.bytes_read += size * len(threads.lanes)
            found = np.empty((0, elements), dtype)
            for cluster, positions in memory.parts(addresses, size, threads):
                memory.shadowed(cluster)
                chosen = addresses if positions is None else addresses[positions]
                some = _part(threads, None if len(addresses) == 1 else positions)
                rows = as_slice(((chosen - np.uint64(cluster.virtual_base)) // np.uint64(size)).astype(np.int64))
                data = cluster.load(rows, elements, dtype, some, repeat=len(addresses) == 1)
                if positions is None:
                    return data
                found = found if len(found) else np.empty((len(addresses), elements), dtype)
                found[positions] = data
            return found

        def load_scratch(chunk: Chunk, addresses: np.ndarray, lanes: Lanes) -> np.ndarray:
            threads = chunk.threads(lanes)
            storage = chunk.shared if space == "shared" else chunk.local
            rows = as_slice(storage.rows(addresses, size, threads))
            return storage.load(rows, elements, dtype, threads, repeat=False)

        return load_scratch if space in ("shared", "local") else load_global

    def _store(self, instruction: Instruction) -> Step:
        space, elements, kind = self._access(instruction)
        if space in ("param", "const"):
            raise NotModelledError(f"{instruction.name} is not modelled")
        address, source = instruction.operands[:2]
        if len(instruction.operands) > 2 + ("L2::cache_hint" in instruction.modifiers):
            raise NotModelledError(f"{instruction.name} has more operands than are modelled")
        parts = source.elements if isinstance(source, Vector) else (source,)
        if len(parts) != elements:
            raise NotModelledError(f"{instruction.name} needs {elements} sources, got {len(parts)}")
        bits = f"b{8 * TYPE_BYTES[kind]}"
        reads, read = [self._read(part, bits) for part in parts], self._address(address, space)
        store = self._storer(space)

        def run(chunk: Chunk, lanes: Lanes) -> None:
            values = np.empty((chunk.count(lanes), elements), DTYPES[bits])
            for i, part in enumerate(reads):
                values[:, i] = part(chunk, lanes)
            store(chunk, read(chunk, lanes), values, lanes)

        return Step(instruction, run)

    def _storer(self, space: str) -> Callable:
        memory, execution = self.program.memory, self.execution

        def store_global(chunk: Chunk, addresses: np.ndarray, values: np.ndarray, lanes: Lanes) -> None:
            threads = chunk.threads(lanes)
            size = values.shape[1] * values.dtype.itemsize
            execution.bytes_written += size * len(threads.lanes)
            addresses = np.broadcast_to(addresses, len(values))
            for cluster, positions in memory.parts(addresses, size, threads):
                chosen, some = addresses[_every(positions)], _part(threads, positions)
                cluster.check_writable(chosen, size, some)
                memory.shadowed(cluster)
                rows = as_slice(((chosen - np.uint64(cluster.virtual_base)) // np.uint64(size)).astype(np.int64))
                cluster.store(rows, values[_every(positions)], some)

        def store_scratch(chunk: Chunk, addresses: np.ndarray, values: np.ndarray, lanes: Lanes) -> None:
            threads = chunk.threads(lanes)
            storage = chunk.shared if space == "shared" else chunk.local
            storage.store(
                as_slice(storage.rows(addresses, values.shape[1] * values.dtype.itemsize, threads)), values, threads
            )

        return store_scratch if space in ("shared", "local") else store_global

    # --- atomics ---

    def _atomic(self, instruction: Instruction) -> Step:
        words = [w for w in instruction.modifiers if w not in _ATOMIC_ORDERS and w not in _SCOPES]
        kind = words.pop()
        space = next((w for w in words if w in ("global", "shared", "shared::cta")), None)
        words = [w for w in words if w not in (space, "noftz")]
        if space is None or len(words) != 1:
            raise NotModelledError(f"{instruction.name} is not modelled")
        operator, space = words[0], space.removesuffix("::cta")
        function = _atomic_function(operator, kind, space)
        if function is None:
            raise NotModelledError(f"{instruction.name} is not modelled: .{operator}.{kind} has no rule")
        operands = list(instruction.operands)
        result = operands.pop(0) if instruction.opcode == "atom" else Sink()
        address, *values = operands
        if len(values) != 2 if operator == "cas" else len(values) != 1:
            raise NotModelledError(f"{instruction.name} has a wrong number of operands")
        put, read = writer(result, kind), self._address(_single(address), space)
        reads = [self._read(_single(value), kind) for value in values]
        update = self._updater(space)

        def run(chunk: Chunk, lanes: Lanes) -> None:
            n = chunk.count(lanes)
            addresses = np.broadcast_to(read(chunk, lanes), n)
            old = update(chunk, addresses, function, [np.broadcast_to(r(chunk, lanes), n) for r in reads], lanes)
            put(chunk, old, lanes)

        return Step(instruction, run)

    def _updater(self, space: str) -> Callable:
        memory, execution = self.program.memory, self.execution

        def update_global(
            chunk: Chunk, addresses: np.ndarray, function: Callable, values: list, lanes: Lanes
        ) -> np.ndarray:
            threads, size = chunk.threads(lanes), values[0].dtype.itemsize
            execution.bytes_read += size * len(addresses)
            execution.bytes_written += size * len(addresses)
            old = np.empty(len(addresses), values[0].dtype)
            for cluster, positions in memory.parts(addresses, size, threads):
                positions = np.arange(len(addresses)) if positions is None else positions
                some = _part(threads, positions)
                cluster.check_writable(addresses[positions], size, some)
                memory.shadowed(cluster)
                rows = ((addresses[positions] - np.uint64(cluster.virtual_base)) // np.uint64(size)).astype(np.int64)
                old[positions] = cluster.update(rows, function, [v[positions] for v in values], some)
            return old

        def update_shared(
            chunk: Chunk, addresses: np.ndarray, function: Callable, values: list, lanes: Lanes
        ) -> np.ndarray:
            threads = chunk.threads(lanes)
            rows = chunk.shared.rows(addresses, values[0].dtype.itemsize, threads)
            return chunk.shared.update(rows, function, values, threads)

        return update_shared if space == "shared" else update_global

    # --- asynchronous copies and matrices ---

    def _copy(self, instruction: Instruction) -> Step:
        """Decode ``cp.async``.

        The data appear when the thread waits for its group. Until then the bytes count as
        unwritten.
        """
        words = [w for w in instruction.modifiers if w not in _CACHE and w != "L2::cache_hint"]
        if words == ["async", "commit_group"]:
            return Step(instruction, _for_all(lambda chunk: chunk.copies.commit()))
        if words in (["async", "wait_group"], ["async", "wait_all"]):
            count = instruction.operands[0] if instruction.operands else Literal(0)
            if not isinstance(count, Literal):
                raise NotModelledError("cp.async.wait_group takes a constant")
            keep = count.bits
            commit_first = words[1] == "wait_all"

            def wait(chunk: Chunk) -> None:
                if commit_first:
                    chunk.copies.commit()
                chunk.copies.wait(keep)

            return Step(instruction, _for_all(wait))
        if words not in (["async", "shared", "global"], ["async", "shared::cta", "global"]):
            raise NotModelledError(f"{instruction.name} is not modelled")
        target, source, size, *used = instruction.operands
        if not isinstance(size, Literal) or size.bits not in (4, 8, 16) or len(used) > 1:
            raise NotModelledError("cp.async copies 4, 8 or 16 bytes here")
        return Step(instruction, self._copy_function(target, source, size.bits, used))

    def _copy_function(self, target: Operand, source: Operand, size: int, count: list[Operand]) -> Callable:
        to, of = self._address(target, "shared"), self._address(source, "global")
        load = self._loader("global", size // 4, np.dtype(np.uint32))
        read_count = self._read(count[0], "u32") if count else _constant(np.array([size], np.uint32))

        def run(chunk: Chunk, lanes: Lanes) -> None:
            threads, n = chunk.threads(lanes), chunk.count(lanes)
            used = np.broadcast_to(read_count(chunk, lanes), n)
            if not ((used == 0) | (used == size)).all():
                raise NotModelledError("cp.async of a part of its bytes is not modelled")
            rows = chunk.shared.rows(np.broadcast_to(to(chunk, lanes), n), size, threads)
            data = np.zeros((n, size // 4), np.uint32)
            copied = np.flatnonzero(used)
            if len(copied):
                addresses = np.broadcast_to(of(chunk, lanes), n)[copied]
                data[copied] = load(chunk, addresses, copied if lanes is None else lanes[copied])
            chunk.shared.check_write(rows, size, threads)
            chunk.shared.tracked.forget(rows, size)
            chunk.copies.open.append(lambda: chunk.shared.store(rows, data, chunk.threads(lanes)))

        return run

    def _matrices(self, instruction: Instruction) -> tuple[int, bool]:
        """Return the number of 8 x 8 matrices of 16-bit numbers, and whether they are transposed."""
        words = [w for w in instruction.modifiers if w not in ("shared", "shared::cta", "trans")]
        counts = {"x1": 1, "x2": 2, "x4": 4}
        if len(words) != 5 or words[:3] != ["sync", "aligned", "m8n8"] or words[3] not in counts or words[4] != "b16":
            raise NotModelledError(f"{instruction.name} is not modelled")
        return counts[words[3]], "trans" in instruction.modifiers

    def _whole_warp(self, instruction: Instruction, run: Callable) -> Step:
        step = Step(instruction, run, scope="warp")
        step.needs = _constant(np.array([0xFFFFFFFF], np.uint32))
        return step

    def _store_matrix(self, instruction: Instruction) -> Step:
        matrices, transposed = self._matrices(instruction)
        address, source = instruction.operands
        parts = source.elements if isinstance(source, Vector) else (source,)
        if len(parts) != matrices:
            raise NotModelledError(f"{instruction.name} needs {matrices} sources, got {len(parts)}")
        reads, read = [self._read(part, "b32") for part in parts], self._address(address, "shared")

        def run(chunk: Chunk, lanes: Lanes) -> None:
            every = chunk.lane_numbers if lanes is None else lanes
            takers = every % 32 < 8 * matrices
            fragments = np.zeros((chunk.size, matrices), np.uint32)
            for i, part in enumerate(reads):
                fragments[every, i] = part(chunk, lanes)
            rows = np.zeros((chunk.size // 32, 32, 8), np.uint16)
            rows[:, : 8 * matrices] = warp.matrix_rows(fragments, transposed).reshape(-1, 8 * matrices, 8)
            threads = chunk.threads(every[takers])
            places = chunk.shared.rows(np.broadcast_to(read(chunk, lanes), len(every))[takers], 16, threads)
            chunk.shared.store(places, rows.reshape(-1, 8)[every[takers]], threads)

        return self._whole_warp(instruction, run)

    def _load_matrix(self, instruction: Instruction) -> Step:
        matrices, transposed = self._matrices(instruction)
        result, address = instruction.operands
        parts = result.elements if isinstance(result, Vector) else (result,)
        writes = [writer(part, "b32") for part in parts]
        if len(writes) != matrices:
            raise NotModelledError(f"{instruction.name} needs {matrices} results, got {len(writes)}")
        read = self._address(address, "shared")

        def run(chunk: Chunk, lanes: Lanes) -> None:
            every = chunk.lane_numbers if lanes is None else lanes
            givers = every[every % 32 < 8 * matrices]
            addresses = np.broadcast_to(read(chunk, lanes), len(every))[every % 32 < 8 * matrices]
            threads = chunk.threads(givers)
            rows = chunk.shared.rows(addresses, 16, threads)
            data = chunk.shared.load(rows, 8, np.dtype(np.uint16), threads, repeat=False)
            full = np.zeros((chunk.size, 8), np.uint16)
            full[givers] = data
            fragments = warp.matrix_fragments(full, matrices, transposed)
            for i, put in enumerate(writes):
                put(chunk, fragments[every, i], lanes)

        return self._whole_warp(instruction, run)


def _never(chunk: Chunk, lanes: Lanes) -> None:
    """Fail: the scheduler follows branches and ends threads itself."""
    raise AssertionError("a branch or an end is not run")


def _check_widths(operands: list[tuple[Operand, str]]) -> None:
    for operand, kind in operands:
        register = operand.register if isinstance(operand, Not) else operand
        if isinstance(register, Register) and unsigned(register.type) != unsigned(kind):
            raise NotModelledError(f"register {register.name} has type {register.type}, but {kind} is needed")


def _only(instruction: Instruction, allowed: set[str]) -> None:
    unknown = [w for w in instruction.modifiers if w not in allowed]
    if unknown:
        raise NotModelledError(f"{instruction.name} is not modelled: the modifier .{unknown[0]} has no rule")


def _located(apply: Callable, values: list[np.ndarray], lanes: Lanes) -> Any:
    """Apply an operation.

    Its errors give a position among the operands, which becomes that of a thread of the chunk.
    """
    try:
        return apply(*values)
    except PtxError as error:
        if lanes is not None and error.lane is not None:
            error.lane = int(lanes[error.lane])
        raise


def _single(operand: Operand) -> Operand:
    return operand.elements[0] if isinstance(operand, Vector) and len(operand.elements) == 1 else operand


def _every(positions: np.ndarray | None) -> slice | np.ndarray:
    return slice(None) if positions is None else positions


def _part(threads: Threads, positions: np.ndarray | None) -> Threads:
    if positions is None:
        return threads
    when = None if threads.when is None else threads.when[positions]
    return Threads(threads.lanes[positions], threads.who[positions], when)


def _for_all(function: Callable[[Chunk], None]) -> Callable:
    def run(chunk: Chunk, lanes: Lanes) -> None:
        if lanes is not None:
            raise NotModelledError("groups of cp.async by a part of the threads are not modelled", lane=int(lanes[0]))
        function(chunk)

    return run


def _warp_barrier(members: Read) -> Callable:
    def run(chunk: Chunk, lanes: Lanes) -> None:
        if not (members(chunk, lanes) == 0xFFFFFFFF).all():
            raise NotModelledError("bar.warp.sync of a part of a warp is not modelled")
        chunk.warp_barrier(lanes)

    return run


def _atomic_function(operator: str, kind: str, space: str) -> Callable | None:
    """Return the function from the old value and the operands to the new; None where there is no
    rule.

    Source: PTX ISA, "atom".
    """
    if operator == "exch" and kind in ("b32", "b64"):
        return lambda old, new: new
    if operator == "cas" and kind in ("b16", "b32", "b64"):
        return lambda old, compare, new: np.where(old == compare, new, old)
    if operator in ("and", "or", "xor") and kind in ("b32", "b64"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operator]
    if operator in ("min", "max") and kind in ("u32", "s32", "u64", "s64"):
        return np.minimum if operator == "min" else np.maximum
    if operator != "add":
        return None
    if kind in ("u32", "s32", "u64"):
        return np.add
    if kind == "f32" and space == "global":  # subnormals are flushed in global memory, but not in shared
        return lambda old, b: floats.canonical(floats.flush(floats.flush(old) + floats.flush(b)), "f32")
    if kind in ("f32", "f64", "f16"):
        return lambda old, b: floats.canonical(old + b, kind)
    if kind == "bf16":
        one = np.array([0x3F80], np.uint16)
        return lambda old, b: floats.fma_bf16(old, one, b)
    if kind in ("f16x2", "bf16x2"):
        element = _atomic_function("add", kind[:-2], space)
        assert element is not None, "each half type has a sum"
        return operations.over_elements(element, kind)
    return None
