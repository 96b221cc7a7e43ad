"""Compare two runs of ``make bench``: what got slower or faster, beyond the noise.

\b
    python benchmarks/compare.py before.json after.json

A ratio is how many times longer another contender takes than ours. Both were timed in turn in one
process, so other load hardly affects it. A ratio has changed if it differs by more than
``--threshold``, and by more than the combined spread of both runs (interquartile ranges over
rounds, as the root of the sum of their squares). If both runs have the same kind of machine,
versions and threads, our own seconds are compared in the same way.

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
"""Ratios of two ``make bench`` runs of the same code differ by less than this."""
EVEN = 0.05
"""A ratio this close to 1 means that neither is faster."""
MACHINE = ("cpu_model", "cpu_count", "instruction_set", "torch_cpu_capability", "threads")
VERSIONS = ("python", "torch", "diffusers", "numpy")

Measured = tuple[float, float]
"""A value and its relative spread, which is NaN after too few rounds."""


class Unusable(click.ClickException):
    exit_code = 2


@dataclass(frozen=True)
class Case:
    """Ratios by "other / ours", and the seconds of our contenders by name."""

    ratios: dict[str, Measured]
    seconds: dict[str, Measured]


@dataclass(frozen=True)
class Run:
    """One run: its file, commit, machine and measured cases."""

    path: str
    commit: str
    facts: dict[str, Any]
    cases: dict[str, Case]


@dataclass(frozen=True)
class Change:
    """One number in both runs.

    ``gain`` is the larger value over the smaller, minus 1; negative if ours got slower.
    """

    case: str
    what: str
    before: float
    after: float
    gain: float
    allowed: float
    verdict: str


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> Run:
    """Read a file that ``make bench`` wrote.

    Raises:
        Unusable: the file is not one.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(
            f"a run must be a JSON file that can be read, got {path} ({error}): write one with make bench"
        ) from None
    found = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise Unusable(f'a run must have a list "benchmarks", got none in {path}: pass a file that make bench wrote')
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
    """Return which facts about machine, threads or versions differ, as lines."""
    first, second = before.facts, after.facts
    return [f"{name}: {first.get(name)} -> {second.get(name)}" for name in names if first.get(name) != second.get(name)]


def changes(before: Run, after: Run, what: str, threshold: float = THRESHOLD) -> list[Change]:
    """Return the changes of all common "ratios" or "seconds" (``what``), the largest loss first."""
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
    """Return the cases, and the ratios of common cases, that ``second`` lacks."""
    found = []
    for name, case in first.cases.items():
        if name not in second.cases:
            found.append(name)
        else:
            found += [f"{name}: {ratio}" for ratio in case.ratios if ratio not in second.cases[name].ratios]
    return sorted(found)


def agreement(before: Run, after: Run) -> dict[str, Any]:
    """Summarise how well the second run reproduces the first.

    Counts the ratios and those that agree on which is faster, and finds the largest difference.
    """
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
    """Return 1 if ours is faster, -1 if the other is, 0 if neither."""
    return 0 if max(ratio, 1 / ratio) <= 1 + EVEN else 1 if ratio > 1 else -1


# --- Showing ----------------------------------------------------------------------------------------------------------


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the report as text."""
    for when in ("before", "after"):
        yield f"{when + ':':8}{report[when]['path']}, commit {report[when]['commit'][:12]}"
    if report["differences"]:
        yield f"not the same: {'; '.join(report['differences'])}"
    if "seconds" not in report["compared"]:
        yield "seconds are not compared, only ratios"
    for verdict in ("slower", "faster"):
        yield from _table(f"{verdict}, beyond the noise", [c for c in report["changes"] if c["verdict"] == verdict])
    for title, names in report["missing"].items():
        yield from ["", title, *(f"  {name}" for name in names)] if names else []
    unjudged = [f"  {c['case']}: {c['what']}" for c in report["changes"] if c["verdict"] == "not judged"]
    yield from ["", "not judged, fewer than four rounds in a run", *unjudged] if unjudged else []
    yield ""
    count = [sum(c["verdict"] == verdict for c in report["changes"]) for verdict in ("slower", "faster", "same")]
    yield "{} slower, {} faster, {} within the noise".format(*count)
    same = report["agreement"]
    yield (
        f"{same['agree_on_which_is_faster']} of {same['ratios']} ratios agree on which is faster ({same['even']} of them within "
        f"{EVEN:.0%} of 1); {same['within_threshold']} differ by at most {THRESHOLD:.0%}, the largest by {same['largest_difference']:.0%}"
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
    """Return the whole comparison as plain data."""
    if not changes(before, after, "ratios"):
        raise Unusable(
            f"both runs must have a ratio in common, got none in {before.path} and {after.path}: measure the same cases"
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
    help="What to compare. auto: ratios, and seconds if machine, versions and threads are the same.",
)
@click.option("--json", "file", type=click.File("w"), help="Write the comparison to this file; - for standard output.")
def main(before: str, after: str, threshold: float, measure: str, file: TextIO | None) -> None:
    report = report_on(read_run(before), read_run(after), threshold, measure)
    if file is not None:
        file.write(json.dumps(_without_nan(report), indent=1) + "\n")
    if file is None or file.name != "<stdout>":
        click.echo("\n".join(lines(report)))
    raise SystemExit(any(change["verdict"] == "slower" for change in report["changes"]))


def _without_nan(value: Any) -> Any:
    """Return the value for JSON, with NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
