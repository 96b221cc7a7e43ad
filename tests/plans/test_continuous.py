"""Paths in continuous time: levels, the rows of steps along them, and the times of a run, against formulas written here in float64."""

import dataclasses
import math
import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_fast.plans.coefficients import PREDICTION_TYPES, edm_prediction
from ddim_fast.plans.continuous import (
    CONTINUOUS_SCHEDULES,
    CONTINUOUS_SPACINGS,
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    VESchedule,
    VPSchedule,
)
from ddim_fast.plans.levels import NoiseLevel
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.schedules import NoiseSchedule
from tests.plans.test_plan import apply_row, output_of

EPS = np.finfo(np.float64).eps
RNG = np.random.default_rng(221006)
X_T, M, Z = RNG.standard_normal((3, 64))

# The level at a time, from the papers.
LEVELS = {
    FlowSchedule(): lambda t: (1 - t, t),
    FlowSchedule(shift=3.0, time_scale=1000.0): lambda t: (1 - t, t),
    FlowSchedule(shift_terminal=0.1): lambda t: (1 - t, t),
    EDMSchedule(): lambda t: (1.0, t),
    EDMSchedule(sigma_min=0.02, sigma_max=100.0, rho=3.0, sigma_data=1.0, preconditioned=True): lambda t: (1.0, t),
    VESchedule(): lambda t: (1.0, t),
    VPSchedule(): lambda t: (math.exp(-0.05 * t - 4.975 * t**2), math.sqrt(-math.expm1(-0.1 * t - 9.95 * t**2))),
    CosineSchedule(): lambda t: (math.cos(math.pi / 2 * t) if t < 1 else 0.0, math.sin(math.pi / 2 * t)),
    CosineSchedule(shift=4.0): lambda t: (lambda a, s: (a / math.hypot(a, s), s / math.hypot(a, s)))(
        math.cos(math.pi / 2 * t) if t < 1 else 0.0, 4 * math.sin(math.pi / 2 * t)
    ),
}
PATHS = pytest.mark.parametrize("schedule", list(LEVELS), ids=repr)


def exact_levels(schedule, timesteps):
    """(alpha, sigma) at each time, and clean data at the end."""
    return [*(LEVELS[schedule](t) for t in timesteps), (1.0, 0.0)]


def test_every_path_is_here():
    assert {type(schedule) for schedule in LEVELS} == set(CONTINUOUS_SCHEDULES.values())
    assert {schedule.name for schedule in LEVELS} == set(CONTINUOUS_SCHEDULES)


@PATHS
def test_levels_are_the_papers(schedule):
    for t in np.linspace(0, schedule.first, 200).tolist()[1:]:
        level = schedule.level(t)
        np.testing.assert_allclose(level, LEVELS[schedule](t), rtol=0, atol=8 * EPS * max(1, t))
        if level.alpha > 0:
            again = schedule.time_of_half_log_snr(level.half_log_snr)
            # Where the ratio hardly changes with time, its rounding moves the time: within some 1e3 eps.
            assert again == pytest.approx(t, rel=2000 * EPS)
    assert schedule.level(0.0) == NoiseLevel(1.0, 0.0)  # exactly
    assert schedule.level(0) == (1, 0)


def test_pure_noise_is_exact():
    assert FlowSchedule().level(1.0) == (0.0, 1.0)
    assert CosineSchedule().level(1.0) == CosineSchedule(shift=3.0).level(1.0) == (0.0, 1.0)
    assert FlowSchedule().level(1.0).alpha_bar == 0.0
    assert FlowSchedule().level(1.0).half_log_snr == -math.inf
    assert FlowSchedule().level(0.0).alpha_bar == 1.0


# --- Rows --------------------------------------------------------------------------------------------------------------


def textbook_step(kind, x_t, m, level_t, level_prev, eta, z, sigma_data=0.5):
    """Solve m = output_of(x0, eps) and x_t = alpha x0 + sigma eps, and put them together at the other level."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_prev
    of_m = [output_of(kind, *unit, alpha_t, sigma_t, sigma_data) for unit in ((1.0, 0.0), (0.0, 1.0))]
    x0, eps = np.linalg.solve([of_m, [alpha_t, sigma_t]], np.stack([m, x_t]))
    variance = eta**2 * sigma_s**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
    return alpha_s * x0 + math.sqrt(max(sigma_s**2 - variance, 0.0)) * eps + math.sqrt(variance) * z


@PATHS
@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_row_is_the_textbook_step(schedule, kind, eta):
    timesteps = [t for t in schedule.select(9, "linspace") if LEVELS[schedule](t)[0] > 0]
    plan = SamplingPlan(schedule, tuple(timesteps), kind, eta)
    for step, (level_t, level_prev) in zip(plan.steps, pairwise(exact_levels(schedule, timesteps)), strict=True):
        sigma_data = getattr(schedule, "sigma_data", 0.5)
        expected = textbook_step(kind, X_T, M, level_t, level_prev, eta, Z, sigma_data)
        got, _ = apply_row(step.coefficients, X_T, M, Z)
        size = np.abs(X_T).max() * max(map(abs, (*step.coefficients.folded, step.coefficients.x0_x, 1.0)))
        largest = max(size / min(1, level_t[0]), 1 / level_t[0] ** 2, 1 / level_t[1] ** 2)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e4 * EPS * largest)


@PATHS
@pytest.mark.parametrize("eta_scales", ["std_dev", "variance"])
def test_noise_keeps_the_marginals(schedule, eta_scales):
    """Where the model knows x0, x_s is alpha_s x0 + sigma_s (a standard normal), whatever eta."""
    for eta in (0.0, 0.3, 1.0):
        plan = SamplingPlan(schedule, schedule.select(12), "sample", eta, eta_scales)
        for step, (alpha, sigma) in zip(plan.steps, exact_levels(schedule, plan.timesteps)[1:], strict=True):
            row = step.coefficients
            assert row.prev_x0 == pytest.approx(alpha, abs=8 * EPS)
            assert math.hypot(row.prev_eps, row.prev_noise) == pytest.approx(sigma, rel=1e-12, abs=1e-14)
            assert (row.prev_noise > 0) == (eta > 0 and sigma > 0)


def test_the_deterministic_step_of_flow_matching_is_eulers():
    """x_s = x_t + (s - t) v, from pure noise to clean data."""
    plan = SamplingPlan(FlowSchedule(shift=3.0), FlowSchedule(shift=3.0).select(20), "flow")
    for t, s, step in zip(plan.timesteps, [*plan.timesteps[1:], 0.0], plan.steps, strict=True):
        np.testing.assert_allclose(step.coefficients.folded, (1, s - t), rtol=0, atol=8 * EPS)


def test_the_deterministic_step_of_edm_is_eulers():
    """x_s = x_t + (s - t) (x_t - D) / t (arXiv 2206.00364, algorithm 1 without churn or correction)."""
    schedule = EDMSchedule(preconditioned=True)
    plan = SamplingPlan(schedule, schedule.select(18), "sample")
    for t, s, step in zip(plan.timesteps, [*plan.timesteps[1:], 0.0], plan.steps, strict=True):
        np.testing.assert_allclose(step.coefficients.folded, (1 + (s - t) / t, -(s - t) / t), rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 7.3])
def test_edms_network_is_preconditioned_as_in_the_paper(sigma_data):
    """Table 1 of arXiv 2206.00364: D = c_skip x + c_out F, and eps = (x - D) / sigma."""
    for sigma in (1e-3, 0.4, 1.0, 80.0, 1e4):
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
        eps_x, eps_m = sigma / (sigma**2 + sigma_data**2), -c_out / sigma
        got = edm_prediction(NoiseLevel(1.0, sigma), sigma_data)
        np.testing.assert_allclose(got, (c_skip, c_out, eps_x, eps_m), rtol=16 * EPS)
        schedule = EDMSchedule(sigma_max=2e4, sigma_min=1e-4, sigma_data=sigma_data)
        assert schedule.input_scale(sigma) == pytest.approx(1 / math.sqrt(sigma**2 + sigma_data**2), rel=4 * EPS)
        assert schedule.model_time(sigma) == pytest.approx(math.log(sigma) / 4, rel=4 * EPS)


@PATHS
@pytest.mark.parametrize(("order", "least"), [(1, 0.85), (2, 1.75), (3, 2.6)])
def test_order_of_convergence(schedule, order, least):
    """Twice the steps leave half the error in order 1, a quarter in order 2, an eighth in order 3, on normal data with the exact model."""
    start = schedule.time_of_half_log_snr(-3.0)
    end = schedule.time_of_half_log_snr(4.0)

    def run(count, order):
        """The affine map (a, b) of a run between two levels, x_end = a x_start + b, in float64."""
        levels = np.linspace(-3.0, 4.0, count + 1)
        times = [start, *(schedule.time_of_half_log_snr(v) for v in levels[1:-1].tolist()), end]
        plan = SamplingPlan(schedule, tuple(times), "sample", order=order)
        x, last, before = (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)
        for step, t in zip(plan.steps[:-1], times, strict=False):
            alpha, sigma = LEVELS[schedule](t)
            gain = alpha * 0.16 / (alpha**2 * 0.16 + sigma**2)
            x0 = gain * x[0], 0.7 + gain * (x[1] - alpha * 0.7)
            row = step.coefficients
            weights = (*row.folded, row.prev_history, row.prev_history_2)
            x = tuple(
                sum(w * v for w, v in zip(weights, vs, strict=True)) for vs in zip(x, x0, last, before, strict=True)
            )
            last, before = x0, last
        return np.array(x)

    # The exact flow of normal data keeps the standard score: x_end / std_end - mean terms.
    (alpha_t, sigma_t), (alpha_s, sigma_s) = LEVELS[schedule](start), LEVELS[schedule](end)
    scale = math.sqrt((alpha_s**2 * 0.16 + sigma_s**2) / (alpha_t**2 * 0.16 + sigma_t**2))
    true = np.array([scale, alpha_s * 0.7 - scale * alpha_t * 0.7])
    errors = [np.abs(run(count, order) - true).max() for count in (64, 128, 256)]
    assert math.log2(errors[0] / errors[2]) / 2 > least, errors


@PATHS
def test_third_order_integrates_a_parabola(schedule):
    """x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^(s - h) x0(s) ds (arXiv 2211.01095, proposition 4.1), by quadrature."""
    levels = [-1.0, -0.6, -0.1, 0.5]
    times = tuple(schedule.time_of_half_log_snr(v) for v in levels)
    row = SamplingPlan(schedule, times, "sample", order=3).steps[2].coefficients
    (_, _, (_, sigma_t), (alpha_s, sigma_s)) = (LEVELS[schedule](t) for t in times)
    m0, m1, m2, x = RNG.standard_normal((4, 50))
    parabola = np.polynomial.polynomial.polyfit(
        [0.0, -0.5, -0.9], np.stack([m0, m1, m2]), 2
    )  # in lambda, from lambda_t
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s = 0.3 * (nodes + 1)
    integral = (
        0.3 * (weights * np.exp(s - 0.6)) @ np.stack([parabola[0] + parabola[1] * v + parabola[2] * v**2 for v in s])
    )
    expected = sigma_s / sigma_t * x + alpha_s * integral
    of_x, of_m = row.folded
    got = of_x * x + of_m * m0 + row.prev_history * m1 + row.prev_history_2 * m2
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    # Steps so short that the functions of h are taken from their series.
    short = tuple(schedule.time_of_half_log_snr(0.2 + 0.004 * i) for i in range(4))
    row = SamplingPlan(schedule, short, "sample", order=3).steps[2].coefficients
    (alpha_s, _), total = LEVELS[schedule](short[3]), row.folded[1] + row.prev_history + row.prev_history_2
    assert total == pytest.approx(-alpha_s * math.expm1(-0.004), rel=1e-9)
    assert row.prev_history == pytest.approx(
        -4 / 3 * alpha_s * 0.004, rel=0.01
    )  # Adams and Bashforth: 23, -16 and 5 twelfths
    assert row.prev_history_2 == pytest.approx(5 / 12 * alpha_s * 0.004, rel=0.01)


@PATHS
def test_second_order_with_noise_is_sde_dpm_solver_2m(schedule):
    """The update of SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix), at eta = 1."""
    levels = [-1.0, -0.6, 0.1]
    times = tuple(schedule.time_of_half_log_snr(v) for v in levels)
    row = SamplingPlan(schedule, times, "sample", 1.0, order=2).steps[1].coefficients
    (_, (_, sigma_t), (alpha_s, sigma_s)) = (LEVELS[schedule](t) for t in times)
    m0, m1, x, z = RNG.standard_normal((4, 50))
    h, r = 0.7, 0.4 / 0.7
    expected = (
        sigma_s / sigma_t * math.exp(-h) * x
        + alpha_s * (1 - math.exp(-2 * h)) * m0
        + alpha_s * (1 - math.exp(-2 * h)) / (2 * r) * (m0 - m1)
        + sigma_s * math.sqrt(1 - math.exp(-2 * h)) * z
    )
    of_x, of_m = row.folded
    got = of_x * x + of_m * m0 + row.prev_history * m1 + row.prev_noise * z
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


# --- Times -------------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("spacing", [None, *CONTINUOUS_SPACINGS])
def test_exactly_so_many_times_from_the_first(schedule, spacing):
    for count in (1, 2, 3, 7, 50, 333):
        times = schedule.select(count, spacing)
        assert len(times) == count
        assert times[0] == schedule.first
        assert all(earlier > later > 0 for earlier, later in pairwise(times))


def test_spacings_are_the_papers():
    n = np.arange(10)
    by_edm = (80 ** (1 / 7) + n / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # equation 5
    np.testing.assert_allclose(EDMSchedule().select(10), by_edm, rtol=1e-13)
    np.testing.assert_allclose(VESchedule().select(10), 50 * (0.01 / 50) ** (n / 9), rtol=1e-13)  # arXiv 2011.13456
    even = 1 - n / 10
    np.testing.assert_allclose(FlowSchedule().select(10), even, rtol=1e-13)
    np.testing.assert_allclose(FlowSchedule(shift=3.0).select(10), 3 * even / (1 + 2 * even), rtol=1e-13)
    linear = np.linspace(1000, 1, 10) / 1000
    shifted = FlowSchedule(shift=3.0).select(10, "linspace")
    np.testing.assert_allclose(shifted, 3 * linear / (1 + 2 * linear), rtol=1e-13)
    half_log_snr = [VPSchedule().level(t).half_log_snr for t in VPSchedule().select(10, "log_snr")]
    np.testing.assert_allclose(np.diff(half_log_snr), np.diff(half_log_snr)[0], rtol=1e-9)


def test_the_shift_of_a_resolution_is_fluxs():
    """mu from 0.5 at 256 tokens to 1.15 at 4096, and t -> e^mu / (e^mu + 1 / t - 1)."""
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        schedule = FlowSchedule.for_resolution(tokens, time_scale=1000.0)
        even = 1 - np.arange(8) / 8
        np.testing.assert_allclose(schedule.select(8), math.exp(mu) / (math.exp(mu) + 1 / even - 1), rtol=1e-13)
        assert schedule.time_scale == 1000.0


def test_a_terminal_shift_ends_where_it_says():
    schedule = FlowSchedule(shift=2.0, shift_terminal=0.1)
    times, plain = np.array(schedule.select(12)), np.array(FlowSchedule(shift=2.0).select(12))
    assert times[-1] == pytest.approx(0.1, rel=1e-13)
    np.testing.assert_allclose((1 - times) / (1 - plain[-1]), (1 - plain) * 0.9 / (1 - plain[-1]) ** 2, rtol=1e-12)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20, unique=True))
def test_a_list_of_ones_own_is_kept(times):
    times = sorted(times, reverse=True)
    assert FlowSchedule().explicit(times) == tuple(times)
    assert FlowSchedule().explicit(np.array(times)) == tuple(times)


# --- Values ------------------------------------------------------------------------------------------------------------


def test_equal_where_their_numbers_are():
    schedules = [*LEVELS]
    for i, one in enumerate(schedules):
        for j, other in enumerate(schedules):
            assert (one == other) == (i == j)
            # A digest tells levels apart, whatever times are visited and what the model is told.
            times = np.linspace(0, 1, 9)
            same_levels = all(one.level(t) == other.level(t) for t in times)
            assert (one.digest == other.digest) == (same_levels and one.name == other.name)
        copy = pickle.loads(pickle.dumps(one))
        assert copy == one
        assert hash(copy) == hash(one)
        assert copy.digest == one.digest
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.shift = 2.0


REFUSALS = [
    (lambda: FlowSchedule(shift=0), "shift must be .* above 0, got 0"),
    (lambda: FlowSchedule(shift=-3.0), "shift must be .*, got -3.0"),
    (lambda: FlowSchedule(shift="3"), "shift must be a finite number.*, got '3'"),
    (lambda: FlowSchedule(shift_terminal=1.0), "shift_terminal must be .*, got 1.0"),
    (lambda: FlowSchedule(num_train_timesteps=1), "num_train_timesteps must be .*, got 1"),
    (lambda: FlowSchedule.for_resolution(0), "image_seq_len must be .*, got 0"),
    (lambda: EDMSchedule(sigma_min=80, sigma_max=0.002), "sigma_min must be less than sigma_max, got 80 and 0.002"),
    (lambda: EDMSchedule(sigma_data=0.0), "sigma_data must be .*, got 0.0"),
    (lambda: EDMSchedule(rho=0), "rho must be .*, got 0"),
    (lambda: EDMSchedule(preconditioned=1), "preconditioned must be True or False, got 1"),
    (lambda: VESchedule(sigma_min=-1), "sigma_min must be .*, got -1"),
    (lambda: VPSchedule(beta_max=math.nan), "beta_max must be .*, got nan"),
    (lambda: CosineSchedule(last=0.0), "last must be .*, got 0.0"),
    (lambda: FlowSchedule().select(0), "num_inference_steps must be .*, got 0"),
    (lambda: FlowSchedule().select(5, "leading"), "timestep_spacing must be one of .*, got 'leading'"),
    (lambda: FlowSchedule().explicit([]), r"timesteps must hold at least one time, got \[\]"),
    (lambda: FlowSchedule().explicit([999, 500]), r"in \(0, 1\] on the path 'flow', got timesteps\[0\] = 999"),
    (lambda: FlowSchedule().explicit([1.0, 0.5, 0.0]), r"got timesteps\[2\] = 0.0: leave it out, every run leads to 0"),
    (lambda: EDMSchedule().explicit([80.0, 80.0]), "strictly decreasing, got 80.0 followed by 80.0 at index 1"),
    (lambda: EDMSchedule().explicit([1.0, 2.0]), "strictly decreasing, got 1.0 followed by 2.0"),
    (lambda: FlowSchedule().explicit(["a"]), r"timesteps\[0\] must be a finite number, got 'a'"),
    (lambda: FlowSchedule().explicit("ddim50"), "timesteps must be a list of numbers, got 'ddim50'"),
    (lambda: FlowSchedule().level(1.5), r"t must lie in \[0, 1\] on the path 'flow', got 1.5"),
    (lambda: SamplingPlan(FlowSchedule(), (1.0, 0.5)), "epsilon prediction needs alpha > 0, got alpha = 0"),
    (lambda: SamplingPlan(FlowSchedule(), (1.0, 0.5), "score"), "score prediction needs alpha > 0, got alpha = 0"),
    (lambda: SamplingPlan(FlowSchedule(), (0.9, 0.5), "flow", eta=3.0), "eta may be at most 1.0.*, got 3.0"),
    (lambda: SamplingPlan(FlowSchedule(), (0.9, 0.5), "flow", set_alpha_to_one=False), "set_alpha_to_one=False"),
    (lambda: SamplingPlan(FlowSchedule(), (0.9, 0.5), "flow", model_timesteps=(0.9,)), "model_timesteps must be 2 numbers"),
    (lambda: SamplingPlan(FlowSchedule(), (0.9, 0.5), "flow", model_timesteps=(0.9, 2.0)), "model_timesteps must be 2"),
    (lambda: SamplingPlan(NoiseSchedule.linear(), (0.5, 0.1)), "t must be an integer, got 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_refusal_says_what_was_received(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)
