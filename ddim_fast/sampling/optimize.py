"""Make a model faster for one shape of batch while its pictures stay the same: each way is tried,
timed and checked.

fast = sampler.optimize(model, (64, 1, 28, 28), conditioning={"class_labels": labels})
print(fast.gain)
images = sampler.sample(fast, (64, 1, 28, 28), seed=0, conditioning={"class_labels": labels})
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..models.protocol import Model
from ..models.replacements import REPLACEMENTS, channels_last, with_replacements
from ..plans.plan import SamplingPlan
from ..utils.checks import check_number
from .capture import GraphCache
from .initial_state import conditionings_of, place
from .loop import merged_conditioning
from .options import Options
from .run import sample

ROUNDS = 7
"""How often each way is timed, in turn with the others; the median counts."""
SHARES = (1.0, 0.75, 0.5, 0.25)
"""Fractions of a run's steps, the noisiest ones, to try with convolutions in reduced precision, the
largest first."""
MARGIN = 3
"""Reduced precision may change the samples tried by the tolerance divided by this: other samples
change more."""
WORTHWHILE = 0.97
"""A way is kept if it takes less than this fraction of the time."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Gain:
    """What was measured while optimizing.

    Args:
        ways: what is done differently, in words.
        before, after: seconds of a whole run with the model as it was and as it is now: medians,
            timed in turn.
        largest_change: the largest difference between elements of the two sets of samples.
        tolerance: the largest difference allowed.
    """

    ways: tuple[str, ...]
    before: float
    after: float
    largest_change: float
    tolerance: float

    @property
    def times_faster(self) -> float:
        return self.before / self.after

    def __str__(self) -> str:
        how = ", ".join(self.ways) or "nothing helped"
        return (
            f"{self.times_faster:.2f} times faster ({self.before:.3f} s before, {self.after:.3f} s after), "
            f"samples within {self.largest_change:.1e} of what they were (allowed: {self.tolerance:.1e}): {how}"
        )


class OptimizedModel(nn.Module):
    """A model with a faster version for one shape of batch; other shapes go to the model itself.

    Attributes:
        model: the original, whose other attributes this one has, too.
        gain: what was measured.
        batches_guidance: whether both halves of guidance are one call.
    """

    def __init__(
        self,
        model: nn.Module,
        fast: Callable[..., Any],
        shape: Sequence[int],
        reduced_from: float | None,
        batches_guidance: bool,
    ):
        super().__init__()
        self.model = model
        self.shape = tuple(shape)
        self.reduced_from = reduced_from
        self.batches_guidance = batches_guidance
        self.gain: Gain | None = None
        object.__setattr__(self, "fast", fast)  # its weights are the model's or a copy: not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def extra_repr(self) -> str:
        return f"for {self.shape}" + ("" if self.gain is None else f": {self.gain}")

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Any:
        if tuple(x.shape) != self.shape:
            return self.model(x, t, **conditioning)
        if self.reduced_from is not None and bool((t >= self.reduced_from).all()):
            with reduced_convolutions():
                return self.fast(x, t, **conditioning)
        return self.fast(x, t, **conditioning)


@contextmanager
def reduced_convolutions() -> Iterator[None]:
    """Compute float32 convolutions on the CPU by bfloat16 products, summed in float32, in the whole
    process."""
    setting = torch.backends.mkldnn.conv  # type: ignore[attr-defined]  # torch's stubs do not have it
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def optimize(
    plan: SamplingPlan,
    model: nn.Module,
    shape: Sequence[int] | None,
    options: Options,
    graphs: GraphCache,
    *,
    compile: bool = True,
    tolerance: float = 2 / 255,
) -> OptimizedModel:
    """Make a model faster as far as its samples stay what they are: see ``DDIMSampler.optimize``.

    Args:
        options: of the run whose samples are compared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize needs an nn.Module, whose weights it can lay out differently, got {type(model).__name__}: wrap it in one"
        )
    check_number("tolerance", tolerance, at_least=0)
    shape, device, _ = place(model, shape, options.execution.device, torch.float32)
    return _Trial(plan, model, shape, options, graphs, device, tolerance).run(compile)


@dataclass
class _Trial:
    """Trials of faster ways to call a model, on one batch."""

    plan: SamplingPlan
    model: nn.Module
    shape: tuple[int, ...]
    options: Options
    graphs: GraphCache
    device: torch.device
    tolerance: float

    def run(self, compile: bool) -> OptimizedModel:
        batched = self._batches_guidance()
        called_with = (2 * self.shape[0], *self.shape[1:]) if batched else self.shape
        expected = self._samples(self.model)
        result = OptimizedModel(self.model, self.model, called_with, None, batched)
        ways = ["both halves of guidance in one batch"] if batched else []
        change = _largest(self._samples(result), expected) if batched else 0.0
        for name, made in self._ways(len(self.shape) == 4, compile):
            faster = made(result.fast)
            if faster is None or not self._is_faster(faster, result):
                continue
            tried = OptimizedModel(self.model, faster, called_with, None, batched)
            moved = _largest(self._samples(tried), expected)
            if moved <= self.tolerance:
                result, change = tried, moved
                ways.append(name)
        change, reduced = self._reduce(result, expected, change)
        ways += reduced
        before, after = _in_turn(lambda: self._samples(self.model), lambda: self._samples(result), rounds=3)
        if after > before or change > self.tolerance:  # never seen, but the promise must hold
            result = OptimizedModel(self.model, self.model, self.shape, None, False)
            ways, change, after = [], 0.0, before
        result.gain = Gain(tuple(ways), before, after, change, self.tolerance)
        return result.eval()

    def _ways(self, pictures: bool, compile: bool) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
        """Yield what may make a model faster, each on top of those before it that did: its name,
        and how it is done."""
        if pictures:
            yield "channels last", channels_last
        if pictures and self.device.type == "cpu":
            for name, replacements in REPLACEMENTS.items():
                yield name, partial(with_replacements, replacements=replacements)
        if compile:
            freezes = self.device.type == "cpu"
            name = "torch.compile with frozen weights" if freezes else "torch.compile"
            yield name, lambda model: _compiled(model, freezes)

    def _is_faster(self, way: Callable[..., Any], than: OptimizedModel) -> bool:
        """Return whether a call takes noticeably less time than with the best so far."""
        call = self._example(than.shape, than.batches_guidance)
        with torch.no_grad():
            before, after = _in_turn(lambda: call(than.fast), lambda: call(way), rounds=ROUNDS)
        return after < WORTHWHILE * before

    def _samples(self, model: Model, plan: SamplingPlan | None = None) -> Tensor:
        samples = sample(self.plan if plan is None else plan, model, self.shape, self.options, self.graphs)
        assert isinstance(samples, Tensor)  # no trajectory was asked for
        return samples

    @property
    def _scale(self) -> Any:
        """The guidance scale; None where there is no guidance."""
        scale = self.options.guidance.guidance_scale
        return None if scale in (None, 1) else scale

    def _batches_guidance(self) -> bool:
        """Return whether the two conditionings can be merged, and one call with twice the batch
        takes less time than two."""
        if self._scale is None:
            return False
        together = OptimizedModel(self.model, self.model, (2 * self.shape[0], *self.shape[1:]), None, True)
        short = self.plan.last_steps(1)
        try:
            one, two = _in_turn(
                lambda: self._samples(together, short), lambda: self._samples(self.model, short), rounds=ROUNDS
            )
        except ValueError:  # conditioning of different shapes
            return False
        return one < WORTHWHILE * two

    def _example(self, shape: tuple[int, ...], batched: bool) -> Callable[[Callable[..., Any]], Any]:
        """Return a call as the sampler makes it, of whatever it is given."""
        steps, guidance = self.plan.steps, self.options.guidance
        x = torch.zeros(shape, dtype=torch.float32, device=self.device)
        t = torch.full((shape[0],), steps[len(steps) // 2].model_timestep, dtype=torch.int64, device=self.device)
        scales = None if self._scale is None else (self._scale,)
        conditionings = conditionings_of(self.model, guidance.conditioning, scales, guidance.unconditional_conditioning)
        first, *rest = conditionings
        if batched:
            first = merged_conditioning(first, rest[0], self.shape[0])
        return lambda way: way(x, t, **first)

    def _reduce(self, result: OptimizedModel, expected: Tensor, change: float) -> tuple[float, list[str]]:
        """Use bfloat16 convolutions in the noisiest steps, in as many as the tolerance allows, if
        that is faster."""
        if self.device.type != "cpu" or not any(isinstance(m, _CONVOLUTIONS) for m in self.model.modules()):
            return change, []
        told = self.plan.model_times
        result.reduced_from = 0
        exact = copy.copy(result)
        exact.reduced_from = None
        short = self.plan.last_steps(1)
        fast, slow = _in_turn(lambda: self._samples(result, short), lambda: self._samples(exact, short), rounds=ROUNDS)
        if fast < WORTHWHILE * slow:
            for share in SHARES:
                least = result.reduced_from = min(told[: max(1, round(share * len(told)))])
                reduced = _largest(self._samples(result), expected)
                if reduced <= self.tolerance / MARGIN:
                    count = sum(t >= least for t in told)
                    return reduced, [f"convolutions in bfloat16 in the {count} noisiest of {len(told)} steps"]
        result.reduced_from = None
        return change, []


def _compiled(model: nn.Module, freezes: bool) -> Callable[..., Any]:
    if freezes:
        return torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": True})
    return torch.compile(copy.deepcopy(model), dynamic=False)


def _largest(samples: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; NaN counts as infinity."""
    difference = (samples - expected).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def _in_turn(*calls: Callable[[], Any], rounds: int) -> list[float]:
    """Return the median seconds of each, called in turn, after one warm-up call."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return [median(seconds) for seconds in times]
