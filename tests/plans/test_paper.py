"""The paper's update against Bayes' rule and equation 16, and against rows of coefficients made by hand."""

import math

import numpy as np
import pytest
import torch
from paper import ddim_step_paper, std_dev_paper

from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.tolerances import to_numpy

BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "scaled linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "cosine": np.clip(
        1
        - np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        / np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2,
        0,
        0.999,
    ),
    "const": np.full(1000, 0.02),
    "few": np.array([0.1, 0.3, 0.5, 0.9]),
}
per_schedule = pytest.mark.parametrize("schedule", list(BETAS))


def adjacent_pairs(schedule):
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETAS[schedule])])
    return list(zip(alpha_bar[1:].tolist(), alpha_bar[:-1].tolist(), strict=True))


def draw(seed, n=64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 2, n)))


def paper_row(alpha_bar_t, alpha_bar_prev, eta):
    """Equation 12 column by column."""
    s = std_dev_paper(alpha_bar_t, alpha_bar_prev, eta)
    return StepCoefficients(
        x0_x=1 / math.sqrt(alpha_bar_t),
        x0_m=-math.sqrt((1 - alpha_bar_t) / alpha_bar_t),
        eps_x=0.0,
        eps_m=1.0,
        eps_0=0.0,
        prev_x0=math.sqrt(alpha_bar_prev),
        prev_eps=math.sqrt(max(1 - alpha_bar_prev - s**2, 0.0)),
        prev_noise=s,
    )


@per_schedule
def test_eta_one_on_adjacent_steps_is_the_ddpm_posterior(schedule):
    """q(x_prev | x_t, x0) by Bayes' rule: precisions add, and so do precision-weighted means."""
    x_t, x0, z = draw(1)
    for alpha_bar_t, alpha_bar_prev in adjacent_pairs(schedule):
        kept = alpha_bar_t / alpha_bar_prev  # x_t = sqrt(kept) x_prev + sqrt(1 - kept) noise
        prior_variance = 1 - alpha_bar_prev
        eps = (x_t - math.sqrt(alpha_bar_t) * x0) / math.sqrt(1 - alpha_bar_t)
        if prior_variance == 0:  # x_prev is x0: Bayes' rule has nothing to add
            mean, std_dev = x0, 0.0
        else:
            variance = 1 / (1 / prior_variance + kept / (1 - kept))
            mean = variance * (math.sqrt(alpha_bar_prev) * x0 / prior_variance + math.sqrt(kept) * x_t / (1 - kept))
            std_dev = math.sqrt(variance)
        scale = x_t.abs() + x0.abs() + eps.abs() * math.sqrt((1 - alpha_bar_t) / alpha_bar_t) + z.abs()
        got_mean = ddim_step_paper(x_t, eps, alpha_bar_t, alpha_bar_prev, eta=1.0, z=torch.zeros_like(z))
        got = ddim_step_paper(x_t, eps, alpha_bar_t, alpha_bar_prev, eta=1.0, z=z)
        # Near alpha_bar = 1 the inputs themselves, 1 - alpha_bar, hold only some of float64's digits.
        allowed = 1e-12 + 4e-16 / (1 - kept)
        assert ((got_mean - mean).abs() <= allowed * scale).all()
        assert ((got - (mean + std_dev * z)).abs() <= 4 * allowed * scale).all()
        assert std_dev_paper(alpha_bar_t, alpha_bar_prev, 1.0) == pytest.approx(std_dev, rel=4 * allowed, abs=1e-15)


@per_schedule
@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("stride", [1, 7, 50])
def test_paper_step_is_the_textbook_and_the_row(schedule, eta, stride):
    x_t, eps, z = draw(2)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETAS[schedule])]).tolist()
    for t in range(len(alpha_bar) - 1, 0, -stride)[:60]:
        pair = alpha_bar[t], alpha_bar[max(t - stride, 0)]
        if pair[0] == 0 or pair[0] < 1e-12:
            continue
        expected, _ = oracle.textbook_step("epsilon", to_numpy(x_t), to_numpy(eps), *pair, eta=eta, noise=to_numpy(z))
        long_terms = oracle.row_step(
            oracle.textbook_row("epsilon", *pair, eta=eta), to_numpy(x_t), to_numpy(eps), noise=to_numpy(z)
        ).long_terms
        paper = ddim_step_paper(x_t, eps, *pair, eta=eta, z=z)
        by_row = ddim_step(x_t, eps, paper_row(*pair, eta), noise=z)
        assert paper.dtype == by_row.dtype == torch.float64
        for got in (paper, by_row):
            assert np.all(np.abs(to_numpy(got) - expected) <= 8 * np.finfo(float).eps * long_terms)


@per_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_std_dev_is_equation_16(schedule, eta):
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - BETAS[schedule])]).tolist()
    for t, prev in [
        (1, 0),
        (2, 1),
        (len(alpha_bar) - 1, 0),
        (len(alpha_bar) - 1, len(alpha_bar) // 2),
        (len(alpha_bar) // 2, 1),
    ]:
        got = std_dev_paper(alpha_bar[t], alpha_bar[prev], eta)
        assert got == pytest.approx(oracle.std_dev(alpha_bar[t], alpha_bar[prev], eta), rel=1e-15)
        squared = eta**2 * (1 - alpha_bar[prev]) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / alpha_bar[prev])
        assert got**2 == pytest.approx(squared, rel=1e-14)


def test_eta_conventions_meet_where_they_should():
    for pair in [(0.5, 0.6), (0.01, 0.2), (0.9, 0.95)]:
        for eta in (0.0, 1.0):
            assert oracle.std_dev(*pair, eta, "variance") == pytest.approx(std_dev_paper(*pair, eta), rel=1e-15)
        assert oracle.std_dev(*pair, 0.25, "variance") == pytest.approx(std_dev_paper(*pair, 0.5), rel=1e-15)
        assert oracle.std_dev(*pair, 0.25, "variance") > 1.9 * std_dev_paper(*pair, 0.25)


@per_schedule
def test_marginals_are_kept(schedule):
    """Where eps is the noise in x_t, x_prev is sqrt(alpha_bar_prev) x0 plus noise of variance 1 - alpha_bar_prev."""
    x0, eps, _z = draw(3)
    for alpha_bar_t, alpha_bar_prev in adjacent_pairs(schedule)[:: max(len(BETAS[schedule]) // 50, 1)]:
        x_t = math.sqrt(alpha_bar_t) * x0 + math.sqrt(1 - alpha_bar_t) * eps
        ideal = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * eps
        torch.testing.assert_close(
            ddim_step_paper(x_t, eps, alpha_bar_t, alpha_bar_prev), ideal, rtol=1e-9, atol=1e-9 / math.sqrt(alpha_bar_t)
        )
        for eta in (0.4, 1.0):
            unit = torch.ones(1, dtype=torch.float64)
            at = (unit * 0 + math.sqrt(1 - alpha_bar_t), unit)
            direction = ddim_step_paper(*at, alpha_bar_t, alpha_bar_prev, eta=eta, z=unit * 0)  # x0 = 0, eps = 1
            noise = ddim_step_paper(unit * 0, unit * 0, alpha_bar_t, alpha_bar_prev, eta=eta, z=unit)
            assert float(direction**2 + noise**2) == pytest.approx(1 - alpha_bar_prev, rel=1e-9, abs=1e-12)


def test_deterministic_steps_invert():
    x_t, eps, _ = draw(4)
    there = ddim_step_paper(x_t, eps, 0.3, 0.8)
    torch.testing.assert_close(ddim_step_paper(there, eps, 0.8, 0.3), x_t, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ddim_step_paper(x_t, eps, 0.3, 0.3), x_t, rtol=1e-14, atol=1e-14)
    in_two = ddim_step_paper(ddim_step_paper(x_t, eps, 0.3, 0.5), eps, 0.5, 0.8)
    torch.testing.assert_close(in_two, there, rtol=1e-13, atol=1e-13)


def test_rounding_below_zero_is_clamped():
    """1 - alpha_bar_prev - std_dev_t^2 comes out negative for some of these pairs: there the direction is 0, not NaN."""
    x_t, eps, z = draw(5, 4)
    negative = 0
    rng = np.random.default_rng(6)
    pairs = [(10.0**-e, 1 - f) for e in range(1, 18) for f in (0.5, 1e-3, 1e-9, 1e-15)]
    pairs += [
        (a * b, b) for a, b in zip(10.0 ** -rng.uniform(0, 20, 500), 1 - 10.0 ** -rng.uniform(0, 16, 500), strict=True)
    ]
    for alpha_bar_t, alpha_bar_prev in pairs:
        s = std_dev_paper(alpha_bar_t, alpha_bar_prev, 1.0)
        negative += 1 - alpha_bar_prev - s**2 < 0
        assert math.isfinite(s)
        assert ddim_step_paper(x_t, eps, alpha_bar_t, alpha_bar_prev, eta=1.0, z=z).isfinite().all()
    assert negative > 10  # else this test has no teeth


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_almost_clean_steps_are_finite(eta):
    """1 - alpha_bar down to the last bit of float64, and at it."""
    x_t, eps, z = draw(7, 8)
    last = np.nextafter(1.0, 0.0)
    for alpha_bar_t in (1 - 1e-12, 1 - 2**-52, last):
        for alpha_bar_prev in (alpha_bar_t, last, 1.0):
            result = ddim_step_paper(x_t, eps, float(alpha_bar_t), float(alpha_bar_prev), eta=eta, z=z)
            assert result.isfinite().all()
            torch.testing.assert_close(result, x_t, rtol=1e-5, atol=1e-5)
    assert std_dev_paper(1.0, 1.0, eta) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_paper_step_keeps_the_dtype(dtype):
    x_t, eps, z = (t.to(dtype) for t in draw(8))
    assert ddim_step_paper(x_t, eps, 0.3, 0.5, eta=0.5, z=z).dtype == dtype


def test_noise_is_not_read_without_eta():
    x_t, eps, z = draw(9)
    assert ddim_step_paper(x_t, eps, 0.3, 0.5, eta=0.0, z=z * math.nan).isfinite().all()
    assert ddim_step_paper(x_t, eps, 0.3, 1.0, eta=1.0, z=None).isfinite().all()
