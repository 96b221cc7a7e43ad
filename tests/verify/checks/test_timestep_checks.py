"""The checks of noise schedules and timesteps: they pass right subjects, and explain what is wrong."""

import numpy as np
import pytest
import torch

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import run_check
from ddim_fast.verify.subjects.adapters import SamplerFunction, Scheduler
from ddim_fast.verify.subjects.backends import Backend

TIMESTEP_CHECKS = ("alphas-cumprod", "zero-terminal-snr", "timesteps", "previous-timestep", "finite")


def check(subject, name):
    return run_check(CHECKS[name], subject, False, 0, torch.device("cpu"))


class Right:
    """A textbook scheduler in float32, each part of which a subclass may break."""

    clamp = True

    def __init__(
        self,
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        rescale_betas_zero_snr=False,
    ):
        self.total, self.prediction_type, self.spacing = num_train_timesteps, prediction_type, timestep_spacing
        betas = self.betas(beta_schedule, beta_start, beta_end).float()
        self.alphas_cumprod = self.cumulated(betas)
        if rescale_betas_zero_snr:
            self.alphas_cumprod = self.rescaled(self.alphas_cumprod.sqrt()) ** 2

    def betas(self, schedule, start, end):
        if schedule == "linear":
            return torch.linspace(start, end, self.total)
        if schedule == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, self.total) ** 2
        at = torch.arange(self.total + 1, dtype=torch.float64) / self.total
        f = torch.cos((at + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)

    def cumulated(self, betas):
        return torch.cumprod(1 - betas, 0)

    def rescaled(self, root):
        return (root - root[-1]) * root[0] / (root[0] - root[-1])

    def set_timesteps(self, count):
        self.count = count
        self.timesteps = torch.from_numpy(self.chosen(count).copy())

    def chosen(self, count):
        if self.spacing == "leading":
            return (np.arange(count) * (self.total // count))[::-1]
        if self.spacing == "trailing":
            return np.round(self.total - np.arange(count) * self.total / count).astype(np.int64) - 1
        return np.linspace(0, self.total - 1, count).round().astype(np.int64)[::-1]

    def previous(self, t):
        later = self.timesteps[self.timesteps < t]
        return int(later[0]) if len(later) else -1

    def step(self, model_output, timestep, sample, eta=0.0, variance_noise=None):
        t = int(timestep)
        t_prev = self.previous(t)
        a = self.alphas_cumprod[t]
        b = self.alphas_cumprod[t_prev] if 0 <= t_prev < self.total else torch.tensor(1.0)
        x0, eps = self.split(model_output, sample, a)
        std_dev = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        room = 1 - b - std_dev**2
        x_prev = b**0.5 * x0 + (room.clamp(min=0) if self.clamp else room) ** 0.5 * eps
        return (x_prev if variance_noise is None else x_prev + std_dev * variance_noise,)

    def split(self, m, x_t, a):
        if self.prediction_type == "epsilon":
            return (x_t - (1 - a) ** 0.5 * m) / a**0.5, m
        if self.prediction_type == "sample":
            return m, (x_t - a**0.5 * m) / (1 - a) ** 0.5
        return a**0.5 * x_t - (1 - a) ** 0.5 * m, (1 - a) ** 0.5 * x_t + a**0.5 * m


class AlphaItself(Right):
    def cumulated(self, betas):
        return 1 - betas


class Unsquared(Right):
    def betas(self, schedule, start, end):
        return super().betas("linear" if schedule == "scaled_linear" else schedule, start, end)


class CosineUnclipped(Right):
    def betas(self, schedule, start, end):
        found = super().betas(schedule, start, end)
        return found.clamp(max=0.99) if "cos" in schedule else found


class Late(Right):
    """Its product starts after the first beta."""

    def cumulated(self, betas):
        return torch.cat([torch.ones(1), super().cumulated(betas)[:-1]])


class HalfSchedule(Right):
    def cumulated(self, betas):
        return super().cumulated(betas).bfloat16().float()


class Unscaled(Right):
    def rescaled(self, root):
        return root - root[-1]


class NotRescaled(Right):
    def rescaled(self, root):
        return root


class NegativeRoom(Right):
    clamp = False


class Ascending(Right):
    def chosen(self, count):
        return super().chosen(count)[::-1]


class OneTooMany(Right):
    def chosen(self, count):
        return np.append(super().chosen(count), -1) if count == 333 else super().chosen(count)


class Repeating(Right):
    def chosen(self, count):
        found = super().chosen(count).copy()
        if count == 50:
            found[1] = found[0]
        return found


class Fractional(Right):
    def chosen(self, count):
        return super().chosen(count) + (0.5 if count == 7 else 0.0)


class TrailingLate(Right):
    def chosen(self, count):
        return super().chosen(count) - (1 if self.spacing == "trailing" and count == 10 else 0)


class ByStride(Right):
    def previous(self, t):
        return t - self.total // self.count


class OneOff(Right):
    def previous(self, t):
        found = super().previous(t)
        return found if found < 500 else found - 1


class NeverEnds(Right):
    def previous(self, t):
        return max(super().previous(t), 0)


BROKEN = {
    AlphaItself: ("alphas-cumprod", "not their product"),
    Unsquared: ("alphas-cumprod", "schedule = scaled_linear"),
    CosineUnclipped: ("alphas-cumprod", "schedule = cosine"),
    Late: ("alphas-cumprod", "alpha_bar of t = 0"),
    HalfSchedule: ("alphas-cumprod", "within a relative"),
    Unscaled: ("zero-terminal-snr", "shifted and scaled"),
    NotRescaled: ("zero-terminal-snr", "alpha_bar of t = 999 must be 0"),
    NegativeRoom: ("finite", "clamped at 0"),
    Ascending: ("timesteps", "must decrease"),
    OneTooMany: ("timesteps", "333 must be visited, got 334"),
    Repeating: ("timesteps", "980 followed by 980"),
    Fractional: ("timesteps", "an integer in [0, 999], got 852.5"),
    TrailingLate: ("timesteps", "published table"),
    ByStride: ("previous-timestep", "it goes to t = 333 = t - T // N = 666 - 333"),
    OneOff: ("previous-timestep", "the next timestep visited; it goes to t = 499"),
    NeverEnds: ("previous-timestep", "must go to clean data; it goes to t = 0"),
}


@pytest.mark.parametrize("name", TIMESTEP_CHECKS)
def test_a_textbook_scheduler_passes(name):
    result = check(Scheduler(Right), name)
    assert result.outcome is Outcome.PASSED, result.message


@pytest.mark.parametrize("name", TIMESTEP_CHECKS)
def test_our_backend_passes(name):
    result = check(Backend("cpu"), name)
    assert result.outcome is Outcome.PASSED, result.message


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_scheduler_is_found(broken):
    name, words = BROKEN[broken]
    result = check(Scheduler(broken), name)
    assert result.outcome is Outcome.FAILED
    assert words in result.message


def test_the_rule_of_diffusers_is_told_from_right_timesteps():
    subject = Scheduler(ByStride)
    assert check(subject, "timesteps").outcome is Outcome.PASSED
    assert check(subject, "previous-timestep").code.startswith("import torch")


# --- Whole samplers, which are only watched ---------------------------------------------------------------------------


def sampler_with(chosen=lambda count, total: np.arange(count)[::-1] * (total // count), by_stride=False, clamp=True):
    def sample(model, x_T, alphas_cumprod, num_inference_steps, eta=0.0):
        bars = alphas_cumprod.float()
        timesteps = [int(t) for t in chosen(num_inference_steps, len(bars))]
        x = x_T
        for i, t in enumerate(timesteps):
            to = timesteps[i + 1] if i + 1 < len(timesteps) else -1
            to = to if not by_stride else t - len(bars) // num_inference_steps
            a, b = bars[t], bars[to] if to >= 0 else torch.tensor(1.0)
            m = model(x, torch.full((len(x),), t))
            x0 = (x - (1 - a) ** 0.5 * m) / a**0.5
            std_dev = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            room = 1 - b - std_dev**2
            x = b**0.5 * x0 + (room.clamp(min=0) if clamp else room) ** 0.5 * m
            x = x + std_dev * torch.randn_like(x) if std_dev > 0 else x
        return x

    return SamplerFunction(sample)


def both_ends(count, total):
    return np.linspace(0, total - 1, count).round()[::-1]


@pytest.mark.parametrize("name", ["timesteps", "previous-timestep", "finite", "observed-update"])
def test_a_textbook_sampler_passes(name):
    result = check(sampler_with(), name)
    assert result.outcome is Outcome.PASSED, result.message


@pytest.mark.parametrize(
    ("sampler", "name", "words"),
    [
        (
            sampler_with(lambda count, total: range(total - 1, -1, -(total // count))),
            "timesteps",
            "must be visited, got",
        ),
        (sampler_with(both_ends, by_stride=True), "previous-timestep", "= t - T // N ="),
        (sampler_with(both_ends, clamp=False), "finite", "clamped at 0"),
    ],
    ids=["timesteps", "previous-timestep", "finite"],
)
def test_a_broken_sampler_is_found(sampler, name, words):
    result = check(sampler, name)
    assert result.outcome is Outcome.FAILED
    assert words in result.message
