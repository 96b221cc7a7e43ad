"""The model, the sampler and the results that the options of a command select."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..generation.conditioning import Conditioning, EveryClass, OneClass
from ..kernels import dispatch
from ..kernels.contract import StepCoefficients, StepInputs
from ..kernels.noise import sample_seeds
from ..models.flow_view import as_flow
from ..plans.continuous import FlowSchedule
from ..plans.eta import PAPER
from ..plans.files import SUFFIX
from ..plans.named import schedule_from_text
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..sampler import DDIMSampler
from ..sampling.loop import Trajectory
from ..utils import pictures
from ..utils.checks import check_memory, check_sample_shape, refuse, usable_device
from .files import read_samples, save_samples
from .interruption import NOTHING
from .models import named_model


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
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    shape: tuple[int, ...] | None = None
    prediction_type: str | None = None
    quiet: bool = False
    model: nn.Module = field(init=False)
    path: NoisePath | None = field(init=False, default=None)
    left: str = field(init=False, default=NOTHING)
    _noted: set[str] = field(init=False, default_factory=set)
    _device: torch.device = field(init=False, default=torch.device("cpu"))

    def load(self) -> None:
        """Load the model onto the requested device."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.use(self.model_on(usable_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))))

    def model_on(self, device: torch.device) -> nn.Module:
        """Return the model of --model on this device, with the shape of --shape.

        Raises:
            ValueError: it has no shape of its samples.
        """
        self._device = device
        model = named_model(
            self.model_name,
            device,
            trust_pickle=self.trust_pickle,
            variant=self.variant,
            prompts=self.prompts,
            negative_prompt=self.negative_prompt,
        )
        if self.shape is not None:
            model.sample_shape = check_sample_shape("--shape", self.shape)  # type: ignore[assignment]  # a module takes any attribute
        if getattr(model, "sample_shape", None) is None:
            raise ValueError(
                f"the command line needs the shape of a model's samples, got none from {self.model_name}: pass --shape 3,32,32, or "
                "give the model or function an attribute sample_shape = (3, 32, 32)"
            )
        return model

    def use(self, model: nn.Module) -> None:
        """Sample this model, along the path of --schedule and --shift if they are given.

        A diffusion model that is to be sampled along flow matching's path becomes a flow model,
        exactly.

        Raises:
            ValueError: it has no unconditional output, which --guidance needs.
        """
        if self.guidance != 1 and getattr(model, "unconditional", None) is None:
            refuse(
                "--guidance is for models with classes, pipelines with --prompt, and models with an attribute unconditional",
                self.guidance,
                f"leave it out for {self.model_name}",
            )
        trained = getattr(model, "schedule", None)
        path = trained if self.schedule is None else schedule_from_text(self.schedule)
        if self.shift is not None:
            path = _shifted(path, self.shift)
        if isinstance(path, FlowSchedule) and isinstance(trained, NoiseSchedule):
            model = as_flow(model)
            trained = model.schedule
        if isinstance(path, FlowSchedule) and isinstance(trained, FlowSchedule):
            path = replace(path, time_scale=trained.time_scale)
        self.model, self.path = model, path
        if self.backend is not None:  # before any progress is shown
            x = torch.zeros(1, 4, dtype=torch.float32, device=self.where)
            dispatch.choose(StepInputs(x, x, StepCoefficients(1, 0, 0, 1, 0, 1, 0, 0)), self.backend)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W)."""
        return tuple(getattr(self.model, "sample_shape", ()))

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """The shape of a sample that is decoded, (C, H, W): that of the sample where nothing
        decodes it."""
        return tuple(getattr(self.model, "picture_shape", self.sample_shape))

    @property
    def draws_pictures(self) -> bool:
        return len(self.picture_shape) == 3 and self.picture_shape[0] in (1, 3)

    def check_pictures(self, of_pictures: Mapping[str, object] = MappingProxyType({})) -> None:
        """Say what is written of samples that are no pictures.

        Args:
            of_pictures: options that need pictures, None where they are not given.

        Raises:
            ValueError: nothing would be, or such an option is given.
        """
        if self.draws_pictures:
            return
        if given := [name for name, value in of_pictures.items() if value is not None]:
            refuse(f"{given[0]} is for samples that are pictures, (1 or 3, H, W)", self.picture_shape, "leave it out")
        shape, hint = self.picture_shape, ""
        if len(shape) == 3 and shape[2] in (1, 3):  # not drawn, so the first is no number of channels
            hint = f"; channels come first: --shape {shape[2]},{shape[0]},{shape[1]}"
        if self.save is None:
            refuse(
                "samples that are drawn must be pictures, (1 or 3, H, W)",
                shape,
                f"add --save FILE.npz or FILE.safetensors, which take any shape{hint}",
            )
        self.note(f"samples of shape {shape} are no pictures: {self.out} is not written{hint}")

    def to_pictures(self, samples: Tensor) -> Tensor:
        """Return samples as pictures (B, *picture_shape), decoded where they are latents."""
        decode = getattr(self.model, "decode", None)
        if decode is None:
            return samples
        return torch.cat([decode(part.to(self.where)).cpu() for part in samples.split(1)])

    def read(self, paths: tuple[Path, ...]) -> tuple[Tensor, list[str]]:
        """Return the samples in files, on the model's device, and their names; pictures are encoded
        where samples are latents."""
        encode = getattr(self.model, "encode", None)
        return read_samples(paths, self.sample_shape, self.picture_shape, encode, self.where, self.note)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return getattr(self.model, "class_names", None)

    @property
    def where(self) -> torch.device:
        tensors = (tensor for kind in (self.model.parameters, self.model.buffers) for tensor in kind())
        return next((tensor.device for tensor in tensors), self._device)

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
        options = dict(getattr(self.model, "sampler_options", {}))
        return options if self.prediction_type is None else {**options, "prediction_type": self.prediction_type}

    def sampler(self, **more: Any) -> DDIMSampler:
        """Return the sampler; options left out are the model's, or the sampler's defaults."""
        options = self.sampler_options()
        if self.spacing is not None:
            options["timestep_spacing"] = self.spacing
        schedule, timesteps = self.noise_schedule(), parse_timesteps(self.timesteps, self.note)
        return DDIMSampler(
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

    def check_memory(self, name: str, count: int, kept: int = 1, grids: int = 1) -> None:
        """Raise ValueError where ``count`` samples do not fit into memory, each ``kept`` times as
        floats, and in so many grids."""
        shape = self.picture_shape
        each = 4 * kept * math.prod(self.sample_shape) + (
            grids * pictures.grid_bytes(shape) if self.draws_pictures else 0
        )
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
        """Return the columns of a grid in which each has one class, if classes are drawn in turn,
        else None."""
        classes = len(self.class_names or ())
        if not classes or self.class_name is not None or count < classes:
            return None
        return classes * max(1, round(math.sqrt(count) / classes))

    def whole_rows(self, most: int = 64) -> int:
        """Return how many pictures fill whole rows."""
        columns = self.columns(most) or math.isqrt(most)
        return most // columns * columns

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

    def samples_in_batches(self, count: int, draw: Callable[[slice], Tensor | Trajectory]) -> Tensor:
        """Return the samples of ``in_batches`` as one tensor."""
        return torch.cat([part.samples for part in self.in_batches(count, draw)])

    def write(
        self,
        samples: Tensor,
        names: list[str],
        title: str,
        columns: int | None,
        labels: list[int] | None = None,
        drawn: Tensor | None = None,
    ) -> list[Path]:
        """Write the grid of samples (or of the pictures ``drawn``) and, with --save, the samples.

        Raises:
            ValueError: every sample, or every picture, has NaN or infinity; nothing is written.
        """
        written: list[Path] = []
        _check_some_finite("samples", samples)
        if self.draws_pictures:
            images = self.to_pictures(samples) if drawn is None else drawn
            _check_some_finite("pictures", images)
            self.draw(images, names, title, columns)
            written.append(self.out)
            self.left = f"{self.out} was written, and nothing else"
        if self.save is not None:
            save_samples(samples, labels, self.save)
            written.append(self.save)
        return written

    def draw(self, images: Tensor, names: list[str], title: str, columns: int | None) -> None:
        """Write the grid of pictures (B, *picture_shape)."""
        path = self.out.resolve()  # of a link, its target
        pictures.save_grid(images, path, labels=names, title=title, columns=columns)

    def note(self, text: str) -> None:
        """Say on stderr, once, what may not be what was meant; with --quiet, too."""
        text = " ".join(text.split())
        if text not in self._noted:
            self._noted.add(text)
            click.echo(f"note: {text}", err=True)

    @contextmanager
    def notes_of_warnings(self) -> Iterator[None]:
        """Make notes of the warnings that a user of the library is meant to see, without a line of
        its code."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *more, **others: self.note(str(message))
            yield

    def say(self, text: str) -> None:
        if not self.quiet:
            click.echo(text)


def _check_some_finite(name: str, values: Tensor) -> None:
    if len(values) and not bool(values.isfinite().flatten(1).all(1).any()):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in every one of {len(values)}, and did not write them: look at what the "
            "model returns, at its --schedule and at its --prediction-type"
        )


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


def parse_timesteps(text: str | None, note: Callable[[str], None] = lambda text: None) -> list[float] | str | None:
    """Return a list "[900,600]" as numbers, and any other text unchanged.

    Args:
        note: told what counts for sections mean, which may be a list without its brackets.

    Raises:
        ValueError: it is a list that is none, or not decreasing; or a file of another kind.
    """
    if text is None:
        return None
    if text.startswith("["):
        return _listed_timesteps(text)
    if "," in text and all(count.strip().isdigit() for count in text.split(",")):
        counts = [int(count) for count in text.split(",")]
        note(
            f"--timesteps {text} is the counts of steps in {len(counts)} sections, {sum(counts)} steps in all: timesteps themselves "
            f"stand in brackets, {_listed(counts)}"
        )
    elif not text.endswith(SUFFIX) and (os.path.exists(text) or Path(text).suffix):
        refuse(
            f"a file of --timesteps must be one that ddim-fast search writes, FILE{SUFFIX}", text, "name such a file"
        )
    return text


def _listed_timesteps(text: str) -> list[float]:
    try:
        found = [float(t) if "." in t or "e" in t.lower() else int(t) for t in text.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f'a list of timesteps must look like "[900,600,300,0]", got {text!r}') from None
    if any(later >= earlier for earlier, later in pairwise(found)):
        refuse("a list of --timesteps must be decreasing, from noise to data", text, f"write {_listed(found)}")
    return found


def _listed(timesteps: Sequence[float]) -> str:
    """Return distinct timesteps as they are typed, from noise to data."""
    return f"[{','.join(map(str, sorted(set(timesteps), reverse=True)))}]"
