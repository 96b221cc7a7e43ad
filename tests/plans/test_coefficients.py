"""Rows of coefficients from noise levels: the forms that a sampling plan does not use."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.plans.coefficients import (
    ddim_coefficients,
    inversion_coefficients,
    mean_as_x0,
    noising_coefficients,
    previous_x_prediction,
)

LEVELS = [(0.98, 0.9995), (0.3, 0.7), (0.001, 0.02), (0.02, 0.001)]


def x_prev_of(row, x, m, z=0.0):
    """The tableau, in float64."""
    x0 = row.x0_x * x + row.x0_m * m
    eps = row.eps_x * x + row.eps_m * m + row.eps_0 * x0
    return row.prev_x0 * x0 + row.prev_eps * eps + row.prev_noise * z


@pytest.mark.parametrize(("alpha_bar_t", "alpha_bar_before"), LEVELS[:3])
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
def test_previous_x_is_the_posterior_mean(alpha_bar_t, alpha_bar_before, use_clipped_model_output):
    x0, eps = 0.4, -1.3
    x_t = math.sqrt(alpha_bar_t) * x0 + math.sqrt(1 - alpha_bar_t) * eps
    beta = 1 - alpha_bar_t / alpha_bar_before
    mean = (  # equation 7 of DDPM
        math.sqrt(alpha_bar_before) * beta / (1 - alpha_bar_t) * x0
        + math.sqrt(1 - beta) * (1 - alpha_bar_before) / (1 - alpha_bar_t) * x_t
    )
    row = ddim_coefficients(
        alpha_bar_t,
        0.5,
        previous_x_prediction(alpha_bar_t, alpha_bar_before),
        use_clipped_model_output=use_clipped_model_output,
    )
    np.testing.assert_allclose(row.x0_x * x_t + row.x0_m * mean, x0, rtol=1e-11)
    np.testing.assert_allclose(x_prev_of(row, x_t, mean), math.sqrt(0.5) * x0 + math.sqrt(0.5) * eps, rtol=1e-11)


def test_previous_x_before_clean_data_is_x0():
    prediction = previous_x_prediction(0.9, 1.0)
    assert prediction.x0_x == 0
    assert prediction.x0_m == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("alpha_bar", [1.0, 0.9, 0.001, 0.0])
def test_noising_is_equation_4(alpha_bar):
    row = noising_coefficients(alpha_bar)
    expected = math.sqrt(alpha_bar) * 0.7 + math.sqrt(1 - alpha_bar) * -1.1
    assert x_prev_of(row, 0.7, 123.0, -1.1) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("alpha_bar_t", "alpha_bar_prev"), LEVELS[:3])
def test_x_t_is_the_fixed_point_of_its_inversion(kind, alpha_bar_t, alpha_bar_prev):
    """With the output that the model gives at x_t, one iteration from x_t stays there."""
    x_t, m = 0.3, -0.8
    x_prev = x_prev_of(ddim_coefficients(alpha_bar_t, alpha_bar_prev, kind), x_t, m)
    row = inversion_coefficients(alpha_bar_t, alpha_bar_prev, kind)
    assert x_prev_of(row, x_t, m, x_prev) == pytest.approx(x_t, rel=1e-12)


def test_a_temperature_scales_only_what_is_added():
    row = ddim_coefficients(0.3, 0.7, variance=0.1, std_dev_added=0.2)
    assert row.prev_noise == 0.2
    assert row.prev_eps == pytest.approx(math.sqrt(1 - 0.7 - 0.1))


def test_the_mean_may_stand_in_the_place_of_x0():
    row = ddim_coefficients(0.5, 0.7, "v_prediction", variance=0.1)
    same = mean_as_x0(row)
    x, m, z = (torch.from_numpy(np.random.default_rng(i).standard_normal((2, 129))).float() for i in range(3))
    mean = torch.empty_like(x)
    got = ddim_step(x, m, same, noise=z, x0_out=mean)
    assert torch.equal(got, ddim_step(x, m, row, noise=z))
    assert torch.equal(mean, ddim_step(x, m, replace(row, prev_noise=0.0)))
    with pytest.raises(ValueError, match=r"nothing is clipped, got clip = 1\.0"):
        mean_as_x0(ddim_coefficients(0.5, 0.7, clip_sample_range=1.0))
