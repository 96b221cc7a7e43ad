"""``order=2`` against DPM-Solver++(2M) as its paper writes it (arXiv 2211.01095), in float64, and what comes with it."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import ddim_fast
from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.kernels.contract import StepCoefficients, StepTable
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.plans.coefficients import ddim_coefficients, multistep_coefficients
from ddim_fast.plans.levels import NoiseLevel
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.sampling.initial_state import noised, seeds_of_samples

TYPES = ["epsilon", "sample", "v_prediction"]

# --- The paper, independently -----------------------------------------------------------------------------------------

MEANS, SPREADS, WEIGHTS = np.array([-1.2, 0.3, 1.5]), np.array([0.3, 0.2, 0.25]), np.array([0.3, 0.5, 0.2])


def exact_x0(x, alpha_bar):
    """E[x0 | x_t] of a mixture of three Gaussians."""
    signal = math.sqrt(alpha_bar)
    variance = alpha_bar * SPREADS**2 + 1 - alpha_bar
    off = x[..., None] - signal * MEANS
    log_weight = np.log(WEIGHTS) - 0.5 * np.log(variance) - 0.5 * off**2 / variance
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    means = MEANS + signal * SPREADS**2 / variance * off
    return (weight * means).sum(-1) / weight.sum(-1)


def exact_model(schedule, prediction_type):
    """The exact denoiser as a model of this prediction type."""

    def model(x_t, t):
        alpha_bar = schedule.alpha_bar(int(t[0]))
        signal, spread = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x0 = torch.from_numpy(exact_x0(x_t.double().numpy(), alpha_bar))
        eps = (x_t.double() - signal * x0) / spread
        output = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - spread * x0}[prediction_type]
        return output.to(x_t.dtype)

    return model


def dpm_solver_2m(x, alpha_bars, denoise):
    """Algorithm 2 of arXiv 2211.01095, its last step of first order, and 1 / (2 r) at most 1::

        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D.

    ``denoise(x, alpha_bar, i)`` is x0.
    """
    last_x0 = last_h = None
    for i, (ab_t, ab_s) in enumerate(pairwise(alpha_bars)):
        x0 = denoise(x, ab_t, i)
        if ab_s == 1:
            return x0
        alpha_s, sigma_t, sigma_s = math.sqrt(ab_s), math.sqrt(1 - ab_t), math.sqrt(1 - ab_s)
        h = math.log(alpha_s / sigma_s) - math.log(math.sqrt(ab_t) / sigma_t) if ab_t > 0 else math.inf
        D = x0
        if last_x0 is not None and math.isfinite(last_h):
            half_of_1_over_r = min(h / last_h / 2, 1)  # at most 1: ours, see multistep_coefficients
            D = (1 + half_of_1_over_r) * x0 - half_of_1_over_r * last_x0
        x = sigma_s / sigma_t * x - alpha_s * (math.exp(-h) - 1) * D
        last_x0, last_h = x0, h
    return x


STEPS = 960
LAMBDAS = np.linspace(3, -4, STEPS + 1)
EVEN = NoiseSchedule(1 / (1 + np.exp(-2 * LAMBDAS)))
"""Even steps in lambda: halving them halves h."""
X_T = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]


def even_run(prediction_type, steps, order):
    sampler = DDIMSampler(
        EVEN,
        timesteps=list(range(STEPS, -1, -STEPS // steps)),
        prediction_type=prediction_type,
        order=order,
        set_alpha_to_one=False,
    )
    return sampler.sample(exact_model(EVEN, prediction_type), x_T=X_T).numpy()[:, 0]


def true_solution():
    """The ODE's, by Runge and Kutta's method of fourth order in lambda: d(x / sigma) / d lambda = e^lambda x0."""
    u, n = X_T.numpy()[:, 0] * math.sqrt(1 + math.exp(-8)), 4000  # x / sigma at lambda = -4

    def slope(lam, u):
        alpha_bar = 1 / (1 + math.exp(-2 * lam))
        return math.exp(lam) * exact_x0(u * math.sqrt(1 - alpha_bar), alpha_bar)

    h = 7 / n
    for i in range(n):
        lam = -4 + i * h
        a = slope(lam, u)
        b = slope(lam + h / 2, u + h / 2 * a)
        c = slope(lam + h / 2, u + h / 2 * b)
        d = slope(lam + h, u + h * c)
        u = u + h / 6 * (a + 2 * b + 2 * c + d)
    return u / math.sqrt(1 + math.exp(6))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_error_falls_with_the_square_of_the_step(prediction_type):
    truth, coarsest = true_solution(), {}
    for order in (1, 2):
        errors = [np.abs(even_run(prediction_type, n, order) - truth).mean() for n in (40, 80, 160, 320)]
        orders = [math.log2(a / b) for a, b in pairwise(errors)]
        assert orders[-1] == pytest.approx(order, abs=0.15), (order, orders, errors)
        coarsest[order] = errors[0]
    assert coarsest[2] < coarsest[1] / 5


# --- The rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quad"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [True, False], ids=["to clean data", "to alpha_bar_0"])
def test_it_is_the_papers_2m(prediction_type, spacing, schedule, final):
    schedule = getattr(NoiseSchedule, schedule)()
    sampler = DDIMSampler(
        schedule,
        10,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        order=2,
        set_alpha_to_one=final,
    )
    alpha_bars = [schedule.alpha_bar(t) for t in sampler.timesteps]
    alpha_bars.append(1.0 if final else schedule.alpha_bar(0))
    expected = dpm_solver_2m(X_T.numpy(), alpha_bars, lambda x, alpha_bar, i: exact_x0(x, alpha_bar))
    got = sampler.sample(exact_model(schedule, prediction_type), x_T=X_T).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)
    first_order = DDIMSampler(schedule, 10, timestep_spacing=spacing, prediction_type=prediction_type)
    assert np.abs(first_order.sample(exact_model(schedule, prediction_type), x_T=X_T).numpy() - got).max() > 1e-3


@pytest.mark.parametrize("thresholding", [False, True], ids=["clip", "thresholds"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_with_clipping_both_x0_are_the_clipped_ones(prediction_type, thresholding):
    """With eps derived again from the clipped x0, x_t is x_t, and the row is the paper's formula to the letter."""
    schedule, bound = NoiseSchedule.linear(), 1.0
    sampler = DDIMSampler(
        schedule,
        10,
        prediction_type=prediction_type,
        order=2,
        clip_sample=True,
        use_clipped_model_output=True,
        thresholding=thresholding,
        dynamic_thresholding_ratio=0.75,
        sample_max_value=1.25,
    )

    def denoise(x, alpha_bar, i):
        x0 = exact_x0(x, alpha_bar)
        if not thresholding:
            return np.clip(x0, -bound, bound)
        s = np.clip(np.quantile(np.abs(x0), 0.75, axis=1, keepdims=True), 1.0, 1.25)
        return np.clip(x0, -s, s) / s

    x_T = X_T.view(8, 8)
    alpha_bars = [*(schedule.alpha_bar(t) for t in sampler.timesteps), 1.0]
    expected = dpm_solver_2m(x_T.numpy(), alpha_bars, denoise)
    got = sampler.sample(exact_model(schedule, prediction_type), x_T=x_T).numpy()
    tolerance = 1e-5 if thresholding else 1e-11  # thresholds are float32
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_clipped_eps_stays_where_it_is(prediction_type):
    """Without rederiving, x_t is what the clipped x0 and the model's eps make of it, as in the DDIM step."""
    levels, rng = (0.2, 0.35, 0.5), np.random.default_rng(3)
    row = multistep_coefficients(*levels, prediction_type, clip_sample_range=1.0)
    ddim = ddim_coefficients(*levels[1:], prediction_type, clip_sample_range=1.0)
    x, m, last_x0 = (torch.from_numpy(a) for a in rng.standard_normal((3, 4, 50)) * 1.5)
    history, x0 = last_x0.clone(), torch.empty_like(x)
    got = ddim_step(x, m, row, history=history, x0_out=x0)
    assert torch.equal(history, x0)
    assert (x0.abs() == 1).any()
    eps = ddim.eps_x * x + ddim.eps_m * m
    signal, spread = math.sqrt(levels[1]), math.sqrt(1 - levels[1])
    h, last_h = (0.5 * math.log(b * (1 - a) / (a * (1 - b))) for a, b in (levels[1:], levels[:2]))
    D = x0 + (x0 - last_x0) * min(h / (2 * last_h), 1)
    x_t = signal * x0 + spread * eps
    expected = math.sqrt(levels[2]) * D + math.sqrt(1 - levels[2]) * (x_t - signal * D) / spread
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_steps_of_infinite_length_are_those_of_ddim():
    for levels in [(0.2, 0.5, 1.0), (0.0, 0.5, 0.7)]:
        assert multistep_coefficients(*levels, "v_prediction") == ddim_coefficients(*levels[1:], "v_prediction")
    plan = SamplingPlan(NoiseSchedule.linear(), (900, 600, 300), order=2)
    assert [step.coefficients.reads_history for step in plan.steps] == [False, True, False]
    single = SamplingPlan(NoiseSchedule.linear(), (900, 600, 300))
    assert plan.steps[0] == single.steps[0]
    assert plan.steps[2] == single.steps[2]
    assert plan != single


def test_zero_terminal_snr():
    alpha_bars = NoiseSchedule.linear().alphas_cumprod.copy()
    alpha_bars[-1] = 0.0
    schedule = NoiseSchedule(alpha_bars)
    sampler = DDIMSampler(schedule, timesteps=[999, 800, 500, 200], prediction_type="v_prediction", order=2)
    alpha_bars = [*(schedule.alpha_bar(t) for t in sampler.timesteps), 1.0]
    expected = dpm_solver_2m(X_T.numpy(), alpha_bars, lambda x, alpha_bar, i: exact_x0(x, alpha_bar))
    got = sampler.sample(exact_model(schedule, "v_prediction"), x_T=X_T).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


def test_noise_levels_must_fall():
    for levels in [(0.5, 0.4, 0.6), (0.5, 0.5, 0.6), (0.1, 0.5, 0.4)]:
        with pytest.raises(ValueError, match="needs falling noise levels"):
            multistep_coefficients(*levels)
        with pytest.raises(ValueError, match=r"needs falling noise levels, .* got alpha = "):
            multistep_coefficients(*map(NoiseLevel.of_alpha_bar, levels))
    for levels in [(-0.1, 0.5, 0.6), (0.1, 0.5, 1.1)]:
        with pytest.raises(ValueError, match=r"alpha_bar must lie in \[0, 1\]"):
            multistep_coefficients(*levels)


# --- The plan and the sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 4, 1.5, "2", True])
def test_other_orders_are_refused(order):
    with pytest.raises(ValueError, match=r"order must be 1 .* or 2 or 3"):
        DDIMSampler(NoiseSchedule.linear(), 10, order=order)


def test_noise_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"needs eta = 0, got eta = 0.5: use order=2, or eta=0"):
        DDIMSampler(NoiseSchedule.linear(), 10, order=3, eta=0.5)
    for order in (2, 3):
        with pytest.raises(ValueError, match=rf"sigma_hat .* in steps of order 1, got order={order}"):
            DDIMSampler(NoiseSchedule.linear(), 10, order=order, eta=1.0, sigma_hat=True)


def constant(x, t):
    return x * 0.5


def test_what_rests_on_single_steps_refuses_it():
    sampler, x = DDIMSampler(NoiseSchedule.linear(), 4, order=2), torch.zeros(1, 2)
    for call in (
        lambda: sampler.inpaint(constant, x, torch.ones(1, 2)),
        lambda: sampler.inpaint(constant, x, torch.ones(1, 2), strength=0.5),
        lambda: sampler.sample_parallel(constant, (1, 2), seed=0),
        lambda: sampler.invert(constant, x),
        lambda: sampler.reconstruct(constant, x),
    ):
        with pytest.raises(ValueError, match=r"make (one|a sampler) with order=1"):
            call()


def test_img2img_and_interpolate_are_sample_with_another_start():
    schedule = NoiseSchedule.linear()
    model = exact_model(schedule, "epsilon")
    sampler = DDIMSampler(schedule, 10, order=2)
    x = torch.linspace(-1, 1, 4)[:, None]
    got = sampler.img2img(model, x, 0.5, seed=1)
    last = DDIMSampler(schedule, timesteps=sampler.timesteps[-5:], order=2)
    x_T = noised(x, schedule.alpha_bar(last.timesteps[0]), seeds_of_samples(1, None, None, 4), None)
    assert torch.equal(got, last.sample(model, x_T=x_T))
    a, b = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ends = sampler.interpolate(model, a, b, [0, 1])
    torch.testing.assert_close(ends[0], sampler.sample(model, x_T=a))
    torch.testing.assert_close(ends[1], sampler.sample(model, x_T=b))


def test_watching_changes_nothing_and_shows_what_the_history_holds():
    schedule = NoiseSchedule.linear()
    model = exact_model(schedule, "epsilon")
    sampler = DDIMSampler(schedule, 6, order=2)
    x_T = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    plain = sampler.sample(model, x_T=x_T)
    run = sampler.sample(model, x_T=x_T, return_trajectory=True)
    assert torch.equal(run.samples, plain)
    # Each state follows from the one before and two predictions.
    for step, x, x0, after, last in zip(
        sampler.plan().steps, run.x_t, run.x0, run.x_t[1:], [None, *run.x0], strict=False
    ):
        history = torch.full_like(x, math.nan) if last is None else last.clone()
        m = model(x, torch.tensor([step.t]))
        assert torch.equal(ddim_step(x, m, step.coefficients, history=history), after)
        assert torch.equal(history, x0)
    seen = []
    sampler.sample(model, x_T=x_T, callback=lambda i, t, x, x0: seen.append((x.clone(), x0.clone())) and None)
    assert all(torch.equal(a, b) for (a, _), b in zip(seen, run.x_t, strict=False))


def test_guidance_is_in_the_history():
    schedule = NoiseSchedule.linear()
    base = exact_model(schedule, "epsilon")

    def model(x, t, shift=0.0):
        return base(x, t) + shift

    def guided(x, t):
        return base(x, t) + 2.5 * 0.125

    sampler = DDIMSampler(schedule, 8, order=2)
    options = {"conditioning": {"shift": 0.125}, "unconditional_conditioning": {"shift": 0.0}}
    got = sampler.sample(model, x_T=X_T, guidance_scale=2.5, **options)
    torch.testing.assert_close(got, sampler.sample(guided, x_T=X_T), rtol=1e-11, atol=1e-11)


def test_the_shipped_model_is_nearer_to_many_steps():
    model = ddim_fast.load_model("fashion")
    options = {"clip_sample": False, "timestep_spacing": "trailing"}
    labels = {"class_labels": torch.arange(4)}

    def draw(steps, order):
        sampler = DDIMSampler(model.schedule, steps, order=order, **options)
        return sampler.sample(model, (4, *model.sample_shape), seed=0, conditioning=labels)

    many = draw(80, 1)
    first, second = ((draw(10, order) - many).square().mean().sqrt().item() for order in (1, 2))
    assert second < 0.8 * first, (first, second)


# --- A step with a history ----------------------------------------------------------------------------------------------

READS = multistep_coefficients(0.1, 0.3, 0.6)
WRITES = ddim_coefficients(0.3, 0.6)
X = torch.arange(24.0).view(2, 3, 4) / 10


def test_what_a_history_must_be():
    m = X.flip(0) + 0.5
    table = StepTable.of([WRITES, READS])
    assert table.reads_history
    assert not StepTable.of([WRITES]).reads_history
    memory = torch.full((2, 6, 4), -77.0)
    for words, error, row, options in [
        (["got no history", "order=1"], ValueError, READS, {}),
        (["history must have the shape of x_t"], ValueError, READS, {"history": X[:1].clone()}),
        (["history must have the dtype of x_t"], TypeError, READS, {"history": X.double()}),
        (["history must be a torch.Tensor"], TypeError, READS, {"history": X.numpy()}),
        (["history must be on the device of x_t"], ValueError, READS, {"history": X.to("meta")}),
        (["history and x_t must not share"], ValueError, READS, {"history": X}),
        (["history and model_output must not share"], ValueError, READS, {"history": m}),
        (["history and out must not share"], ValueError, READS, {"history": memory[:, :3], "out": memory[:, :3]}),
        (["history and x0_out must not share"], ValueError, READS, {"history": memory[:, :3], "x0_out": memory[:, :3]}),
        (
            ["history and x0_out must not share"],
            ValueError,
            READS,
            {"history": memory[:, :3], "x0_out": memory[:, 1:4]},
        ),
        (["history is written to", "must not share memory"], ValueError, READS, {"history": X[:1].expand(2, 3, 4)}),
        (["history", "must not require gradients"], ValueError, READS, {"history": X.clone().requires_grad_()}),
    ]:
        before, outputs = {k: v.clone() for k, v in options.items() if isinstance(v, torch.Tensor)}, memory.clone()
        with pytest.raises(error) as caught:
            ddim_step(X, m, row, **options)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert torch.equal(memory, outputs)
        assert all(v.device.type == "meta" or torch.equal(options[k], v) for k, v in before.items()), words
    with pytest.raises(ValueError, match="got no history"):
        ddim_step_from_table(X, m, table, torch.tensor([0]))


def test_a_history_may_be_interleaved_with_x_prev():
    memory = torch.full((2, 6, 4), math.nan)
    memory[:, 3:] = 0.5
    expected = ddim_step(X, X + 1, READS, history=torch.full_like(X, 0.5))
    got = ddim_step(X, X + 1, READS, history=memory[:, 3:], out=memory[:, :3])
    assert torch.equal(got, expected)


def outputs(value=math.nan, like=X):
    """What a solver of third order keeps, and the model's next input."""
    return {
        "history": torch.full_like(like, value),
        "history_2": torch.full_like(like, value),
        "model_input_out": torch.full_like(like, math.nan, dtype=torch.float16),
    }


def all_equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def test_by_table_and_by_row_are_the_same_bits():
    rows = [WRITES, READS, replace(multistep_coefficients(0.3, 0.6, 0.9), prev_history_2=0.25, input_scale=0.7)]
    table = StepTable.of(rows)
    assert table.reads_history_2
    assert not StepTable.of(rows[:2]).reads_history_2
    x, y = X.clone(), X.clone()
    kept, by_table = outputs(), outputs()
    for i, row in enumerate(rows):
        ddim_step(x, x.cos(), row, **kept, out=x)
        ddim_step_from_table(y, y.cos(), table, torch.tensor([i]), **by_table, out=y)
        assert torch.equal(x, y)
        assert i == 0 or all_equal(kept, by_table)  # after the first step, history_2 has what nothing wrote
    assert not x.isnan().any()
    per_sample = outputs(0.25)
    got = ddim_step_from_table(X, X.cos(), table, torch.tensor([2, 1]), **per_sample)
    for i, row in enumerate((rows[2], rows[1])):
        alone = outputs(0.25, X[:1])
        assert torch.equal(got[i : i + 1], ddim_step(X[i : i + 1], X[i : i + 1].cos(), row, **alone))
        assert all_equal({name: tensor[i : i + 1] for name, tensor in per_sample.items()}, alone)


def test_two_histories_hold_the_last_two_x0():
    """A solver whose rows are any numbers, and what each step reads worked out in float64."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((2, 7)))
    kept, past = {"history": torch.full_like(x, math.nan), "history_2": torch.full_like(x, math.nan)}, []
    for i in range(5):
        a, b, h, h_2, s = rng.uniform(-1, 1, 5) * [1, 1, i > 0, i > 1, 1]
        m, z = (torch.from_numpy(rng.standard_normal((2, 7))) for _ in range(2))
        row = StepCoefficients(a, b, 0, 0, 0, 0.5, 0, s, prev_history=h, prev_history_2=h_2)
        x0 = a * x + b * m
        expected = 0.5 * x0 + s * z
        expected += sum(weight * of for weight, of in zip((h, h_2), reversed(past), strict=False))
        x = ddim_step(x, m, row, noise=z, **kept)
        torch.testing.assert_close(x, expected, rtol=1e-14, atol=1e-14)
        past.append(x0)
        for name, of in zip(kept, reversed(past), strict=False):
            torch.testing.assert_close(kept[name], of, rtol=1e-14, atol=1e-14)


def test_a_row_survives_its_table():
    for clip in (None, 1.0):
        row = multistep_coefficients(0.1, 0.3, 0.6, clip_sample_range=clip)
        again = StepCoefficients.from_row(row.row(2.0), row.clipped)
        assert again.packed == row.packed
        assert again.reads_history
        assert StepCoefficients(*row.columns) == row


def test_autograd_knows_of_the_write():
    for backend in (None, "cpu", "reference"):
        kept = outputs(1.0)
        versions = {name: tensor._version for name, tensor in kept.items()}
        ddim_step(X, X, READS, **kept, backend=backend)
        assert all(kept[name]._version > version for name, version in versions.items()), backend
    model_input = torch.empty_like(X)
    y = X.clone().requires_grad_()
    ddim_step(y, y * 0, replace(READS, prev_history=0.0, input_scale=3.0), model_input_out=model_input)
    model_input.sum().backward()
    torch.testing.assert_close(y.grad, torch.full_like(X, 3 * READS.folded[0]))
    x = X.clone().requires_grad_()
    weight = torch.ones_like(X)
    with torch.enable_grad():
        result = ddim_step(x, x * 2, READS, history=weight)
        result.sum().backward()
    fold_x, fold_m = READS.folded
    torch.testing.assert_close(x.grad, torch.full_like(X, fold_x + 2 * fold_m))


def test_a_step_much_longer_than_the_last_does_not_overshoot():
    """The weight of the difference of the last two x0 grows with the step, up to 1 and no further."""

    def weight(alpha_bar_prev):
        row, ddim = multistep_coefficients(0.3, 0.31, alpha_bar_prev), ddim_coefficients(0.31, alpha_bar_prev)
        of_d = math.sqrt(alpha_bar_prev) - math.sqrt(0.31 * (1 - alpha_bar_prev) / (1 - 0.31))
        assert row.prev_x0 - ddim.prev_x0 == pytest.approx(-row.prev_history)
        return -row.prev_history / of_d

    assert 0.4 < weight(0.32) < 0.6
    assert [weight(0.5), weight(0.999)] == pytest.approx([1, 1])
