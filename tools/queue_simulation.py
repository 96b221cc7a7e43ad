"""Simulate what slow, hung and dead processes cost a run of ddim-fast generate: its queue against a
fixed assignment of slices.

    python tools/queue_simulation.py            # print the table
    python tools/queue_simulation.py --write    # put it into docs/GENERATE.md

The rules are those of ddim_fast.generation.processes. Each process takes the next slice in order.
When none is left, a process waits until nothing has been finished for its patience, and then redoes
a slice that another has not finished. Times are in seconds: a process of speed 1 takes ``WORK``
seconds for its share. The time of each slice varies by 5 % (lognormal), from a fixed seed.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np

from ddim_fast.generation.processes import LEAST_PATIENCE, TIMES_SLOWEST

PAGE = Path(__file__).parent.parent / "docs/GENERATE.md"
BEGIN, END = "<!-- queue_simulation: begin -->", "<!-- queue_simulation: end -->"
WORK = 480.0
RESTART = 60.0  # seconds until torchrun's new processes have loaded the model


def dealt_out(durations: np.ndarray, deaths: Mapping[int, float]) -> float:
    """Return the end time if slice i is assigned to process i mod their number; inf if never.

    ``durations`` is (slices, processes).
    """
    ranks = durations.shape[1]
    ends = [durations[rank::ranks, rank].sum() for rank in range(ranks)]
    return math.inf if any(ends[rank] > death for rank, death in deaths.items()) else max(ends)


def queued(durations: np.ndarray, deaths: Mapping[int, float], again: bool = True) -> float:
    """Return the time when the last slice is finished; inf if never."""
    slices, ranks = durations.shape
    first, finished, last_finish = 0, [False] * slices, 0.0
    missing, slowest, turns, taken = slices, [0.0] * ranks, [0] * ranks, set()
    working: dict[int, int] = {}  # process -> slice
    events = [(0.0, rank, "free", -1) for rank in range(ranks)]
    while events:
        now, rank, what, index = heapq.heappop(events)
        if now > deaths.get(rank, math.inf):
            working.pop(rank, None)
            continue
        if what == "done":
            if working.get(rank) != index:
                continue  # it gave up the slice, because another finished it
            del working[rank]
            slowest[rank] = max(slowest[rank], durations[index, rank])
            if not finished[index]:
                finished[index], missing, last_finish = True, missing - 1, now
                if not missing:
                    return now
                for other in [other for other, held in working.items() if held == index]:
                    del working[other]
                    heapq.heappush(events, (now, other, "free", -1))
        mine = None
        if first < slices:
            mine, first = first, first + 1
        elif again:
            patience = max(LEAST_PATIENCE, TIMES_SLOWEST * slowest[rank])
            # "free" starts a wait; "look" ends one, during which a slice may have been finished.
            begun = now if what != "look" else last_finish
            if what == "look" and now - last_finish >= patience - 1e-9:
                turns[rank] += 1
                untaken = (i for i in range(slices) if not finished[i] and (turns[rank], i) not in taken)
                mine = next(untaken, None)
                begun = now
                if mine is not None:
                    taken.add((turns[rank], mine))
            if mine is None:
                heapq.heappush(events, (max(begun, last_finish) + patience, rank, "look", -1))
        if mine is not None:
            working[rank] = mine
            heapq.heappush(events, (now + durations[mine, rank], rank, "done", mine))
    return math.inf


def with_restart(durations: np.ndarray, deaths: Mapping[int, float]) -> float:
    """Return the end time under torchrun.

    A death ends all processes, which lose their current slices and restart with --resume.
    """
    slices, ranks = durations.shape
    death = min(deaths.values(), default=math.inf)
    ends, done = [0.0] * ranks, 0
    free = [(0.0, rank) for rank in range(ranks)]
    for index in range(slices):
        now, rank = heapq.heappop(free)
        end = now + durations[index, rank]
        done += end <= death
        ends.append(end)
        heapq.heappush(free, (end, rank))
    if max(ends) <= death:
        return max(ends)
    return death + RESTART + queued(durations[done:], {})


def scenarios(ranks: int) -> dict[str, tuple[np.ndarray, dict[int, float]]]:
    """Return the speeds and times of death of each scenario."""
    equal = np.ones(ranks)
    half, tenth = equal.copy(), equal.copy()
    half[: max(1, ranks // 20)] = 0.5
    tenth[0] = 0.1
    found = {
        "all alike": (equal, {}),
        f"{max(1, ranks // 20)} at half speed": (half, {}),
        "1 at a tenth of the speed": (tenth, {}),
        "1 stops for ever halfway": (equal, {ranks // 2: WORK / 2}),
    }
    if ranks >= 100:
        found[f"{ranks // 50} stop for ever halfway"] = (equal, {rank: WORK / 2 + rank for rank in range(ranks // 50)})
    return found


def shares(ranks: int, speeds: np.ndarray, deaths: Mapping[int, float], per_rank: int, seed: int = 0) -> list[float]:
    """Return the minimum possible time over that of each method; 0 if it never ends."""
    noise = np.random.default_rng(seed).lognormal(0.0, 0.05, (per_rank * ranks, 1))
    durations = WORK / per_rank * noise / speeds
    work = (WORK / per_rank * noise).sum()
    # The work that dead processes could have done until they died.
    lost = sum(speeds[rank] * death for rank, death in deaths.items())
    alive = sum(speed for rank, speed in enumerate(speeds) if rank not in deaths)
    least = (work - lost) / alive
    ends = [
        dealt_out(durations, deaths),
        queued(durations, deaths, again=False),
        queued(durations, deaths),
        with_restart(durations, deaths),
    ]
    return [least / end for end in ends]


def table(counts: Sequence[int] = (8, 512), per_rank: Sequence[int] = (4, 16, 64)) -> str:
    lines = [
        "| processes | what happens | shards a process | dealt out | queue, nothing twice | **queue** | torchrun, begun again |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in counts:
        for name, (speeds, deaths) in scenarios(ranks).items():
            for count in per_rank:
                cells = [f"{share:.0%}" if share else "never ends" for share in shares(ranks, speeds, deaths, count)]
                cells[3] = cells[3] if deaths else "–"
                lines.append(f"| {ranks} | {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--write", is_flag=True, help="Put the table into docs/GENERATE.md.")
def main(write: bool) -> None:
    found = table()
    click.echo(found)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
