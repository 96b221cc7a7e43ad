"""The processes of a run, and the queue that they take slices from, in the store of torch's process
group.

Processes share nothing but counters in the store: there is no collective, so no process waits for
another. A slice goes to whoever asks next. When none is left, an idle process makes again what is
still missing after its patience. So a slow, stopped or dead process delays nobody, and does no harm
if it goes on, since it writes the same bytes under the same name.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..kernels.torch_internals import default_store
from .directory import AGAIN, GenerationError

_START_TIMEOUT = timedelta(minutes=5)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two looks at the store
LEAST_PATIENCE, _WITHOUT_EXPERIENCE = 5.0, 60.0  # seconds
TIMES_SLOWEST = 1.5
_LINGER = 5.0  # seconds that the process that keeps the store waits for the others to leave
_calls = itertools.count()


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run. ``keeps_store``: the store ends with this
    process."""

    rank: int
    world_size: int
    store: Any
    keeps_store: bool = False

    def leave(self) -> None:
        """Leave the run. The process that keeps the store waits for the others, but not for long."""
        left, give_up = self.store.add("left", 1), time.monotonic() + _LINGER
        while self.keeps_store and left < self.world_size and time.monotonic() < give_up:
            time.sleep(_FIRST_PAUSE)
            left = self.store.add("left", 0)


def processes() -> Processes:
    """Return the processes of the initialized process group, of torchrun's environment, or this
    process alone.

    Under torchrun only the store is used. A group of gloo or NCCL would be a mesh of connections
    for collectives that nobody calls, and could not be made before the last process has started.
    """
    if not dist.is_available():
        raise ImportError("ddim_fast.generation needs torch.distributed, which this torch was built without")
    call = next(_calls)
    if dist.is_initialized():
        store = dist.PrefixStore(f"ddim_fast.generate/{call}", default_store())
        return Processes(dist.get_rank(), dist.get_world_size(), store, keeps_store=dist.get_rank() == 0)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, dist.HashStore())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not of_agent,
        timeout=_START_TIMEOUT,
        wait_for_workers=False,
    )
    # torchrun keeps its store when it restarts the processes.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"ddim_fast.generate/{attempt}/{call}", tcp)
    return Processes(rank, world_size, store, keeps_store=rank == 0 and not of_agent)


def agree(
    who: Processes, settings: Mapping[str, Any], begin: Callable[[], None], join: Callable[[Mapping[str, Any]], None]
) -> None:
    """Let rank 0 begin, then the others join. If rank 0 refuses, all refuse.

    Raises:
        GenerationError: rank 0 refused. (It raises its own error.)
    """
    if who.rank == 0:
        try:
            begin()
        except BaseException as error:
            who.store.set("begun", json.dumps({"refused": str(error)}))
            who.leave()
            raise
        who.store.set("begun", json.dumps({"refused": None}))
        return
    who.store.wait(["begun"], _START_TIMEOUT)
    refused = json.loads(who.store.get("begun"))["refused"]
    try:
        if refused is not None:
            raise GenerationError(f"rank 0 refused: {refused}")
        join(settings)
    except BaseException:
        who.leave()
        raise


class WorkQueue:
    """The queue of slices. Every process has its own object, with the same store.

    Args:
        total: the number of slices.
        patience: seconds without a finished slice after which a slice that another process took is
            taken again, when no other is left. None: 1.5 times this process's slowest slice, at
            least 5 s (60 s where it made none).
    """

    def __init__(self, who: Processes, total: int, patience: float | None = None):
        self._store, self._total = who.store, total
        self._patience, self._slowest = patience, 0.0

    # --- Slices -------------------------------------------------------------------------------------------------------

    def turns(self, flush: Callable[[], None]) -> Iterator[int]:
        """Yield the slices that this process is to make, until all are finished. ``flush`` waits
        for its own writes."""
        while (index := self._store.add("next", 1) - 1) < self._total:
            yield from self._timed(index)
        flush()
        for turn in self._until(lambda: self._store.add("finished", 0) >= self._total):
            missing = self.missing()
            if not missing:
                return
            # In each turn one process makes a slice, and another slice is made by the next process
            # that asks.
            mine = next((i for i in missing if self._store.add(f"again/{turn}/{i}", 1) == 1), None)
            if mine is not None:
                yield from self._timed(mine)
                flush()

    def _timed(self, index: int) -> Iterator[int]:
        started = time.monotonic()
        yield index
        self._slowest = max(self._slowest, time.monotonic() - started)

    def _until(self, done: Callable[[], bool]) -> Iterator[int]:
        """Yield 1, 2, ... each time that the patience is over, until it is done. The clock restarts
        whenever a slice is finished."""
        pause, turn, seen, since = _FIRST_PAUSE, 0, None, time.monotonic()
        while not done():
            if (finished := self._store.add("finished", 0)) != seen:
                seen, since = finished, time.monotonic()
            elif time.monotonic() - since > self.patience:
                turn, since = turn + 1, time.monotonic()
                yield turn
                continue
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def patience(self) -> float:
        if self._patience is not None:
            return self._patience
        return max(LEAST_PATIENCE, TIMES_SLOWEST * self._slowest) if self._slowest else _WITHOUT_EXPERIENCE

    def is_finished(self, index: int) -> bool:
        return self._store.check([f"record/{index}"])

    def finish(self, index: int, record: Mapping[str, Any], made: bool) -> None:
        """Record that a shard is safe on the disk."""
        self._store.set(f"record/{index}", json.dumps(record))
        if self._store.add(f"safe/{index}", 1) == 1:
            self._store.add("made" if made else "found", record["count"])
            if bad := record.get("non_finite"):
                self._store.add("non_finite", bad)
            self._store.add("finished", 1)

    def missing(self) -> list[int]:
        """Return the slices that are not finished, by bisection: few queries, since most are
        finished."""

        def within(first: int, last: int) -> Iterator[int]:
            if self._store.check([f"record/{i}" for i in range(first, last)]):
                return
            if last - first == 1:
                yield first
                return
            middle = (first + last) // 2
            yield from within(first, middle)
            yield from within(middle, last)

        return list(within(0, self._total)) if self._total else []

    def records(self) -> list[dict[str, Any]]:
        """Return all shards' records, one round trip each: only the process that finishes the set
        needs them."""
        return [json.loads(self._store.get(f"record/{i}")) for i in range(self._total)]

    @property
    def samples(self) -> tuple[int, int]:
        """The numbers of samples made in this run, and found from before."""
        return self._store.add("made", 0), self._store.add("found", 0)

    @property
    def non_finite(self) -> int:
        return self._store.add("non_finite", 0)

    # --- The end ------------------------------------------------------------------------------------------------------

    def close(self, finish: Callable[[], None]) -> None:
        """Let one process finish the set; the others wait for it, and another takes over where that
        takes too long."""

        def try_to(turn: int) -> None:
            if self._store.add(f"closing/{turn}", 1) == 1:
                finish()
                self._store.set("closed", "yes")

        try_to(0)
        for turn in self._until(lambda: self._store.check(["closed"])):
            try_to(turn)


@contextmanager
def store_errors(is_finished: Callable[[], bool]) -> Iterator[None]:
    """Raise OSError for a lost store; nothing where the set was finished meanwhile."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if not is_finished():
            raise OSError(
                f"the store of the process group is lost, so another process may have died ({error}). {AGAIN}"
            ) from error
