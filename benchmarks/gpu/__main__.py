"""Run the sections, the most valuable first, and write what each found as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from . import captures, loops, steps
from .machine import Machine, Rehearsal
from .results import Results, Row

SECTIONS: dict[str, Callable[[Machine], list[Row]]] = {
    "correctness": steps.correctness,
    "bandwidth": steps.bandwidth,
    "replays": loops.replays,
    "networks": loops.networks,
    "adapters": captures.adapters,
    "recovery": captures.recovery,
    "streams": captures.streams,
    "costs": captures.costs,
    "launches": steps.launches,
    "robot": loops.robot,
    "noise": steps.noise,
    "thresholds": steps.thresholds,
    "counters": steps.counters,
}


@click.command(help=f"{__doc__}\n\nSections: {', '.join(SECTIONS)}.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("out/gpu"), show_default=True,
              help="A folder for gpu.json and gpu.md. What they hold is kept: later runs add to it.")  # fmt: skip
@click.option("--only", help="Run these sections alone, separated by commas.")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="Begin no section after so many minutes.")
@click.option("--rehearse", is_flag=True, help="Run on the CPU, with stand-ins: to see that all sections run.")
def main(out: Path, only: str | None, minutes: float, rehearse: bool) -> None:
    chosen = list(SECTIONS) if only is None else only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise click.UsageError(f"--only takes {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if not rehearse and not torch.cuda.is_available():
        raise click.ClickException("a CUDA device is needed, and torch finds none: --rehearse runs it on the CPU")
    machine = Rehearsal() if rehearse else Machine()
    results, started, failed = Results(out, machine.provenance()), time.monotonic(), []
    for name in chosen:
        if time.monotonic() - started > 60 * minutes:
            click.echo(f"{name}: left out, {minutes:g} minutes are over (--only {name} runs it)")
            failed.append(name)
            continue
        passed = results.run(name, lambda name=name: SECTIONS[name](machine))  # type: ignore[misc]
        found = results.sections[name]
        click.echo(f"{name}: {'done' if passed else found['error'].splitlines()[0]} ({found['seconds']} s)")
        if not passed:
            failed.append(name)
    click.echo(f"{out / 'gpu.json'}, {out / 'gpu.md'}: {len(chosen) - len(failed)} of {len(chosen)} sections")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
