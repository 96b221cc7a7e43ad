"""Measuring one cell: draw its samples, time them, and evaluate their quality."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import add
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.conditioning import Conditioning
from ..integrations.named_schedulers import NamedScheduler, named_scheduler
from ..kernels.noise import sample_seeds
from ..models.metrics import sample_distances
from ..models.protocol import Model, output_tensor, sample_shape_of
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..sampler import DDIMSampler
from ..sampling.guidance import guidance_scales, guided_output
from ..sampling.initial_state import conditionings_of, initial_state
from ..sampling.inversion import reconstruction_error
from ..sampling.loop import Loop, Timing, begins_steps, model_calls
from ..utils.checks import refuse
from ..utils.files import first_line
from ..utils.transfer import to_device
from .cells import Cell
from .closed_form import ClosedForm
from .others import AGAINST, OtherSampler, Rehearsal, short_name
from .quality import Judge, mean
from .results import CellResult, Measure

CONVERGED = Cell(200, "log_snr", order=2)
"""The cell used as the converged solution. It is of order 2: its error falls with the square of the
number of steps."""
Progress = Callable[[int], Any]
"""Called as ``progress(calls)`` with the number of new model calls, counted per sample."""


@dataclass
class Subject:
    """A model and all settings that cells share. Cells differ only in the fields of ``Cell``.

    Args:
        shape: of one sample, ``(C, ...)``. None: the model's ``sample_shape``.
        conditioning: gives the conditioning of sample i; None for an unconditional model.
        sampler_options: the model's own sampling settings, as arguments of ``DDIMSampler``.
        seed: gives the initial noise; sample i of every cell starts from the same noise.
        judge: evaluates samples by features; None for no such metrics.
        truth: the data distribution in closed form, if it is known.
        reconstructed: number of converged samples to encode and decode; 0 for none.
    """

    model: Model
    schedule: NoisePath
    shape: Sequence[int] | None = None
    conditioning: Conditioning | None = None
    guidance_scale: float | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    count: int = 1000
    batch_size: int = 64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    judge: Judge | None = None
    truth: ClosedForm | None = None
    reconstructed: int = 0

    def __post_init__(self) -> None:
        self.shape = self.sample_shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample.

        Raises:
            TypeError, ValueError: there is none, or it breaks a rule.
        """
        return sample_shape_of(self.model, self.shape)

    def sampler(self, cell: Cell) -> DDIMSampler:
        return cell.sampler(self.schedule, self.sampler_options)

    def other(self, cell: Cell) -> OtherSampler:
        """Return the sampler of a cell that is another library's scheduler.

        Raises:
            TypeError, ValueError: there is no such scheduler.
        """
        return self.other_sampler(named_scheduler(str(cell.scheduler), AGAINST), cell.num_inference_steps)

    def other_sampler(self, named: NamedScheduler, num_inference_steps: int) -> OtherSampler:
        """Return a scheduler as the owner of a pipeline with this model configures it: with the
        model's path, prediction type and clipping, and its own spacing."""
        prediction_type = getattr(self.model, "prediction_type", None) or self.schedule.default_prediction_type
        settings = {name: value for name, value in self.sampler_options.items() if name != "timestep_spacing"}
        clip = getattr(self.model, "clip_sample_range", None)
        return OtherSampler(named, self.schedule, prediction_type, clip, settings, num_inference_steps)

    def rehearsed(self, named: NamedScheduler, num_inference_steps: int) -> Rehearsal:
        """Rehearse a scheduler for this model.

        Raises:
            ValueError: it cannot sample the model's path, or tells the model what it cannot take.
        """
        rehearsal = self.other_sampler(named, num_inference_steps).rehearse(self.sample_shape, self.device)
        between = [t for t in rehearsal.times if t != round(t)]
        if between and isinstance(self.schedule, NoiseSchedule):
            x = torch.zeros((1, *self.sample_shape), dtype=torch.float32, device=self.device)
            t = torch.full((1,), between[0], dtype=torch.float32, device=self.device)
            try:
                with torch.no_grad():
                    output_tensor(self.model(x, t, **self.conditions(0, 1)), x)
            except Exception as error:  # whatever the model does
                raise ValueError(
                    f"a scheduler must tell the model whole timesteps, where it takes no others ({type(error).__name__}: "
                    f"{first_line(error)}), got {between[0]:g} from {named.text}: add timestep_spacing=leading or trailing"
                ) from error
        return rehearsal

    def check(self, cell: Cell) -> None:
        """Raise TypeError or ValueError unless this cell can be drawn."""
        if cell.scheduler is None:
            self.sampler(cell).plan(self.model)
            return
        rehearsal = self.rehearsed(named_scheduler(cell.scheduler, AGAINST), cell.num_inference_steps)
        if (rehearsal.calls, rehearsal.draws_noise) != (cell.predictions, cell.draws_noise):
            refuse(
                f"a cell of {cell.scheduler} must have calls={rehearsal.calls} and draws_noise={rehearsal.draws_noise}",
                (cell.calls, cell.draws_noise),
                "make it by other_cells",
            )

    def seeds(self, first: int, size: int) -> Tensor:
        """Return ``(size,)`` int64, the seeds of the samples from ``first`` on."""
        return torch.from_numpy(sample_seeds(self.seed, first + size))[first:]

    def given_noise(self, cell: Cell, first: int, size: int) -> Tensor | None:
        """Return x_T of a cell's samples from ``first`` on, where the data have noise of their own."""
        if self.truth is None:
            return None
        return self.truth.noise(cell.count or self.count)[first : first + size].to(self.device)

    def conditions(self, first: int, size: int) -> dict[str, Tensor]:
        """Return the conditioning of the samples from ``first`` on."""
        rows = {} if self.conditioning is None else self.conditioning.rows(first, size)
        return {name: row.to(self.device) for name, row in rows.items()}

    def labels(self, count: int) -> Tensor | None:
        """Return the class of each sample; None for a model without classes."""
        return None if self.conditioning is None else self.conditioning.rows(0, count).get("class_labels")

    @property
    def calls_per_step(self) -> int:
        return 1 if self.guidance_scale in (None, 1) else 2

    def calls(self, cell: Cell) -> int:
        """Return the model calls of a cell, counted per sample, without those of reconstruction."""
        return (cell.count or self.count) * cell.predictions * self.calls_per_step


@dataclass(eq=False)
class Batch:
    """Samples ``(B, C, ...)`` of a cell on the CPU, and what they took.

    Attributes:
        calls: of the model for each sample, guidance included.
        model_seconds: in the model; in captured graphs, in the whole loop.
        update_seconds: in everything else, from the seeds to the samples.
        peak_megabytes: see ``PeakMemory``.
    """

    samples: Tensor
    calls: int
    model_seconds: float
    update_seconds: float
    peak_megabytes: float


def firsts(subject: Subject, cell: Cell) -> range:
    """Return the number of the first sample of each batch of a cell."""
    return range(0, cell.count or subject.count, subject.batch_size)


def draw(subject: Subject, cell: Cell, count: int | None = None, progress: Progress = lambda calls: None) -> Tensor:
    """Draw the first ``count`` samples of a cell. None: the cell's own number of samples."""
    cell = replace(cell, count=count or cell.count)
    return torch.cat([draw_batch(subject, cell, first, progress).samples for first in firsts(subject, cell)])


def draw_batch(subject: Subject, cell: Cell, first: int, progress: Progress = lambda calls: None) -> Batch:
    """Draw the batch of a cell that begins with sample ``first``."""
    count = cell.count or subject.count
    size = min(subject.batch_size, count - first)
    run = _our_run if cell.scheduler is None else _other_run
    sample = run(subject, cell, first, size)
    timing = Timing()
    with _counted(subject.model, size * cell.predictions * subject.calls_per_step, progress):
        memory = PeakMemory(subject.device)
        started = time.perf_counter()
        samples, predictions = sample(timing)
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
        seconds = time.perf_counter() - started
        peak = memory.megabytes()
    in_model = min(timing.model_seconds + timing.captured_seconds, seconds)
    return Batch(samples.cpu(), predictions * subject.calls_per_step, in_model, seconds - in_model, peak)


def _our_run(subject: Subject, cell: Cell, first: int, size: int) -> Callable[[Timing], tuple[Tensor, int]]:
    """Return what draws a batch with our sampler, and how often the model predicts."""
    sampler, seeds = subject.sampler(cell), subject.seeds(first, size)
    options: dict[str, Any] = {
        "seeds": seeds,
        "conditioning": subject.conditions(first, size),
        "guidance_scale": subject.guidance_scale,
        "x_T": subject.given_noise(cell, first, size),
        "device": subject.device,
    }

    def sample(timing: Timing) -> tuple[Tensor, int]:
        samples = sampler.sample(subject.model, (size, *subject.sample_shape), timing=timing, **options)
        return samples, sampler.num_inference_steps

    return sample


def _other_run(subject: Subject, cell: Cell, first: int, size: int) -> Callable[[Timing], tuple[Tensor, int]]:
    """Return what draws a batch with another library's scheduler, and how often the model predicts."""
    other, seeds = subject.other(cell), subject.seeds(first, size)
    scheduler = other.scheduler()  # a pipeline has one already
    scales = guidance_scales(subject.guidance_scale, (0.0,))
    calls = model_calls(subject.model, conditionings_of(subject.model, subject.conditions(first, size), scales, None))
    begin = begins_steps(subject.model)
    generator = torch.Generator(subject.device).manual_seed(int(seeds[0]) & ((1 << 63) - 1))
    given = subject.given_noise(cell, first, size)

    def sample(timing: Timing) -> tuple[Tensor, int]:
        predictions = 0

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal predictions
            predictions += 1
            began = time.perf_counter()
            m, uncond = Loop(x_t=x, calls=calls, begin=begin, guidance_scales=scales).predict(t)
            timing.model_seconds += time.perf_counter() - began
            return m if uncond is None or scales is None else guided_output(m, uncond, scales[0], 0.0, x.dtype)

        noise = given
        if noise is None:
            shape = (size, *subject.sample_shape)
            noise = initial_state(shape, None, to_device(seeds, subject.device), None, subject.device, torch.float32)
        return other.drive(scheduler, predict, noise, generator), predictions

    return sample


@contextmanager
def _counted(model: Model, calls: int, progress: Progress) -> Iterator[None]:
    """Call ``progress`` after each model call.

    Calls that cannot be observed (in a CUDA graph, of a plain function) are reported at the end.
    """
    seen = 0

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal seen
        seen += len(arguments[0])
        progress(len(arguments[0]))

    hook = None
    if isinstance(model, nn.Module) and all(p.device.type == "cpu" for p in model.parameters()):
        hook = model.register_forward_hook(after)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
    progress(calls - seen)


def measure(
    subject: Subject, cell: Cell, converged: Tensor | None = None, progress: Progress = lambda calls: None
) -> tuple[CellResult, Tensor]:
    """Draw the samples of a cell and measure their quality and time.

    Args:
        converged: converged samples from the same noise, ``(M, C, ...)``; the first min(N, M) are
            compared. None: no distance.

    Returns:
        The result, and the samples ``(N, C, ...)``.
    """
    batches = [draw_batch(subject, cell, first, progress) for first in firsts(subject, cell)]
    return judged(subject, cell, batches, converged)


def judged(
    subject: Subject, cell: Cell, batches: Sequence[Batch], converged: Tensor | None = None
) -> tuple[CellResult, Tensor]:
    """Return the result of a cell whose batches are drawn, and its samples, see ``measure``."""
    samples = torch.cat([batch.samples for batch in batches])
    quality: dict[str, Measure] = {}
    if subject.judge is not None:
        quality |= subject.judge.measures(samples, subject.labels(len(samples)))
    if subject.truth is not None:
        quality["wasserstein"] = Measure(subject.truth.wasserstein(samples))
    if converged is not None and cell.deterministic:
        shared = min(len(samples), len(converged))
        quality["distance"] = mean(sample_distances(samples[:shared], converged[:shared]))
        if subject.reconstructed and cell.order == 1 and cell.scheduler is None:
            quality["reconstruction"] = reconstruction(subject, cell, converged[: subject.reconstructed])
    size = max(len(batch.samples) for batch in batches)
    whole = [batch for batch in batches if len(batch.samples) == size]  # a smaller one takes longer a sample
    model_ms, update_ms = (
        [1e3 * s / size for s in seconds]
        for seconds in zip(*((b.model_seconds, b.update_seconds) for b in whole), strict=True)
    )
    result = CellResult(
        cell,
        len(samples),
        quality,
        model_ms=median(model_ms),
        update_ms=median(update_ms),
        calls=batches[0].calls,
        peak_megabytes=max(batch.peak_megabytes for batch in batches),
        batch_ms=tuple(map(add, model_ms, update_ms)),
    )
    return result, samples


def reconstruction(subject: Subject, cell: Cell, samples: Tensor) -> Measure:
    """Return the mean squared error, in [0, 1], of samples encoded to noise and decoded again
    (section 5.4 of the DDIM paper)."""
    x0 = samples.to(subject.device)
    rows = {} if subject.conditioning is None else subject.conditioning.rows(0, len(x0))
    again = subject.sampler(cell).reconstruct(
        subject.model, x0, conditioning={name: row.to(subject.device) for name, row in rows.items()}
    )
    return mean(reconstruction_error(x0, again).cpu())


def other_cells(
    subject: Subject, text: str, steps: Sequence[int], count_at: Mapping[int, int | None] | None = None
) -> list[Cell]:
    """Return cells of another library's scheduler, rehearsed with each number of steps.

    Args:
        text: ``module:Class?option=value``, as in ``diffusers:UniPCMultistepScheduler?solver_order=3``.
        count_at: number of samples by number of steps, if it differs from the study's.

    Raises:
        TypeError, ValueError: there is no such scheduler or option, or it cannot sample the model's
            path, from its predictions, in such a number of steps.
    """
    named = named_scheduler(text, AGAINST)
    cells = []
    for S in steps:
        found = subject.rehearsed(named, S)
        count = (count_at or {}).get(S)
        cells.append(
            Cell(S, short_name(text), count=count, scheduler=text, calls=found.calls, draws_noise=found.draws_noise)
        )
    return cells


class PeakMemory:
    """Peak memory since construction, minus the memory in use at construction."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_peak()

    def megabytes(self) -> float:
        """Return the peak in 10^6 bytes; NaN if the system does not report it."""
        if self._device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self._device) - self._before) / 1e6
        return max(_status("VmHWM") - self._before, 0.0) / 1e6


def _reset_peak() -> float:
    """Reset Linux's peak memory counter of this process; return the memory in use, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return _status("VmRSS")


def _status(name: str) -> float:
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return math.nan
    return math.nan if found is None else 1024.0 * int(found[1])
