"""``ddim-fast img2img``, ``inpaint``, ``interpolate`` and ``reconstruct``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import noise_options, takes_run
from .outputs import counted

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Run

_PICTURES = click.argument(
    "paths",
    nargs=-1,
    required=True,
    metavar="PICTURES...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
_STRENGTH = "how much is regenerated, in (0, 1]: the share of the steps to run"


def _read(run: Run, paths: tuple[Path, ...]) -> tuple[Tensor, list[str], list[int] | None]:
    """Load the model; return the samples in files on its device, their names, and their labels.

    Labels are None without --class and --prompt.
    """
    run.load()
    run.check_pictures()
    x0, names = run.read(paths)
    labels = run.labels(len(x0)) if run.class_name is not None or run.prompts else None
    return x0, names, labels


def _write_pairs(
    run: Run, before: Tensor, after: Tensor, names: list[str], title: str, labels=None, kept: Tensor | None = None
) -> None:
    """Write a grid of each picture, black where it is not ``kept``, beside its result."""
    import torch

    drawn = None
    if run.draws_pictures:
        shown, result = run.to_pictures(before).cpu(), run.to_pictures(after).cpu()
        if kept is not None:
            mask = torch.nn.functional.interpolate(kept.cpu()[None, None], shown.shape[2:])
            shown = shown * mask - (1 - mask)
        drawn = torch.stack([shown, result], 1).flatten(0, 1)
    under = [text for name in names for text in (name, "->")]
    columns = 2 * min(len(names), max(1, round(len(names) ** 0.5)))
    written = run.write(after, under, title, columns, labels, drawn)
    run.say(f"{counted(len(names), 'picture')}: {title} -> {', '.join(map(str, written))}")


@click.command()
@_PICTURES
@takes_run(
    *noise_options,
    click.option("--strength", type=float, default=0.6, show_default=True, help=f"{_STRENGTH.capitalize()}."),
)
def img2img(run: Run, paths: tuple[Path, ...], strength: float) -> None:
    """Regenerate pictures: add noise to them, then denoise them by sampling.

    PICTURES are image files, or samples that --save wrote (.npz, .safetensors).

    \b
    Examples:
      ddim-fast sample --class Sneaker -n 4 --save sneakers.npz
      ddim-fast img2img sneakers.npz --class "Ankle boot" --strength 0.7
    """
    x0, names, labels = _read(run, paths)
    sampler, seeds = run.sampler(), run.seeds(len(x0))

    def draw(part: slice):
        return sampler.img2img(
            run.model,
            x0[part],
            strength,
            **run.options(labels, seeds, part),
        )

    images = run.samples_in_batches(len(x0), draw)
    title = f"{run.model_name}: strength {strength:g}, {sampler.num_inference_steps} steps, eta {run.eta_text}, seed {run.seed}"
    _write_pairs(run, x0, images, names, title, labels)


_KEPT = {
    "left": lambda y, x: x < 0.5,
    "right": lambda y, x: x >= 0.5,
    "top": lambda y, x: y < 0.5,
    "bottom": lambda y, x: y >= 0.5,
    "border": lambda y, x: (abs(x - 0.5) >= 0.25) | (abs(y - 0.5) >= 0.25),
    "centre": lambda y, x: (abs(x - 0.5) < 0.25) & (abs(y - 0.5) < 0.25),
}


def _mask(run: Run, keep: str) -> Tensor:
    """Return the mask ``(H, W)``: 1 where the sample is kept."""
    import numpy as np
    import torch

    from ..utils.checks import refuse
    from .files import read_picture

    if len(run.sample_shape) != 3:
        refuse("--keep is for samples (C, H, W)", run.sample_shape, "use DDIMSampler.inpaint, whose mask has any shape")
    _, height, width = run.sample_shape
    if keep in _KEPT:
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        return torch.from_numpy(_KEPT[keep](y, x).astype(np.float32))
    path = Path(keep)
    if not path.is_file():
        raise ValueError(f"--keep must be one of {', '.join(_KEPT)}, or an image file, got {keep!r}")
    note = run.note if run.picture_shape == run.sample_shape else lambda text: None  # a mask of latents is smaller
    return (read_picture(path, (1, height, width), note)[0, 0] + 1) / 2


@click.command()
@_PICTURES
@takes_run(
    *noise_options,
    click.option(
        "--keep",
        required=True,
        metavar="PART|FILE",
        help=f"The part to keep: {', '.join(_KEPT)}, or a mask image, white where the picture is kept.",
    ),
    click.option(
        "--strength", type=float, default=1.0, show_default=True, help=f"For the rest of the picture: {_STRENGTH}."
    ),
)
def inpaint(run: Run, paths: tuple[Path, ...], keep: str, strength: float) -> None:
    """Keep a part of pictures, and regenerate the rest to match.

    PICTURES are image files, or samples that --save wrote (.npz, .safetensors).

    \b
    Examples:
      ddim-fast sample --class Sneaker -n 4 --save sneakers.npz
      ddim-fast inpaint sneakers.npz --keep left --class Sneaker
    """
    x0, names, labels = _read(run, paths)
    mask = _mask(run, keep)
    sampler, seeds = run.sampler(), run.seeds(len(x0))

    def draw(part: slice):
        return sampler.inpaint(
            run.model,
            x0[part],
            mask,
            strength=strength,
            **run.options(labels, seeds, part),
        )

    images = run.samples_in_batches(len(x0), draw)
    title = f"{run.model_name}: {keep} kept, {sampler.num_inference_steps} steps, eta {run.eta_text}, seed {run.seed}"
    _write_pairs(run, x0, images, names, title, labels, mask)


@click.command()
@takes_run(
    click.option("--from-seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first sample."),
    click.option("--to-seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the last sample."),
    click.option(
        "--frames", type=click.IntRange(2), default=11, show_default=True, help="Samples per row, ends included."
    ),
    click.option(
        "-n", "--rows", type=click.IntRange(1), default=5, show_default=True, help="Number of rows, one for each pair."
    ),
)
def interpolate(run: Run, from_seed: int, to_seed: int, frames: int, rows: int) -> None:
    """Draw samples between two samples by spherical interpolation of their noise (section 5.3 of
    the DDIM paper).

    \b
    Example:
      ddim-fast interpolate --from-seed 3 --to-seed 8 --frames 9 -n 10
    """
    import torch

    from ..kernels.dispatch import normals
    from ..kernels.noise import NoiseStream, sample_seeds

    run.load()
    run.check_pictures()
    run.check_memory("--rows times --frames", rows * frames)
    labels, sampler = run.labels(rows), run.sampler()
    weights = torch.linspace(0, 1, frames, dtype=torch.float32, device="cpu").tolist()

    def start(seed: int) -> Tensor:
        seeds = torch.from_numpy(sample_seeds(seed, rows)).to(run.where)
        return normals(seeds, run.sample_shape, 0, NoiseStream.INITIAL)

    samples = sampler.interpolate(
        run.model,
        start(from_seed),
        start(to_seed),
        weights,
        seed=from_seed,
        conditioning=run.conditioning(labels),
        guidance_scale=run.guidance,
        backend=run.backend,
        progress=not run.quiet,
    )
    assert isinstance(samples, torch.Tensor)  # no trajectory was asked for
    images = samples.view(frames, rows, *run.sample_shape).transpose(0, 1).flatten(0, 1).cpu()
    title = f"{run.model_name}: from seed {from_seed} to seed {to_seed}, {sampler.num_inference_steps} steps"
    written = run.write(images, [f"{weight:.2f}" for weight in weights] * rows, title, frames)
    run.say(f"{counted(rows, 'row')} of {frames} pictures -> {', '.join(map(str, written))}")


@click.command()
@_PICTURES
@takes_run(
    click.option(
        "--iterations",
        type=click.IntRange(1),
        default=5,
        show_default=True,
        help="Model calls per inversion step. 1: plain DDIM inversion.",
    ),
)
def reconstruct(run: Run, paths: tuple[Path, ...], iterations: int) -> None:
    """Invert pictures to noise, sample from that noise, and report the reconstruction error.

    PICTURES are image files, or samples that --save wrote (.npz, .safetensors). x0 is not clipped:
    see docs/INVERSION.md.

    \b
    Examples:
      ddim-fast sample --class Bag -n 4 --save bags.npz
      ddim-fast reconstruct bags.npz --class Bag --steps 50 --iterations 5
    """
    from torch import Tensor

    from ..sampling.inversion import reconstruction_error

    x0, names, labels = _read(run, paths)
    sampler = run.sampler(clip_sample=False)

    def draw(part: slice):
        options: dict[str, Any] = {
            "conditioning": run.conditioning(labels, part),
            "guidance_scale": run.guidance,
            "backend": run.backend,
        }
        x_T = sampler.invert(run.model, x0[part], iterations=iterations, progress=not run.quiet, **options)
        assert isinstance(x_T, Tensor)  # no trajectory was asked for
        return sampler.sample(run.model, x_T=x_T, seed=0, progress=not run.quiet, **options)

    images = run.samples_in_batches(len(x0), draw)
    error = reconstruction_error(x0.cpu(), images).mean()
    title = f"{run.model_name}: {sampler.num_inference_steps} steps, {iterations} iterations, mean squared error {error:.2e}"
    _write_pairs(run, x0, images, names, title, labels)
