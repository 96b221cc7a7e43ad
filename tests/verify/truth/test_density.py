"""The Gaussian of a step in float64 is the normal distribution, and its slopes are derivatives."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from ddim_fast.verify.truth import density, oracle, tolerances

ROW = oracle.textbook_row("v_prediction", 0.5, 0.7, eta=0.8, clip=1.2, use_clipped_model_output=True)


def tensors(shape=(3, 2, 5), seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.standard_normal(shape)


def test_it_is_what_textbook_steps_are_distributed_like():
    x_t, m = tensors()
    found = density.gaussian(ROW, x_t, m)
    options = {"eta": 0.8, "clip": 1.2, "use_clipped_model_output": True}
    at = [
        oracle.textbook_step("v_prediction", x_t, m, 0.5, 0.7, noise=np.full_like(x_t, z), **options)[0] for z in (0, 1)
    ]
    np.testing.assert_allclose(found.mean, at[0].reshape(3, 10), rtol=1e-13)
    np.testing.assert_allclose(at[1] - at[0], found.std, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_its_log_probability_is_that_of_scipy(reduction):
    x_t, m = tensors()
    found = density.gaussian(ROW, x_t, m)
    x_prev = found.mean + found.std * np.random.default_rng(1).standard_normal(found.mean.shape)
    each = stats.norm(found.mean, found.std).logpdf(x_prev)
    np.testing.assert_allclose(found.log_prob(x_prev, reduction), getattr(each, reduction)(1), rtol=1e-12)


def test_its_integral_is_one():
    found = density.gaussian(ROW, np.array([[0.3]]), np.array([[-0.7]]))
    total, _ = integrate.quad(lambda x: math.exp(found.log_density(np.array([[x]]))[0, 0]), -np.inf, np.inf)
    assert abs(total - 1) < 1e-9


def test_slopes_are_derivatives_where_x0_is_clear_of_its_bound():
    x_t, m = tensors((2, 400))
    m[0, :3] = (np.array([1.2, -1.2, 1.2 + 1e-5]) - ROW["x0_x"] * x_t[0, :3]) / ROW["x0_m"]  # on the bound, or near it
    found = density.gaussian(ROW, x_t, m)
    x_prev = found.mean + found.std
    of_density, of_mean, clear = density.slopes(ROW, x_t, m, x_prev)
    x, leaf = torch.from_numpy(x_t), torch.from_numpy(m).requires_grad_()
    x0 = (ROW["x0_x"] * x + ROW["x0_m"] * leaf).clamp(-1.2, 1.2)
    eps = ROW["eps_x"] * x + ROW["eps_m"] * leaf + ROW["eps_0"] * x0
    mean = ROW["prev_x0"] * x0 + ROW["prev_eps"] * eps
    (slope,) = torch.autograd.grad(mean.sum(), leaf, retain_graph=True)
    each = torch.distributions.Normal(mean, found.std).log_prob(torch.from_numpy(x_prev))
    (gradient,) = torch.autograd.grad(each.sum(), leaf)
    np.testing.assert_allclose(of_mean[clear], slope.numpy()[clear], atol=1e-10)
    np.testing.assert_allclose(of_density[clear], gradient.numpy()[clear], atol=1e-8)
    away = np.abs(np.abs(ROW["x0_x"] * x_t + ROW["x0_m"] * m) - 1.2)
    assert clear[away > 2 * density.STEP].all()
    assert not clear[away < 0.5 * density.STEP * abs(ROW["x0_m"])].any()
    assert not clear[0, :3].any()


def test_no_noise_is_no_density():
    row = oracle.textbook_row("epsilon", 0.5, 1.0, eta=1.0)
    x_t, m = tensors((2, 3))
    assert density.gaussian(row, x_t, m) is None
    assert density.gaussian(row, x_t, m, min_std=0.1).std == 0.1
    assert density.gaussian(ROW, x_t, m, min_std=0.01).std == ROW["prev_noise"]


def test_an_error_of_the_standard_deviation_widens_what_is_allowed():
    """The bounds hold the density and its gradient with another standard deviation."""
    rng = np.random.default_rng(0)
    deviation, std, off = rng.standard_normal((4, 50)), 0.7, 1e-3
    zero = np.zeros_like(deviation)

    def log_prob(s):
        return (-0.5 * (deviation / s) ** 2 - math.log(s)).sum(1)

    offset = math.log(std) + density.HALF_LOG_2_PI
    allowed = tolerances.density_error(torch.float64, deviation, zero, 0.5 / std**2, offset, off)
    tight = tolerances.density_error(torch.float64, deviation, zero, 0.5 / std**2, offset)
    for other in (std * (1 - off), std * (1 + off)):
        assert (np.abs(log_prob(other) - log_prob(std)) <= allowed).all()
        assert (np.abs(log_prob(other) - log_prob(std)) > tight).all()
        moved = np.abs(deviation / other**2 - deviation / std**2)
        factor = np.full_like(deviation, 1 / std**2)
        assert (moved <= tolerances.density_gradient_error(torch.float64, deviation, zero, factor, off)).all()
        assert (moved > tolerances.density_gradient_error(torch.float64, deviation, zero, factor)).all()
    assert np.isinf(tolerances.density_error(torch.float64, deviation, zero, 1.0, 0.0, 1.0)).all()
    assert np.isinf(tolerances.density_gradient_error(torch.float64, deviation, zero, zero, 1.0)).all()
