"""Options shared by several commands, and the model, sampler and files that they select."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..generation.conditioning import Conditioning, EveryClass, OneClass
from ..kernels import dispatch
from ..kernels.noise import sample_seeds
from ..models.flow_view import as_flow
from ..models.loading import load_model
from ..models.shipped import SHIPPED
from ..plans.continuous import CONTINUOUS_SPACINGS, FlowSchedule
from ..plans.eta import ETA_SCALES, PAPER
from ..plans.named import ALL_SCHEDULES, schedule_from_text
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..plans.timesteps import SPACINGS
from ..sampler import DDIMSampler
from ..sampling.capture_mode import MODES
from ..sampling.loop import Trajectory
from ..utils import pictures
from ..utils.checks import check_memory, usable_device
from ..utils.files import npz_array, safetensors_tensor
from ..utils.import_string import exits_refused, import_string
from .lists import NumberOrList

FRAMES = 60  # the most frames in an animation
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NUMBER_SUFFIXES = (".npz", ".safetensors")


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The options of every command that samples, and the model and sampler they select."""

    model_name: str = "fashion"
    class_name: str | None = None
    guidance: float = 1.0
    steps: int | None = None
    timesteps: str | None = None
    eta: float | tuple[float, ...] = 0.0
    eta_scales: str = PAPER
    sigma_hat: bool = False
    order: int | None = None
    analytic_variance: bool = False
    spacing: str | None = None
    schedule: str | None = None
    shift: float | None = None
    seed: int = 0
    batch_size: int = 64
    threads: int | None = None
    backend: str | None = None
    device: str | None = None
    capture: str = "auto"
    out: Path = Path("grid.png")
    save: Path | None = None
    trust_pickle: bool = False
    variant: str | None = None
    quiet: bool = False
    model: nn.Module = field(init=False)
    path: NoisePath | None = field(init=False, default=None)

    def prepare(self) -> None:
        """Check that the output files can be written, then load the model."""
        check_output(self.out, PICTURE_SUFFIXES)
        check_output(self.save, NUMBER_SUFFIXES)
        self.load()

    def load(self) -> None:
        """Load the model onto the requested device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.use(self.model_on(usable_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))))

    def model_on(self, device: torch.device) -> nn.Module:
        """Return the model of --model on this device.

        Raises:
            ValueError: it does not tell the shape of its samples.
        """
        if ":" in self.model_name and not os.path.exists(self.model_name):
            model = _own_model(self.model_name).to(device)
        else:
            model = load_model(self.model_name, device, trust_pickle=self.trust_pickle, variant=self.variant)
        if getattr(model, "sample_shape", None) is None:
            raise ValueError(
                f"the command line needs a model that has the shape of its samples, got {self.model_name}: give it an attribute "
                "sample_shape = (C, H, W), or use the Python API"
            )
        return model

    def use(self, model: nn.Module) -> None:
        """Sample this model, along the path of --schedule and --shift if they are given.

        A diffusion model that is to be sampled along flow matching's path becomes a flow model,
        exactly.
        """
        trained = getattr(model, "schedule", None)
        path = trained if self.schedule is None else schedule_from_text(self.schedule)
        if self.shift is not None:
            path = _shifted(path, self.shift)
        if isinstance(path, FlowSchedule) and isinstance(trained, NoiseSchedule):
            model = as_flow(model)
            trained = path
        if isinstance(path, FlowSchedule) and isinstance(trained, FlowSchedule):
            path = replace(path, time_scale=trained.time_scale)
            trained = path  # which times are visited is for the sampler to choose
        if path is not None and trained not in (None, path) and not self.quiet:
            click.echo(
                f"note: the {self.model_name} model was trained with another schedule; with {self.schedule} its samples will be wrong",
                err=True,
            )
        self.model, self.path = model, path

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W)."""
        return tuple(getattr(self.model, "sample_shape", ()))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return getattr(self.model, "class_names", None)

    @property
    def where(self) -> torch.device:
        return next(iter(self.model.parameters()), torch.empty(0, dtype=torch.float32, device="cpu")).device

    @property
    def eta_text(self) -> str:
        """eta as it was typed."""
        return ",".join(f"{eta:g}" for eta in (self.eta if isinstance(self.eta, tuple) else (self.eta,)))

    def noise_schedule(self) -> NoisePath:
        """Return the noise schedule of --schedule, or else the model's."""
        if self.path is None:
            raise ValueError(
                f"a model must have a noise schedule, got none in {self.model_name}: pass one with --schedule"
            )
        return self.path

    def sampler_options(self) -> dict[str, Any]:
        """Return the model's own sampling settings, as arguments of ``DDIMSampler``."""
        return dict(getattr(self.model, "sampler_options", {}))

    def sampler(self, **more: Any) -> DDIMSampler:
        """Return the sampler; options left out are the model's, or the sampler's defaults."""
        options = self.sampler_options()
        if self.spacing is not None:
            options["timestep_spacing"] = self.spacing
        schedule, timesteps = self.noise_schedule(), parse_timesteps(self.timesteps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            sampler = DDIMSampler(
                schedule,
                self.steps,
                self.eta,
                timesteps=timesteps,
                eta_scales=self.eta_scales,  # type: ignore[arg-type]  # it checks
                sigma_hat=self.sigma_hat,
                order=self.order,
                analytic_variance=self.analytic_variance,
                **options,
                **more,
            )
        for warning in () if self.quiet else caught:
            click.echo(f"note: {warning.message}", err=True)
        return sampler

    def check_memory(self, name: str, count: int, kept: int = 1, grids: int = 1) -> None:
        """Raise ValueError where ``count`` samples do not fit into memory, each ``kept`` times as
        floats, and in so many grids."""
        each = 4 * kept * math.prod(self.sample_shape) + grids * pictures.grid_bytes(self.sample_shape)
        check_memory(name, count, count * each, "take fewer, or write them with ddim-fast generate")

    def labels(self, count: int) -> list[int] | None:
        """Return the class of every sample: the one of --class, or each class in turn.

        None for a model without classes.
        """
        names = self.class_names
        if names is None:
            if self.class_name is not None:
                raise ValueError(f"--class is for models with named classes, got {self.model_name}: leave it out")
            return None
        if self.class_name is None:
            return [i % len(names) for i in range(count)]
        lower = [name.lower() for name in names]
        if self.class_name.lower() in lower:
            return [lower.index(self.class_name.lower())] * count
        if self.class_name.isdigit() and int(self.class_name) < len(names):
            return [int(self.class_name)] * count
        raise ValueError(
            f"--class must be one of {', '.join(names)}, or 0 to {len(names) - 1}, got {self.class_name!r}"
        )

    def names(self, labels: list[int] | None, count: int) -> list[str]:
        """Return the label under each picture."""
        names = self.class_names
        return [str(i) for i in range(count)] if labels is None or names is None else [names[label] for label in labels]

    def columns(self, count: int) -> int | None:
        """Return one column per class if classes are drawn in turn, else None."""
        classes = len(self.class_names or ())
        return classes if classes and self.class_name is None and count >= classes else None

    def conditioning(self, labels: list[int] | None, part: slice = slice(None)) -> dict[str, Tensor] | None:
        return (
            None
            if labels is None
            else {"class_labels": torch.tensor(labels[part], dtype=torch.int64, device=self.where)}
        )

    def seeds(self, count: int) -> Tensor:
        return torch.from_numpy(sample_seeds(self.seed, count))

    def options(self, labels: list[int] | None, seeds: Tensor, part: slice) -> dict[str, Any]:
        """Return the arguments of the sampler's methods for one batch."""
        return {
            "seeds": seeds[part],
            "conditioning": self.conditioning(labels, part),
            "guidance_scale": self.guidance,
            "backend": self.backend,
            "capture": self.capture,
            "progress": not self.quiet and self.capture != "loop",
        }

    def in_batches(self, count: int, draw: Callable[[slice], Tensor | Trajectory]) -> list[Trajectory]:
        """Return the results of ``draw`` for each batch, on the CPU.

        A sample's seed does not depend on its batch.
        """
        parts = []
        for first in range(0, count, self.batch_size):
            result = draw(slice(first, min(first + self.batch_size, count)))
            run = result if isinstance(result, Trajectory) else Trajectory(x_t=[result])
            parts.append(Trajectory(run.timesteps, [x.cpu() for x in run.x_t], [x.cpu() for x in run.x0]))
        return parts

    def write(
        self,
        images: Tensor,
        names: list[str],
        title: str,
        columns: int | None,
        labels: list[int] | None = None,
        samples: Tensor | None = None,
    ) -> list[Path]:
        """Write the grid of images and, with --save, the samples. None: the images themselves."""
        pictures.grid(images, names, title, columns=columns).save(self.out)
        if self.save is None:
            return [self.out]
        save_samples(images if samples is None else samples, labels, self.save)
        return [self.out, self.save]

    def say(self, text: str) -> None:
        if not self.quiet:
            click.echo(text)


_OPTIONS = {
    "model_name": click.option(
        "--model",
        "model_name",
        default="fashion",
        show_default=True,
        metavar="NAME|PATH",
        help=f"The shipped model ({', '.join(SHIPPED)}), a diffusers directory, a TorchScript or torch.export archive, or "
        "module:attribute: a torch module with an attribute sample_shape, or a function that returns one.",
    ),
    "trust_pickle": click.option(
        "--trust-pickle",
        is_flag=True,
        help="Load a model file that can run code: TorchScript, torch.export, weights in a .bin.",
    ),
    "variant": click.option(
        "--variant",
        default=None,
        metavar="NAME",
        help='Which weights of a diffusers directory: "fp16" for diffusion_pytorch_model.fp16.safetensors.',
    ),
    "class_name": click.option(
        "--class", "class_name", default=None, metavar="NAME", help="Use only this class: a name or number."
    ),
    "guidance": click.option(
        "--guidance",
        type=float,
        default=1.0,
        show_default=True,
        help="Classifier-free guidance scale; above 1, samples are more typical of their class.",
    ),
    "steps": click.option(
        "--steps",
        type=click.IntRange(1),
        default=None,
        help="Number of sampling steps: more are better and slower.  [default: 50]",
    ),
    "timesteps": click.option(
        "--timesteps",
        default=None,
        metavar="LIST",
        help='Instead of --steps: "ddim50", sections "10,15,20", a list "[900,600,300,0]", or a FILE.json from ddim-fast search.',
    ),
    "spacing": click.option(
        "--spacing",
        type=click.Choice(sorted({*SPACINGS, *CONTINUOUS_SPACINGS})),
        default=None,
        help="Timestep spacing.  [default: the model's, or the schedule's: leading, for flow matching uniform]",
    ),
    "schedule": click.option(
        "--schedule",
        default=None,
        metavar="NAME",
        help=f"Noise schedule, for a model whose files do not give one: {', '.join(sorted(ALL_SCHEDULES))}; with arguments as in "
        "'edm?sigma_max=50&rho=5'. A diffusion model is sampled along flow matching's path with 'flow'.  [default: the model's]",
    ),
    "shift": click.option(
        "--shift",
        type=float,
        default=None,
        help="Shift of flow matching's times towards the noise; 3 is Stable Diffusion 3's.  [default: the schedule's]",
    ),
    "batch_size": click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Samples per batch; changes speed only.",
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(1), default=None, help="Number of CPU threads.  [default: torch's]"
    ),
    "backend": click.option(
        "--backend",
        type=click.Choice(list(dispatch.BACKENDS)),
        default=None,
        help="Backend that computes the update.  [default: the fastest]",
    ),
    "device": click.option(
        "--device",
        default=None,
        metavar="DEVICE",
        help="cpu, cuda or cuda:1.  [default: cuda if available, else cpu]",
    ),
    "out": click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        default="grid.png",
        show_default=True,
        help="The labelled grid (PNG, JPEG, WebP).",
    ),
    "save": click.option(
        "--save",
        type=click.Path(dir_okay=False, path_type=Path),
        default=None,
        metavar="FILE",
        help="Also write the raw samples: .npz or .safetensors.",
    ),
    "quiet": click.option("--quiet", is_flag=True, help="Show no progress bar and no summary."),
}

_OF_A_MODEL = (
    "model_name",
    "trust_pickle",
    "variant",
    "class_name",
    "guidance",
    "schedule",
    "shift",
    "batch_size",
    "threads",
    "device",
    "quiet",
)

noise_options = (
    click.option(
        "--eta",
        type=NumberOrList(),
        default=0.0,
        show_default=True,
        help="0: deterministic DDIM. 1: as much noise as DDPM. Or one number for each step: 0,0.7,0.7,0.",
    ),
    click.option(
        "--eta-scales",
        type=click.Choice(ETA_SCALES),
        default=PAPER,
        show_default=True,
        help="What eta means: it scales the std_dev (the paper) or the variance of DDPM's noise; or it is the noise "
        "level of Flow-GRPO's or Coefficients-Preserving Sampling's (cps).",
    ),
    click.option(
        "--order",
        type=click.IntRange(1, 3),
        default=None,
        help="2: multistep DDIM, closer to converged samples with the same number of model calls. 3 needs --eta 0.  "
        "[default: the order of --timesteps FILE.json, or 1]",
    ),
    click.option(
        "--analytic-variance",
        is_flag=True,
        help="Add Analytic-DPM's noise instead of eta's, as measured for --timesteps FILE.json.",
    ),
    click.option("--sigma-hat", is_flag=True, help="Use the paper's larger DDPM noise; needs --eta 1."),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same samples."
    ),
    click.option(
        "--capture",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="On a CUDA device: replay CUDA graphs, one per step or one for the whole loop.",
    ),
)


def takes_run(*more: Callable) -> Callable:
    """Decorate a command with the options of all sampling commands, and with ``more``.

    The common ones are passed as a ``Run``, the command's first argument.
    """
    return _gathered((*more, *_OPTIONS.values()), {f.name for f in fields(Run) if f.init})


def takes_model(command: Callable) -> Callable:
    """Decorate a command with the options of the model only, passed as a ``Run`` first."""
    return _gathered([_OPTIONS[name] for name in _OF_A_MODEL], set(_OF_A_MODEL))(command)


def _gathered(options: Sequence[Callable], names: set[str]) -> Callable:
    """Return a decorator that adds options, and passes those in ``names`` as a ``Run``."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def with_run(**given: Any) -> None:
            run = Run(**{name: given.pop(name) for name in list(given) if name in names})
            command(run, **given)

        for option in reversed(options):
            with_run = option(with_run)
        return with_run

    return decorate


def _own_model(name: str) -> nn.Module:
    """Import ``module:attribute``: a module, or a function that returns one."""
    value = import_string(name, "the model")
    with exits_refused(name, "the model"):
        model = value if isinstance(value, nn.Module) or not callable(value) else value()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"--model module:attribute must be a torch.nn.Module, or return one, got {type(model).__name__} from {name}"
        )
    return model.eval().requires_grad_(False)


def _shifted(schedule: NoisePath | None, shift: float) -> NoisePath:
    """Return a schedule with this shift.

    Raises:
        ValueError: it has none, or the shift is out of range.
    """
    if schedule is None or "shift" not in getattr(schedule, "__dataclass_fields__", ()):
        raise ValueError(
            f"--shift is for a schedule that has one, flow or trigonometric, got {schedule!r}: add --schedule flow, or leave it out"
        )
    return replace(schedule, shift=shift)  # type: ignore[type-var]  # it is a dataclass


def conditioning_rule(run: Run) -> Conditioning | None:
    """Return the conditioning: the class of --class, or each class in turn.

    None for a model without classes.
    """
    labels = run.labels(1)
    if labels is None:
        return None
    return OneClass(labels[0]) if run.class_name is not None else EveryClass(len(run.class_names or ()))


def parse_timesteps(text: str | None) -> list[float] | str | None:
    """Return a list "[900,600]" as numbers, and any other text unchanged."""
    if text is None or not text.startswith("["):
        return text
    try:
        return [float(t) if "." in t or "e" in t.lower() else int(t) for t in text.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f'a list of timesteps must look like "[900,600,300,0]", got {text!r}') from None


# --- Files ------------------------------------------------------------------------------------------------------------


def check_output(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError if a file has an unknown suffix, or its folder does not exist."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the file name must end in {' or '.join(suffixes)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist: create it first")


def save_samples(images: Tensor, labels: list[int] | None, path: Path) -> None:
    if path.suffix.lower() == ".npz":
        arrays: dict[str, Any] = {} if labels is None else {"labels": np.array(labels)}
        np.savez_compressed(path, samples=images.numpy(), **arrays)
    else:
        tensors = {} if labels is None else {"labels": torch.tensor(labels, dtype=torch.int64, device="cpu")}
        save_file({"samples": images.contiguous(), **tensors}, path)


def read_samples(paths: tuple[Path, ...], sample_shape: tuple[int, ...]) -> tuple[Tensor, list[str]]:
    """Read pictures, and samples that ``--save`` wrote.

    Pictures are resized to the model's sample size, and converted to grey for models with one
    channel.

    Returns:
        One batch ``(B, C, H, W)`` in [-1, 1], and a name for each sample.

    Raises:
        ValueError: a file is neither, or its samples have another shape.
    """
    samples, names = [], []
    for path in paths:
        found = _read_numbers(path) if path.suffix.lower() in NUMBER_SUFFIXES else _read_picture(path, sample_shape)
        if found.ndim != 4 or tuple(found.shape[1:]) != tuple(sample_shape):
            raise ValueError(
                f"samples must be (B, {', '.join(map(str, sample_shape))}) for this model, got {tuple(found.shape)} in {path}"
            )
        samples.append(found)
        names += [path.stem if len(found) == 1 else f"{path.stem} {i}" for i in range(len(found))]
    return torch.cat(samples), names


def _read_numbers(path: Path) -> Tensor:
    if path.suffix.lower() == ".npz":
        samples = torch.from_numpy(npz_array(path, "samples").astype(np.float32))
    else:
        samples = safetensors_tensor(path, "samples").float()
    if not bool(samples.isfinite().all()):
        raise ValueError(f"samples must be finite, got NaN or infinity in {path}")
    return samples


def _read_picture(path: Path, sample_shape: tuple[int, ...]) -> Tensor:
    channels, height, width = sample_shape
    if channels not in (1, 3):
        raise ValueError(
            f"pictures need a model with 1 or 3 channels, got one with {channels}: pass samples as .npz or .safetensors"
        )
    pixels = pictures.read_picture(path, "L" if channels == 1 else "RGB", (width, height))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
