"""Measuring one cell: draw its samples, time them, and evaluate their quality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.conditioning import Conditioning
from ..kernels.noise import sample_seeds
from ..models.metrics import sample_distances
from ..models.protocol import Model
from ..plans.path import NoisePath
from ..sampler import DDIMSampler
from ..sampling.inversion import reconstruction_error
from ..sampling.loop import Timing
from .cells import Cell
from .closed_form import ClosedForm
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
        shape: of one sample, ``(C, ...)``.
        conditioning: gives the conditioning of sample i; None for an unconditional model.
        sampler_options: the model's own sampling settings, as arguments of ``DDIMSampler``.
        seed: gives the initial noise; sample i of every cell starts from the same noise.
        judge: evaluates samples by features; None for no such metrics.
        truth: the data distribution in closed form, if it is known.
        reconstructed: number of converged samples to encode and decode; 0 for none.
    """

    model: Model
    schedule: NoisePath
    shape: tuple[int, ...]
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

    def sampler(self, cell: Cell) -> DDIMSampler:
        return cell.sampler(self.schedule, self.sampler_options)

    def labels(self, count: int) -> Tensor | None:
        """Return the class of each sample; None for a model without classes."""
        return None if self.conditioning is None else self.conditioning.rows(0, count).get("class_labels")

    @property
    def calls_per_step(self) -> int:
        return 1 if self.guidance_scale in (None, 1) else 2

    def calls(self, cell: Cell) -> int:
        """Return the model calls of a cell, counted per sample, without those of reconstruction."""
        return (cell.count or self.count) * cell.num_inference_steps * self.calls_per_step


@dataclass(eq=False)
class Drawn:
    """Samples of a cell ``(N, C, ...)`` on the CPU, and each batch's time in seconds per sample."""

    samples: Tensor
    model_seconds: list[float]
    update_seconds: list[float]


def draw(subject: Subject, cell: Cell, count: int | None = None, progress: Progress = lambda calls: None) -> Drawn:
    """Draw the first ``count`` samples of a cell. None: the cell's own number of samples."""
    count = count or cell.count or subject.count
    sampler, seeds = subject.sampler(cell), torch.from_numpy(sample_seeds(subject.seed, count))
    x_T = None if subject.truth is None else subject.truth.noise(count)
    samples, drawn = [], Drawn(torch.empty(0, dtype=torch.float32, device="cpu"), [], [])
    for first in range(0, count, subject.batch_size):
        size, timing = min(subject.batch_size, count - first), Timing()

        rows = {} if subject.conditioning is None else subject.conditioning.rows(first, size)
        with _counted(subject.model, size * sampler.num_inference_steps * subject.calls_per_step, progress):
            batch = sampler.sample(
                subject.model,
                (size, *subject.shape),
                seeds=seeds[first : first + size],
                conditioning={name: row.to(subject.device) for name, row in rows.items()},
                guidance_scale=subject.guidance_scale,
                x_T=None if x_T is None else x_T[first : first + size].to(subject.device),
                device=subject.device,
                timing=timing,
            )
        samples.append(batch.cpu())
        drawn.model_seconds.append(timing.model_seconds / size)
        drawn.update_seconds.append(timing.update_seconds / size)
    drawn.samples = torch.cat(samples)
    return drawn


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
    memory = PeakMemory(subject.device)
    drawn = draw(subject, cell, progress=progress)
    peak, samples = memory.megabytes(), drawn.samples
    quality: dict[str, Measure] = {}
    if subject.judge is not None:
        quality |= subject.judge.measures(samples, subject.labels(len(samples)))
    if subject.truth is not None:
        quality["wasserstein"] = Measure(subject.truth.wasserstein(samples))
    if converged is not None and cell.deterministic:
        shared = min(len(samples), len(converged))
        quality["distance"] = mean(sample_distances(samples[:shared], converged[:shared]))
        if subject.reconstructed and cell.order == 1:
            quality["reconstruction"] = reconstruction(subject, cell, converged[: subject.reconstructed])
    result = CellResult(
        cell,
        len(samples),
        quality,
        # The fastest batch is the least disturbed by other programs.
        model_ms=1e3 * min(drawn.model_seconds),
        update_ms=1e3 * min(drawn.update_seconds),
        calls=cell.num_inference_steps * subject.calls_per_step,
        peak_megabytes=peak,
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
