"""Plans against the textbook: every formula here is written from the papers, in float64, and none is asked of the package."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.kernels.contract import StepCoefficients
from ddim_fast.plans.coefficients import PREDICTION_TYPES
from ddim_fast.plans.eta import ETA_SCALES, OF_EQUATION_16
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.plans.timesteps import SPACINGS, select_timesteps

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)
LINEAR = NoiseSchedule.from_alphas_cumprod(ALPHA_BAR)
STRIDED = (999, 998, 700, 433, 101, 7, 0)
RNG = np.random.default_rng(20201006)
X_T, X0, Z = RNG.standard_normal((3, 64))


def textbook_std_dev(alpha_bar_t, alpha_bar_prev, eta, eta_scales="std_dev"):
    """Equation 16; or the variance tilde beta, not its root, times eta."""
    tilde_beta = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)
    return eta * math.sqrt(tilde_beta) if eta_scales == "std_dev" else math.sqrt(eta * tilde_beta)


def output_of(kind, x0, eps, alpha, sigma, sigma_data=0.5):
    """What a perfect model returns at x_t = alpha x0 + sigma eps, from the definition of each kind of prediction."""
    ratio = sigma / alpha if alpha else math.inf
    return {
        "epsilon": lambda: eps,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * eps - sigma * x0,
        "flow": lambda: eps - x0,  # the derivative of (1 - t) x0 + t eps
        "score": lambda: -eps / sigma,
        "edm": lambda: (  # D = c_skip y + c_out F is x0, of y = x_t / alpha
            (x0 - sigma_data**2 / (ratio**2 + sigma_data**2) * (x0 + ratio * eps))
            * math.sqrt(ratio**2 + sigma_data**2) / (ratio * sigma_data)
        ),
    }[kind]()  # fmt: skip


def textbook_step(
    kind, x_t, m, alpha_bar_t, alpha_bar_prev, std_dev, direction_std_dev, z, clip, use_clipped_model_output
):
    """Equation 12 from what the model's output means. ``direction_std_dev``: the noise that the direction term makes room for."""
    signal, spread = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    # Two linear equations: m = output_of(x0, eps), and x_t = signal x0 + spread eps.
    of_m = [output_of(kind, *unit, signal, spread) for unit in ((1.0, 0.0), (0.0, 1.0))]
    x0, eps = np.linalg.solve([of_m, [signal, spread]], np.stack([m, x_t]))
    if clip is not None:
        x0 = np.clip(x0, -clip, clip)
        if use_clipped_model_output:
            eps = (x_t - signal * x0) / spread
    room = max(1 - alpha_bar_prev - direction_std_dev**2, 0.0)
    return alpha_bar_prev**0.5 * x0 + room**0.5 * eps + std_dev * z, x0


def apply_row(row: StepCoefficients, x_t, m, z):
    """The tableau, as StepCoefficients' docstring defines it."""
    x0 = np.clip(row.x0_x * x_t + row.x0_m * m, -row.clip, row.clip)
    eps = row.eps_x * x_t + row.eps_m * m + row.eps_0 * x0
    return row.prev_x0 * x0 + row.prev_eps * eps + row.prev_noise * z, x0


def following(timesteps, alpha_bar, final):
    """(alpha_bar_t, alpha_bar_prev) of each step."""
    return list(zip(alpha_bar[list(timesteps)], [*alpha_bar[list(timesteps[1:])], final], strict=True))


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_no_prediction_type_or_eta_scale_is_without_a_textbook_formula_here():
    for kind in PREDICTION_TYPES:
        output_of(kind, 1.0, 1.0, 0.6, 0.8)
    assert set(OF_EQUATION_16) == {"std_dev", "variance"}  # for the others see test_eta.py


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("clip", "use_clipped_model_output"), [(None, False), (1.0, False), (0.4, False), (1.0, True), (0.4, True)]
)
@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
def test_every_row_is_the_textbook_step(kind, clip, use_clipped_model_output, eta, set_alpha_to_one):
    plan = SamplingPlan(
        LINEAR, STRIDED, kind, eta, clip_sample_range=clip, use_clipped_model_output=use_clipped_model_output,
        set_alpha_to_one=set_alpha_to_one,
    )  # fmt: skip
    pairs = following(STRIDED, ALPHA_BAR, 1.0 if set_alpha_to_one else ALPHA_BAR[0])
    assert len(plan.steps) == len(pairs) == plan.num_inference_steps
    for step, (alpha_bar_t, alpha_bar_prev) in zip(plan.steps, pairs, strict=True):
        std_dev = textbook_std_dev(alpha_bar_t, alpha_bar_prev, eta)
        assert step.std_dev_t == step.coefficients.prev_noise == pytest.approx(std_dev, rel=1e-12)
        args = (alpha_bar_t, alpha_bar_prev, std_dev, std_dev, Z, clip, use_clipped_model_output)
        x_prev, x0 = textbook_step(kind, X_T, X0, *args)
        got_x_prev, got_x0 = apply_row(step.coefficients, X_T, X0, Z)
        largest = 1 / math.sqrt(alpha_bar_t * (1 - alpha_bar_t))
        np.testing.assert_allclose(got_x0, x0, rtol=1e-12, atol=1e-14 * largest)
        np.testing.assert_allclose(got_x_prev, x_prev, rtol=1e-12, atol=1e-14 * largest)
        if clip is not None:
            assert (abs(x0) == clip).any(), "the probe never reached the clip range"


def test_a_row_worked_out_by_hand():
    """alpha_bar 0.25 -> 0.64: sqrt 0.5 and 0.8, noise sqrt(0.75) and 0.6; at eta = 1 variance 0.36/0.75 * (1 - 0.25/0.64)."""
    schedule = NoiseSchedule.from_alphas_cumprod([0.64, 0.25])
    first, last = SamplingPlan(schedule, (1, 0)).steps
    row = first.coefficients
    assert dataclasses.astuple(row) == pytest.approx(
        (2, -math.sqrt(3), 0, 1, 0, 0.8, 0.6, 0, math.inf, 0.8, 0.6, 0, 0, 1), rel=1e-15
    )
    assert (first.index, first.t, first.t_prev, last.index, last.t, last.t_prev) == (0, 1, 0, 1, 0, -1)
    assert (first.alpha_bar_t, first.alpha_bar_prev, last.alpha_bar_t, last.alpha_bar_prev) == (0.25, 0.64, 0.64, 1)
    row = SamplingPlan(schedule, (1, 0), eta=1).steps[0].coefficients
    assert row.prev_noise**2 == pytest.approx(0.2925, rel=1e-14)
    assert row.prev_eps**2 == pytest.approx(0.36 - 0.2925, rel=1e-14)
    row = SamplingPlan(schedule, (1, 0), "v_prediction", clip_sample_range=3).steps[0].coefficients
    assert dataclasses.astuple(row)[:4] == pytest.approx((0.5, -math.sqrt(0.75), math.sqrt(0.75), 0.5), rel=1e-15)
    assert row.clip == 3


def test_pairs_are_those_of_the_list_not_of_a_stride():
    plan = SamplingPlan(LINEAR, STRIDED)
    assert [(s.t, s.t_prev) for s in plan.steps] == list(zip(STRIDED, (*STRIDED[1:], -1), strict=True))
    assert [s.index for s in plan.steps] == list(range(len(STRIDED)))


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_the_last_step_goes_to_clean_data_or_to_the_first_alpha_bar(set_alpha_to_one):
    for timesteps in ((999, 0), (999, 10)):
        last = SamplingPlan(LINEAR, timesteps, eta=1.0, set_alpha_to_one=set_alpha_to_one).steps[-1]
        assert last.t_prev == -1
        if set_alpha_to_one:
            assert last.alpha_bar_prev == last.coefficients.prev_x0 == 1
            assert last.coefficients.prev_eps == last.std_dev_t == 0
        else:
            assert last.alpha_bar_prev == ALPHA_BAR[0]
            assert last.coefficients.prev_x0 == pytest.approx(math.sqrt(ALPHA_BAR[0]), rel=1e-15)
    last = SamplingPlan(LINEAR, (999, 0), set_alpha_to_one=False).steps[-1]
    np.testing.assert_allclose(apply_row(last.coefficients, X_T, X0, Z)[0], X_T, rtol=1e-12, atol=1e-12)  # it stays


def test_predictions_that_mean_the_same_give_the_same_step():
    """One (x0, eps) written as epsilon, as x0 and as v."""
    for eta in (0.0, 0.7):
        plans = {kind: SamplingPlan(LINEAR, STRIDED, kind, eta) for kind in PREDICTION_TYPES}
        for i, alpha_bar_t in enumerate(ALPHA_BAR[list(STRIDED)]):
            signal, spread = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
            eps = (X_T - signal * X0) / spread
            outputs = {"epsilon": eps, "sample": X0, "v_prediction": signal * eps - spread * X0}
            results = [apply_row(plans[kind].steps[i].coefficients, X_T, m, Z)[0] for kind, m in outputs.items()]
            for result in results[1:]:
                np.testing.assert_allclose(result, results[0], rtol=1e-10, atol=1e-11 / spread)


# --- Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.09, 0.5, 1.0])
def test_eta_scales_the_standard_deviation_or_the_variance(eta):
    by_std_dev = SamplingPlan(LINEAR, STRIDED, eta=eta).steps
    by_variance = SamplingPlan(LINEAR, STRIDED, eta=eta, eta_scales="variance").steps
    squared = SamplingPlan(LINEAR, STRIDED, eta=eta**2, eta_scales="variance").steps
    for a, b, c, pair in zip(by_std_dev, by_variance, squared, following(STRIDED, ALPHA_BAR, 1.0), strict=True):
        tilde_beta = textbook_std_dev(*pair, 1.0) ** 2
        assert a.std_dev_t == pytest.approx(eta * math.sqrt(tilde_beta), rel=1e-12)
        assert b.std_dev_t**2 == pytest.approx(eta * tilde_beta, rel=1e-12)
        assert c.std_dev_t == pytest.approx(a.std_dev_t, rel=1e-14)
        assert c.coefficients.prev_eps == pytest.approx(a.coefficients.prev_eps, rel=1e-9)
        if eta in (0.0, 1.0):
            assert a == b
        elif tilde_beta:
            assert b.std_dev_t > 1.2 * a.std_dev_t
        # Noise and direction together keep the marginal: prev_eps^2 + std_dev^2 = 1 - alpha_bar_prev.
        for step in (a, b):
            total = step.coefficients.prev_eps**2 + step.coefficients.prev_noise**2
            assert total == pytest.approx(1 - pair[1], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
def test_sigma_hat_is_the_larger_noise_with_the_direction_of_eta_one(kind):
    """Appendix D.3 of arXiv 2010.02502."""
    steps = SamplingPlan(LINEAR, STRIDED, kind, eta=1.0, sigma_hat=True).steps
    for step, (alpha_bar_t, alpha_bar_prev) in zip(steps, following(STRIDED, ALPHA_BAR, 1.0), strict=True):
        clean = step.t_prev == -1
        sigma_hat = 0.0 if clean else math.sqrt(1 - alpha_bar_t / alpha_bar_prev)
        direction = textbook_std_dev(alpha_bar_t, alpha_bar_prev, 1.0)
        assert clean or sigma_hat > direction
        args = (alpha_bar_t, alpha_bar_prev, sigma_hat, direction, Z, None, False)
        expected, _ = textbook_step(kind, X_T, X0, *args)
        got, _ = apply_row(step.coefficients, X_T, X0, Z)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14 / math.sqrt(alpha_bar_t * (1 - alpha_bar_t)))
        assert step.std_dev_t == pytest.approx(sigma_hat, rel=1e-12)


@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
def test_eta_one_on_adjacent_steps_is_the_ddpm_posterior(kind):
    """q(x_prev | x_t, x0) by Bayes' rule from the betas: precisions add, and so do precision-weighted means."""
    plan = SamplingPlan(LINEAR, tuple(range(999, -1, -1)), kind, eta=1.0)
    for step in plan.steps[:-1]:
        beta, prior_variance = BETAS[step.t], 1 - ALPHA_BAR[step.t_prev]
        variance = 1 / (1 / prior_variance + (1 - beta) / beta)
        mean = variance * (math.sqrt(ALPHA_BAR[step.t_prev]) * X0 / prior_variance + math.sqrt(1 - beta) * X_T / beta)
        signal, spread = math.sqrt(ALPHA_BAR[step.t]), math.sqrt(1 - ALPHA_BAR[step.t])
        eps = (X_T - signal * X0) / spread
        m = output_of(kind, X0, eps, signal, spread)
        got, _ = apply_row(step.coefficients, X_T, m, 0.0)
        np.testing.assert_allclose(got, mean, rtol=1e-9, atol=1e-10)
        assert step.std_dev_t**2 == pytest.approx(variance, rel=1e-10)
    last = plan.steps[-1]
    signal, spread = math.sqrt(ALPHA_BAR[0]), math.sqrt(1 - ALPHA_BAR[0])
    eps = (X_T - signal * X0) / spread
    m = output_of(kind, X0, eps, signal, spread)
    np.testing.assert_allclose(apply_row(last.coefficients, X_T, m, Z)[0], X0, rtol=1e-12, atol=1e-12)


# --- Rounding ---------------------------------------------------------------------------------------------------------


def assert_sound(plan, tolerance=1e-12):
    for step in plan.steps:
        row = dataclasses.astuple(step.coefficients)
        assert all(math.isfinite(value) for value in row[:8]), step
        c = step.coefficients
        assert c.prev_noise >= 0
        assert c.prev_eps >= 0
        room = 1 - step.alpha_bar_prev
        assert abs(c.prev_noise**2 + c.prev_eps**2 - room) <= tolerance * room + 1e-17


def naive_room(timesteps, alpha_bar):
    """1 - alpha_bar_prev - std_dev^2 at eta = 1 as most code has it, unclamped."""
    at = alpha_bar[list(timesteps)]
    prev = np.append(at[1:], 1.0)
    std_dev = np.sqrt((1 - prev) / (1 - at)) * np.sqrt(1 - at / prev)
    return 1 - prev - std_dev**2


PRESETS = {
    name: getattr(NoiseSchedule, name)() for name in ("linear", "scaled_linear", "quad", "cosine", "sigmoid", "const")
}
PRESETS["zero_snr"] = PRESETS["linear"].rescale_zero_terminal_snr()


def test_rounding_below_zero_gives_no_nan_at_eta_one():
    """Step counts are searched for where the unclamped difference is negative, where a square root of it would be NaN."""
    schedule = PRESETS["zero_snr"]
    negative = [
        timesteps
        for spacing in ("leading", "trailing", "linspace", "uniform", "quad")
        for count in range(1, 60)
        if (naive_room(timesteps := select_timesteps(count, 1000, spacing), schedule.alphas_cumprod) < 0).any()
    ]
    assert len(negative) >= 10  # else this test has no teeth
    for timesteps in negative:
        assert_sound(SamplingPlan(schedule, timesteps, "v_prediction", eta=1.0))


@pytest.mark.parametrize("pair", [(999, 500), (500, 499), (300, 200)])
def test_an_eta_larger_by_rounding_alone_leaves_no_direction_and_no_nan(pair):
    """Where the room is negative by rounding and the step is not refused, its root must not be taken."""
    largest = math.sqrt(1 - ALPHA_BAR[pair[1]]) / textbook_std_dev(*ALPHA_BAR[list(pair)], 1.0)
    for eta in (largest, largest * (1 + 1e-10), largest * (1 - 1e-10)):
        assert_sound(plan := SamplingPlan(LINEAR, pair, eta=eta), tolerance=1e-9)
        assert plan.steps[0].coefficients.prev_eps < 1e-4


@given(
    spacing=st.sampled_from(sorted(SPACINGS)),
    count=st.one_of(st.integers(1, 60), st.integers(1, 1000)),
    preset=st.sampled_from(sorted(PRESETS)),
    kind=st.sampled_from(["sample", "v_prediction"]),
    set_alpha_to_one=st.booleans(),
    sigma_hat=st.booleans(),
)
@settings(max_examples=60)
def test_no_step_count_gives_nan_at_eta_one(spacing, count, preset, kind, set_alpha_to_one, sigma_hat):
    schedule = PRESETS[preset]
    timesteps = select_timesteps(count, 1000, spacing, schedule=schedule)
    plan = SamplingPlan(schedule, timesteps, kind, 1.0, set_alpha_to_one=set_alpha_to_one)
    assert plan.num_inference_steps == count
    assert_sound(plan)
    if sigma_hat:
        plan = dataclasses.replace(plan, sigma_hat=True)
        assert all(math.isfinite(s.coefficients.prev_noise) and s.coefficients.prev_eps >= 0 for s in plan.steps)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", sorted(SPACINGS))
def test_no_step_count_from_1_to_1000_gives_nan_at_eta_one(spacing):
    for count in range(1, 1001):
        timesteps = select_timesteps(count, 1000, spacing, schedule=LINEAR)
        assert_sound(SamplingPlan(LINEAR, timesteps, eta=1.0))


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12, unique=True),
    eta=st.floats(0, 1),
    kind=st.sampled_from(sorted(PREDICTION_TYPES)),
    eta_scales=st.sampled_from([name for name, scale in ETA_SCALES.items() if scale.keeps_marginals]),
)
def test_any_schedule_gives_sound_rows(logits, eta, kind, eta_scales):
    alpha_bar = np.unique(1 / (1 + np.exp(-np.array(logits))))[::-1]
    schedule = NoiseSchedule.from_alphas_cumprod(alpha_bar)
    steps = tuple(range(len(alpha_bar) - 1, -1, -1))
    assert_sound(SamplingPlan(schedule, steps, kind, eta, eta_scales))


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta_scales", ["std_dev", "variance"])
@pytest.mark.parametrize(
    "timesteps",
    [
        (999, 998),
        (999, 900),
        (700, 350),
        (300, 200),
        (999, 500, 0),
        (999, 998, 0),
        (999, 990, 0),
        (500, 400, 300, 0),
        (999, 700, 433, 101, 7, 0),
    ],
    ids=str,
)
def test_the_largest_eta_that_the_refusal_names_is_accepted(timesteps, eta_scales):
    with pytest.raises(ValueError, match=r"got 1e\+03|got 1000") as refusal:
        SamplingPlan(LINEAR, timesteps, eta=1000.0, eta_scales=eta_scales)
    named = float(re.search(r"at most ([0-9.e+-]*[0-9])", str(refusal.value))[1])
    # Independent: eta^2 tilde beta <= 1 - alpha_bar_prev on every step.
    largest = min(
        (1 - prev) / textbook_std_dev(at, prev, 1.0) ** 2
        for at, prev in following(timesteps, ALPHA_BAR, 1.0)
        if prev < 1
    )
    largest = math.sqrt(largest) if eta_scales == "std_dev" else largest
    assert named == pytest.approx(largest, rel=1e-5)
    plan = SamplingPlan(LINEAR, timesteps, eta=named, eta_scales=eta_scales)
    assert min(s.coefficients.prev_eps for s in plan.steps[:-1]) < 0.01  # no room is left on the tightest
    with pytest.raises(ValueError, match="eta may be at most"):
        SamplingPlan(LINEAR, timesteps, eta=largest * 1.001, eta_scales=eta_scales)


def test_eta_above_one_is_accepted_where_there_is_room():
    steps = SamplingPlan(LINEAR, (500, 499, 498), eta=1.5).steps
    assert steps[0].std_dev_t == pytest.approx(1.5 * textbook_std_dev(ALPHA_BAR[500], ALPHA_BAR[499], 1.0))


@pytest.mark.parametrize("eta", [1e160, 1e200, 10**400], ids=["1e160", "1e200", "10**400"])
def test_an_enormous_eta_is_refused_like_any_other(eta):
    with pytest.raises(ValueError, match="eta"):
        SamplingPlan(LINEAR, (999, 500, 0), eta=eta)


def test_zero_terminal_snr_refuses_epsilon_and_serves_the_others():
    schedule = NoiseSchedule.from_alphas_cumprod([0.64, 0.25, 0.0])
    with pytest.raises(ValueError, match=r"alpha_bar_t = 0.*v_prediction"):
        SamplingPlan(schedule, (2, 1, 0))
    SamplingPlan(schedule, (1, 0))  # the last timestep left out
    for eta in (0.0, 1.0):
        by_v = SamplingPlan(schedule, (2, 1, 0), "v_prediction", eta).steps[0].coefficients
        by_x0 = SamplingPlan(schedule, (2, 1, 0), "sample", eta).steps[0].coefficients
        std_dev = eta * math.sqrt(0.75)  # tilde beta = (1 - 0.25) / 1 * 1
        expected = 0.5 * X0 + math.sqrt(0.75 - std_dev**2 if eta == 0 else 0) * X_T + std_dev * Z
        np.testing.assert_allclose(apply_row(by_x0, X_T, X0, Z)[0], expected, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(apply_row(by_v, X_T, -X0, Z)[0], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", list(PREDICTION_TYPES))
@pytest.mark.parametrize("use_clipped_model_output", [False, True])
def test_a_schedule_that_begins_without_noise_has_a_row_there(kind, use_clipped_model_output):
    """alpha_bar_0 = 1: x_t is the clean sample, and a perfect model's step changes nothing."""
    schedule = NoiseSchedule.from_alphas_cumprod([1.0, 0.5])
    row = SamplingPlan(
        schedule, (1, 0), kind, 1.0, clip_sample_range=9, use_clipped_model_output=use_clipped_model_output
    ).steps[1]
    # Of a sample without noise, a model of the noise, v, the score or F may say anything.
    m = {"sample": X_T, "flow": Z - X_T}.get(kind, Z)
    np.testing.assert_allclose(apply_row(row.coefficients, X_T, m, Z)[0], X_T, rtol=1e-15)


REFUSALS = [
    (dict(prediction_type="eps"), "'eps'"),
    (dict(prediction_type=None), "None"),
    (dict(prediction_type=["epsilon"]), "epsilon"),
    (dict(eta_scales="sigma"), "'sigma'"),
    (dict(eta=-0.25), "-0.25"),
    (dict(eta=math.nan), "nan"),
    (dict(eta=math.inf), "inf"),
    (dict(eta="0.5"), "'0.5'"),
    (dict(eta=1.75, timesteps=(999, 500, 0)), "1.75"),
    (dict(eta=0.5, sigma_hat=True), "0.5"),
    (dict(sigma_hat=True), "0.0"),
    (dict(clip_sample_range=0.0), "0.0"),
    (dict(clip_sample_range=-2.5), "-2.5"),
    (dict(clip_sample_range=math.inf), "inf"),
    (dict(clip_sample_range=math.nan), "nan"),
    (dict(use_clipped_model_output=True), "None"),
]


@pytest.mark.parametrize(("arguments", "received"), REFUSALS, ids=lambda value: str(value)[:60])
def test_every_refusal_says_what_was_received(arguments, received):
    with pytest.raises(ValueError, match="got .*" + re.escape(received)):
        SamplingPlan(**{"schedule": LINEAR, "timesteps": (999, 0), **arguments})


def test_a_timestep_outside_the_schedule_is_refused():
    with pytest.raises(IndexError, match="1000"):
        SamplingPlan(LINEAR, (1000, 0))


@pytest.mark.parametrize("timesteps", [(0, 500), (999, 500, 500, 0), (0, 999)], ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_timesteps_that_do_not_decrease_are_refused_by_a_sentence(timesteps, eta):
    with pytest.raises(ValueError, match="decreas"):
        SamplingPlan(LINEAR, timesteps, eta=eta)


# --- Plans as data ----------------------------------------------------------------------------------------------------


def test_equal_plans_are_equal_and_hash_alike():
    def build(**changes):
        arguments = {"schedule": NoiseSchedule.from_betas(BETAS), "timesteps": STRIDED, "eta": 0.5, **changes}
        return SamplingPlan(**arguments)

    assert build() == build()
    assert hash(build()) == hash(build())
    assert len({build(), build(), build(eta=0.25)}) == 2
    others = [
        build(eta=0.25),
        build(timesteps=STRIDED[1:]),
        build(prediction_type="sample"),
        build(eta_scales="variance"),
        build(eta=1.0, sigma_hat=True),
        build(eta=1.0),
        build(set_alpha_to_one=False),
        build(clip_sample_range=1.0),
        build(clip_sample_range=1.0, use_clipped_model_output=True),
        build(schedule=NoiseSchedule.cosine()),
    ]
    assert len({build(), *others}) == len(others) + 1
    assert build().steps == build().steps


def test_plans_steps_and_rows_are_frozen():
    plan = SamplingPlan(LINEAR, STRIDED)
    for thing, name in ((plan, "eta"), (plan.steps[0], "t"), (plan.steps[0].coefficients, "prev_x0")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 0.5)
    assert isinstance(plan.steps, tuple)
    assert all(type(value) is float for step in plan.steps for value in dataclasses.astuple(step.coefficients))
