"""Analytic-DPM against its paper, and against data whose every step is known exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.plans.coefficients import analytic_variance, ddim_variance
from ddim_fast.search.analytic import measure_eps_residual
from ddim_fast.search.runs import Runs

LINEAR = NoiseSchedule.linear()
LEVELS = st.floats(0.01, 0.99)


@given(LEVELS, LEVELS, st.floats(0, 1), st.floats(0, 1))
def test_theorem_1_in_the_papers_words(a, b, eta, gamma):
    """sigma*_n^2 = lambda_n^2 + (sqrt(beta_bar_n / alpha_n) - sqrt(beta_bar_{n-1} - lambda_n^2))^2 (1 - beta_bar_n Gamma_n)."""
    alpha_bar_n, alpha_bar_before = sorted((a, b))
    lambda_2 = ddim_variance(alpha_bar_n, alpha_bar_before, eta)
    alpha_n, beta_bar_n, beta_bar_before = alpha_bar_n / alpha_bar_before, 1 - alpha_bar_n, 1 - alpha_bar_before
    score_squared = (
        gamma / beta_bar_n
    )  # E |score|^2 / D, with score = -eps / sqrt(beta_bar_n) and E |eps|^2 / D = gamma
    factor = math.sqrt(beta_bar_n / alpha_n) - math.sqrt(max(beta_bar_before - lambda_2, 0))
    expected = lambda_2 + factor**2 * (1 - beta_bar_n * score_squared)
    assert analytic_variance(alpha_bar_n, alpha_bar_before, lambda_2, 1 - gamma) == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


class Gaussian(torch.nn.Module):
    """The exact eps of data N(0, variance)."""

    prediction_type = "epsilon"

    def __init__(self, variance):
        super().__init__()
        self.variance = variance

    def forward(self, x, t):
        alpha_bar = LINEAR.alpha_bar(int(t[0]))
        return math.sqrt(1 - alpha_bar) / (alpha_bar * self.variance + 1 - alpha_bar) * x


def variance_of_result(plan, model, start):
    """That of x0 by a plan, from x_T of variance ``start``: each step is linear, so it is exact."""
    variance = start
    for step in plan.steps:
        eps_of_x = float(model(torch.ones(1, 1, dtype=torch.float64), torch.tensor([step.t])))
        of_x, of_m = step.coefficients.folded
        variance = (of_x + of_m * eps_of_x) ** 2 * variance + step.coefficients.prev_noise**2
    return variance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("data_variance", [0.04, 0.25, 1.0])
@pytest.mark.parametrize("timesteps", [(999, 600, 200), (900, 100), (999, 500, 250, 20)])
def test_gaussian_data_keep_their_variance_but_for_the_last_step(eta, data_variance, timesteps):
    """With DDPM's lambda, and with any, every step leads from the exact marginal to the exact marginal: what the last step leaves out is
    the variance that x0 has once x_t is known, which a sampler that ends in clean data does not add."""
    model = Gaussian(data_variance)
    residual = []
    for t in timesteps:
        alpha_bar = LINEAR.alpha_bar(t)
        residual.append(alpha_bar * data_variance / (alpha_bar * data_variance + 1 - alpha_bar))
    plan = DDIMSampler(LINEAR, timesteps=timesteps, eta=eta, analytic_variance=residual).plan(model)
    first, last = LINEAR.alpha_bar(timesteps[0]), LINEAR.alpha_bar(timesteps[-1])
    found = variance_of_result(plan, model, first * data_variance + 1 - first)
    left_open = data_variance * (1 - last) / (last * data_variance + 1 - last)
    assert found == pytest.approx(data_variance - left_open, rel=1e-9)
    if eta < 1:
        without = DDIMSampler(LINEAR, timesteps=timesteps, eta=eta).plan(model)
        assert abs(variance_of_result(without, model, first * data_variance + 1 - first) - found) > 1e-4 * data_variance


def test_the_residual_is_measured():
    model, count = Gaussian(0.25), 20_000
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(count, 4, generator=generator)
    runs = Runs(model, torch.randn(count, 4, generator=generator), batch_size=count)
    plan = DDIMSampler(LINEAR, timesteps=(900, 500, 100, 0)).plan(model)
    found = measure_eps_residual(runs, plan, x0)
    bars = np.array([LINEAR.alpha_bar(t) for t in plan.timesteps])
    np.testing.assert_allclose(found, 0.25 * bars / (0.25 * bars + 1 - bars), rtol=5 * math.sqrt(2 / (4 * count)))


def test_edges():
    assert analytic_variance(0.3, 1.0, 0.0, 0.9) == 0.0  # nothing is added to clean data
    assert analytic_variance(0.3, 0.5, 0.1, 1.2) == analytic_variance(0.3, 0.5, 0.1, 1.0)
    with pytest.raises(ValueError, match="needs alpha_bar_t > 0, got alpha_bar_t = 0"):
        analytic_variance(0.0, 0.5, 0.1, 0.5)
