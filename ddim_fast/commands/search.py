"""``ddim-fast search``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import takes_model
from .outputs import OutputFile, duration

if TYPE_CHECKING:
    from ..search import FittedSolver, Found, Search
    from .run import Run

EFFORTS = {
    # name: samples for the cost table, for the refinement, for the held-out score; full sampling
    # runs that the refinement may use: a third of them where a fit follows, which moves timesteps,
    # too
    "quick": (24, 32, 64, 30),
    "normal": (48, 96, 200, 150),
    "thorough": (96, 256, 1000, 400),
}


@click.command()
@takes_model
@click.option("--steps", type=click.IntRange(1), required=True, help="Number of timesteps to find.")
@click.option(
    "--order",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Solver order: 1 is DDIM, 2 is multistep DDIM.",
)
@click.option(
    "--model-timesteps/--one-list",
    default=True,
    show_default=True,
    help="Also search for model timesteps, or find one list, which any DDIM sampler can use.",
)
@click.option(
    "--coefficients",
    is_flag=True,
    help="Then fit the solver, too: the weights of earlier predictions in every step, with the timesteps. Needs --order 2.",
)
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    default="normal",
    show_default=True,
    help="How many samples and sampling runs the search uses.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=1000, show_default=True, help="Search seed; the next one is held out."
)
@click.option(
    "--out",
    type=OutputFile((".json",)),
    default="timesteps.json",
    show_default=True,
    help="The file for the list and its provenance.",
)
def search(
    run: Run,
    steps: int,
    order: int,
    model_timesteps: bool,
    coefficients: bool,
    effort: str,
    seed: int,
    out: Path,
) -> None:
    """Find the few timesteps whose samples are closest to converged samples, for one model.

    First, dynamic programming finds the cheapest path over all possible steps, whose costs are
    measured along converged trajectories. Then the search moves single timesteps and evaluates each
    move by sampling: the timesteps visited, and the model timesteps, which the model is given
    instead. A model timestep within a long step brings the result closer to that of many short
    steps. The result is evaluated on held-out noise, next to every closed-form spacing, and written
    as a small JSON file for --timesteps of all commands, and for
    DDIMSampler(timesteps="FILE.json") in Python.

    With --coefficients the file is a whole solver: a row of numbers for each step, fitted so that
    its runs end where converged ones do. Fewer steps then reach as far. A search that was
    interrupted (Ctrl-C, a crash) goes on where it was, from FILE.json.partial.

    \b
    Examples:
      ddim-fast search --steps 10 --out ten.json
      ddim-fast sample --timesteps ten.json
      ddim-fast search --steps 8 --coefficients --out eight.json
      ddim-fast search --steps 8 --model path/to/pipeline --guidance 3 --effort thorough
    """
    from ..search import Search, search_timesteps
    from ..utils.progress import tqdm
    from .run import conditioning_rule

    run.load()
    count, refine_count, held_out, refine_runs = EFFORTS[effort]
    wanted = Search(
        run.model,
        run.noise_schedule(),
        run.sample_shape,
        num_inference_steps=steps,
        order=order,
        conditioning=conditioning_rule(run),
        guidance_scale=None if run.guidance == 1 else run.guidance,
        sampler_options=run.sampler_options(),
        count=count,
        refine_count=refine_count,
        held_out=held_out,
        refine_runs=refine_runs // 3 if coefficients else refine_runs,
        model_timesteps=model_timesteps,
        seed=seed,
        coefficients=coefficients,
        device=run.where,
    )
    partial = out.with_name(out.name + ".partial")
    if not run.quiet:
        run.say(_beforehand(wanted, partial))
    with tqdm(total=wanted.calls(), desc="searching", unit="call", disable=run.quiet) as bar:
        try:
            found = search_timesteps(wanted, bar.update, lambda text: bar.set_postfix_str(text), partial)
        except KeyboardInterrupt:
            if partial.exists():
                run.left = f"run the same command again: it goes on from what was found so far, in {partial}"
            raise
        bar.total = bar.n  # the refinement may not use its whole budget
    found.best.write(out)
    run.say(_table(found))
    if found.fitted is not None:
        run.say(_gain(found, found.fitted))
    if found.best.model_timesteps is not None:
        run.say(f"model timesteps {list(found.best.model_timesteps)}")
    run.say(f"{list(found.timesteps)} -> {out}")


def _beforehand(wanted: Search, partial: Path) -> str:
    """Return in words how many model calls the search makes, and how long they take by two of them."""
    calls: list[int] = []
    plan, runs = wanted.converging_plan(), wanted.runs(min(64, wanted.refine_count), wanted.seed, calls.append)
    for _ in range(2):  # the first warms up
        calls.clear()
        started = time.perf_counter()
        runs.predict(runs.first_state(plan).x_t, plan.steps[0])
        seconds = (time.perf_counter() - started) / sum(calls)
    most = wanted.calls()
    going_on = f"going on from {partial}" if partial.exists() else f"Ctrl-C keeps what is found, in {partial}"
    return f"at most {most:,} model calls of one sample, about {duration(most * seconds)}; {going_on}"


def _table(found: Found) -> str:
    """Return a table of the scores of all lists, the best first."""
    title = "distance to converged"
    width = max(len(title), *(len(score.name) + 2 for score in found.scores))
    lines = [f"{title:{width}}  searched on  held out"]
    lines += [f"{f'  {score.name}':{width}}{score.seen:13.4f}{score.held_out:10.4f}" for score in found.scores]
    return "\n".join(lines)


def _gain(found: Found, fitted: FittedSolver) -> str:
    """Return in words what the fit gained on held-out noise, and on its own."""
    from ..search import FITTED

    score, before = found.score(FITTED), found.score("searched")
    gained, own = 1 - score.held_out / before.held_out, 1 - score.seen / before.seen
    if not fitted.gained:
        return f"the fit gains nothing beyond noise ({gained:+.1%} held out): the file has the timesteps, without coefficients"
    return f"fitted coefficients: {gained:.0%} nearer than order 2 on held-out noise, {own:.0%} on the noise of the fit"
