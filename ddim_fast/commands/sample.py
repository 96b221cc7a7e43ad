"""``ddim-fast sample``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import noise_options, takes_run

if TYPE_CHECKING:
    from ..sampling.loop import Timing, Trajectory
    from .run import Run

FRAMES = 60
"""The most frames in an animation."""


@click.command()
@takes_run(
    *noise_options,
    click.option("-n", "--count", type=click.IntRange(1), default=64, show_default=True, help="Number of pictures."),
    click.option(
        "--trajectory",
        type=click.Path(dir_okay=False, path_type=Path),
        default=None,
        metavar="FILE.gif",
        help="Also write an animation of the predicted x0.",
    ),
)
def sample(run: Run, count: int, trajectory: Path | None) -> None:
    """Draw pictures and write them as a labelled grid.

    \b
    Classes of the shipped model:
      0 T-shirt/top  1 Trouser  2 Pullover  3 Dress  4 Coat
      5 Sandal       6 Shirt    7 Sneaker   8 Bag    9 Ankle boot

    \b
    Examples:
      ddim-fast sample --steps 20 --eta 0.5 --seed 7 -n 64 --out grid.png
      ddim-fast sample --class Sneaker -n 16 --guidance 2 --trajectory sneakers.gif
      ddim-fast sample --model path/to/pipeline --timesteps "10,15,20" --save samples.npz
    """
    import torch

    from ..sampling.loop import Timing
    from .files import check_output

    check_output(trajectory, (".gif",))
    run.prepare()
    sampler = run.sampler()
    steps = 0 if trajectory is None else sampler.num_inference_steps
    run.check_memory("-n", count, 1 + 2 * steps, 1 + min(steps, FRAMES))
    labels = run.labels(count)
    timing, started, seeds = Timing(), time.perf_counter(), run.seeds(count)

    def draw(part: slice):
        return sampler.sample(
            run.model,
            (part.stop - part.start, *run.sample_shape),
            return_trajectory=trajectory is not None,
            device=run.where,
            timing=timing,
            **run.options(labels, seeds, part),
        )

    parts = run.in_batches(count, draw)
    seconds = time.perf_counter() - started
    order = "" if sampler.order == 1 else f"order {sampler.order}, "
    if sampler.history_weights is not None:
        order = "fitted coefficients, "
    how = f"{sampler.num_inference_steps} steps, {order}eta {run.eta_text}, seed {run.seed}"
    how += f", guidance {run.guidance:g}" if run.guidance != 1 else ""
    title, names, columns = f"{run.model_name}: {how}", run.names(labels, count), run.columns(count)
    written = run.write(torch.cat([part.samples for part in parts]), names, title, columns, labels)
    if trajectory is not None:
        _save_trajectory(parts, names, title, columns, trajectory)
        written.insert(1, trajectory)
    run.say(
        f"{count} pictures in {seconds:.2f} s: {count / seconds:.1f} images/s, {sampler.num_inference_steps} steps; "
        f"{_where_time_went(timing)} -> {', '.join(map(str, written))}"
    )


def _where_time_went(timing: Timing) -> str:
    if timing.captured_seconds:
        return f"{timing.steps} steps replayed as CUDA graphs"
    share = timing.update_seconds / (timing.model_seconds + timing.update_seconds)
    return f"model {timing.model_seconds:.2f} s, update {timing.update_seconds * 1e3:.1f} ms ({share:.2%})"


def _save_trajectory(parts: list[Trajectory], names: list[str], title: str, columns: int | None, path: Path) -> None:
    import numpy as np
    import torch

    from ..utils import pictures

    steps = len(parts[0].x0)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, FRAMES)).round().astype(int))
    frames = [
        pictures.grid(
            torch.cat([part.x0[i] for part in parts]), names, f"{title}, t = {parts[0].timesteps[i]}", columns=columns
        )
        for i in chosen
    ]
    pictures.save_animation(frames, path)
