"""Instructions in which the threads of a warp exchange registers.

Values and masks are those of the threads that take part.

Source: PTX ISA, "shfl.sync", "vote.sync", "match.sync", "redux.sync", "ldmatrix" and "stmatrix".
All of them order no memory.
"""

from __future__ import annotations

import numpy as np

from .errors import NotModelledError, UnspecifiedError
from .floats import minimum_or_maximum
from .memory import WARP
from .scheduler import Chunk, Lanes, as_masks


def spread(chunk: Chunk, values: np.ndarray, lanes: Lanes) -> np.ndarray:
    """Return ``(warps, 32)``: the values of some threads, and zeros for the others."""
    full = np.zeros(chunk.size, values.dtype)
    full[slice(None) if lanes is None else lanes] = values
    return full.reshape(-1, WARP)


def gather(rows: np.ndarray, lanes: Lanes) -> np.ndarray:
    flat = rows.reshape(-1)
    return flat if lanes is None else flat[lanes]


def _present(chunk: Chunk, lanes: Lanes) -> np.ndarray:
    return spread(chunk, np.ones(chunk.count(lanes), bool), lanes)


def shuffle(mode: str):
    """Return a function for ``shfl.sync``.

    It gives another thread's value, and whether that thread is in range.
    """

    def run(chunk: Chunk, lanes: Lanes, a: np.ndarray, b: np.ndarray, c: np.ndarray, members: np.ndarray):
        values, b, c, members = (spread(chunk, x, lanes) for x in (a, b, c, members))
        lane = np.arange(WARP, dtype=np.int64)[None, :]
        b, clamp, segment = (b & 31).astype(np.int64), (c & 31).astype(np.int64), (c >> 8 & 31).astype(np.int64)
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane)
        row = np.arange(len(values))[:, None]
        present = _present(chunk, lanes)
        in_mask = (members >> source.astype(np.uint32) & 1 == 1) & present[row, source]
        wrong = present & ~in_mask
        if wrong.any():
            lane_at_fault = int(np.argmax(wrong))
            raise UnspecifiedError(
                f"a value is taken from thread {source.reshape(-1)[lane_at_fault]} of the warp, which does not take part",
                lane=lane_at_fault,
            )
        return gather(values[row, source], lanes), gather(inside, lanes)

    return run


def vote(mode: str):
    """Return a function for ``vote.sync`` of the members' predicates.

    It says whether all or any are set, whether they agree, or has one bit for each.
    """

    def run(chunk: Chunk, lanes: Lanes, predicate: np.ndarray, members: np.ndarray) -> np.ndarray:
        flags = as_masks(spread(chunk, predicate, lanes).reshape(-1))
        flags = (flags if lanes is None else flags[lanes]) & members
        return {"ballot": flags, "all": flags == members, "any": flags != 0, "uni": (flags == members) | (flags == 0)}[
            mode
        ]

    return run


def match(mode: str):
    """Return a function for ``match.sync``: the members with the same value.

    With ``all``, the mask is that of all members or 0, and the second result says which.
    """

    def run(chunk: Chunk, lanes: Lanes, a: np.ndarray, members: np.ndarray):
        values, masks = spread(chunk, a, lanes), spread(chunk, members, lanes)
        bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        equal = values[:, :, None] == values[:, None, :]
        same = np.where(equal, bit, np.uint32(0)).sum(axis=2, dtype=np.uint32) & masks
        if mode == "any":
            return gather(same, lanes)
        return gather(np.where(same == masks, masks, np.uint32(0)), lanes), gather(same == masks, lanes)

    return run


def reduction(operator: str, absolute: bool, nan: bool):
    """Return a function for ``redux.sync``.

    It gives a sum, minimum, maximum or bitwise operation over the members.
    """

    def combine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype == np.float32:
            return minimum_or_maximum(a, b, take_less=operator == "min", kind="f32", nan=nan, xorsign=False)
        functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
        return (functions | {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor})[operator](a, b)

    def run(chunk: Chunk, lanes: Lanes, a: np.ndarray, members: np.ndarray) -> np.ndarray:
        values, masks, present = spread(chunk, a, lanes), spread(chunk, members, lanes), _present(chunk, lanes)
        values = np.abs(values) if absolute else values
        bit = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        result = np.zeros_like(values)
        started = np.zeros(values.shape, bool)
        for source in range(WARP):  # in the order of threads; every member sees the same sequence
            member = present & (masks & bit[source] != 0)
            value = np.broadcast_to(values[:, source : source + 1], values.shape)
            result = np.where(member, np.where(started, combine(result, value), value), result)
            started |= member
        if values.dtype == np.float32:
            result = combine(result, result)  # the canonical NaN
        return gather(result, lanes)

    return run


def undefined_reduction(chunk: Chunk, lanes: Lanes, bits: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return undefined bits of a ``redux.sync``: all, where any bit of a member is undefined."""
    some = reduction("or", False, False)(chunk, lanes, bits, members) != 0
    return np.where(some, np.uint32(0xFFFFFFFF), np.uint32(0))


def active_mask(chunk: Chunk, lanes: Lanes) -> np.ndarray:
    """Return ``activemask``, which is certain only where the whole warp is together."""
    if lanes is not None and not np.logical_and.reduce(_present(chunk, lanes), axis=1)[lanes // WARP].all():
        raise NotModelledError(
            "activemask in a warp that has branched apart depends on the hardware", lane=int(lanes[0])
        )
    return np.full(1, 0xFFFFFFFF, np.uint32)


def matrix_fragments(rows: np.ndarray, matrices: int, transposed: bool) -> np.ndarray:
    """Distribute rows of eight 16-bit numbers to registers: ``ldmatrix`` m8n8.

    Rows are ``(warps, 32, 8)``, registers ``(warps * 32, matrices)`` with two numbers each.

    Threads 8 i to 8 i + 7 give the rows of matrix i. Thread t gets the elements 2 (t mod 4) and the
    next of row t div 4, or of that column where the matrix is transposed.
    """
    tiles = rows.reshape(-1, WARP // 8, 8, 8)[:, :matrices]
    tiles = tiles.swapaxes(2, 3) if transposed else tiles
    pairs = np.ascontiguousarray(tiles).view(np.uint32)  # (warps, matrices, 8, 4)
    return pairs.reshape(len(tiles), matrices, WARP).swapaxes(1, 2).reshape(-1, matrices)


def matrix_rows(fragments: np.ndarray, transposed: bool) -> np.ndarray:
    """Collect registers into rows of eight 16-bit numbers, the inverse: ``stmatrix`` m8n8.

    Registers are ``(warps * 32, matrices)``, rows ``(warps, matrices, 8, 8)``.
    """
    matrices = fragments.shape[1]
    pairs = fragments.reshape(-1, WARP, matrices).swapaxes(1, 2).reshape(-1, matrices, 8, 4)
    tiles = np.ascontiguousarray(pairs).view(np.uint16)
    return np.ascontiguousarray(tiles.swapaxes(2, 3)) if transposed else tiles
