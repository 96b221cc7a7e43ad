"""What got slower or faster from one run of ``make bench`` to another, beyond the noise.

\b
    python benchmarks/compare.py before.json after.json

A ratio says how many times longer another contender takes than ours. Both were timed in turn in one process, so it hardly
depends on what else ran. A ratio has changed where it differs by more than ``--threshold``, and by more than the spreads
of both runs together (interquartile ranges over rounds, as the root of the sum of their squares). Where both runs come
from one kind of machine, with the same versions and threads, our own seconds are compared in the same way.

\b
Exit code 0: nothing got slower. 1: something did. 2: a file cannot be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import click

THRESHOLD = 0.15
"""Two runs of the same code differ by less than this: what ``make bench`` promises of its ratios."""
EVEN = 0.05
"""A ratio this near to 1 says that neither is faster."""
MACHINE = ("cpu_model", "cpu_count", "instruction_set", "torch_cpu_capability", "threads")
VERSIONS = ("python", "torch", "diffusers", "numpy")

Measured = tuple[float, float]
"""A value and its spread, a share of it; NaN if there were too few rounds to tell."""


class Unusable(click.ClickException):
    exit_code = 2


@dataclass(frozen=True)
class Case:
    """Ratios by "another / ours", and the seconds of our contenders, by their names."""

    ratios: dict[str, Measured]
    seconds: dict[str, Measured]


@dataclass(frozen=True)
class Run:
    """What one run measured, where, and from what."""

    path: str
    commit: str
    facts: dict[str, Any]
    cases: dict[str, Case]


@dataclass(frozen=True)
class Change:
    """One number in both runs. ``gain`` is the difference, the larger over the smaller less 1: below 0 where ours got slower."""

    case: str
    what: str
    before: float
    after: float
    gain: float
    allowed: float
    verdict: str


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> Run:
    """A file that ``make bench`` wrote.

    Raises:
        Unusable: it is not one.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(
            f"a run must be a JSON file that can be read, got {path} ({error}): make bench writes one"
        ) from None
    found = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise Unusable(f'a run must have a list "benchmarks", got none in {path}: give the file that make bench writes')
    try:
        cases = {one["fullname"]: _case(one["extra_info"]) for one in found if "ratios" in one["extra_info"]}
        facts = data["machine_info"]["ddim_fast"]
        commit = data["commit_info"]["id"] or "unknown"
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(
            f"a run must have machine_info.ddim_fast, commit_info, and for each benchmark fullname and extra_info with positive "
            f"ratios and seconds, got {type(error).__name__} ({error}) in {path}: measure again with make bench"
        ) from None
    if not cases:
        raise Unusable(
            f"a run must have a benchmark with ratios, got none of {len(found)} in {path}: measure again with make bench"
        )
    return Run(str(path), commit, facts, cases)


def _case(info: dict[str, Any]) -> Case:
    ratios = {name: _measured(one["ratio"], one["spread"]) for name, one in info["ratios"].items()}
    ours = dict.fromkeys(name.rpartition(" / ")[2] for name in ratios)
    return Case(ratios, {name: _measured(info["seconds"][name], info["spread"][name]) for name in ours})


def _measured(value: float, spread: float | None) -> Measured:
    if not 0 < value < math.inf:
        raise ValueError(f"not positive and finite: {value}")
    return float(value), math.nan if spread is None else float(spread)


# --- Comparing --------------------------------------------------------------------------------------------------------


def differences(before: Run, after: Run, names: tuple[str, ...] = MACHINE + VERSIONS) -> list[str]:
    """Where machine, threads or versions are not the same."""
    first, second = before.facts, after.facts
    return [f"{name}: {first.get(name)} -> {second.get(name)}" for name in names if first.get(name) != second.get(name)]


def changes(before: Run, after: Run, what: str, threshold: float = THRESHOLD) -> list[Change]:
    """All ``what``, "ratios" or "seconds", that both runs have, those that lost most first."""
    found = []
    for name in before.cases.keys() & after.cases.keys():
        first, second = getattr(before.cases[name], what), getattr(after.cases[name], what)
        for label in first.keys() & second.keys():
            shown = label if what == "ratios" else f"seconds of {label}"
            found.append(_change(name, shown, first[label], second[label], what == "ratios", threshold))
    return sorted(found, key=lambda change: (change.gain, change.case, change.what))


def _change(case: str, what: str, before: Measured, after: Measured, more_is_better: bool, threshold: float) -> Change:
    allowed = max(threshold, math.hypot(before[1], after[1]))
    far = max(after[0] / before[0], before[0] / after[0]) - 1
    gain = far if (after[0] >= before[0]) == more_is_better else -far
    if math.isnan(before[1]) or math.isnan(after[1]):
        allowed, verdict = math.nan, "not judged"
    elif far <= allowed:
        verdict = "same"
    else:
        verdict = "faster" if gain > 0 else "slower"
    return Change(case, what, before[0], after[0], gain, allowed, verdict)


def only_in(first: Run, second: Run) -> list[str]:
    """Cases, and ratios of common cases, that ``second`` lacks."""
    found = []
    for name, case in first.cases.items():
        if name not in second.cases:
            found.append(name)
        else:
            found += [f"{name}: {ratio}" for ratio in case.ratios if ratio not in second.cases[name].ratios]
    return sorted(found)


def agreement(before: Run, after: Run) -> dict[str, Any]:
    """How well the second run repeats the first: ratios, those that agree on which is faster, and the largest difference."""
    found = changes(before, after, "ratios")
    far = [max(c.after / c.before, c.before / c.after) - 1 for c in found]
    worst = max(range(len(far)), key=far.__getitem__)
    return {
        "ratios": len(found),
        "agree_on_which_is_faster": sum(_winner(c.before) * _winner(c.after) >= 0 for c in found),
        "even": sum(0 in (_winner(c.before), _winner(c.after)) for c in found),
        "within_threshold": sum(f <= THRESHOLD for f in far),
        "median_difference": sorted(far)[len(far) // 2],
        "largest_difference": far[worst],
        "largest_difference_in": f"{found[worst].case}: {found[worst].what}",
    }


def _winner(ratio: float) -> int:
    """1 where ours is faster, -1 where the other is, 0 where neither."""
    return 0 if max(ratio, 1 / ratio) <= 1 + EVEN else 1 if ratio > 1 else -1


# --- Showing ----------------------------------------------------------------------------------------------------------


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    for when in ("before", "after"):
        yield f"{when + ':':8}{report[when]['path']}, commit {report[when]['commit'][:12]}"
    if report["differences"]:
        yield f"not the same: {'; '.join(report['differences'])}"
    if "seconds" not in report["compared"]:
        yield "seconds are not compared, ratios alone"
    for verdict in ("slower", "faster"):
        yield from _table(f"{verdict}, beyond the noise", [c for c in report["changes"] if c["verdict"] == verdict])
    for title, names in report["missing"].items():
        yield from ["", title, *(f"  {name}" for name in names)] if names else []
    unjudged = [f"  {c['case']}: {c['what']}" for c in report["changes"] if c["verdict"] == "not judged"]
    yield from ["", "not judged, for fewer than four rounds in a run", *unjudged] if unjudged else []
    yield ""
    count = [sum(c["verdict"] == verdict for c in report["changes"]) for verdict in ("slower", "faster", "same")]
    yield "{} slower, {} faster, {} within the noise".format(*count)
    same = report["agreement"]
    yield (
        f"{same['agree_on_which_is_faster']} of {same['ratios']} ratios agree on which is faster ({same['even']} of them within "
        f"{EVEN:.0%} of 1); {same['within_threshold']} differ by {THRESHOLD:.0%} at most, the largest by {same['largest_difference']:.0%}"
    )


def _table(title: str, found: list[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    rows = [("case", "what", "before", "after", "ours is", "noise")]
    for c in found:
        rows.append(
            (
                c["case"],
                c["what"],
                f"{c['before']:.4g}",
                f"{c['after']:.4g}",
                f"{c['gain']:+.0%}",
                f"{c['allowed']:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield from ["", title]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def report_on(before: Run, after: Run, threshold: float = THRESHOLD, measure: str = "auto") -> dict[str, Any]:
    """Everything that is found, as plain data."""
    if not changes(before, after, "ratios"):
        raise Unusable(
            f"two runs must have a ratio in common, got none in {before.path} and {after.path}: measure the same cases"
        )
    different = differences(before, after)
    compared = {"ratios": ["ratios"], "seconds": ["seconds"]}.get(measure)
    compared = compared or (["ratios"] if different else ["ratios", "seconds"])
    return {
        **{when: {"path": run.path, "commit": run.commit, "facts": run.facts} for when, run in (("before", before), ("after", after))},
        "threshold": threshold,
        "differences": different,
        "compared": compared,
        "changes": [asdict(change) for what in compared for change in changes(before, after, what, threshold)],
        "missing": {"missing in the second run": only_in(before, after), "new in the second run": only_in(after, before)},
        "agreement": agreement(before, after),
    }  # fmt: skip


@click.command(help=__doc__)
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("--threshold", type=click.FloatRange(0, min_open=True), default=THRESHOLD, show_default=True)
@click.option(
    "--measure",
    type=click.Choice(["auto", "ratios", "seconds"]),
    default="auto",
    show_default=True,
    help="What is compared. auto: ratios, and seconds where machine, versions and threads are the same.",
)
@click.option("--json", "file", type=click.File("w"), help="Write all that was found here; - for standard output.")
def main(before: str, after: str, threshold: float, measure: str, file: TextIO | None) -> None:
    report = report_on(read_run(before), read_run(after), threshold, measure)
    if file is not None:
        file.write(json.dumps(_without_nan(report), indent=1) + "\n")
    if file is None or file.name != "<stdout>":
        click.echo("\n".join(lines(report)))
    raise SystemExit(any(change["verdict"] == "slower" for change in report["changes"]))


def _without_nan(value: Any) -> Any:
    """The same, with null where JSON has no word."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
