"""Count how often correct subjects fail the checks of ddim_fast.verify, over many seeds.

python tools/false_alarms.py cpu --repeats 200 --check noise-normal --json out/false_alarms.json
"""

import json
import sys
import time
from pathlib import Path

import click
from tqdm.auto import tqdm

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import verify

BAD = (Outcome.FAILED, Outcome.ERROR)


def repeat(subject: str, checks: list[str] | None, seeds: range, full: bool, bar: tqdm) -> dict:
    """Run all checks with each seed.

    Returns:
        How often each check failed, its worst error, and every failure with its seed.
    """
    failures: list[dict] = []
    found = {}
    for seed in seeds:
        for result in verify(subject, checks=checks, full=full, seed=seed, required=()).results:
            one = found.setdefault(result.name, {"ran": 0, "failed": 0, "worst": 0.0, "seconds": 0.0})
            one["ran"] += result.outcome in (Outcome.PASSED, *BAD)
            one["failed"] += result.outcome in BAD
            one["worst"] = max(one["worst"], result.worst) if result.worst == result.worst else one["worst"]
            one["seconds"] += result.seconds
            if result.outcome in BAD:
                failures.append({"check": result.name, "seed": seed, "message": result.message})
        bar.update()
        bar.set_postfix(failures=len(failures))
    return {"subject": subject, "checks": found, "failures": failures}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("subjects", nargs=-1, required=True)
@click.option(
    "--check", "checks", multiple=True, type=click.Choice(list(CHECKS)), help="Run only this check; may be repeated."
)
@click.option("--repeats", default=100, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--first-seed",
    type=click.IntRange(min=0),
    help="The first of consecutive seeds; by default taken from the clock.",
)
@click.option("--full", is_flag=True, help="Run the full set.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results to this file, as JSON.")
def main(
    subjects: tuple[str, ...],
    checks: tuple[str, ...],
    repeats: int,
    first_seed: int | None,
    full: bool,
    json_file: Path | None,
) -> None:
    first = time.time_ns() if first_seed is None else first_seed
    with tqdm(total=len(subjects) * repeats, unit="verification") as bar:
        seeds = range(first, first + repeats)
        results = [repeat(subject, list(checks) or None, seeds, full, bar) for subject in subjects]
    for result in results:
        for name, one in result["checks"].items():
            click.echo(
                f"{result['subject']}: {name}: {one['failed']} of {one['ran']} failed, nearest {one['worst']:.2f}"
            )
    if json_file is not None:
        data = {"first_seed": first, "repeats": repeats, "full": full, "results": results}
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    sys.exit(any(result["failures"] for result in results))


if __name__ == "__main__":
    main()
