"""The checks of noise: they pass right samplers and detect wrong ones."""

import math

import numpy as np
import pytest
import torch

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import verify
from ddim_fast.verify.subjects.adapters import StepFunction
from ddim_fast.verify.truth import oracle

NOISE = [name for name in CHECKS if name.startswith("noise-")]


def step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, z):
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    std_dev_t = oracle.std_dev(alpha_bar_t, alpha_bar_prev, eta)
    rest = math.sqrt(max(1 - alpha_bar_prev - std_dev_t**2, 0.0))
    return math.sqrt(alpha_bar_prev) * x0 + rest * model_output + std_dev_t * z


def subject(draw):
    """A right step function, its noise ``draw(x_t, generator)``."""

    def function(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, generator=None):
        return step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, draw(x_t, generator))

    return StepFunction(function)


def normal(x_t, generator):
    return torch.randn(x_t.shape, generator=generator)


def sampler(draw):
    """A right sampler function that can only be watched; ``draw(x_T, x_t, generator, steps)`` is
    called once a step."""

    def sample(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
        x_t, before = x_T, []
        for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a, p = float(alphas_cumprod[t]), float(alphas_cumprod[t_prev]) if t_prev >= 0 else 1.0
            before.append(draw(x_T, x_t, generator, before))
            x_t = step(x_t, model(x_t, torch.full((len(x_t),), t)), a, p, eta, before[-1])
        return x_t

    return sample


def failed(subject, *names):
    report = verify(subject, checks=names or NOISE)
    assert not report.of(Outcome.ERROR), report.of(Outcome.ERROR)[0].message
    return {result.name: result.message for result in report.of(Outcome.FAILED)}


RIGHT = {
    "cpu": "cpu",
    "reference": "reference",
    "diffusers": "diffusers:DDIMScheduler",
    "drop-in": "ddim_fast.integrations.diffusers:FastDDIMScheduler",
    "step with a generator": subject(normal),
    "step with torch's global generator": StepFunction(
        lambda x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0: step(
            x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, torch.randn(x_t.shape)
        )
    ),
    "sampler": sampler(lambda x_T, x_t, generator, before: normal(x_t, generator)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_subjects_pass(name):
    assert failed(RIGHT[name]) == {}


def test_a_step_that_must_be_given_noise_is_left_out():
    def function(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
        return step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta, noise)

    results = verify(function, checks=NOISE, required=()).results
    assert {result.outcome for result in results} == {Outcome.NOT_APPLICABLE}


# --- Wrong: single steps ------------------------------------------------------------------------------------------------


def of(change):
    return subject(lambda x_t, generator: change(normal(x_t, generator)))


def uniform(x_t, generator):
    return (torch.rand(x_t.shape, generator=generator) * 2 - 1) * math.sqrt(3)


def lag(z, distance, r):
    flat = z.reshape(len(z), -1)
    echo = torch.cat([flat[:, :distance], r * flat[:, :-distance] + math.sqrt(1 - r * r) * flat[:, distance:]], 1)
    return echo.reshape(z.shape)


def signs_only(z):
    """Neighbours of the same size with signs of their own: not correlated, but far from
    independent."""
    flat = z.reshape(-1).clone()
    flat[1::2] = flat[0::2].abs() * flat[1::2].sign()
    return flat.reshape(z.shape)


def channels(z, *scales):
    return z * torch.tensor(scales).reshape(-1, 1, 1)


def common(z, share):
    """Every sample has a part of one common noise."""
    return math.sqrt(1 - share) * z + math.sqrt(share) * z[:1]


WRONG = {
    "the variance is 1 % too large": (of(lambda z: z * math.sqrt(1.01)), "noise-normal"),
    "the variance is 1 % too small": (of(lambda z: z * math.sqrt(0.99)), "noise-normal"),
    "the mean is 0.01": (of(lambda z: z + 0.01), "noise-normal"),
    "uniform": (subject(uniform), "noise-normal"),
    "Laplace": (of(lambda z: torch.sign(z) * -torch.log1p(-torch.erf(z.abs() / 2**0.5)) / 2**0.5), "noise-normal"),
    "cut at 3": (of(lambda z: z.clamp(-3, 3)), "noise-normal"),
    "drawn again beyond 3.5": (of(lambda z: torch.where(z.abs() > 3.5, z.flip(0) * 0.5, z)), "noise-normal"),
    "channels scaled": (of(lambda z: channels(z, 1.02, 0.98, 1.0, 1.0)), "noise-normal"),
    "one sample louder": (of(lambda z: torch.cat([1.1 * z[:1], z[1:]])), "noise-normal"),
    "none": (of(torch.zeros_like), "noise-normal"),
    "not a number": (of(lambda z: z / 0 * 0), "noise-normal"),
    "a correlation of 0.01 at lag 1": (of(lambda z: lag(z, 1, 0.01)), "noise-within-sample"),
    "a correlation of 0.01 with the row above": (of(lambda z: lag(z, 32, 0.01)), "noise-within-sample"),
    "a correlation of 0.03 at lag 777": (of(lambda z: lag(z, 777, 0.03)), "noise-within-sample"),
    "antithetic halves of a sample": (of(lambda z: torch.cat([z[:, :2], -z[:, :2]], 1)), "noise-within-sample"),
    "neighbours of one size": (of(signs_only), "noise-within-sample"),
    "the same in all channels": (of(lambda z: z[:, :1].expand_as(z)), "noise-within-sample"),
    "the same for the batch": (of(lambda z: z[:1].expand_as(z)), "noise-between-samples"),
    "antithetic halves of a batch": (
        of(lambda z: torch.cat([z[: len(z) // 2], -z[: len(z) - len(z) // 2]])),
        "noise-between-samples",
    ),
    "one sample twice": (of(lambda z: torch.cat([z[:-1], z[:1]])), "noise-between-samples"),
    "1 % in common": (of(lambda z: common(z, 0.01)), "noise-between-samples"),
    "samples shifted by one": (
        of(lambda z: torch.stack([torch.roll(z[0].reshape(-1), i) for i in range(len(z))]).reshape(z.shape)),
        "noise-between-samples",
    ),
    "the same at each step": (
        subject(lambda x_t, g: normal(x_t, torch.Generator().manual_seed(g.initial_seed()))),
        "noise-between-steps",
    ),
    "made of the samples": (
        subject(lambda x_t, g: 0.1 * x_t + math.sqrt(0.99) * normal(x_t, g)),
        "noise-between-steps",
    ),
    "the seed is ignored": (
        subject(lambda x_t, g: normal(x_t, torch.Generator().manual_seed(int(x_t.view(torch.int32).sum()) % 2**31))),
        "noise-between-seeds",
    ),
    "another generator than that given": (subject(lambda x_t, g: torch.randn(x_t.shape)), "noise-between-seeds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_found_by_the_check_meant_for_it(name):
    wrong, by = WRONG[name]
    assert by in failed(wrong, by)


@pytest.mark.parametrize("seed", range(3))
def test_one_percent_of_the_variance_is_found_with_any_seed(seed):
    report = verify(of(lambda z: z * math.sqrt(1.01)), checks=["noise-normal"], seed=seed)
    assert "the variance of all noise is 1.0" in report.results[0].message


# --- Wrong: whole runs --------------------------------------------------------------------------------------------------

WRONG_RUNS = {
    "x_T again": (lambda x_T, x_t, g, before: x_T, "noise-between-steps"),
    "every second step's again": (
        lambda x_T, x_t, g, before: before[-2] if len(before) > 1 else normal(x_t, g),
        "noise-between-steps",
    ),
    "the last step's, shifted": (
        lambda x_T, x_t, g, before: before[-1].reshape(-1).roll(5).reshape(x_t.shape) if before else normal(x_t, g),
        "noise-between-steps",
    ),
    "a tenth of the last step's": (
        lambda x_T, x_t, g, before: 0.1 * before[-1] + math.sqrt(0.99) * normal(x_t, g) if before else normal(x_t, g),
        "noise-between-steps",
    ),
    "the variance is 1 % too large": (lambda x_T, x_t, g, before: math.sqrt(1.01) * normal(x_t, g), "noise-normal"),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_wrong_run_is_found_by_the_check_meant_for_it(name):
    wrong, by = WRONG_RUNS[name]
    assert by in failed(sampler(wrong), by)


def test_messages_say_the_rule_and_what_was_found():
    found = failed(of(lambda z: z[:1].expand_as(z)), "noise-between-samples")["noise-between-samples"]
    assert found.startswith("the samples of a batch must have independent noise: the ")
    assert "where 0 +- " in found or "where 1 +- " in found


def test_rates_are_stated():
    own = [one for name, one in CHECKS.items() if name in NOISE or name.endswith("-marginals")]
    assert len(own) == 8
    assert sum(one.false_alarm_rate for one in own) <= 1e-6
    assert all(0 < one.false_alarm_rate <= 1e-7 for one in own)


@pytest.mark.slow
def test_right_subjects_pass_with_200_seeds():
    names = [name for name in CHECKS if name in NOISE or name.endswith("-marginals")]
    wrong = [
        (seed, result.name, result.message)
        for seed in range(200)
        for result in verify("cpu", checks=names, seed=seed).results
        if result.outcome is not Outcome.PASSED
    ]
    assert wrong == []


def test_noise_is_recovered_to_single_precision():
    """The statistical tests measure the noise itself, not the arithmetic."""
    from ddim_fast.verify.checks.base import Context
    from ddim_fast.verify.checks.noise import noise_of, watch

    drawn = []

    def keep(x_t, generator):
        drawn.append(normal(x_t, generator))
        return drawn[-1]

    context = Context(subject(keep), np.random.default_rng(0))
    found = noise_of(context, watch(context, (2, 4, 8, 8)))
    assert len(found) >= 3
    for step_found, z in zip(found, drawn, strict=False):
        np.testing.assert_allclose(step_found.z, z.double().numpy(), atol=1e-5)
