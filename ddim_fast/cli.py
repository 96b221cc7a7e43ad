"""The command line: ``ddim-fast sample`` and ``ddim-fast info``."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from . import pictures
from ._version import __version__
from .capture import MODES
from .kernels import cpu_step, dispatch
from .kernels.contract import StepCoefficients, StepInputs
from .kernels.noise import NOISE_STANDARD_VERSION, sample_seeds
from .models import SHIPPED, ShippedModel, load_model
from .sampler import DDIMSampler, Timing, Trajectory, usable_device
from .schedule import SCHEDULES, make_schedule
from .timesteps import SPACINGS
from .update import ETA_SCALES

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_FRAMES = 60  # at most, in an animation


class _Group(click.Group):
    """Turns the library's errors, which say what to do, into messages without a traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ddim-fast")
def main() -> None:
    """A fast DDIM sampler: the whole update in one kernel.

    \b
    Start here:
      ddim-fast sample                     64 pictures from the model that ships with the package
      ddim-fast sample --steps 10 --eta 1  fewer steps, with DDPM's noise
      ddim-fast info                       what runs on this machine, and why something does not
    """


@main.command()
@click.option(
    "--model",
    "model_name",
    type=click.Choice(sorted(SHIPPED)),
    default="fashion",
    show_default=True,
    help="The model to sample.",
)
@click.option("-n", "--count", type=click.IntRange(1), default=64, show_default=True, help="How many pictures.")
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=None,
    help="How many timesteps to visit: more is better and slower.  [default: 50]",
)
@click.option(
    "--timesteps",
    default=None,
    metavar="LIST",
    help='Instead of --steps: "ddim50", sections "10,15,20", or a list "[900,600,300,0]".',
)
@click.option(
    "--eta", type=float, default=0.0, show_default=True, help="0: deterministic DDIM. 1: as much noise as DDPM."
)
@click.option(
    "--eta-scales",
    type=click.Choice(ETA_SCALES),
    default="std_dev",
    show_default=True,
    help="What eta multiplies; the paper's is std_dev.",
)
@click.option("--sigma-hat", is_flag=True, help="The paper's larger DDPM noise; needs --eta 1.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same pictures."
)
@click.option(
    "--class",
    "class_name",
    default=None,
    metavar="NAME",
    help="Only this class: a name or number (see below). Otherwise all in turn.",
)
@click.option(
    "--guidance",
    type=float,
    default=1.0,
    show_default=True,
    help="Classifier-free guidance: above 1, more typical of the class.",
)
@click.option(
    "--spacing",
    type=click.Choice(sorted(SPACINGS)),
    default="leading",
    show_default=True,
    help="How the timesteps are spread.",
)
@click.option(
    "--schedule",
    type=click.Choice(sorted(SCHEDULES)),
    default="linear",
    show_default=True,
    help="The model's noise schedule. The shipped model knows linear only.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Pictures at a time; changes speed only.",
)
@click.option("--threads", type=click.IntRange(1), default=None, help="Processor threads.  [default: torch's]")
@click.option(
    "--backend",
    type=click.Choice(list(dispatch.BACKENDS)),
    default=None,
    help="What computes the update.  [default: the fastest]",
)
@click.option(
    "--device",
    default=None,
    metavar="DEVICE",
    help="cpu, cuda or cuda:1.  [default: cuda where there is one, else cpu]",
)
@click.option(
    "--capture",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="On a CUDA device: replay the steps as CUDA graphs, one a step or one for the whole loop.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="grid.png",
    show_default=True,
    help="The labelled grid (PNG, JPEG, WebP).",
)
@click.option(
    "--trajectory",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE.gif",
    help="Also an animation of x0 as it forms.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE",
    help="Also the samples as numbers: .npz or .safetensors.",
)
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def sample(
    model_name: str,
    count: int,
    steps: int | None,
    timesteps: str | None,
    eta: float,
    eta_scales: str,
    sigma_hat: bool,
    seed: int,
    class_name: str | None,
    guidance: float,
    spacing: str,
    schedule: str,
    batch_size: int,
    threads: int | None,
    backend: str | None,
    device: str | None,
    capture: str,
    out: Path,
    trajectory: Path | None,
    save: Path | None,
    quiet: bool,
) -> None:
    """Draw pictures and lay them out in a labelled grid.

    \b
    Classes of the shipped model:
      0 T-shirt/top  1 Trouser  2 Pullover  3 Dress  4 Coat
      5 Sandal       6 Shirt    7 Sneaker   8 Bag    9 Ankle boot

    \b
    Examples:
      ddim-fast sample --steps 20 --eta 0.5 --seed 7 -n 64 --out grid.png
      ddim-fast sample --class Sneaker -n 16 --guidance 2 --trajectory sneakers.gif
      ddim-fast sample --timesteps "10,15,20" --save samples.npz
    """
    _check_outputs(out, trajectory, save)
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(model_name).to(_device(device))
    labels = _labels(model, class_name, count)
    sampler = DDIMSampler(
        make_schedule(schedule),
        steps,
        eta,
        timesteps=_parse_timesteps(timesteps),
        timestep_spacing=spacing,
        eta_scales=eta_scales,
        sigma_hat=sigma_hat,
    )
    if schedule != "linear" and not quiet:
        click.echo(
            f"note: the {model_name} model was trained with the linear schedule; with {schedule} its pictures will be wrong",
            err=True,
        )
    timing, started = Timing(), time.perf_counter()
    parts = _sample_in_batches(
        sampler,
        model,
        labels,
        seed,
        batch_size,
        keep_trajectory=trajectory is not None,
        guidance_scale=guidance,
        backend=backend,
        capture=capture,
        timing=timing,
        progress=not quiet and capture != "loop",
    )
    seconds = time.perf_counter() - started
    images = torch.cat([part.samples for part in parts])
    names = [model.class_names[label] for label in labels]
    how = f"{sampler.num_inference_steps} steps, eta {eta:g}, seed {seed}" + (
        f", guidance {guidance:g}" if guidance != 1 else ""
    )
    title = f"{model_name}: {how}"
    columns = model.num_classes if class_name is None and count >= model.num_classes else None  # a class per column
    pictures.grid(images, names, title, columns=columns).save(out)
    written = [out]
    if trajectory is not None:
        _save_trajectory(parts, names, title, columns, trajectory)
        written.append(trajectory)
    if save is not None:
        _save_samples(images, labels, save)
        written.append(save)
    if not quiet:
        click.echo(
            f"{count} pictures in {seconds:.2f} s: {count / seconds:.1f} images/s, {sampler.num_inference_steps} steps; "
            f"{_where_time_went(timing)} -> {', '.join(map(str, written))}"
        )


def _where_time_went(timing: Timing) -> str:
    if timing.captured_seconds:
        return f"{timing.steps} steps replayed as CUDA graphs"
    share = timing.update_seconds / (timing.model_seconds + timing.update_seconds)
    return f"model {timing.model_seconds:.2f} s, update {timing.update_seconds * 1e3:.1f} ms ({share:.2%})"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)


def _check_outputs(out: Path, trajectory: Path | None, save: Path | None) -> None:
    """Refuse what could not be written before anything is computed."""
    for path, suffixes in (
        (out, (".png", ".jpg", ".jpeg", ".webp")),
        (trajectory, (".gif",)),
        (save, (".npz", ".safetensors")),
    ):
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"the file name must end in {' or '.join(suffixes)}, got {path}")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist: make it first")


def _parse_timesteps(text: str | None) -> list[int] | str | None:
    if text is None or not text.startswith("["):
        return text
    try:
        return [int(t) for t in text.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f'a list of timesteps looks like "[900,600,300,0]", got {text!r}') from None


def _labels(model: ShippedModel, class_name: str | None, count: int) -> list[int]:
    """The class of every picture: one for all, or each in turn."""
    if class_name is None:
        return [i % model.num_classes for i in range(count)]
    names = [name.lower() for name in model.class_names]
    if class_name.lower() in names:
        return [names.index(class_name.lower())] * count
    if class_name.isdigit() and int(class_name) < model.num_classes:
        return [int(class_name)] * count
    raise ValueError(
        f"--class must be one of {', '.join(model.class_names)}, or 0 to {model.num_classes - 1}, got {class_name!r}"
    )


def _sample_in_batches(
    sampler: DDIMSampler,
    model: ShippedModel,
    labels: list[int],
    seed: int,
    batch_size: int,
    keep_trajectory: bool,
    **options,
) -> list[Trajectory]:
    """The pictures of all labels, on the CPU, a batch at a time; a sample's seed does not depend on its batch."""
    device = next(model.parameters()).device
    seeds = torch.from_numpy(sample_seeds(seed, len(labels)))
    parts = []
    for first in range(0, len(labels), batch_size):
        part = slice(first, first + batch_size)
        batch_labels = torch.tensor(labels[part], device=device)
        result = sampler.sample(
            model,
            (len(batch_labels), *model.sample_shape),
            seeds=seeds[part],
            conditioning={"class_labels": batch_labels},
            return_trajectory=keep_trajectory,
            device=device,
            **options,
        )
        run = result if keep_trajectory else Trajectory(x_t=[result])
        parts.append(Trajectory(run.timesteps, [x.cpu() for x in run.x_t], [x.cpu() for x in run.x0]))
    return parts


def _save_trajectory(parts: list[Trajectory], names: list[str], title: str, columns: int | None, path: Path) -> None:
    steps = len(parts[0].x0)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, _FRAMES)).round().astype(int))
    frames = [
        pictures.grid(
            torch.cat([part.x0[i] for part in parts]), names, f"{title}, t = {parts[0].timesteps[i]}", columns=columns
        )
        for i in chosen
    ]
    pictures.save_animation(frames, path)


def _save_samples(images: torch.Tensor, labels: list[int], path: Path) -> None:
    if path.suffix.lower() == ".npz":
        np.savez_compressed(path, samples=images.numpy(), labels=np.array(labels))
    else:
        save_file({"samples": images.contiguous(), "labels": torch.tensor(labels)}, path)


@main.command()
def info() -> None:
    """Say what runs on this machine: versions, backends and why one does not, instruction set."""
    click.echo(f"ddim_fast {__version__}, noise standard {NOISE_STANDARD_VERSION}")
    click.echo(f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    click.echo(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"
    )
    click.echo("backends, best first:")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        x = torch.zeros(1, 4, device=device)
        inputs = StepInputs(x, x, StepCoefficients(1, 0, 0, 1, 0, 1, 0, 0))
        for name, backend in dispatch.BACKENDS.items():
            reasons = backend.unsupported_reasons(inputs)
            click.echo(f"  {name} on {device}: {'not usable: ' + '; '.join(reasons) if reasons else 'usable'}")
    if cpu_step.extension is not None:
        usable = cpu_step.extension.instruction_sets()
        click.echo(f"instruction set: {cpu_step.extension.selected()} (usable here: {', '.join(usable)})")


if __name__ == "__main__":
    main()
