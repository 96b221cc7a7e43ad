"""What eta means: each convention's step against its source's formula, written here in float64, and whether it keeps the marginals.

Sources: equation 16 of arXiv 2010.02502; Flow-GRPO, arXiv 2505.05470, and its code's ``sde_step_with_logprob``; CPS, arXiv
2509.05952. Those of flow matching are written in the sample and the velocity, as they are there.
"""

import dataclasses
import math
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_examples import DOCS

import ddim_fast as df
from ddim_fast.plans.coefficients import ddim_coefficients
from ddim_fast.plans.eta import (
    ETA_SCALES,
    OF_EQUATION_16,
    PAPER,
    explicit_eta,
    flow_grpo_noise,
    told_apart,
)
from ddim_fast.plans.levels import NoiseLevel
from ddim_fast.plans.plan import SamplingPlan
from tests.plans.test_continuous import PATHS, exact_levels
from tests.plans.test_plan import apply_row

EPS = np.finfo(np.float64).eps
RNG = np.random.default_rng(250505470)
X, V, Z = RNG.standard_normal((3, 64))
FLOW = df.FlowSchedule(shift=3.0)
ETA = 0.3


# --- The sources' formulas, on the straight path ---------------------------------------------------------------------------


def flow_grpo(x, v, sigma, sigma_prev, noise_level, sigma_max):
    """(mean, standard deviation) of a step."""
    dt = sigma_prev - sigma
    s = math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma))) * noise_level
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * math.sqrt(-dt)


def cps(x, v, sigma, sigma_prev, noise_level, sigma_max):
    s = sigma_prev * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * v, x + v * (1 - sigma)
    return x0 * (1 - sigma_prev) + x1 * math.sqrt(sigma_prev**2 - s**2), s


def ddim(x, v, sigma, sigma_prev, eta, sigma_max):
    kept = (1 - sigma) * sigma_prev / ((1 - sigma_prev) * sigma)
    s = eta * sigma_prev * math.sqrt(1 - kept**2)
    return (x - sigma * v) * (1 - sigma_prev) + (x + v * (1 - sigma)) * math.sqrt(max(sigma_prev**2 - s**2, 0)), s


STEPS = {
    "std_dev": ddim,
    "variance": lambda x, v, sigma, sigma_prev, eta, sigma_max: ddim(x, v, sigma, sigma_prev, eta**0.5, sigma_max),
    "flow_grpo": flow_grpo,
    "cps": cps,
}


def test_every_convention_has_its_sources_formula_here():
    assert set(STEPS) == set(ETA_SCALES)
    assert OF_EQUATION_16 == ("std_dev", "variance")


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("times", [FLOW.select(28), df.FlowSchedule().select(10), (1.0, 0.9, 0.75, 0.5), (0.8, 0.7)])
def test_a_step_of_flow_matching_is_its_sources(eta_scales, eta, times):
    """All but the last, which leads to clean data; the first starts at pure noise, or not."""
    plan = SamplingPlan(FLOW, tuple(times), "flow", eta, eta_scales)
    for step, (sigma, sigma_prev) in zip(plan.steps, pairwise(times), strict=False):
        mean, std_dev = STEPS[eta_scales](X, V, sigma, sigma_prev, eta, times[1])
        got, _ = apply_row(step.coefficients, X, V, 0)
        size = np.abs([X, V]).max() / (1 - sigma_prev) / sigma_prev
        np.testing.assert_allclose(got, mean, rtol=0, atol=256 * EPS * size)
        assert (
            step.std_dev_t == step.coefficients.prev_noise == pytest.approx(std_dev, rel=256 * EPS / (1 - sigma_prev))
        )


@PATHS
@pytest.mark.parametrize("eta_scales", ["flow_grpo", "cps"])
def test_a_step_on_any_path_is_that_of_the_straight_one_scaled(schedule, eta_scales):
    """x / (alpha + sigma) is on the straight path at the time sigma / (alpha + sigma), where it has the velocity eps - x0."""
    plan = SamplingPlan(schedule, schedule.select(9), "sample", 0.15, eta_scales)
    levels = exact_levels(schedule, plan.timesteps)
    times = [sigma / (alpha + sigma) for alpha, sigma in levels]
    for index, step in enumerate(plan.steps[:-1]):
        (alpha, sigma), (alpha_prev, sigma_prev) = levels[index : index + 2]
        eps = (X - alpha * V) / sigma  # V is x0
        mean, std_dev = STEPS[eta_scales](X / (alpha + sigma), eps - V, *times[index : index + 2], 0.15, times[1])
        got, _ = apply_row(step.coefficients, X, V, 0)
        scale = alpha_prev + sigma_prev
        size = (
            scale
            * (1 + np.abs([X, V]).max() / sigma)
            * max(1, sigma / max(alpha, sigma / 100))
            / min(times[index + 1], 1)
        )
        np.testing.assert_allclose(got, scale * mean, rtol=0, atol=1e4 * EPS * size)
        assert step.std_dev_t == pytest.approx(scale * std_dev, rel=1e-10)


def test_steps_of_discrete_timesteps_are_those_of_their_levels():
    """A number is the alpha_bar of a variance-preserving level."""
    schedule = df.NoiseSchedule.linear()
    for eta_scales, scale in ETA_SCALES.items():
        plan = SamplingPlan(schedule, (900, 500, 100), "epsilon", 0.3, eta_scales)
        for step in plan.steps[:-1]:
            levels = [NoiseLevel.of_alpha_bar(level) for level in (step.level_t, step.level_prev)]
            row = ddim_coefficients(*levels, "epsilon", **scale.noise(*levels, 0.3)._asdict())
            np.testing.assert_allclose(
                dataclasses.astuple(step.coefficients)[:8], dataclasses.astuple(row)[:8], rtol=1e-12
            )


# --- Marginals ------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
def test_the_variance_that_a_step_leaves_is_exact_or_has_the_error_that_is_stated(schedule, eta_scales):
    """Of x0 and eps as they are: prev_eps eps + std_dev z has the variance sigma_prev^2. Flow-GRPO's, on the straight path, has more:
    s_t^2 dt^2 / sigma_t + (s_t^2 dt / (2 sigma_t))^2."""
    plan = SamplingPlan(schedule, schedule.select(12), "sample", ETA, eta_scales)
    levels = exact_levels(schedule, plan.timesteps)
    times = [sigma / (alpha + sigma) for alpha, sigma in levels]
    for index, step in enumerate(plan.steps):
        (alpha, sigma), row = levels[index + 1], step.coefficients
        assert row.prev_x0 == pytest.approx(alpha, abs=8 * EPS)
        left, excess = row.prev_eps**2 + row.prev_noise**2, 0.0
        if eta_scales == "flow_grpo" and sigma > 0:
            t, dt = times[index], times[index + 1] - times[index]
            squared = ETA**2 * t / (1 - (times[1] if t == 1 else t))
            excess = (alpha + sigma) ** 2 * (squared * dt**2 / t + (squared * dt / (2 * t)) ** 2)
            assert excess > 1e-4 * sigma**2
        assert left == pytest.approx(sigma**2 + excess, rel=1e-11, abs=1e-14)
    assert ETA_SCALES[eta_scales].keeps_marginals == (eta_scales != "flow_grpo")


def variance_of_a_run(eta_scales, eta, count, std_dev):
    """(variance before the last step over its exact one, and of the samples) of a run with the exact model of N(0, std_dev^2).

    The model's x0 is linear in x_t, and so is a step: the variance becomes a^2 variance + std_dev_t^2.
    """
    plan = SamplingPlan(FLOW, FLOW.select(count), "sample", eta, eta_scales)
    variance, ratio = 1.0, math.nan
    for step in plan.steps:
        alpha, sigma = step.level_t
        ratio = variance / ((alpha * std_dev) ** 2 + sigma**2)
        of_x, of_x0 = step.coefficients.folded
        slope = of_x + of_x0 * alpha * std_dev**2 / ((alpha * std_dev) ** 2 + sigma**2)
        variance = slope**2 * variance + step.std_dev_t**2
    return ratio, variance


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
def test_runs_with_more_steps_converge_to_the_data_but_not_with_cps(eta_scales):
    """With the exact model of normal data the error of the samples' variance falls with the number of steps. CPS replaces the same
    share of the noise in a step of any length, so that more steps are more noise, each with its error."""
    for eta in (0.3, 0.7):
        errors = [abs(variance_of_a_run(eta_scales, eta, count, 1.0)[1] - 1) for count in (50, 200, 800)]
        if eta_scales == "cps":
            assert errors[2] > 0.5 * errors[1]
        else:
            assert errors[1] < 0.35 * errors[0]
            assert errors[2] < 0.35 * errors[1]


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
@pytest.mark.parametrize("count", [5, 28])
def test_data_that_is_one_point_keeps_its_marginals_but_with_flow_grpo(eta_scales, count):
    ratio, variance = variance_of_a_run(eta_scales, 0.7, count, 0.0)
    assert variance == pytest.approx(0, abs=1e-15)  # the last step leads to the model's x0
    if eta_scales == "flow_grpo":
        assert ratio > 1.05
    else:
        assert ratio == pytest.approx(1, rel=64 * count * EPS)


def test_the_numbers_of_the_page_are_measured():
    """docs/PATHS.md: for each convention and number of steps, of one point the last ratio, and of N(0, 1) the samples' variance."""
    rows = re.findall(
        r"^\| (?:`(\w+)`|eta = 0) \| (\d+) \| ([0-9.]+) \| ([0-9.]+) \|$", (DOCS / "PATHS.md").read_text(), re.M
    )
    assert {name for name, *_ in rows} == {"", *ETA_SCALES}
    for name, count, ratio, variance in rows:
        run = name or PAPER, 0.7 if name else 0.0, int(count)
        assert (ratio, variance) == (f"{variance_of_a_run(*run, 0.0)[0]:.3f}", f"{variance_of_a_run(*run, 1.0)[1]:.3f}")


# --- Where there is no room, and clean data --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
@PATHS
def test_clean_data_stays_clean(eta_scales, schedule):
    last = SamplingPlan(schedule, schedule.select(4), "sample", 0.05, eta_scales).steps[-1]
    assert (last.std_dev_t, last.coefficients.prev_eps, last.coefficients.prev_x0) == (0, 0, 1)


@pytest.mark.parametrize(
    ("eta_scales", "largest"),
    [("flow_grpo", math.sqrt(2 * 0.25 * 0.5 / 0.25)), ("cps", 1.0), ("std_dev", 1.0), ("variance", 1.0)],
)
def test_the_largest_eta_leaves_nothing_of_the_predicted_noise(eta_scales, largest):
    """Flow-GRPO: where s_t^2 dt / (2 sigma_t) is sigma_prev: eta^2 = 2 sigma_prev (1 - sigma_t) / -dt, least in the step 0.5 -> 0.25."""
    times = (1.0, 0.75, 0.5, 0.25)
    plan = SamplingPlan(FLOW, times, "flow", 0.5, eta_scales)
    assert plan.largest_eta == pytest.approx(largest, rel=4 * EPS)
    at_most = SamplingPlan(FLOW, times, "flow", plan.largest_eta, eta_scales)
    assert min(abs(step.coefficients.prev_eps) for step in at_most.steps[:-1]) < 1e-7
    with pytest.raises(ValueError, match=r"eta may be at most .*, got 1\.01") as refusal:
        SamplingPlan(FLOW, times, "flow", 1.01, eta_scales)
    named = float(re.search(r"at most ([0-9.]*[0-9])", str(refusal.value))[1])
    assert SamplingPlan(FLOW, times, "flow", named, eta_scales).eta == named


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
@pytest.mark.parametrize("eta", [1e160, 1e200, 10**400], ids=["1e160", "1e200", "10**400"])
def test_an_enormous_eta_is_refused_like_any_other(eta_scales, eta):
    with pytest.raises(ValueError, match="eta"):
        SamplingPlan(FLOW, FLOW.select(5), "flow", eta, eta_scales)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(order=2), "order=2"),
        (dict(eps_residual=(0.1,) * 5), "eps_residual"),
        (dict(eta=1.0, sigma_hat=True), "sigma_hat.*eta_scales='flow_grpo'"),
        (dict(eta=1.0, sigma_hat=True, eta_scales="cps"), "sigma_hat.*eta_scales='cps'"),
        (dict(eta_scales="grpo"), "eta_scales must be one of std_dev, variance, flow_grpo, cps, got 'grpo'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        SamplingPlan(
            FLOW, FLOW.select(5), **{"prediction_type": "sample", "eta": 0.5, "eta_scales": "flow_grpo", **arguments}
        )


def test_without_noise_a_convention_changes_nothing():
    for order in (1, 2, 3):
        plans = [SamplingPlan(FLOW, FLOW.select(5), "flow", 0.0, name, order=order) for name in ETA_SCALES]
        assert all(plan.steps == plans[0].steps for plan in plans)


def test_order_2_takes_the_noise_of_cps():
    """The multistep row has its terms: sqrt(sigma_prev^2 - std_dev^2) of eps, with x0 extrapolated, and std_dev."""
    one, two = (SamplingPlan(FLOW, FLOW.select(6), "flow", 0.4, "cps", order=order) for order in (1, 2))
    assert two.steps[0] == one.steps[0]
    for first, second in zip(one.steps[2:-1], two.steps[2:-1], strict=True):
        assert second.std_dev_t == first.std_dev_t > 0
        row = second.coefficients
        assert (row.prev_noise, row.prev_eps) == (first.std_dev_t, first.coefficients.prev_eps)
        assert row.prev_history != 0
        assert row.prev_x0 + row.prev_history == pytest.approx(first.coefficients.prev_x0, rel=4 * EPS)


@pytest.mark.parametrize(
    "levels",
    [((0.5, 0.5), (0.4, 0.6)), ((1.0, 0.0), (1.0, 0.0)), ((0.0, 1.0), (0.0, 1.0))],
    ids=["noisier", "clean", "pure"],
)
def test_flow_grpos_step_needs_noise_to_remove(levels):
    with pytest.raises(ValueError, match="from noise to less noise, got one from alpha = "):
        flow_grpo_noise(*(NoiseLevel(*level) for level in levels), 0.7)


def test_flow_grpos_own_formula_adds_noise_to_clean_data_too():
    """What a step of its code does, which a plan leaves out: s_t sqrt(sigma_t), and more eps taken away than there is."""
    variance, prev_eps = flow_grpo_noise(NoiseLevel(0.8, 0.2), NoiseLevel(1.0, 0.0), 0.7)
    mean, std_dev = flow_grpo(X, V, 0.2, 0.0, 0.7, 0.9)
    assert math.sqrt(variance) == pytest.approx(std_dev, rel=8 * EPS)
    np.testing.assert_allclose((X - 0.2 * V) + prev_eps * (X + 0.8 * V), mean, atol=16 * EPS)


# --- eta of each step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta_scales", list(ETA_SCALES))
def test_each_step_has_its_own_eta(eta_scales):
    etas = (0.0, 0.7, 0.0, 0.3, 0.0)
    plan = SamplingPlan(FLOW, FLOW.select(5), "flow", etas, eta_scales)
    assert plan.eta == plan.etas == etas
    for index, eta in enumerate(etas):
        assert plan.steps[index] == SamplingPlan(FLOW, FLOW.select(5), "flow", eta, eta_scales).steps[index]
    assert plan.last_steps(2).steps[0].coefficients == plan.steps[3].coefficients
    assert plan.last_steps(3).etas == etas[2:]
    assert plan.last_steps(1).eta == 0


@pytest.mark.parametrize(
    "as_given", [list, tuple, np.array, np.float32], ids=["list", "tuple", "float64 array", "float32 array"]
)
def test_etas_may_come_as_a_list_or_an_array(as_given):
    etas = [0.0, 0.5, 0.25]
    given = as_given(etas)
    sampler = df.DDIMSampler(FLOW, 3, eta=given, eta_scales="cps")
    assert sampler.eta == tuple(etas)
    given = list(given)
    given[0] = 0.75
    assert sampler == df.DDIMSampler(FLOW, 3, eta=etas, eta_scales="cps") == pickle.loads(pickle.dumps(sampler))
    assert hash(sampler) == hash(sampler.replace(eta=etas))
    assert "eta=(0.0, 0.5, 0.25)" in repr(sampler)
    assert "eta_scales='cps'" in repr(sampler)
    assert sampler.last_steps(2).eta == (0.5, 0.25)


def test_etas_that_are_the_same_are_one_eta():
    """So a plan is equal to that of the number, and what needs eta = 0 takes a list of zeros."""
    assert SamplingPlan(FLOW, FLOW.select(4), eta=(0.5,) * 4, prediction_type="flow") == SamplingPlan(
        FLOW, FLOW.select(4), eta=0.5, prediction_type="flow"
    )
    assert SamplingPlan(FLOW, FLOW.select(4), eta=[0, 0, 0, 0], prediction_type="flow", order=3).eta == 0
    sampler = df.DDIMSampler(FLOW, 4, eta=[0.5] * 4)
    assert sampler.replace(num_inference_steps=7).eta == 0.5


@pytest.mark.parametrize(
    ("eta", "kind", "words"),
    [
        ([0.5, 0.5], ValueError, "eta must be one number, or one for each of the 3 steps, got (0.5, 0.5)"),
        ([], ValueError, "one for each of the 3 steps, got ()"),
        ([0.0, -1.0, 0.0], ValueError, "eta[1] must be a finite number, 0 (deterministic) or more, got -1.0"),
        ([0.0, math.nan, 0.0], ValueError, "eta[1] must be a finite number, got nan"),
        ([0.0, True, 0.0], ValueError, "eta[1] must be a finite number, 0 (deterministic) or more, got True"),
        ([0.0, "1", 0.0], TypeError, "eta[1] must be a finite number, got '1'"),
        ([0.0, 1.5, 0.0], ValueError, "eta[1] may be at most 1.0, got 1.5"),
        ("0.5", ValueError, "eta must be a finite number, 0 (deterministic) or more, got '0.5'"),
        (np.ones((3, 1)), TypeError, "eta[0] must be a finite number, got [1.0]"),
    ],
    ids=str,
)
def test_wrong_etas_are_named(eta, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        df.DDIMSampler(FLOW, 3, eta=eta, eta_scales="cps")


@given(
    eta=st.floats(0, 1),
    logits=st.lists(st.floats(-12, 12), min_size=2, max_size=2, unique=True),
    scale=st.floats(0.1, 10),
    eta_scales=st.sampled_from(sorted(ETA_SCALES)),
)
def test_any_step_has_finite_noise_that_grows_with_eta(eta, logits, scale, eta_scales):
    """Between any two levels, of any path: 0 at eta = 0; more eta, more noise and less of the predicted one."""
    (alpha, sigma), (alpha_prev, sigma_prev) = (
        (scale / (1 + math.exp(-logit)), scale / (1 + math.exp(logit))) for logit in sorted(logits)
    )
    levels = NoiseLevel(alpha, sigma), NoiseLevel(alpha_prev, sigma_prev)
    found = [ETA_SCALES[eta_scales].noise(*levels, value) for value in (0.0, eta / 2, eta)]
    variances = [noise.variance for noise in found]
    assert variances[0] == 0
    assert variances == sorted(variances)
    assert all(math.isfinite(value) for value in variances)
    kept = [noise.prev_eps for noise in found if noise.prev_eps is not None]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) == (0 if ETA_SCALES[eta_scales].keeps_marginals else 3)


def test_noise_that_is_the_same_is_told_by_the_papers_convention():
    assert told_apart("variance", 0.25) == told_apart(PAPER, 0.5) == (PAPER, 0.5)
    assert {told_apart(name, 0) for name in ETA_SCALES} == {(PAPER, 0)}
    assert len({told_apart(name, 1) for name in ETA_SCALES}) == 3
    assert explicit_eta(1, 3) == 1
