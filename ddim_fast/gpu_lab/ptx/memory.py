"""Memory of a launch, with a shadow that records who touched it.

Checked are bounds, alignment, reads of what nothing has written, and races.

Global memory is the memory of the argument tensors, at virtual addresses: every tensor lies far
from every other, so that an access past the end of one never lands in the next. The low bits of
addresses are kept, so alignment is the real one. Tensors that overlap keep their distance.

What orders two accesses of different threads (PTX ISA, "Memory Consistency Model", "bar",
"bar.warp.sync"):

- ``bar.sync`` between them, for threads of one CTA;
- ``bar.warp.sync`` of the whole warp between them, for threads of one warp;
- nothing else. ``shfl.sync`` and other exchanges of a warp move registers and order no memory.
  Waiting for an atomic of another CTA is not recognised, and such a pair of accesses is reported as
  a race.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import AddressError, LaunchError, NotModelledError, RaceError, UnwrittenError

WARP = 32
_BLOCK = 64  # bytes; regions are seen in whole blocks, so that every aligned access is one element of a view
_SPACING = 1 << 36
_LARGEST_REGION = 1 << 35


@dataclass(frozen=True)
class Region:
    """Memory that a launch may use: ``nbytes`` from the real address ``address``."""

    name: str
    address: int
    nbytes: int
    writable: bool = True
    owner: object = field(default=None, repr=False, compare=False)  # keeps the memory alive

    @classmethod
    def of(cls, array: Any, name: str = "array", writable: bool = True) -> Region:
        """Return the memory of a NumPy array or CPU tensor, from its first element to its last.

        Gaps between rows are included.

        Raises:
            LaunchError: The array is neither, is not in CPU memory, or has a negative stride.
        """
        if isinstance(array, np.ndarray):
            address, itemsize, strides = array.ctypes.data, array.itemsize, array.strides
            writable = writable and array.flags.writeable
        elif hasattr(array, "data_ptr"):
            if array.device.type != "cpu":
                raise LaunchError(f"memory must be the CPU's, got {name} on {array.device}")
            address, itemsize = array.data_ptr(), array.element_size()
            strides = tuple(s * itemsize for s in array.stride())
        else:
            raise LaunchError(
                f"memory must be a NumPy array or a CPU tensor, got {name} of type {type(array).__name__}"
            )
        if any(s < 0 for s in strides):
            raise LaunchError(f"negative strides are not modelled, got {name} with strides {strides}")
        empty = 0 in array.shape
        nbytes = 0 if empty else itemsize + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
        return cls(name, address, nbytes, writable, array)


@dataclass(eq=False)
class Threads:
    """Who makes an access.

    ``who`` numbers the threads of the launch from 1. ``when`` counts their barriers; None where the
    kernel has none.
    """

    lanes: np.ndarray  # within the chunk
    who: np.ndarray
    when: np.ndarray | None


_SEVERAL_OF_CTA = -(1 << 30)
_SEVERAL = -(1 << 31)


class Shadow:
    """For each granule of memory, the last writer, reader and atomic user.

    A user is 0 (none), a thread's number from 1, ``-1 - w`` (several threads of warp w),
    ``-2^30 - c`` (several of CTA c) or ``-2^31`` (several of different CTAs). A granule is the
    smallest access that the kernel makes: accesses are aligned, so none crosses.
    """

    def __init__(self, nbytes: int, granule: int, threads_per_cta: int):
        self.granule, self.threads_per_cta = granule, threads_per_cta
        self.cells = -(-nbytes // _BLOCK) * _BLOCK // granule
        self.users: dict[str, np.ndarray] = {}
        self.times: dict[str, np.ndarray] = {}

    def _view(self, table: dict[str, np.ndarray], kind: str, size: int) -> np.ndarray:
        if kind not in table:
            table[kind] = np.zeros(self.cells, np.int32 if table is self.users else np.int64)
        return table[kind].reshape(-1, size // self.granule)

    def _warp(self, user: np.ndarray) -> np.ndarray:
        one_warp = np.where(user > _SEVERAL_OF_CTA, -1 - user.astype(np.int64), -1)
        return np.where(user > 0, (user.astype(np.int64) - 1) // WARP, one_warp)

    def _cta(self, user: np.ndarray) -> np.ndarray:
        several = np.where(user == _SEVERAL, -1, _SEVERAL_OF_CTA - user.astype(np.int64))
        return np.where(user > _SEVERAL_OF_CTA, self._warp(user) * WARP // self.threads_per_cta, several)

    def _ordered(
        self, before: np.ndarray, then: np.ndarray | None, user: np.ndarray, now: np.ndarray | None
    ) -> np.ndarray:
        if then is None or now is None:
            return np.zeros(before.shape, bool)
        same_warp, same_cta = self._warp(before) == self._warp(user), self._cta(before) == self._cta(user)
        return (same_warp & (then != now)) | (same_cta & (then >> 32 != now >> 32))

    def _merged(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        warp_a, cta_a = self._warp(a), self._cta(a)
        merged = np.where((cta_a == self._cta(b)) & (cta_a >= 0), _SEVERAL_OF_CTA - cta_a, _SEVERAL)
        merged = np.where((warp_a == self._warp(b)) & (warp_a >= 0), -1 - warp_a, merged)
        return np.where(a == b, a, merged).astype(np.int32)

    def unwritten(self, rows: slice | np.ndarray, size: int) -> np.ndarray:
        """Return which accesses touch a granule that nothing has written."""
        return (self._view(self.users, "write", size)[rows] == 0).any(axis=1)

    def forget(self, rows: slice | np.ndarray, size: int) -> None:
        """Mark granules as unwritten: a copy into them is under way."""
        self._view(self.users, "write", size)[rows] = 0

    def conflict(self, kind: str, rows: slice | np.ndarray, size: int, threads: Threads) -> tuple[int, int, str] | None:
        """Return the first access that races with an earlier one of ``kind``; None if there is
        none.

        Returns:
            The access's position, the earlier one's user, and ``kind``.
        """
        if kind not in self.users:
            return None
        before = self._view(self.users, kind, size)[rows]
        mine = threads.who[:, None]
        suspect = (before != 0) & (before != mine)
        if not suspect.any():
            return None
        mine = np.broadcast_to(mine, before.shape)[suspect]
        then = now = None
        if threads.when is not None:
            then = self._view(self.times, kind, size)[rows][suspect]
            now = np.broadcast_to(threads.when[:, None], before.shape)[suspect]
        races = ~self._ordered(before[suspect], then, mine, now)
        if not races.any():
            return None
        first = int(np.argmax(races))
        return int(np.nonzero(suspect)[0][first]), int(before[suspect][first]), kind

    def write(
        self, rows: slice | np.ndarray, size: int, threads: Threads, harmless: Callable[[], np.ndarray] | None = None
    ) -> tuple[int, int, str] | None:
        """Set the writer; return the first access that another thread of the same instruction
        overwrites.

        ``harmless`` says of which accesses that does not matter; they get several writers.
        """
        users, mine = self._view(self.users, "write", size), threads.who[:, None]
        users[rows] = mine
        if threads.when is not None:
            self._view(self.times, "write", size)[rows] = threads.when[:, None]
        if isinstance(rows, slice):
            return None
        lost = users[rows] != mine
        if not lost.any():
            return None
        bad = lost if harmless is None else lost & ~harmless()[:, None]
        if bad.any():
            i, j = (int(x[0]) for x in np.nonzero(bad))
            return i, int(users[rows][i, j]), "write"
        self._share(users, rows, lost, np.broadcast_to(mine, lost.shape))
        return None

    def use(self, kind: str, rows: slice | np.ndarray, size: int, threads: Threads) -> None:
        """Add readers or atomic users, replacing accesses that a barrier has ordered before them."""
        users = self._view(self.users, kind, size)
        before = users[rows]
        mine = np.broadcast_to(threads.who[:, None], before.shape)
        now = None if threads.when is None else np.broadcast_to(threads.when[:, None], before.shape)
        times = None if now is None else self._view(self.times, kind, size)
        user = mine
        others = (before != 0) & (before != mine)
        if others.any():
            then = None if times is None else times[rows]
            keep = others & ~self._ordered(before, then, mine, now)
            user = np.where(keep, self._merged(before, mine), mine)
        users[rows] = user
        if times is not None:
            times[rows] = now
        if isinstance(rows, slice):
            return
        lost = users[rows] != user
        if lost.any():
            self._share(users, rows, lost, user)

    def _share(self, users: np.ndarray, rows: np.ndarray, lost: np.ndarray, user: np.ndarray) -> None:
        """Record several threads of one instruction on a granule.

        ``lost`` is true where another thread than ``user`` is recorded.
        """
        merged = self._merged(users[rows][lost], user[lost])
        cells = (rows[:, None] * users.shape[1] + np.arange(users.shape[1]))[lost]
        for chosen in (merged > _SEVERAL_OF_CTA, merged <= _SEVERAL_OF_CTA, merged == _SEVERAL):  # the widest last
            users.reshape(-1)[cells[chosen]] = merged[chosen]


def as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Return rows at equal distances as a slice, which is ten times as fast.

    Other rows are returned as they are.
    """
    if len(rows) == 1:
        return slice(int(rows[0]), int(rows[0]) + 1)
    first, step = int(rows[0]), int(rows[1]) - int(rows[0])
    if step <= 0 or int(rows[-1]) != first + step * (len(rows) - 1) or not (rows[1:] - rows[:-1] == step).all():
        return rows
    return slice(first, int(rows[-1]) + 1, step)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


class _Storage:
    """Bytes with their shadow: the base class of global, shared and local memory."""

    may_repeat_writes = False  # whether threads may store the same value at one place in one instruction

    def __init__(self, name: str, data: np.ndarray, shadow: Shadow | None, describe: Callable[[int], str]):
        self.name, self.data, self.shadow, self.describe = name, data, shadow, describe

    @property
    def tracked(self) -> Shadow:
        """The shadow of memory that may be written."""
        assert self.shadow is not None, "memory that is written has a shadow"
        return self.shadow

    def _race(
        self, found: tuple[int, int, str] | None, verb: str, rows: slice | np.ndarray, size: int, threads: Threads
    ):
        if found is None:
            return
        position, other, kind = found
        row = (rows.start + (rows.step or 1) * position) if isinstance(rows, slice) else int(rows[position])
        done = {"write": "written", "read": "read", "atomic": "changed atomically"}[kind]
        raise RaceError(
            f"{size} bytes at {self.place(row * size)} are {verb} by one thread and {done} by {self.describe(other)}, "
            "and nothing orders the two",
            lane=int(threads.lanes[position]),
        )

    def place(self, offset: int) -> str:
        return f"byte {offset} of {self.name}"

    def load(
        self, rows: slice | np.ndarray, elements: int, dtype: np.dtype, threads: Threads, repeat: bool
    ) -> np.ndarray:
        """Return the elements, ``(n, elements)``.

        With ``repeat``, every thread reads the one row.
        """
        size = elements * dtype.itemsize
        if self.shadow is not None:
            seen = np.full(len(threads.who), rows.start) if repeat and isinstance(rows, slice) else rows
            self._check_written(seen, size, threads)
            for kind in ("write", "atomic"):
                self._race(self.shadow.conflict(kind, seen, size, threads), "read", seen, size, threads)
            self.shadow.use("read", seen, size, threads)
        return self.data.view(dtype).reshape(-1, elements)[rows]

    def _check_written(self, rows: slice | np.ndarray, size: int, threads: Threads) -> None:
        """Accept everything: global memory is written before the launch."""

    def store(self, rows: slice | np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Store ``values``, ``(n, elements)``."""
        size = values.shape[1] * values.dtype.itemsize
        data = self.data.view(values.dtype).reshape(-1, values.shape[1])
        self.check_write(rows, size, threads)
        data[rows] = values
        harmless = (lambda: (data[rows] == values).all(axis=1)) if self.may_repeat_writes else None
        self._race(self.tracked.write(rows, size, threads, harmless), "written", rows, size, threads)

    def check_write(self, rows: slice | np.ndarray, size: int, threads: Threads) -> None:
        for kind in ("write", "read", "atomic"):
            self._race(self.tracked.conflict(kind, rows, size, threads), "written", rows, size, threads)

    def update(
        self, rows: np.ndarray, function: Callable, operands: Sequence[np.ndarray], threads: Threads
    ) -> np.ndarray:
        """Do an atomic, and return the old values.

        Threads on one address take turns, by their numbers.
        """
        dtype = operands[0].dtype
        self._check_written(rows, dtype.itemsize, threads)
        for kind in ("write", "read"):
            found = self.tracked.conflict(kind, rows, dtype.itemsize, threads)
            self._race(found, "changed atomically", rows, dtype.itemsize, threads)
        self.tracked.use("atomic", rows, dtype.itemsize, threads)
        data = self.data.view(dtype)
        old = np.empty(len(rows), dtype)
        for turn in _turns(rows):
            old[turn] = data[rows[turn]]
            data[rows[turn]] = function(old[turn], *(x[turn] for x in operands))
        return old


def _turns(rows: np.ndarray) -> list[np.ndarray]:
    """Group positions: the first thread of each address, the second of each, and so on."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    by_rank = np.argsort(rank, kind="stable")
    return np.split(order[by_rank], np.flatnonzero(np.diff(rank[by_rank])) + 1)


class ScratchMemory(_Storage):
    """Shared memory of every CTA, or local memory of every thread: a block of bytes for each owner.

    Triton lets threads that hold the same element all store it, in one instruction: which of them
    wins does not matter.
    """

    may_repeat_writes = True

    def __init__(self, name: str, base: int, nbytes: int, owner: np.ndarray, granule: int, **shadow):
        self.base, self.nbytes, self.owner = base, nbytes, owner
        self.stride = _align(max(nbytes, 1), _BLOCK)
        total = self.stride * (int(owner[-1]) + 1)
        describe = shadow.pop("describe")
        super().__init__(name, np.zeros(total, np.uint8), Shadow(total, granule, **shadow), describe)

    def place(self, offset: int) -> str:
        return f"byte {offset % self.stride} of {self.name}"

    def _check_written(self, rows: slice | np.ndarray, size: int, threads: Threads) -> None:
        unwritten = self.tracked.unwritten(rows, size)
        if unwritten.any():
            first = int(np.argmax(unwritten))
            row = np.arange(self.tracked.cells)[rows][first] if isinstance(rows, slice) else rows[first]
            raise UnwrittenError(
                f"{size} bytes at {self.place(int(row) * size)} are read, but nothing has written them",
                lane=int(threads.lanes[first]),
            )

    def rows(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.base
        wrong = (offsets < 0) | (offsets + size > self.nbytes)
        if wrong.any():
            first = int(np.argmax(wrong))
            offset = int(np.broadcast_to(offsets, len(threads.lanes))[first])
            raise AddressError(
                f"{size} bytes at byte {offset} are outside {self.name}, which has {self.nbytes} bytes",
                lane=int(threads.lanes[first]),
            )
        check_alignment(offsets, size, self.place, threads)
        return (self.owner[threads.lanes] * self.stride + offsets) // size


def check_alignment(offsets: np.ndarray, size: int, place: Callable[[int], str], threads: Threads) -> None:
    wrong = offsets & (size - 1) != 0
    if wrong.any():
        first = int(np.argmax(wrong))
        raise AddressError(
            f"an access of {size} bytes must be aligned to {size} bytes, got {place(int(offsets[first]))}",
            lane=int(threads.lanes[first]),
        )


class _Cluster(_Storage):
    """Regions that overlap, with one piece of memory and of address space."""

    def __init__(self, regions: list[Region], number: int, describe: Callable[[int], str]):
        start, end = min(r.address for r in regions), max(r.address + r.nbytes for r in regions)
        if end - start > _LARGEST_REGION:
            raise LaunchError(f"a region may have {_LARGEST_REGION} bytes, got {end - start}")
        self.regions, self.nbytes = regions, end - start
        self.real_base = start - start % _BLOCK
        self.virtual_base = (number + 1) * _SPACING
        self.start = self.virtual_base + start % _BLOCK
        self.end = self.start + self.nbytes
        self.all_writable = all(r.writable for r in regions)
        self.any_writable = any(r.writable for r in regions)
        super().__init__(
            "+".join(r.name for r in regions), _bytes_at(self.real_base, self.end - self.virtual_base), None, describe
        )

    def virtual(self, address: int) -> int:
        return address - self.real_base + self.virtual_base

    def place(self, offset: int) -> str:
        return f"byte {offset - (self.start - self.virtual_base)} of {self.name}"

    def check_writable(self, addresses: np.ndarray, size: int, threads: Threads) -> None:
        if self.all_writable:
            return
        allowed = np.zeros(len(addresses), bool)
        for region in self.regions:
            first = self.virtual(region.address)
            allowed |= region.writable & (addresses >= first) & (addresses + size <= first + region.nbytes)
        if not allowed.all():
            raise AddressError(f"{self.name} is read-only, and is written", lane=int(threads.lanes[np.argmin(allowed)]))


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    """Return a view of real memory in whole blocks.

    It may contain bytes outside the regions, but every access is checked before.
    """
    buffer = (ctypes.c_uint8 * _align(nbytes, _BLOCK)).from_address(address)
    return np.frombuffer(memoryview(buffer), np.uint8)


class GlobalMemory:
    """All regions of a launch."""

    def __init__(self, regions: Sequence[Region], granule: int, describe: Callable[[int], str], **shadow):
        self.granule, self.shadow_options, self.describe = granule, shadow, describe
        self.clusters: list[_Cluster] = []
        group: list[Region] = []
        end = 0
        for region in sorted((r for r in regions if r.nbytes), key=lambda r: (r.address, -r.nbytes)):
            if group and region.address >= end:
                self._add(group)
                group = []
            group.append(region)
            end = max(end, region.address + region.nbytes)
        if group:
            self._add(group)
        self.starts = np.array([c.virtual_base for c in self.clusters], np.uint64)

    def _add(self, group: list[Region]) -> None:
        self.clusters.append(_Cluster(group, len(self.clusters), self.describe))

    def virtual(self, region: Region) -> int:
        """Return the address that the kernel sees. That of an empty tensor belongs to no region."""
        for cluster in self.clusters:
            if region in cluster.regions:
                return cluster.virtual(region.address)
        return (len(self.clusters) + 2) * _SPACING + region.address % _BLOCK

    def parts(self, addresses: np.ndarray, size: int, threads: Threads) -> list[tuple[_Cluster, np.ndarray | None]]:
        """Return each cluster that is accessed, with the positions of its accesses (None: all)."""
        lowest, highest = int(addresses.min()), int(addresses.max())
        for cluster in self.clusters:
            if cluster.start <= lowest and highest + size <= cluster.end:
                check_alignment(addresses - np.uint64(cluster.virtual_base), size, cluster.place, threads)
                return [(cluster, None)]
        number = np.searchsorted(self.starts, addresses, side="right") - 1
        found: list[tuple[_Cluster, np.ndarray | None]] = []
        for i in np.unique(number):
            positions = np.flatnonzero(number == i)
            self._check_bounds(i, addresses, positions, size, threads)
            cluster = self.clusters[i]
            part = (
                Threads(np.broadcast_to(threads.lanes, addresses.shape)[positions], threads.who, None)
                if len(addresses) > 1
                else threads
            )
            check_alignment(addresses[positions] - np.uint64(cluster.virtual_base), size, cluster.place, part)
            found.append((cluster, positions))
        return found

    def _check_bounds(self, i: int, addresses: np.ndarray, positions: np.ndarray, size: int, threads: Threads) -> None:
        chosen = addresses[positions]
        cluster = self.clusters[max(i, 0)] if self.clusters else None
        inside = np.zeros(len(chosen), bool)
        if i >= 0 and cluster is not None:
            inside = (chosen >= cluster.start) & (chosen <= np.uint64(cluster.end - min(size, cluster.nbytes)))
            inside &= size <= cluster.nbytes
        if inside.all():
            return
        first = int(np.argmin(inside))
        address = int(chosen[first])
        if address < 4096:
            where = f"through a null pointer (address {address})"
        elif cluster is None:
            where = f"at address {address:#x}, but the launch has no memory at all"
        else:
            where = f"at byte {address - cluster.start} of {cluster.name}, which has {cluster.nbytes} bytes"
        raise AddressError(f"an access of {size} bytes {where}", lane=int(threads.lanes[positions[first]]))

    def shadowed(self, cluster: _Cluster) -> _Cluster:
        """Give the cluster a shadow at its first access.

        Memory that nothing may write needs none.
        """
        if cluster.shadow is None and cluster.any_writable:
            cluster.shadow = Shadow(len(cluster.data), self.granule, **self.shadow_options)
        return cluster


def granule_of(sizes: Sequence[int]) -> int:
    """Return the smallest access, in bytes."""
    if any(s & (s - 1) for s in sizes):
        raise NotModelledError(f"accesses must have a power of two of bytes, got {sorted(set(sizes))}")
    return min([*sizes, _BLOCK // 2])
