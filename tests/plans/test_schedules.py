"""The schedule against formulas written again: exact fractions, plain loops and Bayes' rule on Gaussians."""

import copy
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.plans.schedules import SCHEDULES, NoiseSchedule, make_schedule

FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COUNTS = [1, 2, 3, 1000]


def exact_alphas_cumprod(betas):
    product, result = Fraction(1), []
    for beta in betas:
        product *= 1 - Fraction(beta)
        result.append(float(product))
    return result


def between(start, end, count):
    """``count`` numbers from start to end, evenly: np.linspace in exact arithmetic, rounded once."""
    start, end = Fraction(start), Fraction(end)
    return [float(start + (end - start) * index / max(count - 1, 1)) for index in range(count)]


def squares_between(start, end, count):
    return [root**2 for root in between(math.sqrt(start), math.sqrt(end), count)]


def cosine_betas(count, s=0.008, max_beta=0.999):
    def signal(time):
        return math.cos((time + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - signal((index + 1) / count) / signal(index / count), max_beta) for index in range(count)]


EXPECTED_BETAS = {
    "linear": lambda count: between(1e-4, 0.02, count),
    "scaled_linear": lambda count: squares_between(0.00085, 0.012, count),
    "quad": lambda count: squares_between(1e-4, 0.02, count),
    "cosine": cosine_betas,
    "squaredcos_cap_v2": cosine_betas,
    "sigmoid": lambda count: [1e-4 + (0.02 - 1e-4) / (1 + math.exp(-x)) for x in between(-6, 6, count)],
    "const": lambda count: [0.02] * count,
    "jsd": lambda count: [1 / (count - index) for index in range(count)],
}


# --- Presets --------------------------------------------------------------------------------------------------------


def test_every_preset_has_an_expected_formula():
    assert set(EXPECTED_BETAS) == set(SCHEDULES)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_preset_follows_its_formula(name, count):
    schedule = make_schedule(name, count)
    betas = EXPECTED_BETAS[name](count)
    assert schedule.alphas_cumprod.dtype == schedule.betas.dtype == schedule.log_snr.dtype == np.float64
    assert schedule.num_train_timesteps == len(schedule.betas) == len(schedule.log_snr) == count
    np.testing.assert_allclose(schedule.alphas_cumprod, exact_alphas_cumprod(betas), rtol=2e-13, atol=0)
    # A beta is 1 minus a ratio of squared cosines: NumPy 1.24's cosine is off by an ulp more.
    np.testing.assert_allclose(schedule.betas, betas, rtol=0, atol=4 * np.finfo(float).eps)
    assert (np.diff(schedule.alphas_cumprod, prepend=1.0) < 0).all()


def test_published_values():
    """Numbers that other projects print: Stable Diffusion's and DDPM's last ᾱ, and the cosine schedule's capped end."""
    assert NoiseSchedule.scaled_linear().alphas_cumprod[-1] == pytest.approx(0.004660095, rel=1e-6)
    assert NoiseSchedule.linear().alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert NoiseSchedule.cosine().alphas_cumprod[-1] == pytest.approx(2.4289e-9, rel=1e-3)
    assert NoiseSchedule.cosine().betas[0] == pytest.approx(4.1282e-5, rel=1e-4)


@pytest.mark.parametrize("count", COUNTS)
def test_jsd_falls_linearly_to_exactly_zero(count):
    schedule = NoiseSchedule.jsd(count)
    assert schedule.alphas_cumprod[-1] == 0.0
    np.testing.assert_allclose(schedule.alphas_cumprod, [(count - 1 - t) / count for t in range(count)], rtol=1e-12)


def test_presets_take_their_arguments():
    np.testing.assert_allclose(make_schedule("linear", 3, beta_start=0.1, beta_end=0.3).betas, [0.1, 0.2, 0.3])
    np.testing.assert_allclose(
        make_schedule("scaled_linear", 3, beta_start=0.01, beta_end=0.09).betas, [0.01, 0.04, 0.09]
    )
    np.testing.assert_allclose(make_schedule("quad", 3, beta_start=0.01, beta_end=0.09).betas, [0.01, 0.04, 0.09])
    np.testing.assert_allclose(make_schedule("sigmoid", 3, beta_start=0.2, beta_end=0.4).betas[1], 0.3)
    np.testing.assert_allclose(make_schedule("const", 3, beta=0.25).alphas_cumprod, [0.75, 0.5625, 0.421875])
    expected = cosine_betas(7, s=0.1, max_beta=0.5)
    np.testing.assert_allclose(make_schedule("cosine", 7, s=0.1, max_beta=0.5).betas, expected, atol=1e-15)
    assert max(expected) == 0.5


def test_preset_names():
    assert make_schedule("linear").name == "linear"
    assert make_schedule("squaredcos_cap_v2").name == "cosine"
    assert make_schedule("squaredcos_cap_v2") == NoiseSchedule.cosine()
    assert {NoiseSchedule.quad().name, NoiseSchedule.const().name} == {"quad", "const"}


# --- The class ------------------------------------------------------------------------------------------------------


def test_alphas_cumprod_is_a_read_only_copy():
    given_values = np.array([0.9, 0.5])
    schedule = NoiseSchedule.from_alphas_cumprod(given_values)
    given_values[0] = 0.1
    assert schedule.alphas_cumprod.tolist() == [0.9, 0.5]
    for each in (schedule, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert each == schedule
        assert each.name == schedule.name
        with pytest.raises(ValueError, match="read-only"):
            each.alphas_cumprod[0] = 0.1
    with pytest.raises(AttributeError):
        schedule.name = "other"


def test_equality_and_hash_follow_the_bytes():
    schedule = NoiseSchedule.linear()
    same = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod, "another name")
    assert schedule == same
    assert hash(schedule) == hash(same)
    nudged = schedule.alphas_cumprod.copy()
    nudged[500] = np.nextafter(nudged[500], 1)
    assert schedule != NoiseSchedule.from_alphas_cumprod(nudged)
    assert schedule != "linear"
    assert NoiseSchedule.from_alphas_cumprod([0.5, 0.0]) == NoiseSchedule.from_alphas_cumprod([0.5, -0.0])


@pytest.mark.parametrize(
    "values",
    [[0.75, 0.5], (0.75, 0.5), np.array([0.75, 0.5], np.float32), torch.tensor([0.75, 0.5], dtype=torch.bfloat16)],
)
def test_any_array_type_is_accepted(values):
    expected = NoiseSchedule(np.array([0.75, 0.5]), "custom")
    assert NoiseSchedule.from_alphas_cumprod(values) == expected
    assert NoiseSchedule.from_betas([0.25, 1 / 3]).alphas_cumprod.tolist() == pytest.approx([0.75, 0.5], abs=1e-16)


def test_whole_numbers_are_real_numbers():
    assert NoiseSchedule.from_betas(torch.tensor([0, 1])).alphas_cumprod.tolist() == [1.0, 0.0]
    assert NoiseSchedule.from_alphas_cumprod([1]).betas.tolist() == [0.0]


def test_repr_is_short():
    text = repr(NoiseSchedule.from_alphas_cumprod([0.5, 0.25], "mine"))
    assert text == "NoiseSchedule(name='mine', num_train_timesteps=2, alphas_cumprod=0.5 ... 0.25)"


def test_log_snr_of_ordinary_and_infinite_ends():
    assert NoiseSchedule.from_alphas_cumprod([1.0, 0.5, 0.0]).log_snr.tolist() == [math.inf, 0.0, -math.inf]
    schedule = NoiseSchedule.linear()
    expected = [math.log(value / (1 - value)) for value in schedule.alphas_cumprod.tolist()]
    np.testing.assert_allclose(schedule.log_snr, expected, rtol=1e-13, atol=1e-13)


def test_alpha_bar():
    schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])
    assert [schedule.alpha_bar(t) for t in (-1, 0, np.int64(1))] == [1.0, 0.75, 0.5]
    assert schedule.alpha_bar(-1, final_alpha_bar=0.75) == 0.75
    assert schedule.alpha_bar(1, final_alpha_bar=0.75) == 0.5
    assert type(schedule.alpha_bar(0)) is float


# --- Zero terminal SNR ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "const"])
def test_zero_terminal_snr_follows_algorithm_1(name, count):
    schedule = make_schedule(name, count)
    rescaled = schedule.rescale_zero_terminal_snr()
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0] == schedule.alphas_cumprod[0]
    roots = [math.sqrt(value) for value in schedule.alphas_cumprod.tolist()]
    expected = [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]
    np.testing.assert_allclose(rescaled.alphas_cumprod, expected, rtol=1e-12, atol=0)
    assert rescaled.name == f"{name}_zero_terminal_snr"
    assert rescaled.rescale_zero_terminal_snr() is rescaled
    assert rescaled.betas[-1] == 1.0
    assert rescaled.log_snr[-1] == -math.inf


def test_zero_terminal_snr_of_a_single_step():
    assert NoiseSchedule.jsd(1).rescale_zero_terminal_snr().alphas_cumprod.tolist() == [0.0]
    with pytest.raises(ValueError, match="at least 2 training timesteps, got a schedule of 1"):
        NoiseSchedule.linear(1).rescale_zero_terminal_snr()


# --- The forward process --------------------------------------------------------------------------------------------


def noisy_pair(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    return draw[0].to(dtype), draw[1].to(dtype)


FORWARD = {
    "add_noise": lambda a, x0, noise: math.sqrt(a) * x0 + math.sqrt(1 - a) * noise,
    "velocity": lambda a, x0, noise: math.sqrt(a) * noise - math.sqrt(1 - a) * x0,
}


def tolerance(dtype):
    """Two products and a sum of terms below 8, in float32 at the least, then one rounding to the dtype."""
    return {"rtol": torch.finfo(dtype).eps, "atol": 8 * 3 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)}


@pytest.mark.parametrize("method", sorted(FORWARD))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_forward_of_one_timestep(method, dtype, t):
    schedule = NoiseSchedule.linear()
    x0, noise = noisy_pair((3, 2, 5, 5), dtype)
    result = getattr(schedule, method)(x0, noise, t)
    expected = FORWARD[method](schedule.alphas_cumprod[t], x0.double(), noise.double())
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("method", sorted(FORWARD))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("t_dtype", [torch.int64, torch.int32, torch.int16])
def test_one_timestep_per_sample_gives_the_bits_of_one_call_per_sample(method, dtype, t_dtype):
    schedule = NoiseSchedule.scaled_linear()
    x0, noise = noisy_pair((4, 2, 3), dtype)
    timesteps = [999, 0, 17, 640]
    together = getattr(schedule, method)(x0, noise, torch.tensor(timesteps, dtype=t_dtype))
    for index, t in enumerate(timesteps):
        alone = getattr(schedule, method)(x0[index], noise[index], t)
        assert torch.equal(together[index], alone)
        assert torch.equal(getattr(schedule, method)(x0[index], noise[index], torch.tensor(t, dtype=t_dtype)), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    schedule = NoiseSchedule.linear()
    x0, noise = noisy_pair((2000,), dtype)
    expected = schedule.add_noise(x0.float(), noise.float(), 300).to(dtype)
    assert torch.equal(schedule.add_noise(x0, noise, 300), expected)


def test_float64_noise_raises_the_precision_but_not_the_dtype():
    schedule = NoiseSchedule.linear()
    x0, noise = noisy_pair((2000,), torch.float64)
    x0 = x0.float()
    mixed = schedule.add_noise(x0, noise, 300)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, schedule.add_noise(x0.double(), noise, 300).float())


@pytest.mark.parametrize("shape", [(0, 3, 4), (0,)])
def test_a_batch_of_none(shape):
    schedule = NoiseSchedule.linear()
    x0 = torch.zeros(shape)
    t = torch.zeros(0, dtype=torch.int64)
    for result in (schedule.add_noise(x0, x0, t), schedule.velocity(x0, x0, 5), schedule.add_noise(x0, x0, 5)):
        assert result.shape == shape
    mean, variance = schedule.posterior_mean_variance(x0, x0, t)
    assert mean.shape == shape
    assert variance.shape == (0,) + (1,) * (len(shape) - 1)


def test_inputs_of_a_single_value():
    x0, noise = torch.tensor(2.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    result = NoiseSchedule.from_alphas_cumprod([0.64]).add_noise(x0, noise, 0)
    assert result.shape == ()
    assert result.item() == pytest.approx(0.8 * 2 - 0.6)


def test_both_ends_of_the_signal():
    schedule = NoiseSchedule.from_alphas_cumprod([1.0, 0.5, 0.0])
    x0, noise = noisy_pair((7,), torch.float32)
    assert torch.equal(schedule.add_noise(x0, noise, 0), x0)
    assert torch.equal(schedule.add_noise(x0, noise, 2), noise)
    assert torch.equal(schedule.velocity(x0, noise, 0), noise)
    assert torch.equal(schedule.velocity(x0, noise, 2), -x0)


def test_add_noise_has_the_moments_of_q():
    schedule = NoiseSchedule.linear()
    count = 400_000
    noise = torch.randn(count, generator=torch.Generator().manual_seed(3))
    for t in (0, 200, 999):
        alpha_bar = schedule.alphas_cumprod[t]
        x_t = schedule.add_noise(torch.full((count,), 1.5), noise, t).double()
        spread = math.sqrt(1 - alpha_bar)
        assert x_t.mean().item() == pytest.approx(1.5 * math.sqrt(alpha_bar), abs=5 * spread / math.sqrt(count))
        assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=5 * math.sqrt(2 / count))


def test_velocity_gives_x0_and_noise_back():
    schedule = NoiseSchedule.cosine()
    x0, noise = noisy_pair((5, 4), torch.float64)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod[t.numpy()])[:, None]
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v, x0, rtol=0, atol=1e-14)
    torch.testing.assert_close((1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v, noise, rtol=0, atol=1e-14)


def test_gradients_flow():
    schedule = NoiseSchedule.from_alphas_cumprod([0.64])
    x0, noise = (tensor.requires_grad_() for tensor in noisy_pair((3,), torch.float64))
    schedule.add_noise(x0, noise, 0).sum().backward()
    torch.testing.assert_close(x0.grad, torch.full((3,), 0.8, dtype=torch.float64))
    torch.testing.assert_close(noise.grad, torch.full((3,), 0.6, dtype=torch.float64))


# --- The posterior --------------------------------------------------------------------------------------------------


def bayes(alpha_bar_previous, alpha_bar, x0, x_t):
    """Mean and variance of x_{t-1}: q(x_{t-1} | x_0), times the likelihood of x_t, by adding precisions."""
    alpha = alpha_bar / alpha_bar_previous
    prior_precision = 1 / (1 - alpha_bar_previous)
    likelihood_precision = alpha / (1 - alpha)
    variance = 1 / (prior_precision + likelihood_precision)
    prior_mean = alpha_bar_previous.sqrt() * x0
    return variance * (prior_precision * prior_mean + likelihood_precision * x_t / alpha.sqrt()), variance


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "const"])
def test_posterior_is_the_product_of_gaussians(name):
    schedule = make_schedule(name)
    timesteps = [1, 2, 500, 998, 999]
    x0, x_t = noisy_pair((len(timesteps), 6), torch.float64)
    mean, variance = schedule.posterior_mean_variance(x0, x_t, torch.tensor(timesteps))
    assert variance.shape == (len(timesteps), 1)
    for index, t in enumerate(timesteps):
        previous, current = torch.from_numpy(schedule.alphas_cumprod[[t - 1, t]])
        expected_mean, expected_variance = bayes(previous, current, x0[index], x_t[index])
        torch.testing.assert_close(mean[index], expected_mean, rtol=1e-11, atol=1e-11)
        assert variance[index].item() == pytest.approx(expected_variance.item(), rel=1e-11)
        alone_mean, alone_variance = schedule.posterior_mean_variance(x0[index], x_t[index], t)
        assert torch.equal(alone_mean, mean[index])
        assert type(alone_variance) is float
        assert alone_variance == variance[index].item()


def test_posterior_by_counting_samples():
    """Nothing but the forward process: walk x_0 -> x_{t-1} -> x_t, keep the walks that end near one x_t, look back."""
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.6, 0.3])
    generator = torch.Generator().manual_seed(5)
    count = 1_500_000
    before = math.sqrt(0.6) * 0.7 + math.sqrt(0.4) * torch.randn(count, generator=generator)
    after = math.sqrt(0.5) * before + math.sqrt(0.5) * torch.randn(count, generator=generator)
    kept = before[(after - 0.2).abs() < 0.02].double()
    mean, variance = schedule.posterior_mean_variance(torch.tensor([0.7]), torch.tensor([0.2]), 2)
    assert len(kept) > 20_000
    assert kept.mean().item() == pytest.approx(mean.item(), abs=5 * math.sqrt(variance / len(kept)))
    assert kept.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / len(kept)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("first", [1.0, 0.9])
def test_posterior_of_the_first_timestep_is_x0(dtype, first):
    schedule = NoiseSchedule.from_alphas_cumprod([first, 0.5])
    x0, x_t = noisy_pair((2, 3), dtype)
    mean, variance = schedule.posterior_mean_variance(x0, x_t, 0)
    assert torch.equal(mean, x0)
    assert mean.dtype == dtype
    assert variance == 0.0
    mean, variance = schedule.posterior_mean_variance(x0, x_t, torch.tensor([0, 1]))
    assert torch.equal(mean[0], x0[0])
    assert variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert variance[0].item() == 0.0


def test_posterior_of_zero_terminal_snr_forgets_x_t():
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.36, 0.0])
    x0, x_t = noisy_pair((4,), torch.float64)
    mean, variance = schedule.posterior_mean_variance(x0, x_t, 2)
    torch.testing.assert_close(mean, 0.6 * x0)
    assert variance == pytest.approx(0.64)


def test_posterior_keeps_the_digits_of_a_tiny_alpha():
    schedule = NoiseSchedule.from_alphas_cumprod([0.5, 1e-18])
    x_t = torch.ones(1, dtype=torch.float64)
    mean, _ = schedule.posterior_mean_variance(torch.zeros_like(x_t), x_t, 1)
    assert mean.item() == pytest.approx(math.sqrt(2e-18) * 0.5, rel=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=40), st.data())
def test_betas_round_trip_and_forward_agrees_with_the_walk(betas, data):
    schedule = NoiseSchedule.from_betas(betas)
    np.testing.assert_allclose(schedule.betas, betas, rtol=0, atol=1e-15)
    t = data.draw(st.integers(0, len(betas) - 1))
    signal, spread = 1.0, 0.0
    for beta in betas[: t + 1]:
        signal, spread = signal * math.sqrt(1 - beta), spread * (1 - beta) + beta
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert schedule.add_noise(one, zero, t).item() == pytest.approx(signal, rel=1e-13)
    assert schedule.add_noise(zero, one, t).item() ** 2 == pytest.approx(spread, rel=1e-11)


# --- Errors: each gives the rule and the value got -------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "at least one timestep, got shape (0,)"),
        (np.zeros((0,)), ValueError, "at least one timestep, got shape (0,)"),
        (np.full((2, 2), 0.5), ValueError, "1-D with shape (T,), got shape (2, 2)"),
        (0.5, ValueError, "got shape ()"),
        ([0.9, math.nan], ValueError, "finite, got alphas_cumprod[1] = nan"),
        ([math.inf, 0.9], ValueError, "finite, got alphas_cumprod[0] = inf"),
        ([1.5, 0.9], ValueError, "[0, 1], got alphas_cumprod[0] = 1.5"),
        ([0.9, -0.25], ValueError, "[0, 1], got alphas_cumprod[1] = -0.25"),
        ([0.9, 0.5, 0.5], ValueError, "strictly decreasing, got 0.5 at t = 1 and 0.5 at t = 2"),
        ([0.25, 0.5], ValueError, "strictly decreasing, got 0.25 at t = 0 and 0.5 at t = 1"),
        ([0.5, 0.0, 0.0], ValueError, "got 0.0 at t = 1 and 0.0 at t = 2"),
        (["a", "b"], TypeError, "real numbers, got ['a', 'b']"),
        ([[0.5], [0.4, 0.3]], TypeError, "real numbers, got [[0.5], [0.4, 0.3]]"),
        ([True, False], TypeError, "real numbers, got [True, False]"),
        ([0.5 + 1j], TypeError, "real numbers, got [(0.5+1j)]"),
        (None, TypeError, "real numbers, got None"),
        (torch.tensor([True, False]), TypeError, "real numbers, got"),
    ],
)
def test_bad_alphas_cumprod(values, error, message):
    for build in (NoiseSchedule.from_alphas_cumprod, lambda each: NoiseSchedule(each, "mine")):
        with pytest.raises(error, match=re.escape(message)):
            build(values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.1, 1.25], ValueError, "[0, 1], got betas[1] = 1.25"),
        ([-0.5], ValueError, "[0, 1], got betas[0] = -0.5"),
        ([0.1, math.nan], ValueError, "finite, got betas[1] = nan"),
        ([[0.1]], ValueError, "got shape (1, 1)"),
        ([0.5, 0.0], ValueError, "strictly decreasing, got 0.5 at t = 0 and 0.5 at t = 1"),
        ([1.0, 0.5], ValueError, "strictly decreasing, got 0.0 at t = 0 and 0.0 at t = 1"),
        ("linear", TypeError, "real numbers, got 'linear'"),
    ],
)
def test_bad_betas(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        NoiseSchedule.from_betas(values)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    ("count", "error", "received"),
    [
        (0, ValueError, "0"),
        (-3, ValueError, "-3"),
        (2.0, TypeError, "2.0"),
        (True, TypeError, "True"),
        ("9", TypeError, "'9'"),
    ],
)
def test_bad_count(name, count, error, received):
    with pytest.raises(error, match=f"num_train_timesteps must .*got {received}"):
        make_schedule(name, count)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("linear", {"beta_end": 1.5}, ValueError, "beta_end must be a finite number in [0, 1], got 1.5"),
        ("linear", {"beta_start": "x"}, TypeError, "beta_start must be a finite number in [0, 1], got 'x'"),
        ("scaled_linear", {"beta_start": -0.5}, ValueError, "beta_start must be a finite number in [0, 1], got -0.5"),
        ("quad", {"beta_end": math.nan}, ValueError, "beta_end must be a finite number in [0, 1], got nan"),
        ("sigmoid", {"beta_end": True}, TypeError, "beta_end must be a finite number in [0, 1], got True"),
        ("const", {"beta": 2.0}, ValueError, "beta must be a finite number in [0, 1], got 2.0"),
        ("cosine", {"s": -1.0}, ValueError, "s must be a finite number, at least 0, got -1.0"),
        ("cosine", {"max_beta": 1.5}, ValueError, "max_beta must be a finite number in [0, 1], got 1.5"),
        ("cosine", {"s": math.inf}, ValueError, "s must be a finite number, at least 0, got inf"),
        ("jsd", {"beta_start": 0.1}, TypeError, "'jsd' takes no further arguments, got 'beta_start'"),
        ("const", {"beta_end": 0.1}, TypeError, "'const' takes beta, got 'beta_end'"),
        ("const", {"beta": 0.0}, ValueError, "strictly decreasing, got 1.0 at t = 0 and 1.0 at t = 1"),
    ],
)
def test_bad_preset_argument(name, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_schedule(name, **arguments)


@pytest.mark.parametrize("name", ["linaer", "", None, ["linear"]])
def test_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=re.escape(f"got {name!r}")) as caught:
        make_schedule(name)
    assert all(known in str(caught.value) for known in SCHEDULES)


def test_bad_name():
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        NoiseSchedule(np.array([0.5]), 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10,), IndexError, "[-1, 9] for a schedule of 10 timesteps (-1 is before the first step), got 10"),
        ((-2,), IndexError, "got -2"),
        ((1.0,), TypeError, "t must be an integer, got 1.0"),
        ((True,), TypeError, "t must be an integer, got True"),
        ((-1, 0.0), ValueError, "final_alpha_bar must be greater than 0, got 0.0"),
        ((-1, 1.5), ValueError, "final_alpha_bar must be a finite number in [0, 1], got 1.5"),
        ((-1, "one"), TypeError, "final_alpha_bar must be a finite number in [0, 1], got 'one'"),
    ],
)
def test_bad_alpha_bar_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        NoiseSchedule.linear(10).alpha_bar(*arguments)


X = torch.zeros(2, 3)


@pytest.mark.parametrize("method", ["add_noise", "velocity", "posterior_mean_variance"])
@pytest.mark.parametrize(
    ("x0", "other", "t", "error", "message"),
    [
        (X, X, 10, IndexError, "t must lie in [0, 9] for a schedule of 10 timesteps, got 10"),
        (X, X, -1, IndexError, "got -1"),
        (X, X, 10**30, IndexError, f"got {10**30}"),
        (X, X, torch.tensor([3, -1]), IndexError, "got -1"),
        (X, X, torch.tensor([10, 3]), IndexError, "got 10"),
        (X, X, 1.0, TypeError, "t must be an integer, got 1.0"),
        (X, X, True, TypeError, "got True"),
        (X, X, [1, 2], TypeError, "got [1, 2]"),
        (X, X, torch.tensor([1.0, 2.0]), TypeError, "integer tensor, got dtype torch.float32"),
        (X, X, torch.tensor([True, False]), TypeError, "integer tensor, got dtype torch.bool"),
        (X, X, torch.tensor([1, 2, 3]), ValueError, "(batch,) = (2,), got shape (3,)"),
        (X, X, torch.tensor([1]), ValueError, "(batch,) = (2,), got shape (1,)"),
        (X, X, torch.tensor([[1], [2]]), ValueError, "got shape (2, 1)"),
        (X, torch.zeros(2, 1), 1, ValueError, "must have the shape of x0, (2, 3), got (2, 1)"),
        (X, X.long(), 1, TypeError, "must be floating point, got torch.int64"),
        (X.to(torch.complex64), X, 1, TypeError, "x0 must be floating point, got torch.complex64"),
        (X.numpy(), X, 1, TypeError, "x0 must be a tensor, got ndarray"),
        (X, 0.0, 1, TypeError, "must be a tensor, got float"),
        (X, X.to("meta"), 1, ValueError, "must be on x0's device, cpu, got meta"),
    ],
)
def test_bad_forward_arguments(method, x0, other, t, error, message):
    with pytest.raises(error, match=re.escape(message)):
        getattr(NoiseSchedule.linear(10), method)(x0, other, t)
