"""The checks of side effects: they pass right samplers and detect wrong ones."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from verify.right_subjects import INSTALLED, in_float32, sampler

from ddim_fast.verify import Outcome, verify
from ddim_fast.verify.subjects.backends import Backend
from ddim_fast.verify.subjects.subject import Subject

CHECKS = ("deterministic", "draws-nothing", "no-stale-state", "inputs-untouched", "batch-independence")


def step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    std_dev = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    x_prev = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(1 - alpha_bar_prev - std_dev**2, 0)) * model_output
    return x_prev if std_dev == 0 else x_prev + std_dev * noise


RIGHT = INSTALLED | {"step": step, "sampler": sampler, "sampler in float32": in_float32}


@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass(name):
    for seed in (0, 1):
        report = verify(RIGHT[name], checks=CHECKS, seed=seed, required=(), full=seed == 1)
        assert report.passed, [(r.name, r.message) for r in report.results if r.message]


# --- Steps that break one thing ---------------------------------------------------------------------------------------

_calls, _cache, _buffers = [], {}, {}


def draws_from_torch(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    torch.randn(1)
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)


def draws_from_its_generator(x_t, model_output, alpha_bar_t, alpha_bar_prev, generator=None):
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 0.0 * torch.randn(x_t.shape, generator=generator)


def draws_from_numpy(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    np.random.rand()  # noqa: NPY002 (the global one is meant)
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)


def draws_from_python(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    random.random()
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)


def adds_torchs_noise(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 1e-6 * torch.randn_like(x_t)


def adds_numpys_noise(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 1e-6 * np.random.randn()  # noqa: NPY002 (the global one is meant)


def depends_on_its_calls(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    _calls.append(1)
    return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 1e-6 * (len(_calls) % 2)


def keeps_its_first_levels(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    levels = _cache.setdefault("first", (alpha_bar_t, alpha_bar_prev))
    return step(x_t, model_output, *levels)


def keeps_alpha_bar_prev_by_alpha_bar_t(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return step(x_t, model_output, alpha_bar_t, _cache.setdefault(alpha_bar_t, alpha_bar_prev))


def keeps_coefficients_without_their_type(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    bars = _cache.get((alpha_bar_t, alpha_bar_prev, x_t.ndim))
    if bars is None or x_t.dtype == torch.bfloat16:
        bars = [float(torch.tensor(bar, dtype=x_t.dtype)) for bar in (alpha_bar_t, alpha_bar_prev)]
        _cache[alpha_bar_t, alpha_bar_prev, x_t.ndim] = bars
    return step(x_t, model_output, *bars)


def writes_x_t(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return x_t.copy_(step(x_t, model_output, alpha_bar_t, alpha_bar_prev)).clone()


def writes_model_output(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    model_output.mul_(math.sqrt(1 - alpha_bar_t))
    return result


def writes_noise(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, noise)
    if noise is not None:
        noise.mul_(2)
    return result


def returns_model_output(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return model_output.copy_(step(x_t, model_output, alpha_bar_t, alpha_bar_prev))


def reuses_its_result(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    buffer = _buffers.setdefault(x_t.shape, torch.empty_like(x_t))
    return buffer.copy_(step(x_t, model_output, alpha_bar_t, alpha_bar_prev))


def x0_is_x_prev(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    x_prev = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    return x_prev, x_prev


def centres_the_batch(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    return result - 1e-4 * result.mean()


def looks_at_the_whole_batch(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    return result + 0.0 * x_t.sum()


def order_of_the_batch(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    result = step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
    result[1:2] += 1e-4
    return result


BROKEN_STEPS = {
    "draws-nothing": (draws_from_torch, draws_from_its_generator, draws_from_numpy, draws_from_python),
    "deterministic": (adds_torchs_noise, adds_numpys_noise, depends_on_its_calls),
    "no-stale-state": (
        keeps_its_first_levels,
        keeps_alpha_bar_prev_by_alpha_bar_t,
        keeps_coefficients_without_their_type,
    ),
    "inputs-untouched": (
        writes_x_t,
        writes_model_output,
        writes_noise,
        returns_model_output,
        reuses_its_result,
        x0_is_x_prev,
    ),
    "batch-independence": (centres_the_batch, looks_at_the_whole_batch, order_of_the_batch),
}


@pytest.mark.parametrize(
    ("check", "broken"), [(check, broken) for check, all_of_it in BROKEN_STEPS.items() for broken in all_of_it]
)
def test_a_broken_step_is_caught(check, broken):
    _cache.clear()
    found = verify(broken, checks=[check]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert "must" in found.message
    assert " raised " not in found.message


# --- Runs that break one thing ----------------------------------------------------------------------------------------

_position = {}


def keeps_its_place_outside(model, x_T, alphas_cumprod, timesteps):
    """One position for all runs of the process."""
    _position["timesteps"] = timesteps
    x_t, bars = x_T, [*alphas_cumprod.tolist(), 1.0]
    for i in range(len(timesteps)):
        m = model(x_t, torch.full((len(x_t),), timesteps[i]))
        following = [*_position["timesteps"], -1][i + 1 :][:1] or [-1]
        x_t = step(x_t, m, bars[timesteps[i]], bars[following[0]])
    return x_t


def writes_x_T(model, x_T, alphas_cumprod, timesteps):  # noqa: N802 (x_T is the paper's)
    return x_T.copy_(sampler(model, x_T, alphas_cumprod, timesteps)).clone()


def returns_x_T(model, x_T, alphas_cumprod, timesteps):  # noqa: N802 (x_T is the paper's)
    sampler(model, x_T, alphas_cumprod, timesteps)
    return x_T


def writes_what_the_model_returned(model, x_T, alphas_cumprod, timesteps):
    def inner(x_t, t):
        output = model(x_t, t)
        output.mul_(1.0 + 1e-6)
        return output

    return sampler(inner, x_T, alphas_cumprod, timesteps)


def works_on_x_t_in_parts(x_t, m, alpha_bar_t, alpha_bar_prev):
    """Right, unless the model's output is x_t itself."""
    scale = math.sqrt(alpha_bar_prev / alpha_bar_t)
    x_t.mul_(scale)
    return x_t.add_(m, alpha=math.sqrt(1 - alpha_bar_prev) - scale * math.sqrt(1 - alpha_bar_t))


def writes_over_x_t_before_it_reads_the_output(model, x_T, alphas_cumprod, timesteps):
    return sampler(model, x_T.clone(), alphas_cumprod, timesteps, step=works_on_x_t_in_parts)


def shares_noise(model, x_T, alphas_cumprod, timesteps, eta, seeds):
    """The seed of the first sample makes the noise of all."""
    end = sampler(model, x_T, alphas_cumprod, timesteps)
    generator = torch.Generator().manual_seed(int(seeds[0]))
    return end + eta * torch.randn(x_T.shape, generator=generator)


def own_noise(model, x_T, alphas_cumprod, timesteps, eta, seeds):
    end = sampler(model, x_T, alphas_cumprod, timesteps)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return end + eta * torch.stack([torch.randn(x_T.shape[1:], generator=g) for g in generators])


BROKEN_RUNS = (
    ("no-stale-state", keeps_its_place_outside),
    ("inputs-untouched", writes_x_T),
    ("inputs-untouched", returns_x_T),
    ("inputs-untouched", writes_what_the_model_returned),
    ("inputs-untouched", writes_over_x_t_before_it_reads_the_output),
    ("batch-independence", shares_noise),
    ("draws-nothing", lambda model, x_T, alphas_cumprod, timesteps: sampler(model, x_T, alphas_cumprod, timesteps) + 0 * torch.rand(1)),
    ("deterministic", lambda model, x_T, alphas_cumprod, timesteps: sampler(model, x_T, alphas_cumprod, timesteps) + 1e-6 * torch.rand(1)),
    ("batch-independence", lambda model, x_T, alphas_cumprod, timesteps: sampler(model, x_T, alphas_cumprod, timesteps) + 1e-3 * len(x_T)),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(BROKEN_RUNS)))
def test_a_broken_run_is_caught(number):
    check, broken = BROKEN_RUNS[number]
    found = verify(broken, checks=[check]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert "must" in found.message


def test_noise_from_each_samples_own_seed_passes():
    assert verify(own_noise, checks=["batch-independence"]).passed


class SeedsByPosition(Backend):
    """Sample i has the noise of seed i + 1."""

    def __init__(self):
        super().__init__("reference")

    def sample(self, setting, model, x_T, source):
        return super().sample(setting, model, x_T, source.roll(1))


def test_seeds_of_other_samples_are_caught():
    found = verify(SeedsByPosition(), checks=["batch-independence"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "seed" in found.message


class BitsOff(Backend):
    """A claim to exact arithmetic is a claim to the same bits: the vector loop's tail is computed
    otherwise."""

    def __init__(self):
        super().__init__("reference")

    sample = Subject.sample

    def step(self, case):
        result = super().step(case)
        flat = result.x_prev.view(-1)
        tail = len(flat) % 8
        flat[len(flat) - tail :] = torch.nextafter(flat[len(flat) - tail :], torch.tensor(math.inf))
        return result


def test_one_bit_in_the_tail_is_caught_where_arithmetic_is_exact():
    assert verify(BitsOff(), checks=["batch-independence"]).results[0].outcome is Outcome.FAILED


def test_the_global_generators_are_left_as_they_were():
    np.random.seed(3)  # noqa: NPY002 (the global one is meant)
    torch.manual_seed(3)
    verify(step, checks=CHECKS, required=())
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert np.random.rand() == np.random.RandomState(3).rand()  # noqa: NPY002 (the global one is meant)


def test_states_of_a_list_of_generators_are_watched():
    def both(model, x_T, alphas_cumprod, timesteps, generator=None):
        torch.rand(1, generator=generator[1])
        return sampler(model, x_T, alphas_cumprod, timesteps)

    from ddim_fast.verify.subjects.adapters import SamplerFunction

    subject = SamplerFunction(both, "both")
    subject.source = functools.partial(lambda seed, size: [torch.Generator() for _ in range(size)])
    found = verify(subject, checks=["draws-nothing"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "number 1" in found.message
