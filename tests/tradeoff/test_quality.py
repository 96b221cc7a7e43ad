"""Quality numbers against what they must be."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.models.metrics import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    load_features,
    sample_distances,
)
from ddim_fast.tradeoff import ClosedForm, judge_of, shipped_judge
from ddim_fast.tradeoff.quality import ENOUGH, frechet_measure, mean, precision_and_recall, share

LINEAR = NoiseSchedule.linear()


def normals(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_precision_and_recall_by_trying_all_pairs():
    samples, real = normals(40, 3), normals(30, 3, seed=1) * 1.5

    def within(points, manifold, k=3):
        inside = []
        for p in points:
            hit = False
            for i, centre in enumerate(manifold):
                others = sorted(math.dist(centre, o) for j, o in enumerate(manifold) if j != i)
                hit |= math.dist(p, centre) <= others[k - 1]
            inside.append(hit)
        return np.mean(inside)

    precision, recall = precision_and_recall(samples, real)
    assert precision.value == within(samples.tolist(), real.tolist())
    assert recall.value == within(real.tolist(), samples.tolist())


def test_precision_and_recall_tell_two_failures_apart():
    real = torch.cat([normals(200, 4), normals(200, 4, seed=1) + 20])
    one_mode, blurred = (
        normals(400, 4, seed=2),
        torch.cat([normals(200, 4, seed=3), normals(200, 4, seed=4) + 20]) * 1.8,
    )
    precision, recall = precision_and_recall(one_mode, real)
    assert precision.value > 0.8
    assert 0.3 < recall.value < 0.6
    precision, recall = precision_and_recall(blurred, real)
    assert precision.value < 0.5
    precision, recall = precision_and_recall(real, real)
    assert precision.value == recall.value == 1


def test_the_error_of_a_frechet_distance_is_that_over_fresh_samples():
    real = FeatureStatistics(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 1000)
    fresh = [frechet_distance(feature_statistics(normals(300, 3, seed=i) + 0.5), real) for i in range(60)]
    measured = frechet_measure(normals(300, 3, seed=99) + 0.5, real)
    assert measured.error == pytest.approx(np.std(fresh), rel=0.5)
    assert measured.value == pytest.approx(np.mean(fresh), abs=4 * np.std(fresh))


def test_means_and_shares():
    values = normals(500)
    assert mean(values).value == pytest.approx(values.mean().item())
    assert mean(values).error == pytest.approx(values.std().item() / math.sqrt(500))
    assert math.isnan(mean(values[:1]).error)
    found = share(torch.tensor([True, False, True, True]))
    assert (found.value, found.error) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 4)))


def test_sample_distances():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0]]).view(2, 1, 2, 2)
    assert sample_distances(a, b).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"same shape, got \(2, 1, 2, 2\) and \(1, 1, 2, 2\)"):
        sample_distances(a, b[:1])


def test_what_a_judge_tells():
    judge = judge_of(lambda x: x.flatten(1)[:, :2], normals(100, 1, 2, 2).float(), "two pixels")
    samples = normals(64, 1, 2, 2, seed=1).float()
    assert set(judge.measures(samples, None)) == {"frechet", "precision", "recall"}
    assert set(judge.measures(samples[: 2 * ENOUGH - 1], None)) == {"precision", "recall"}  # too few for a covariance
    assert set(judge_of(lambda x: x.flatten(1), None, "no real data").measures(samples, None)) == set()
    found = shipped_judge().measures(torch.rand(12, 1, 28, 28) * 3 - 1, torch.arange(12) % 10)  # out of range: clamped
    assert set(found) == {"precision", "recall", "class_agreement"}
    assert load_features().shape == (2000, 64)


# --- Closed forms -----------------------------------------------------------------------------------------------------

WEIGHTS, MEANS, STD_DEVS = (0.3, 0.7), (-1.0, 0.6), (0.15, 0.3)


def density(x, alpha_bar=1.0):
    signal = math.sqrt(alpha_bar)
    sds = [math.sqrt(alpha_bar * s * s + 1 - alpha_bar) for s in STD_DEVS]
    return sum(w * norm.pdf(x, signal * m, s) for w, m, s in zip(WEIGHTS, MEANS, sds, strict=True))


@pytest.mark.parametrize("t", [0, 50, 400, 999])
def test_the_model_is_the_score(t):
    """eps = -sqrt(1 - alpha_bar) d/dx log p_t(x), by differences of the density."""
    alpha_bar, h = LINEAR.alpha_bar(t), 1e-5
    x = np.linspace(-2.5, 2.5, 21)
    slope = (np.log(density(x + h, alpha_bar)) - np.log(density(x - h, alpha_bar))) / (2 * h)
    got = ClosedForm(LINEAR)(torch.tensor(x)[:, None], torch.full((21,), t))[:, 0].numpy()
    np.testing.assert_allclose(got, -math.sqrt(1 - alpha_bar) * slope, rtol=1e-6, atol=1e-6)


def test_quantiles_and_cumulative():
    model = ClosedForm(LINEAR)
    p = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.99, 1 - 1e-6], dtype=torch.float64)
    x = model.quantile(p)
    torch.testing.assert_close(model.cumulative(x), p, rtol=1e-9, atol=1e-12)
    for value in (-1.2, 0.0, 0.7):
        assert model.cumulative(torch.tensor([value], dtype=torch.float64)).item() == pytest.approx(
            quad(density, -8, value, limit=200)[0], abs=1e-9
        )


def test_the_wasserstein_distance_is_the_integral():
    model, samples = ClosedForm(LINEAR), torch.tensor([[0.4], [-1.3], [0.9]])
    ordered = sorted(samples[:, 0].tolist())

    def integrand(p):
        return (ordered[min(int(3 * p), 2)] - model.quantile(torch.tensor([p], dtype=torch.float64)).item()) ** 2

    expected = sum(quad(integrand, i / 3, (i + 1) / 3, epsabs=1e-7)[0] for i in range(3))
    assert model.wasserstein(samples) == pytest.approx(math.sqrt(expected), rel=1e-6)
    shifted = model.quantile((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[:, None]
    assert model.wasserstein(shifted) < 2e-3
    assert model.wasserstein(shifted + 0.25) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_more_steps_come_nearer_at_the_rate_of_the_order(order):
    model, x_T = ClosedForm(LINEAR), ClosedForm.noise(2000).double()
    errors = []
    for steps in (16, 32, 64):
        sampler = DDIMSampler(LINEAR, steps, timestep_spacing="log_snr", order=order)
        errors.append(model.wasserstein(sampler.sample(model, x_T=x_T)))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates == pytest.approx([order] * 2, abs=0.45)
