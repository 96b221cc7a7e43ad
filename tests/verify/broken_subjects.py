"""Samplers that are wrong on purpose: each breaks one thing of a right one, and names the checks
that must find it.

``Textbook`` is right: plain torch in float64, rounded once, with each thing that can go wrong in a
method of its own. ``TextbookScheduler``, ``textbook_step`` and ``textbook_sample`` are right, too,
in the other forms that a subject may have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from ddim_fast.verify.subjects.adapters import SamplerFunction, Scheduler, StepFunction
from ddim_fast.verify.subjects.subject import FEATURES, Subject
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import Level, StepCase, StepResult

# --- Right: every feature ---------------------------------------------------------------------------------------------


def splitmix(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: a good hash of 64 bits."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seeds: torch.Tensor, step: int, count: int) -> np.ndarray:
    """In (0, 1), of shape (batch, count): a hash of the sample's seed, the step and the place."""
    with np.errstate(over="ignore"):
        key = splitmix(splitmix(seeds.numpy().astype(np.uint64)) + np.uint64(step))[:, None]
        bits = splitmix(key ^ splitmix(np.arange(count, dtype=np.uint64)))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def normals(seeds: torch.Tensor, step: int, count: int) -> np.ndarray:
    """Box and Muller's."""
    half = -(-count // 2)
    u, v = np.split(uniforms(seeds, step, 2 * half), 2, axis=1)
    radius = np.sqrt(-2 * np.log(u))
    return np.concatenate([radius * np.cos(2 * math.pi * v), radius * np.sin(2 * math.pi * v)], axis=1)[:, :count]


class Textbook(Subject):
    """Right. All in float64, rounded once."""

    name = "textbook"
    arithmetic = "exact"
    features = frozenset(FEATURES) - {"no_waiting", "no_allocation"}

    def alphas_cumprod(self, setting):
        return _alphas_cumprod(setting.schedule, setting.num_train_timesteps, setting.zero_terminal_snr)

    def timesteps(self, setting):
        count, total = setting.num_inference_steps, setting.num_train_timesteps
        if setting.timesteps is not None:
            return list(setting.timesteps)
        if setting.timestep_spacing == "leading":
            return [i * (total // count) for i in range(count)][::-1]
        if setting.timestep_spacing == "trailing":
            return [math.floor(total - i * total / count + 0.5) - 1 for i in range(count)]
        return [math.floor(i * (total - 1) / max(count - 1, 1) + 0.5) for i in range(count)][::-1]

    @lru_cache(maxsize=512)  # noqa: B019 (subjects live as long as a test)
    def levels(self, setting):
        return setting.levels(self.timesteps(setting), self.alphas_cumprod(setting))

    def level(self, case):
        return self.levels(case.setting)[case.index]

    def source(self, seed, batch_size):
        return torch.from_numpy(np.random.default_rng(seed).integers(2**62, size=batch_size))

    def noise(self, case):
        shape = case.x_t.shape
        found = normals(case.source, case.index, math.prod(shape[1:]))
        return torch.from_numpy(found).reshape(shape).to(case.x_t.device)

    def load(self, tensor):
        return tensor.double()

    def store(self, result, dtype):
        return result.to(dtype)

    def guided(self, output, uncond, scale):
        return uncond + scale * (output - uncond)

    def meaning(self, kind, x, m, a):
        """(x0, eps) that the model's output means."""
        signal, spread = math.sqrt(a), math.sqrt(1 - a)
        if kind == "epsilon":
            return (x - spread * m) / signal, m
        if kind == "sample":
            return m, (x - signal * m) / spread
        return signal * x - spread * m, signal * m + spread * x

    def bounded(self, x0, bound, thresholds):
        if thresholds is None:
            return x0.clamp(-bound, bound)
        s = thresholds.double().reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s * bound

    def rederived(self, setting, x, x0, eps, a):
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a) if setting.use_clipped_model_output else eps

    def std_dev(self, eta, a, p):
        return 0.0 if p == 1 or eta == 0 else eta * math.sqrt((1 - p) / (1 - a) * (1 - a / p))

    def direction(self, p, std):
        return math.sqrt(max(1 - p - std**2, 0.0))

    def added(self, case, std):
        """The noise of a step, scaled."""
        if std == 0:
            return 0.0
        return std * (self.noise(case) if case.noise is None else self.load(case.noise))

    def combined(self, x0, eps, p, std):
        return math.sqrt(p) * x0 + self.direction(p, std) * eps

    def blended(self, x_prev, p, mask, known_x0, known_noise):
        known = math.sqrt(p) * known_x0 + math.sqrt(1 - p) * known_noise
        return mask * known + (1 - mask) * x_prev

    def predicted(self, case, level):
        """(x0, eps), clipped and derived again as the setting asks."""
        setting, more = case.setting, case.more
        x, m = self.load(case.x_t), self.load(case.model_output)
        if "guidance_scale" in more:
            m = self.guided(m, self.load(more["model_output_uncond"]), more["guidance_scale"])
        x0, eps = self.meaning(setting.prediction_type, x, m, level.alpha_bar_t)
        if setting.clip_sample_range is not None:
            x0 = self.bounded(x0, setting.clip_sample_range, more.get("thresholds"))
        return x0, self.rederived(setting, x, x0, eps, level.alpha_bar_t)

    def step(self, case):
        level = self.level(case)
        x0, eps = self.predicted(case, level)
        std = self.std_dev(case.setting.eta, level.alpha_bar_t, level.alpha_bar_prev)
        x_prev = self.combined(x0, eps, level.alpha_bar_prev, std) + self.added(case, std)
        if (mask := case.more.get("mask")) is not None:
            known = [self.load(case.more[name]) for name in ("known_x0", "known_noise")]
            x_prev = self.blended(x_prev, level.alpha_bar_prev, self.load(mask), *known)
        result = self.store(x_prev, case.dtype)
        return StepResult(case.x_t.copy_(result) if case.in_place else result, self.store(x0, case.dtype))

    def distribution(self, case):
        """The mean and the standard deviation of x_prev."""
        level = self.level(case)
        std = self.std_dev(case.setting.eta, level.alpha_bar_t, level.alpha_bar_prev)
        return self.combined(*self.predicted(case, level), level.alpha_bar_prev, std), std

    def log_density(self, deviation, std):
        return -0.5 * (deviation / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)

    def reduced(self, each, reduction, dtype):
        return (each.sum(1) if reduction == "sum" else each.mean(1)).float()

    def sampled(self, x_prev):
        return x_prev.detach()

    def log_prob(self, case, x_prev):
        mean, std = self.distribution(case)
        if std == 0:
            raise ValueError("no noise, no density")
        each = self.log_density(self.sampled(x_prev).double() - mean, std)
        each = each.reshape(len(mean), math.prod(mean.shape[1:]))
        return self.reduced(each, case.more.get("log_prob_reduction", "mean"), case.dtype)

    def invert(self, setting, model, x0):
        found = x0.double()
        for level in reversed(self.levels(setting)):
            found = self.inverted(setting, model, found, level, x0.dtype)
        return found.to(x0.dtype)

    def inverted(self, setting, model, x_prev, level, dtype):
        """x_t whose step leads to x_prev, by fixed-point iteration."""
        x_t = x_prev
        for _ in range(20):
            output = model(x_t.to(dtype), torch.full((len(x_t),), level.t)).double()
            _, eps = self.meaning(setting.prediction_type, x_t, output, level.alpha_bar_t)
            x0 = (x_prev - math.sqrt(1 - level.alpha_bar_prev) * eps) / math.sqrt(level.alpha_bar_prev)
            x_t = math.sqrt(level.alpha_bar_t) * x0 + math.sqrt(1 - level.alpha_bar_t) * eps
        return x_t


@lru_cache
def _alphas_cumprod(schedule, total, zero_terminal_snr):
    found = oracle.alphas_cumprod(schedule, total)
    return oracle.zero_terminal_snr(found) if zero_terminal_snr else found


# --- Right: the other forms -------------------------------------------------------------------------------------------


def textbook_step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    """Right, in float32."""
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    std = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    x_prev = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(1 - alpha_bar_prev - std**2, 0.0)) * model_output
    return x_prev + std * noise if std else x_prev


@lru_cache
def _table(beta_schedule, total, beta_start, beta_end):
    betas = torch.linspace(beta_start, beta_end, total, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, total, dtype=torch.float64) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        f = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = torch.tensor([min(1 - f[i + 1] / f[i], 0.999) for i in range(total)], dtype=torch.float64)
    return (1 - betas).cumprod(0)


class TextbookScheduler:
    """Right, in float32, with the interface of diffusers."""

    def __init__(
        self,
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        timestep_spacing="leading",
    ):
        self.total, self.spacing = num_train_timesteps, timestep_spacing
        self.alphas_cumprod = _table(beta_schedule, num_train_timesteps, beta_start, beta_end)

    def set_timesteps(self, count):
        i = np.arange(count)
        if self.spacing == "leading":
            found = (i * (self.total // count))[::-1].copy()
        elif self.spacing == "trailing":
            found = np.floor(self.total - i * self.total / count + 0.5).astype(np.int64) - 1
        else:
            found = np.linspace(0, self.total - 1, count).round().astype(np.int64)[::-1].copy()
        self.timesteps = torch.from_numpy(found)

        visited = found.tolist()
        self.next = dict(zip(visited, [*visited[1:], -1], strict=True))

    def previous(self, t):
        return self.next[int(t)]

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, variance_noise=None):
        previous = self.previous(timestep)
        a, p = (float(self.alphas_cumprod[t]) if t >= 0 else 1.0 for t in (timestep, previous))
        if eta and previous >= 0 and variance_noise is None:
            variance_noise = torch.randn(sample.shape, generator=generator, dtype=sample.dtype)
        return (textbook_step(sample, model_output, a, p, eta if previous >= 0 else 0.0, variance_noise),)


def textbook_sample(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None, step=textbook_step):
    """Right, a whole run in the dtype of x_T."""
    x_t = x_T
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, p = (float(alphas_cumprod[i]) if i >= 0 else 1.0 for i in (t, t_prev))
        noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype) if eta and t_prev >= 0 else 0.0
        x_t = step(x_t, model(x_t, torch.full((len(x_t),), t)), a, p, eta, noise)
    return x_t


RIGHT: dict[str, Callable[[], Subject]] = {
    "every feature": Textbook,
    "step": lambda: StepFunction(textbook_step),
    "scheduler": lambda: Scheduler(TextbookScheduler),
    "sampler": lambda: SamplerFunction(textbook_sample),
}

# --- Wrong ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A wrong subject.

    Args:
        what: is wrong with it.
        caught_by: each of these checks must fail.
    """

    name: str
    make: Callable[[], Subject]
    what: str
    caught_by: tuple[str, ...]


BROKEN: list[Broken] = []


def broken(what: str, *caught_by: str) -> Callable[[type], type]:
    """Decorator: this subclass of ``Textbook`` is wrong."""

    def register(kind: type) -> type:
        name = "".join(f" {c.lower()}" if c.isupper() else c for c in kind.__name__).strip()
        kind.name = name
        BROKEN.append(Broken(name, kind, what, caught_by))
        return kind

    return register


def broken_form(name: str, make: Callable[[], Subject], what: str, *caught_by: str) -> None:
    """The same for a subject of another form."""
    BROKEN.append(Broken(name, make, what, caught_by))


def noise_of(case: StepCase, **changes: Any) -> np.ndarray:
    """The noise of a right step, flat, with the source or the step changed."""
    given = {"source": case.source, "index": case.index} | changes
    return normals(given["source"], given["index"], math.prod(case.x_t.shape[1:]))


def shaped(noise: np.ndarray, case: StepCase) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(noise)).reshape(case.x_t.shape).to(case.x_t.device)


# The formula.


@broken("noise is scaled by the variance, not the standard deviation", "update-with-noise", "eta-convention")
class SigmaSquared(Textbook):
    def added(self, case, std):
        return super().added(case, std**2)


@broken("eta scales the variance, declared as the standard deviation", "eta-convention")
class OtherEta(Textbook):
    def std_dev(self, eta, a, p):
        return super().std_dev(math.sqrt(eta), a, p)


@broken("alpha of one step where alpha_bar belongs", "alphas-cumprod")
class AlphaForAlphaBar(Textbook):
    def alphas_cumprod(self, setting):
        bars = super().alphas_cumprod(setting)
        return bars / np.concatenate([[1.0], bars[:-1]])


@broken("the betas of the scaled linear schedule are not squared back", "alphas-cumprod")
class BetasNotSquared(Textbook):
    def alphas_cumprod(self, setting):
        if setting.schedule != "scaled_linear":
            return super().alphas_cumprod(setting)
        return np.cumprod(1 - np.linspace(0.00085, 0.012, setting.num_train_timesteps))


@broken("alpha_bar from a running product in float32", "alphas-cumprod")
class AlphaBarInSinglePrecision(Textbook):
    def alphas_cumprod(self, setting):
        bars = super().alphas_cumprod(setting)
        alphas = bars / np.concatenate([[1.0], bars[:-1]])
        return np.cumprod(alphas.astype(np.float32), dtype=np.float32).astype(np.float64)


@broken("the cosine schedule without its bound on beta", "alphas-cumprod")
class CosineUnbounded(Textbook):
    def alphas_cumprod(self, setting):
        if setting.schedule != "cosine":
            return super().alphas_cumprod(setting)
        total = setting.num_train_timesteps
        f = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.maximum(f[1:] / f[0], 1e-12)


@broken("the model's output is clipped, not the predicted x0", "update")
class ClipsTheOutput(Textbook):
    def step(self, case):
        bound = case.setting.clip_sample_range
        if bound is None:
            return super().step(case)
        clipped = case.but(
            model_output=case.model_output.clamp(-bound, bound), setting=case.setting.but(clip_sample_range=None)
        )
        return super().step(clipped)


@broken("x_prev is clipped, too", "update")
class ClipsThePrevious(Textbook):
    def step(self, case):
        result = super().step(case)
        bound = case.setting.clip_sample_range
        return result if bound is None else result._replace(x_prev=result.x_prev.clamp(-bound, bound))


@broken("the bound of clipping is always 1", "update")
class ClipsAtOne(Textbook):
    def bounded(self, x0, bound, thresholds):
        return super().bounded(x0, 1.0 if thresholds is None else bound, thresholds)


@broken("eps is never derived again from the clipped x0", "update")
class NeverRederives(Textbook):
    def rederived(self, setting, x, x0, eps, a):
        return eps


@broken("eps is always derived again from the clipped x0", "update")
class AlwaysRederives(Textbook):
    def rederived(self, setting, x, x0, eps, a):
        clips = setting.clip_sample_range is not None
        return super().rederived(setting.but(use_clipped_model_output=clips), x, x0, eps, a)


@broken("v with the sign of its x0 part wrong", "update")
class VelocitySign(Textbook):
    def meaning(self, kind, x, m, a):
        return super().meaning(kind, x, -m if kind == "v_prediction" else m, a)


@broken("a prediction of x0 is treated as one of eps", "update")
class SampleAsEpsilon(Textbook):
    def meaning(self, kind, x, m, a):
        return super().meaning("epsilon" if kind == "sample" else kind, x, m, a)


@broken("the coefficient of eps lacks - std_dev_t^2", "update-with-noise", "ddpm")
class DirectionWithoutVariance(Textbook):
    def direction(self, p, std):
        return math.sqrt(1 - p)


@broken("1 - alpha_bar_prev - std_dev_t^2 in float32 is not kept from falling below 0", "zero-terminal-snr")
class DirectionNotANumber(Textbook):
    def direction(self, p, std):
        left = np.float32(1 - p) - np.float32(std) ** 2
        return math.sqrt(left) if left >= 0 else math.nan


@broken("the same, with a table of std_dev_t in half precision", "finite")
class DirectionFromHalfPrecision(DirectionNotANumber):
    def std_dev(self, eta, a, p):
        return float(np.float16(super().std_dev(eta, a, p)))


@broken("DDPM's variance is beta, not beta tilde", "ddpm", "update-with-noise")
class BetaNotTilde(Textbook):
    def std_dev(self, eta, a, p):
        return 0.0 if p == 1 else min(eta * math.sqrt(1 - a / p), math.sqrt(1 - p))


@broken(
    "noise of sqrt(beta) is added but the direction kept for equation 16 (std_dev_hat, the wrong way round)", "ddpm"
)
class HatInTheDirection(Textbook):
    def combined(self, x0, eps, p, std):
        return super().combined(x0, eps, p, min(std * 1.1, math.sqrt(1 - p)))


@broken(
    "the step works on x_t / sqrt(alpha_bar_t) but forgets to scale back", "update", "convergence", "data-marginals"
)
class EulerInTheWrongVariable(Textbook):
    def combined(self, x0, eps, p, std):
        return x0 + self.direction(p, std) / math.sqrt(p) * eps


# Timesteps.


class GoesElsewhere(Textbook):
    """Where it says that its steps go is right; where they go is not."""

    def goes_to(self, level: Level, setting) -> float:
        return level.t_prev

    def level(self, case):
        level, setting = super().level(case), case.setting
        if setting.alpha_bars is not None:
            return level
        to = int(self.goes_to(level, setting))
        bars = self.alphas_cumprod(setting)
        return level._replace(t_prev=to, level_prev=float(bars[to]) if to >= 0 else 1.0)


@broken("each step goes to one timestep before the next that is visited", "previous-timestep", "update")
class PreviousOffByOne(GoesElsewhere):
    def goes_to(self, level, setting):
        return max(level.t_prev - 1, -1)


@broken("each step goes to t - T // N, whatever is visited next", "previous-timestep")
class FixedStride(GoesElsewhere):
    def goes_to(self, level, setting):
        return max(level.t - setting.num_train_timesteps // setting.steps, -1)


@broken("the last step goes to alpha_bar of timestep 0, not to clean data", "endpoints", "whole-run")
class LastStepToTimestepZero(GoesElsewhere):
    def goes_to(self, level, setting):
        return max(level.t_prev, 0)


@broken("one step more than asked for", "timesteps")
class OneStepTooMany(Textbook):
    def timesteps(self, setting):
        found = super().timesteps(setting)
        if setting.timesteps is not None or found[0] == setting.num_train_timesteps - 1:
            return found
        return [setting.num_train_timesteps - 1, *found]


@broken("a timestep is visited twice", "timesteps")
class DuplicateTimestep(Textbook):
    def timesteps(self, setting):
        found = super().timesteps(setting)
        return found if setting.timesteps is not None or len(found) < 3 else [found[0], *found[:-1]]


@broken("timesteps rise", "timesteps")
class TimestepsRise(Textbook):
    def timesteps(self, setting):
        found = super().timesteps(setting)
        return found if setting.timesteps is not None else found[::-1]


@broken("trailing timesteps start one too high", "timesteps")
class TrailingTooHigh(Textbook):
    def timesteps(self, setting):
        found = super().timesteps(setting)
        if setting.timesteps is not None or setting.timestep_spacing != "trailing":
            return found
        return [min(t + 1, setting.num_train_timesteps - 1 - i) for i, t in enumerate(found)]


@broken("trailing timesteps are leading ones", "timesteps")
class TrailingIsLeading(Textbook):
    def timesteps(self, setting):
        spacing = setting.timestep_spacing
        return super().timesteps(setting.but(timestep_spacing="leading" if spacing == "trailing" else spacing))


@broken("a schedule that ends in pure noise is kept from alpha_bar = 0 by a small number", "zero-terminal-snr")
class ZeroSnrClamped(Textbook):
    def alphas_cumprod(self, setting):
        return np.maximum(super().alphas_cumprod(setting), 1e-4)


@broken("the step at alpha_bar = 0 divides by it", "zero-terminal-snr")
class ZeroSnrDivides(Textbook):
    def meaning(self, kind, x, m, a):
        x0, eps = super().meaning(kind, x, m, a)
        return (x0 * (a / a), eps) if a else (x0 * math.nan, eps)


# Noise.


@broken("noise at the last step", "endpoints")
class NoiseAtTheEnd(Textbook):
    def std_dev(self, eta, a, p):
        return 0.02 * eta if p == 1 else super().std_dev(eta, a, p)

    def direction(self, p, std):
        return 0.0 if p == 1 else super().direction(p, std)

    def noise(self, case):
        return super().noise(case)

    def added(self, case, std):
        return 0.0 if std and case.noise is None and case.source is None else super().added(case, std)


@broken("the same noise at every step", "noise-between-steps")
class NoiseReusedBetweenSteps(Textbook):
    def noise(self, case):
        return super().noise(case.but(index=0))


@broken("the same noise for every sample of a batch", "noise-between-samples")
class NoiseSharedByTheBatch(Textbook):
    def noise(self, case):
        return super().noise(case.but(source=case.source[:1].expand(len(case.source)).clone()))


@broken("variance 1 % too large", "noise-normal")
class VarianceTooLarge(Textbook):
    def noise(self, case):
        return super().noise(case) * math.sqrt(1.01)


@broken("a correlation of 0.02 with the next element", "noise-within-sample")
class CorrelatedNoise(Textbook):
    def noise(self, case):
        z, r = noise_of(case), 0.02
        return shaped(math.sqrt(1 - r**2) * z + r * np.roll(z, 1, axis=1), case)


@broken("the second half of a sample's noise is the first half with the other sign", "noise-within-sample")
class AntitheticHalves(Textbook):
    def noise(self, case):
        z = noise_of(case)
        half = z.shape[1] // 2
        z[:, half : 2 * half] = -z[:, :half]
        return shaped(z, case)


@broken("uniform noise of the right variance", "noise-normal")
class UniformNoise(Textbook):
    def noise(self, case):
        flat = uniforms(case.source, case.index, math.prod(case.x_t.shape[1:]))
        return shaped((flat - 0.5) * math.sqrt(12), case)


@broken("noise is cut at 3 standard deviations", "noise-normal")
class TailsCut(Textbook):
    def noise(self, case):
        return super().noise(case).clamp(-3, 3)


@broken("a mean of 0.01", "noise-normal")
class NoiseWithAMean(Textbook):
    def noise(self, case):
        return super().noise(case) + 0.01


@broken("noise depends on the place in the batch, not on the sample's seed", "batch-independence")
class NoiseByPosition(Textbook):
    def noise(self, case):
        return super().noise(case.but(source=case.source[:1] + torch.arange(len(case.source))))


@broken("the seed is ignored", "noise-between-seeds")
class SeedIgnored(Textbook):
    def source(self, seed, batch_size):
        return super().source(0, batch_size)


@broken("noise from torch's global generator: the same seed gives other noise", "noise-between-seeds")
class GlobalGeneratorAtEta(Textbook):
    def noise(self, case):
        return torch.randn(case.x_t.shape, dtype=torch.float64)


@broken("noise is drawn from torch's global generator at eta = 0, too, and not used", "draws-nothing")
class DrawsAtEtaZero(Textbook):
    def added(self, case, std):
        torch.randn(case.x_t.shape)
        return super().added(case, std)


@broken("a little random at eta = 0", "deterministic")
class RandomAtEtaZero(Textbook):
    def combined(self, x0, eps, p, std):
        return super().combined(x0, eps, p, std) + 1e-5 * torch.randn(x0.shape, dtype=torch.float64)


# Precision.


@broken("coefficients rounded to bfloat16", "update", "half-precision", "composition", "golden")
class CoefficientsInBfloat16(Textbook):
    def combined(self, x0, eps, p, std):
        signal, direction = torch.tensor([math.sqrt(p), self.direction(p, std)]).bfloat16().tolist()
        return signal * x0 + direction * eps


@broken("coefficients in the dtype of the samples", "half-precision")
class CoefficientsInTheDtype(Textbook):
    def step(self, case):
        self.dtype = case.dtype
        return super().step(case)

    def combined(self, x0, eps, p, std):
        signal, direction = torch.tensor([math.sqrt(p), self.direction(p, std)], dtype=self.dtype).tolist()
        return signal * x0 + direction * eps


@broken("half precision is truncated, not rounded", "unbiased-rounding", "half-precision")
class TruncatedRounding(Textbook):
    def store(self, result, dtype):
        rounded = result.to(dtype)
        if dtype not in (torch.float16, torch.bfloat16):
            return rounded
        too_far = rounded.double().abs() > result.abs()
        bits = rounded.view(torch.int16)
        return torch.where(too_far, bits - 1, bits).view(dtype)


@broken("all arithmetic in half precision, with coefficients in float32, declared as exact", "half-precision")
class ComputesInHalf(Textbook):
    def load(self, tensor):
        return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else super().load(tensor)


@broken("double precision is computed in float32", "float64")
class DoubleInSingle(Textbook):
    def load(self, tensor):
        return tensor.float().double()


@broken("half precision comes back as float32", "half-precision")
class ReturnsSingle(Textbook):
    def store(self, result, dtype):
        return result.to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)


# Memory.


@broken("the last elements of odd sizes are never written", "every-element")
class UnwrittenTail(Textbook):
    def store(self, result, dtype):
        out = torch.empty(result.shape, dtype=dtype, device=result.device)
        whole = result.numel() // 8 * 8
        out.view(-1)[:whole] = result.reshape(-1)[:whole].to(dtype)
        return out


@broken("in place, x_t is read after it was written over", "in-place")
class ReadsAfterWriting(Textbook):
    def step(self, case):
        if not case.in_place:
            return super().step(case)
        first = super().step(case.but(in_place=False))
        case.x_t[..., :1] = first.x_prev[..., :1]  # the first column is done, and then everything once more
        return super().step(case)


@broken("in place, the result is elsewhere", "in-place")
class NotInPlace(Textbook):
    def step(self, case):
        return super().step(case.but(in_place=False))


@broken("the coefficients of the first step are used for every step", "no-stale-state", "update")
class StaleCoefficients(Textbook):
    def level(self, case):
        if not hasattr(self, "captured"):
            self.captured = super().level(case)
        return self.captured


@broken("a cache of levels that forgets eta and clipping, and knows only the step", "no-stale-state")
class CacheTooNarrow(Textbook):
    def __init__(self):
        self.cached = {}

    def std_dev(self, eta, a, p):
        return self.cached.setdefault((a, p), super().std_dev(eta, a, p))


@broken("the samples given are written over", "inputs-untouched")
class OverwritesItsInput(Textbook):
    def step(self, case):
        result = super().step(case.but(in_place=False))
        case.x_t.copy_(result.x_prev)
        return result


@broken("the model's output is written over", "inputs-untouched")
class OverwritesTheOutput(Textbook):
    def step(self, case):
        result = super().step(case)
        case.model_output.mul_(1.5)
        return result


@broken("the result shares memory with the samples given", "inputs-untouched")
class ResultIsTheInput(Textbook):
    def step(self, case):
        result = super().step(case.but(x_t=case.x_t.clone()))
        if case.in_place or not case.x_t.numel():
            return super().step(case)
        return result._replace(x_prev=case.x_t.copy_(result.x_prev))


@broken("one buffer for all results", "inputs-untouched")
class OneBuffer(Textbook):
    buffer = None

    def step(self, case):
        result = super().step(case)
        if case.in_place:
            return result
        if self.buffer is None or self.buffer.shape != result.x_prev.shape or self.buffer.dtype != case.dtype:
            self.buffer = torch.empty_like(result.x_prev)
        return result._replace(x_prev=self.buffer.copy_(result.x_prev))


@broken("tensors that are not contiguous are read as if they were", "layout")
class ReadsAsContiguous(Textbook):
    def load(self, tensor):
        dense = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset() >= tensor.numel()
        if not dense:
            return super().load(tensor)
        strides = torch.empty(tensor.shape, device="meta").stride()
        return torch.as_strided(tensor, tensor.shape, strides).double()


@broken("the mean over the batch is taken away", "batch-independence", "update")
class BatchMean(Textbook):
    def store(self, result, dtype):
        return super().store(result - 1e-3 * result.mean(0, keepdim=True) if len(result) else result, dtype)


# Options.


@broken("guidance of 1 + w", "guidance")
class GuidancePlusOne(Textbook):
    def guided(self, output, uncond, scale):
        return super().guided(output, uncond, 1 + scale)


@broken("guidance with its two outputs swapped", "guidance")
class GuidanceSwapped(Textbook):
    def guided(self, output, uncond, scale):
        return super().guided(uncond, output, scale)


@broken("the mask is inverted", "inpainting")
class MaskInverted(Textbook):
    def blended(self, x_prev, p, mask, known_x0, known_noise):
        return super().blended(x_prev, p, 1 - mask, known_x0, known_noise)


@broken("the known region is not brought to the noise level of x_prev", "inpainting")
class KnownRegionNotNoised(Textbook):
    def blended(self, x_prev, p, mask, known_x0, known_noise):
        return super().blended(x_prev, 1.0, mask, known_x0, known_noise)


@broken("the known region is at the noise level of x_t", "inpainting")
class KnownRegionAtTheOldLevel(Textbook):
    def step(self, case):
        self.now = self.level(case).alpha_bar_t
        return super().step(case)

    def blended(self, x_prev, p, mask, known_x0, known_noise):
        return super().blended(x_prev, self.now, mask, known_x0, known_noise)


@broken("thresholds are ignored", "thresholds")
class ThresholdsIgnored(Textbook):
    def bounded(self, x0, bound, thresholds):
        return super().bounded(x0, bound, None)


@broken("x0 is clipped to the threshold but not divided by it", "thresholds")
class ThresholdNotDividedBy(Textbook):
    def bounded(self, x0, bound, thresholds):
        if thresholds is None:
            return super().bounded(x0, bound, None)
        s = thresholds.double().reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s)


# Flow.


@broken("inversion asks the model at the timestep before", "inversion")
class InversionOffByOne(Textbook):
    def inverted(self, setting, model, x_prev, level, dtype):
        def earlier(x_t, t):
            return model(x_t, (t - setting.num_train_timesteps // setting.steps).clamp(min=0))

        return super().inverted(setting, earlier, x_prev, level, dtype)


@broken("inversion takes one step less", "inversion")
class InversionTooShort(Textbook):
    def invert(self, setting, model, x0):
        return super().invert(setting.but(timesteps=tuple(self.timesteps(setting)[1:])), model, x0)


@broken(
    "the model is asked at the timestep that the step goes to", "whole-run", "gaussian-marginals", "mixture-marginals"
)
class ModelAtTheNextTimestep(Textbook):
    def sample(self, setting, model, x_T, source):
        levels = self.levels(setting)
        for index, level in enumerate(levels):
            asked = max(level.t_prev, 0)
            x_T = self.step(
                StepCase(setting, index, x_T, model(x_T, torch.full((len(x_T),), asked)), source=source)
            ).x_prev
        return x_T


# Other forms.


def step_off(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    return textbook_step(x_t, model_output, alpha_bar_t * 1.0001, alpha_bar_prev, eta, noise)


def step_paper_notation(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    """alpha_bar_t where its square root belongs."""
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / alpha_bar_t
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * model_output


broken_form("step: alpha_bar 1e-4 off", lambda: StepFunction(step_off), "alpha_bar_t is 0.01 % too large", "update")
broken_form(
    "step: no square root", lambda: StepFunction(step_paper_notation), "alpha_bar_t where its root belongs", "update"
)


class FixedStrideScheduler(TextbookScheduler):
    def set_timesteps(self, count):
        super().set_timesteps(count)
        self.stride = self.total // count

    def previous(self, t):
        return max(int(t) - self.stride, -1)


class DuplicatingScheduler(TextbookScheduler):
    def set_timesteps(self, count):
        super().set_timesteps(count)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps])


class ShortScheduler(TextbookScheduler):
    def set_timesteps(self, count):
        super().set_timesteps(max(count - 1, 1))


class RandomScheduler(TextbookScheduler):
    def step(self, model_output, timestep, sample, eta=0.0, generator=None, variance_noise=None):
        torch.randn(sample.shape)
        return super().step(model_output, timestep, sample, eta, generator, variance_noise)


class DeafScheduler(TextbookScheduler):
    def step(self, model_output, timestep, sample, eta=0.0, generator=None, variance_noise=None):
        return super().step(model_output, timestep, sample, 0.0, generator, variance_noise)


for kind, what, caught_by in (
    (FixedStrideScheduler, "each step goes to t - T // N, whatever is visited next", ("previous-timestep",)),
    (DuplicatingScheduler, "the first timestep is visited twice", ("timesteps",)),
    (ShortScheduler, "one step less than asked for", ("timesteps",)),
    (RandomScheduler, "torch's global generator is moved at eta = 0", ("draws-nothing",)),
    (DeafScheduler, "eta is ignored", ("update-with-noise", "eta-convention")),
):
    broken_form(f"scheduler: {kind.__name__}", partial(Scheduler, kind), what, *caught_by)


def sample_wrong_pair(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    """The pairs are t and t - T // N."""
    x_t, stride = x_T, len(alphas_cumprod) // len(timesteps)
    for t in timesteps:
        a, p = (float(alphas_cumprod[i]) if i >= 0 else 1.0 for i in (t, t - stride - 1))
        noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype)
        x_t = textbook_step(x_t, model(x_t, torch.full((len(x_t),), t)), a, p, eta if p < 1 else 0.0, noise)
    return x_t


def sample_noisy_end(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    x0 = textbook_sample(model, x_T, alphas_cumprod, timesteps, eta, generator)
    return x0 + 0.01 * eta * torch.randn(x0.shape, generator=generator)


def sample_over_its_start(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    return x_T.copy_(textbook_sample(model, x_T, alphas_cumprod, timesteps, eta, generator))


def sample_other_eta(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    return textbook_sample(model, x_T, alphas_cumprod, timesteps, math.sqrt(eta), generator)


def sample_one_noise(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    seed = generator.initial_seed()

    def step(x_t, model_output, a, p, eta, noise):
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(seed), dtype=x_t.dtype)
        return textbook_step(x_t, model_output, a, p, eta, noise)

    return textbook_sample(model, x_T, alphas_cumprod, timesteps, eta, generator, step)


def sample_deaf(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    return textbook_sample(model, x_T, alphas_cumprod, timesteps, eta, torch.Generator().manual_seed(0))


def sample_scaled_noise(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
    """The standard deviation is 3 % too small."""

    def step(x_t, model_output, a, p, eta, noise):
        return textbook_step(x_t, model_output, a, p, eta, 0.97 * noise)

    return textbook_sample(model, x_T, alphas_cumprod, timesteps, eta, generator, step)


for function, what, caught_by in (
    (sample_wrong_pair, "each step goes one timestep too far", ("observed-update",)),
    (sample_noisy_end, "noise is added to the result", ("endpoints",)),
    (sample_over_its_start, "x_T is written over", ("inputs-untouched",)),
    (sample_other_eta, "eta scales the variance, declared as the standard deviation", ("eta-convention",)),
    (sample_one_noise, "the same noise at every step", ("noise-between-steps",)),
    (sample_deaf, "the generator is ignored", ("noise-between-seeds",)),
    (sample_scaled_noise, "the standard deviation is 3 % too small", ("noise-normal", "gaussian-marginals")),
):
    broken_form(f"sampler: {function.__name__}", partial(SamplerFunction, function), what, *caught_by)
