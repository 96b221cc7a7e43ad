"""``ddim-fast sample``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import noise_options, takes_run
from .outputs import OutputDirectory, OutputFile, counted

if TYPE_CHECKING:
    from torch import Tensor

    from ..sampler import DDIMSampler
    from ..sampling.loop import Timing, Trajectory
    from .run import Run

FRAMES = 60
"""The most frames in an animation."""


@click.command()
@takes_run(
    *noise_options,
    click.option(
        "-n",
        "--count",
        type=click.IntRange(1),
        default=None,
        help="Number of pictures.  [default: 64, or as many as fill whole rows]",
    ),
    click.option(
        "--files",
        type=OutputDirectory(),
        default=None,
        metavar="DIR",
        help="Also write each picture as a PNG of its own, into a new or empty directory.",
    ),
    click.option(
        "--trajectory",
        type=OutputFile((".gif",)),
        default=None,
        metavar="FILE.gif",
        help="Also write an animation of the predicted x0.",
    ),
    click.option(
        "--preview",
        type=click.IntRange(1),
        default=None,
        metavar="STEPS",
        help="While sampling, write the grid of the predicted x0 to --out after every so many steps.",
    ),
)
def sample(run: Run, count: int | None, files: Path | None, trajectory: Path | None, preview: int | None) -> None:
    """Draw pictures and write them as a labelled grid.

    Where every sample has NaN or infinity, nothing is written and the exit code is 1; where only
    some have, a note says so.

    \b
    Classes of the shipped model:
      0 T-shirt/top  1 Trouser  2 Pullover  3 Dress  4 Coat
      5 Sandal       6 Shirt    7 Sneaker   8 Bag    9 Ankle boot

    \b
    Examples:
      ddim-fast sample --steps 20 --eta 0.5 --seed 7 --out grid.png
      ddim-fast sample --class Sneaker -n 16 --guidance 2 --trajectory sneakers.gif
      ddim-fast sample --model path/to/pipeline --timesteps "10,15,20" --save samples.npz
      ddim-fast sample --model path/to/stable-diffusion --prompt "a red fox" --guidance 7 -n 4 --preview 5
    """
    import torch

    from ..sampling.loop import Timing
    from .files import save_pictures

    run.load()
    run.check_pictures({"--files": files, "--trajectory": trajectory, "--preview": preview})
    sampler = run.sampler()
    count = run.whole_rows() if count is None else count
    steps = 0 if trajectory is None else sampler.num_inference_steps
    run.check_memory("-n", count, 1 + 2 * steps, 1 + min(steps, FRAMES))
    labels = run.labels(count)
    title, names, columns = _title(run, sampler), run.names(labels, count), run.columns(count)
    timing, started, seeds = Timing(), time.perf_counter(), run.seeds(count)
    finished: list[Tensor] = []

    def draw(part: slice) -> Tensor | Trajectory:
        def show(step: int, t: Any, x_t: Tensor, x0: Tensor) -> None:
            if preview is not None and (step + 1) % preview == 0 and step + 1 < sampler.num_inference_steps:
                images = torch.cat([*finished, run.to_pictures(x0.cpu())])
                shown = None if names is None else names[: len(images)]
                run.draw(images, shown, f"{title}, after step {step + 1}", columns)
                run.left = f"{run.out} shows the predicted x0 after step {step + 1}"

        found = sampler.sample(
            run.model,
            (part.stop - part.start, *run.sample_shape),
            return_trajectory=trajectory is not None,
            device=run.where,
            timing=timing,
            callback=None if preview is None else show,
            **run.options(labels, seeds, part),
        )
        if preview is not None:
            finished.append(run.to_pictures((found if isinstance(found, torch.Tensor) else found.samples).cpu()))
        return found

    parts = run.in_batches(count, draw)
    seconds = time.perf_counter() - started
    samples = torch.cat([part.samples for part in parts])
    drawn = run.to_pictures(samples) if run.draws_pictures else None
    written = run.write(samples, names, title, columns, labels, drawn)
    if trajectory is not None:
        _save_trajectory(run, parts, names, title, columns, trajectory)
        written.insert(1, trajectory)
    if files is not None and drawn is not None:
        save_pictures(drawn, files)
        written.append(files)
    run.say(
        f"{counted(count, 'picture')} in {seconds:.2f} s: {count / seconds:.1f} images/s, "
        f"{counted(sampler.num_inference_steps, 'step')}; {_where_time_went(timing)} -> {', '.join(map(str, written))}"
    )


def _title(run: Run, sampler: DDIMSampler) -> str:
    order = "" if sampler.order == 1 else f"order {sampler.order}, "
    if sampler.history_weights is not None:
        order = "fitted coefficients, "
    guidance = f", guidance {run.guidance:g}" if run.guidance != 1 else ""
    steps = counted(sampler.num_inference_steps, "step")
    return f"{run.model_name}: {steps}, {order}eta {run.eta_text}, seed {run.seed}{guidance}"


def _where_time_went(timing: Timing) -> str:
    if timing.captured_seconds:
        return f"{timing.steps} steps replayed as CUDA graphs"
    share = timing.update_seconds / (timing.model_seconds + timing.update_seconds)
    return f"model {timing.model_seconds:.2f} s, update {timing.update_seconds * 1e3:.1f} ms ({share:.2%})"


def _save_trajectory(
    run: Run, parts: list[Trajectory], names: list[str], title: str, columns: int | None, path: Path
) -> None:
    import numpy as np
    import torch

    from ..utils import pictures

    steps = len(parts[0].x0)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, FRAMES)).round().astype(int))
    frames = [
        pictures.grid(
            run.to_pictures(torch.cat([part.x0[i] for part in parts])),
            names,
            f"{title}, t = {parts[0].timesteps[i]}",
            columns=columns,
        )
        for i in chosen
    ]
    pictures.save_animation(frames, path.resolve())  # of a link, its target
