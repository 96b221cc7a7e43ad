"""``ddim-fast search``."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm.auto import tqdm

from ..search import Found, Search, search_timesteps
from .options import Run, check_output, conditioning_rule, takes_model

EFFORTS = {
    # name: samples of the table of costs, of the refinement, of the held-out score; whole runs that the refinement may cost
    "quick": (24, 32, 64, 30),
    "normal": (48, 96, 200, 150),
    "thorough": (96, 256, 1000, 400),
}


@click.command()
@takes_model
@click.option("--steps", type=click.IntRange(1), required=True, help="How many timesteps to find.")
@click.option(
    "--order",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Of the steps that they are for: 1 is DDIM, 2 its multistep form.",
)
@click.option(
    "--model-timesteps/--one-list",
    default=True,
    show_default=True,
    help="Search for what the model is told in each step, too; or for one list, which any DDIM sampler can use.",
)
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    default="normal",
    show_default=True,
    help="How many samples it looks at, and how often it tries.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=1000, show_default=True, help="Of the search; the next one is held out."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="timesteps.json",
    show_default=True,
    help="The list, with where it came from.",
)
def search(run: Run, steps: int, order: int, model_timesteps: bool, effort: str, seed: int, out: Path) -> None:
    """Find the timesteps that serve a model best: with few steps, nearest to where many lead.

    First by dynamic programming over what each possible step costs, measured along converged trajectories; then by moving one timestep at
    a time and sampling: those that are visited, and those that the model is told in their place, since a long step goes nearer to where
    many short ones lead with the output of a timestep on its way. The result is judged by noise that the search has not seen, beside every
    spacing in closed form, and written as a small JSON file, which --timesteps takes everywhere, and DDIMSampler(timesteps="FILE.json")
    in Python.

    \b
    Examples:
      ddim-fast search --steps 10 --out ten.json
      ddim-fast sample --timesteps ten.json
      ddim-fast search --steps 8 --model path/to/pipeline --guidance 3 --effort thorough
    """
    check_output(out, (".json",))
    run.load()
    count, refine_count, held_out, refine_runs = EFFORTS[effort]
    wanted = Search(
        run.model,
        run.noise_schedule(),
        tuple(run.model.sample_shape),
        steps,
        order,
        conditioning=conditioning_rule(run),
        guidance_scale=None if run.guidance == 1 else run.guidance,
        sampler_options=run.sampler_options(),
        count=count,
        refine_count=refine_count,
        held_out=held_out,
        refine_runs=refine_runs,
        model_timesteps=model_timesteps,
        seed=seed,
        device=run.where,
    )
    with tqdm(total=wanted.calls(), desc="searching", unit="call", disable=run.quiet) as bar:
        found = search_timesteps(wanted, bar.update, lambda text: bar.set_postfix_str(text))
        bar.total = bar.n  # the refinement may end before its budget
    found.best.write(out)
    run.say(_table(found))
    if found.best.model_timesteps is not None:
        run.say(f"the model is told {list(found.best.model_timesteps)}")
    run.say(f"{list(found.timesteps)} -> {out}")


def _table(found: Found) -> str:
    """Every list that was judged, the best first."""
    title = "distance to converged"
    width = max(len(title), *(len(score.name) + 2 for score in found.scores))
    lines = [f"{title:{width}}  searched on  held out"]
    lines += [f"{f'  {score.name}':{width}}{score.seen:13.4f}{score.held_out:10.4f}" for score in found.scores]
    return "\n".join(lines)
