"""The model, the sampler and the results that the options of a command select."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..generation.conditioning import Conditioning, EveryClass, OneClass
from ..kernels.noise import sample_seeds
from ..models.flow_view import as_flow
from ..models.loading import load_model
from ..plans.continuous import FlowSchedule
from ..plans.eta import PAPER
from ..plans.named import schedule_from_text
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..sampler import DDIMSampler
from ..sampling.loop import Trajectory
from ..utils import pictures
from ..utils.checks import check_memory, usable_device
from ..utils.import_string import exits_refused, import_string
from .files import NUMBER_SUFFIXES, PICTURE_SUFFIXES, check_output, save_samples


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
                eta_scales=self.eta_scales,
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

    def samples_in_batches(self, count: int, draw: Callable[[slice], Tensor | Trajectory]) -> Tensor:
        """Return the samples of ``in_batches`` as one tensor."""
        return torch.cat([part.samples for part in self.in_batches(count, draw)])

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
