"""The checks of distributions: their closed forms are right, and they detect wrong samplers."""

import math

import numpy as np
import pytest
import torch

from ddim_fast.verify.checks import CHECKS, marginals
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import verify
from ddim_fast.verify.subjects.adapters import SamplerFunction, StepFunction
from ddim_fast.verify.truth import oracle, statistics
from ddim_fast.verify.truth.cases import Setting

MARGINALS = [name for name in CHECKS if name.endswith("-marginals")]
GAUSSIAN, MIXTURE, DATA = "gaussian-marginals", "mixture-marginals", "data-marginals"


# --- The closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 8])
@pytest.mark.parametrize("alpha_bar", [0.999, 0.4, 1e-3])
def test_the_exact_eps_is_the_gradient_of_the_log_density(dimensions, alpha_bar):
    data = marginals.mixture(dimensions)
    x = torch.randn(50, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(
            math.sqrt(alpha_bar) * torch.from_numpy(data.means),
            torch.sqrt(alpha_bar * torch.from_numpy(data.std_devs) ** 2 + 1 - alpha_bar),
        ),
        1,
    )
    chosen = torch.distributions.Categorical(probs=torch.from_numpy(data.weights))
    log_density = torch.distributions.MixtureSameFamily(chosen, parts).log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    exact = -math.sqrt(1 - alpha_bar) * score.numpy()
    np.testing.assert_allclose(data.eps(x.detach().numpy(), alpha_bar), exact, rtol=1e-9, atol=1e-9)


def test_the_projected_distribution_is_that_of_the_data():
    rng, data = np.random.default_rng(3), marginals.mixture(8)
    which = rng.choice(len(data.weights), 2**15, p=data.weights)
    points = data.means[which] + data.std_devs[which] * rng.standard_normal((2**15, 8))
    for direction in statistics.directions(rng, 12, 8):
        assert statistics.kolmogorov_smirnov(points @ direction, data.cdf_along(direction), 1e-6).passed


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("eta_scales", ["std_dev", "variance"])
def test_the_recursion_is_the_distribution_of_float64_runs(eta, eta_scales):
    """At two points the linear map itself; over many, the variance."""
    data = marginals.Mixture(np.ones(1), np.array([[0.7, -1.1]]), np.array([[0.3, 1.8]]))
    setting = Setting(num_inference_steps=5, eta=eta)
    levels = setting.levels()
    points = marginals.exact_run(data, levels, 2**16, setting, eta_scales, np.random.default_rng(0))
    mean, std_dev = marginals.gaussian_after(data, levels, setting, eta_scales)
    white = (points - mean) / std_dev
    assert statistics.mean(white, 1e-4).passed
    assert statistics.covariance(white, np.zeros(2), np.eye(2), 1e-4).passed


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_many_steps_the_recursion_tends_to_the_data(eta):
    data = marginals.Mixture(np.ones(1), np.array([[0.7]]), np.array([[0.5]]))
    off = []
    for steps in (50, 200, 1000):
        setting = Setting(num_inference_steps=steps, eta=eta)
        mean, std_dev = marginals.gaussian_after(data, setting.levels(), setting, "std_dev")
        off.append(abs(std_dev[0] - 0.5) + abs(mean[0] - 0.7))
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.01


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_model_says_what_its_prediction_type_means(kind):
    data, setting = marginals.mixture(2), Setting(prediction_type=kind)
    x_t = torch.randn(3, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = marginals.as_model(data, setting)(x_t, torch.full((3,), 600)).numpy()
    assert output.shape == x_t.shape
    alpha_bar = float(setting.alphas_cumprod()[600])
    x0, eps = oracle.split(kind, x_t.numpy(), output, alpha_bar)
    points = np.moveaxis(x_t.numpy(), 1, -1).reshape(-1, 2)
    np.testing.assert_allclose(np.moveaxis(eps, 1, -1).reshape(-1, 2), data.eps(points, alpha_bar), atol=1e-9)
    np.testing.assert_allclose(math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps, x_t.numpy(), atol=1e-9)


@pytest.mark.parametrize(
    ("eta", "steps", "points"),
    [(0.0, 50, 2**15), (1.0, 50, 2**15)]
    + [pytest.param(*key, 2**18, marks=pytest.mark.slow) for key in marginals.DISCRETISATION],
)
def test_the_bias_of_discretisation_is_at_most_that_stated(eta, steps, points):
    data, setting = marginals.mixture(2), Setting(num_inference_steps=steps, eta=eta)
    rng, part = np.random.default_rng(11), min(points, 2**15)
    levels = setting.levels()
    found = np.concatenate(
        [marginals.exact_run(data, levels, part, setting, "std_dev", rng) for _ in range(points // part)]
    )
    bias = max(
        statistics.kolmogorov_smirnov(found @ one, data.cdf_along(one), 0.1).statistic
        for one in statistics.directions(rng, 64, 2)
    )
    stated = marginals.DISCRETISATION[eta, steps]
    assert 0.5 * stated < bias <= stated


# --- Right subjects -------------------------------------------------------------------------------------------------------


def right_step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    std_dev_t = oracle.std_dev(alpha_bar_t, alpha_bar_prev, eta)
    rest = math.sqrt(max(1 - alpha_bar_prev - std_dev_t**2, 0.0))
    x_prev = math.sqrt(alpha_bar_prev) * x0 + rest * model_output
    return x_prev if std_dev_t == 0 else x_prev + std_dev_t * noise


def sampler(step=right_step, spoil=lambda z: z, bars=lambda bars: bars, last=1.0):
    def sample(model, x_T, alphas_cumprod, timesteps, eta=0.0, generator=None):
        alpha_bars, x_t = bars(alphas_cumprod), x_T
        for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a, p = float(alpha_bars[t]), float(alpha_bars[t_prev]) if t_prev >= 0 else last
            z = spoil(torch.randn(x_t.shape, generator=generator))
            x_t = step(x_t, model(x_t, torch.full((len(x_t),), t)), a, p, eta, z)
        return x_t

    return SamplerFunction(sample)


RIGHT = {
    "cpu": "cpu",
    "diffusers": "diffusers:DDIMScheduler",
    "drop-in": "ddim_fast.integrations.diffusers:FastDDIMScheduler",
    "a step that is given noise": StepFunction(right_step),
    "a sampler": sampler(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_subjects_pass(name):
    report = verify(RIGHT[name], checks=MARGINALS, required=())
    assert not report.of(Outcome.FAILED)
    assert not report.of(Outcome.ERROR)
    passed = {result.name for result in report.of(Outcome.PASSED)}
    assert {GAUSSIAN, MIXTURE} <= passed
    assert (DATA in passed) == ("timesteps" in report.features)


# --- Wrong ones -----------------------------------------------------------------------------------------------------------


def other_eta(x_t, model_output, a, p, eta, z):
    """eta scales the variance."""
    return right_step(x_t, model_output, a, p, math.sqrt(eta), z)


def no_variance_in_the_direction(x_t, model_output, a, p, eta, z):
    x_prev = right_step(x_t, model_output, a, p, 0.0, None)
    return x_prev + oracle.std_dev(a, p, eta) * z


def beta_not_beta_tilde(x_t, model_output, a, p, eta, z):
    x_prev = right_step(x_t, model_output, a, p, eta, torch.zeros_like(x_t))
    return x_prev + eta * math.sqrt(1 - a / p) * z * (p < 1)


def noise_left_out(x_t, model_output, a, p, eta, z):
    return right_step(x_t, model_output, a, p, eta, torch.zeros_like(x_t))


def clipped(x_t, model_output, a, p, eta, z):
    """x0 is bounded where nobody asked for it."""
    x0 = ((x_t - math.sqrt(1 - a) * model_output) / math.sqrt(a)).clamp(-1, 1)
    return right_step(x_t, (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a), a, p, eta, z)


def batch_mean(x_t, model_output, a, p, eta, z):
    x_prev = right_step(x_t, model_output, a, p, eta, z)
    return x_prev - 0.02 * x_prev.mean(1, keepdim=True)


WRONG = {
    "other eta": (sampler(other_eta), (GAUSSIAN,)),
    "no variance in the direction": (sampler(no_variance_in_the_direction), (GAUSSIAN, MIXTURE)),
    "beta, not beta tilde": (sampler(beta_not_beta_tilde), (GAUSSIAN, MIXTURE)),
    "noise left out": (sampler(noise_left_out), (GAUSSIAN, MIXTURE)),
    "clipped": (sampler(clipped), (GAUSSIAN, MIXTURE)),
    "coordinates mixed": (sampler(batch_mean), (GAUSSIAN,)),
    "another schedule": (
        sampler(bars=lambda bars: torch.from_numpy(oracle.alphas_cumprod("scaled_linear"))),
        (GAUSSIAN, MIXTURE),
    ),
    "one timestep off": (sampler(bars=lambda bars: torch.cat([bars[1:], bars[-1:]])), (GAUSSIAN,)),
    "noise 5 % too large": (sampler(spoil=lambda z: 1.05 * z), (GAUSSIAN,)),
    "the same noise for all coordinates": (sampler(spoil=lambda z: z[:, :1].expand_as(z)), (GAUSSIAN, MIXTURE)),
    "not finite": (sampler(spoil=lambda z: z / 0), (GAUSSIAN, MIXTURE)),
}


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, (_, checks) in WRONG.items() for check in checks])
def test_a_wrong_sampler_is_found(name, check):
    report = verify(WRONG[name][0], checks=[check])
    assert report.results[0].outcome is Outcome.FAILED, report.results[0]


class FromTheNumberOfSteps:
    """A right or wrong sampler that chooses its timesteps."""

    def __init__(self, step=right_step):
        self.step = step

    def __call__(self, model, x_T, num_inference_steps, eta=0.0, generator=None):
        bars = torch.from_numpy(oracle.alphas_cumprod())
        timesteps = oracle.timesteps("leading", num_inference_steps, 1000)
        return sampler(self.step).function(model, x_T, bars, timesteps, eta, generator)


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        (right_step, Outcome.PASSED),
        (no_variance_in_the_direction, Outcome.FAILED),
        (clipped, Outcome.FAILED),
        (noise_left_out, Outcome.FAILED),
        (beta_not_beta_tilde, Outcome.PASSED),  # in small steps the two are one: left to the other checks
    ],
)
def test_the_data_are_reached_in_many_steps(step, outcome):
    one = FromTheNumberOfSteps(step)
    report = verify(SamplerFunction(one.__call__, "a sampler"), checks=[DATA])
    assert report.results[0].outcome is outcome, report.results[0].message


def test_a_model_call_outside_the_schedule_is_a_failure_not_a_crash():
    def sample(model, x_T, timesteps, eta=0.0):
        return model(x_T, torch.full((len(x_T),), 1000))

    report = verify(SamplerFunction(sample), checks=[GAUSSIAN])
    assert report.results[0].outcome is Outcome.FAILED
    assert "timesteps in [0, 999], got 1000" in report.results[0].message
