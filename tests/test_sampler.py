"""The sampler against a loop written here in float64 NumPy, against closed forms for Gaussian data, and against its own promises."""

import copy
import gc
import itertools
import math
import pickle
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddim_fast.kernels.noise import NoiseStream, sample_seeds, standard_normals
from ddim_fast.plans.plan import SamplingPlan
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.plans.timesteps import respaced_timesteps, select_timesteps
from ddim_fast.sampler import DDIMSampler
from ddim_fast.sampling.loop import Timing, Trajectory
from ddim_fast.verify.truth.oracle import split

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LINEAR = NoiseSchedule.from_alphas_cumprod(ALPHA_BAR)
STEPS = (999, 700, 433, 101, 7, 0)  # no two strides alike
SHAPE = (3, 2, 4, 5)
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _restored_state():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


# --- The textbook, in NumPy float64 -----------------------------------------------------------------------------------


def tilde_beta(alpha_bar_t, alpha_bar_prev):
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def pairs_of(timesteps, alpha_bar=ALPHA_BAR, final=1.0):
    return list(zip(alpha_bar[list(timesteps)], [*alpha_bar[list(timesteps[1:])], final], strict=True))


def textbook_loop(
    model,
    x_T,
    noises,
    timesteps,
    kind="epsilon",
    eta=0.0,
    clip=None,
    use_clipped_model_output=False,
    ratio=None,
    maximum=1.0,
    final=1.0,
):
    """Every x_t, S + 1 of them, and every x0. ``model(x, t)`` in NumPy; ``noises``: one array per step."""
    x, states, x0s = x_T, [x_T], []
    for t, pair, z in zip(timesteps, pairs_of(timesteps, final=final), noises, strict=True):
        alpha_bar_t, alpha_bar_prev = pair
        x0, eps = split(kind, x, model(x, t), alpha_bar_t)
        if (
            ratio is not None
        ):  # Imagen: the bound grows with the sample's quantile, and what is beyond it is scaled back
            s = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1)
            s = np.clip(s, clip, max(maximum, clip)).reshape(-1, *[1] * (x0.ndim - 1))
            x0 = np.clip(x0, -s, s) * (clip / s)
        elif clip is not None:
            x0 = np.clip(x0, -clip, clip)
        if use_clipped_model_output:
            eps = (x - math.sqrt(alpha_bar_t) * x0) / math.sqrt(1 - alpha_bar_t)
        variance = eta**2 * tilde_beta(*pair)
        direction = math.sqrt(max(1 - alpha_bar_prev - variance, 0.0))
        x = math.sqrt(alpha_bar_prev) * x0 + direction * eps + math.sqrt(variance) * z
        states.append(x)
        x0s.append(x0)
    return states, x0s


def wavy(x, t):
    """An elementwise model that is not linear and knows the timestep; tensors and arrays alike."""
    wave = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    if isinstance(t, torch.Tensor):
        t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return 0.9 * wave(x * (0.6 + t / 1500)) + 0.2


def random(seed, shape=SHAPE, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def stream_noises(seed, count, shape, dtype=torch.float64):
    """torch's own stream: the first draw and the next ones."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count + 1)]
    return draws[0], draws[1:]


def standard_noises(seeds, count, shape):
    """The noise standard's normals: x_T and z of each step."""
    n = math.prod(shape[1:])
    x_T = standard_normals(seeds, n, 0, NoiseStream.INITIAL).reshape(shape)
    return x_T, [standard_normals(seeds, n, step, NoiseStream.STEP).reshape(shape) for step in range(count)]


CASES = [
    dict(),
    dict(eta=1.0),
    dict(eta=0.4, kind="sample"),
    dict(eta=0.4, kind="v_prediction"),
    dict(clip=1.0),
    dict(eta=0.4, clip=0.5),
    dict(eta=0.4, clip=0.5, use_clipped_model_output=True, kind="v_prediction"),
    dict(eta=1.0, final=ALPHA_BAR[0]),
    dict(eta=0.4, clip=1.0, ratio=0.8, maximum=3.0),
    dict(clip=0.5, ratio=0.95, maximum=2.0, kind="v_prediction"),
]


def sampler_for(case, timesteps=STEPS):
    return DDIMSampler(
        LINEAR,
        timesteps=timesteps,
        eta=case.get("eta", 0.0),
        prediction_type=case.get("kind", "epsilon"),
        set_alpha_to_one="final" not in case,
        clip_sample="clip" in case,
        clip_sample_range=case.get("clip"),
        use_clipped_model_output=case.get("use_clipped_model_output", False),
        thresholding="ratio" in case,
        dynamic_thresholding_ratio=case.get("ratio", 0.995),
        sample_max_value=case.get("maximum", 1.0),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_state_is_the_textbook_loop_in_float64(case):
    x_T, noises = stream_noises(5, len(STEPS), SHAPE)
    if "final" not in case:
        noises[-1] = noises[-1] * 0  # the last step adds none, and draws none
    states, x0s = textbook_loop(wavy, x_T.numpy(), [z.numpy() for z in noises], STEPS, **case)
    run = sampler_for(case).sample(
        wavy, SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64, return_trajectory=True
    )
    tolerance = 1e-6 if "ratio" in case else 1e-12  # thresholds are float32
    for got, expected in zip(run.x_t, states, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=tolerance, atol=tolerance)
    for got, expected in zip(run.x0, x0s, strict=True):
        np.testing.assert_allclose(
            got.numpy(), expected, rtol=tolerance, atol=100 * tolerance
        )  # eps-derived x0: 1/sqrt(4e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_samples_are_the_textbook_loop_with_the_standard_noise(case):
    seeds = [3, -1, 2**63 + 7]
    x_T, noises = standard_noises(seeds, len(STEPS), SHAPE)
    states, _ = textbook_loop(wavy, x_T.astype(float), [z.astype(float) for z in noises], STEPS, **case)
    got = sampler_for(case).sample(wavy, SHAPE, seeds=seeds)
    assert got.dtype == torch.float32
    scale = np.abs(states[-1]).max()
    np.testing.assert_allclose(got.numpy(), states[-1], rtol=0, atol=2e-4 * max(scale, 1))


# --- Gaussian data: everything is known -------------------------------------------------------------------------------


MU, S = 0.7, 0.9  # data N(MU, S^2)


def denoiser(kind, alpha_bar):
    """E[x0 | x_t] for data N(MU, S^2), as the model of this prediction type; tensors in, tensors out."""
    alpha_bar = torch.tensor(alpha_bar)

    def model(x, t):
        a = alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        x0 = MU + S**2 * a.sqrt() / (a * S**2 + 1 - a) * (x.double() - a.sqrt() * MU)
        eps = (x.double() - a.sqrt() * x0) / (1 - a).sqrt()
        m = {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]
        return m.to(x.dtype)

    return model


def moments(timesteps, alpha_bar, eta, mean=0.0, variance=1.0, eta_scales="std_dev", sigma_hat=False):
    """Mean and variance of the last state: each step is affine in x_t, so both follow step by step, in closed form."""
    for i, (a, prev) in enumerate(pairs_of(timesteps, alpha_bar)):
        gain = S**2 * math.sqrt(a) / (a * S**2 + 1 - a)  # x0 = gain x_t + offset
        offset = MU - gain * math.sqrt(a) * MU
        added = tilde_beta(a, prev) * (eta**2 if eta_scales == "std_dev" else eta)
        direction = math.sqrt(max(1 - prev - added, 0.0) / (1 - a))  # eps = (x_t - sqrt(a) x0) / sqrt(1 - a)
        if sigma_hat:
            added = 1 - a / prev if i + 1 < len(timesteps) else 0.0
        slope = math.sqrt(prev) * gain + direction * (1 - math.sqrt(a) * gain)
        mean = slope * mean + (math.sqrt(prev) - direction * math.sqrt(a)) * offset
        variance = slope**2 * variance + added
    return mean, variance


GAUSSIAN_CASES = [
    ("epsilon", torch.float32, dict(eta=0.0), dict(eta=0.6)),
    ("epsilon", torch.float32, dict(eta=1.0), dict(eta=0.9)),
    ("v_prediction", torch.float32, dict(eta=1.0), dict(eta=0.9)),
    ("sample", torch.float32, dict(eta=0.5), dict(eta=0.5, eta_scales="variance")),
    ("v_prediction", torch.float64, dict(eta=0.5), dict(eta=0.5, eta_scales="variance")),
    ("sample", torch.float64, dict(eta=1.0), dict(eta=0.9)),
    ("v_prediction", torch.float32, dict(eta=0.4, eta_scales="variance"), dict(eta=0.4)),
    ("epsilon", torch.float32, dict(eta=1.0, sigma_hat=True), dict(eta=1.0)),
]


@pytest.mark.parametrize(("kind", "dtype", "rule", "wrong"), GAUSSIAN_CASES, ids=str)
def test_gaussian_data_give_the_mean_and_variance_of_the_affine_recursion(kind, dtype, rule, wrong):
    """2e5 scalars. Bounds of 5 standard errors: each of the 16 checks would fail for one seed in 1.7 million; the seed is fixed."""
    sampler = DDIMSampler(LINEAR, 20, prediction_type=kind, timestep_spacing="trailing", **rule)
    noise = dict(generator=torch.Generator().manual_seed(11)) if dtype == torch.float64 else dict(seed=11)
    x = sampler.sample(denoiser(kind, ALPHA_BAR), (200, 1000), dtype=dtype, **noise).double()
    mean, variance = moments(sampler.timesteps, ALPHA_BAR, **rule)
    n = x.numel()
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 5 * math.sqrt(2 / n)
    # This has teeth: the wrong rule would move the variance by more than twice the bound.
    assert abs(moments(sampler.timesteps, ALPHA_BAR, **wrong)[1] / variance - 1) > 10 * math.sqrt(2 / n)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_many_steps_converge_to_the_data(kind, eta):
    """1000 steps of 4e4 scalars. Bounds: 5 standard errors, and 1 % of what 1000 steps are still off by."""
    sampler = DDIMSampler(LINEAR, 1000, eta, prediction_type=kind)
    mean, variance = moments(sampler.timesteps, ALPHA_BAR, eta)
    assert mean == pytest.approx(MU, abs=0.01)
    assert variance == pytest.approx(S**2, rel=0.02)
    if kind == "epsilon":
        x = sampler.sample(denoiser(kind, ALPHA_BAR), (40, 1000), seed=2).double()
        assert abs(float(x.mean()) - MU) < 0.01 + 5 * S / math.sqrt(x.numel())
        assert abs(float(x.var()) / S**2 - 1) < 0.02 + 5 * math.sqrt(2 / x.numel())


# A schedule that is even in theta, alpha_bar = cos(theta)^2, from clean data to theta = 1.4: smooth, with nothing singular at either
# end, and fine enough (20000 timesteps) that 25, 50, 100 and 200 steps are all evenly spaced. Orders are seen cleanly on it.
THETA = np.linspace(0, 1.4, 20001)
EVEN = NoiseSchedule.from_alphas_cumprod(np.cos(THETA) ** 2)
COUNTS = (25, 50, 100, 200)
MORE_COUNTS = (
    100,
    200,
    400,
    800,
)  # the second term of the variance's error at eta = 1 is large: 25 steps do not show the first alone


def even_timesteps(count):
    return tuple(range(20000, 0, -(20000 // count)))


def order(counts, errors):
    """Minus the slope of log(error) over log(N)."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_deterministic_sampling_converges_with_order_one(kind):
    """To the probability flow: for N(MU, S^2) it carries x_t's distance from its mean, in standard deviations, unchanged."""
    x_T = torch.linspace(-3, 3, 13, dtype=torch.float64)[None]
    a = math.cos(1.4) ** 2
    exact = MU + S * (x_T - math.sqrt(a) * MU) / math.sqrt(a * S**2 + 1 - a)
    errors = []
    for count in COUNTS:
        sampler = DDIMSampler(EVEN, timesteps=even_timesteps(count), prediction_type=kind)
        x = sampler.sample(denoiser(kind, EVEN.alphas_cumprod), x_T=x_T, seed=0)
        assert x.dtype == torch.float64
        errors.append(float((x - exact).abs().max()))
    assert 0.9 < order(COUNTS, errors) < 1.1, errors
    assert errors[-1] < 0.02


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_variance_error_at_eta_one_falls_with_order_one(kind):
    """Through the plan's rows alone, so without sampling error: x_prev = slope x_t + offset + std_dev z."""
    a = math.cos(1.4) ** 2
    errors, mean_errors = [], []
    for count in MORE_COUNTS:
        plan = SamplingPlan(EVEN, even_timesteps(count), kind, eta=1.0)
        mean, variance = math.sqrt(a) * MU, a * S**2 + 1 - a
        model = denoiser(kind, EVEN.alphas_cumprod)
        for step in plan.steps:
            fold_x, fold_m = step.coefficients.folded
            at = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
            zero, one = (fold_x * at + fold_m * model(at, torch.tensor([step.t])))[0].tolist()
            mean, variance = (one - zero) * mean + zero, (one - zero) ** 2 * variance + step.std_dev_t**2
        own = moments(even_timesteps(count), EVEN.alphas_cumprod, 1.0, math.sqrt(a) * MU, a * S**2 + 1 - a)
        assert (mean, variance) == pytest.approx(own, rel=1e-9)
        errors.append(abs(variance - S**2))
        mean_errors.append(abs(mean - MU))
    assert 0.9 < order(MORE_COUNTS, errors) < 1.1, errors
    assert errors[-1] < 0.03 * S**2
    assert max(mean_errors) < 1e-9  # the mean is exact: the denoiser keeps it


# --- Seeds and bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_batch_cut_anywhere_gives_the_same_bits(eta, dtype):
    sampler = DDIMSampler(LINEAR, 7, eta, clip_sample=True)
    shape = (7, 3, 5, 5)
    seeds = sample_seeds(9, 7).tolist()
    whole = sampler.sample(wavy, shape, seeds=seeds, dtype=dtype)
    for cuts in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 7], [0, 6, 7], [0, 0, 7]):
        parts = [
            sampler.sample(wavy, (j - i, *shape[1:]), seeds=seeds[i:j], dtype=dtype)
            for i, j in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 7


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 30001), (41, 3, 24, 24)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, eta):
    """Both shapes are past the size (8192 elements with noise, 32768 without) from which the kernel shares out its work."""
    sampler = DDIMSampler(LINEAR, 3, eta)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(sampler.sample(wavy, shape, seed=4))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_permuted_seeds_permute_the_samples():
    sampler = DDIMSampler(LINEAR, 6, 1.0)
    seeds = [5, 0, 2**64 - 1, 77]
    order_ = [2, 0, 3, 1]
    given = sampler.sample(wavy, (4, 2, 3), seeds=seeds)
    permuted = sampler.sample(wavy, (4, 2, 3), seeds=[seeds[i] for i in order_])
    assert torch.equal(permuted, given[order_])
    same = sampler.sample(wavy, (4, 2, 3), seeds=[8, 8, 8, 8])
    assert torch.equal(same, same[:1].expand(4, -1, -1))


def test_one_seed_means_the_sample_seeds_made_of_it():
    sampler = DDIMSampler(LINEAR, 6, 1.0)
    by_seed = sampler.sample(wavy, (5, 2, 3), seed=123)
    for seeds in (
        sample_seeds(123, 5),
        sample_seeds(123, 5).tolist(),
        torch.from_numpy(sample_seeds(123, 5)),
        [int(s) % 2**64 for s in sample_seeds(123, 5)],
        tuple(sample_seeds(123, 5)),
    ):
        assert torch.equal(sampler.sample(wavy, (5, 2, 3), seeds=seeds), by_seed)
    assert not torch.equal(sampler.sample(wavy, (5, 2, 3), seed=124), by_seed)


def test_unsigned_numpy_seeds_are_64_bit_seeds_like_any_other():
    sampler = DDIMSampler(LINEAR, 3, 1.0)
    wanted = sampler.sample(wavy, (2, 2, 3), seeds=[2**63 + 5, 1])
    got = sampler.sample(wavy, (2, 2, 3), seeds=np.array([2**63 + 5, 1], dtype=np.uint64))
    assert torch.equal(got, wanted)
    assert torch.equal(sampler.sample(wavy, (2, 2, 3), seeds=list(np.array([2**63 + 5, 1], dtype=np.uint64))), wanted)


@pytest.mark.parametrize(
    ("seed", "error", "said"),
    [
        (-5, ValueError, r"in \[0, 2\*\*64\), got -5"),
        (2**64, ValueError, "got 18446744073709551616"),
        (1.5, TypeError, "1.5"),
    ],
)
def test_a_wrong_seed_is_refused_also_where_none_is_needed(seed, error, said):
    sampler, x_T = DDIMSampler(NoiseSchedule.linear(), 2), random(0, dtype=torch.float32)
    for given in ({}, {"x_T": x_T}):
        with pytest.raises(error, match=said):
            sampler.sample(wavy, x_T.shape, seed=seed, **given)


def test_no_seed_is_drawn_where_none_is_needed():
    sampler, x_T = DDIMSampler(NoiseSchedule.linear(), 2), random(0, dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampler.sample(wavy, x_T=x_T)
    assert torch.equal(torch.get_rng_state(), before)
    sampler.sample(wavy, x_T.shape)
    assert not torch.equal(torch.get_rng_state(), before)


def test_manual_seed_fixes_the_default_and_each_run_moves_on():
    sampler = DDIMSampler(LINEAR, 3, 1.0)
    torch.manual_seed(0)
    first, second = sampler.sample(wavy, (2, 3)), sampler.sample(wavy, (2, 3))
    torch.manual_seed(0)
    assert torch.equal(sampler.sample(wavy, (2, 3)), first)
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    sampler.sample(wavy, (2, 3), seed=1)
    sampler.sample(wavy, (2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)  # who names a seed leaves torch's generator alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_generator_gives_torchs_own_stream(dtype):
    shape = (2, 3, 8)
    sampler = DDIMSampler(LINEAR, timesteps=STEPS, eta=1.0, set_alpha_to_one=False)
    generator = torch.Generator().manual_seed(3)
    run = sampler.sample(lambda x, t: 0 * x, shape, generator=generator, dtype=dtype, return_trajectory=True)
    x_T, noises = stream_noises(3, len(STEPS) - 1, shape, dtype)  # the step 0 -> 0 adds nothing and draws nothing
    assert torch.equal(run.x_t[0], x_T)
    for i, (a, prev) in enumerate(pairs_of(STEPS)[:-1]):
        expected = math.sqrt(prev / a) * run.x_t[i].double() + math.sqrt(tilde_beta(a, prev)) * noises[i].double()
        eps = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(run.x_t[i + 1].double(), expected, rtol=eps, atol=eps * float(expected.abs().max()))
    assert torch.equal(
        torch.randn(3, generator=generator), torch.randn(3, generator=_after(3, len(STEPS), shape, dtype))
    )


def _after(seed, draws, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        torch.randn(shape, generator=generator, dtype=dtype)
    return generator


def test_deterministic_sampling_draws_the_start_and_no_more():
    generator = torch.Generator().manual_seed(3)
    DDIMSampler(LINEAR, 5).sample(wavy, (2, 3, 8), generator=generator)
    assert torch.equal(
        torch.randn(4, generator=generator), torch.randn(4, generator=_after(3, 1, (2, 3, 8), torch.float32))
    )


def test_the_start_is_the_standard_noise_of_the_initial_stream():
    run = DDIMSampler(LINEAR, 2).sample(wavy, (3, 2, 5), seeds=[4, 5, 6], return_trajectory=True)
    expected = standard_normals([4, 5, 6], 10, 0, NoiseStream.INITIAL).reshape(3, 2, 5)
    np.testing.assert_array_equal(run.x_t[0].numpy(), expected)


# --- x_T, dtypes, sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "requires_grad", "expanded", "inference"])
@pytest.mark.parametrize("extra", [dict(), dict(return_trajectory=True)], ids=["samples", "trajectory"])
def test_a_given_start_is_where_it_starts_and_is_not_changed(kind, extra):
    with torch.inference_mode(kind == "inference"):
        x_T = random(1).clone()
    if kind == "requires_grad":
        x_T.requires_grad_()
    if kind == "expanded":
        x_T = x_T[:1].expand(3, -1, -1, -1)
    before = x_T.detach().clone()
    run = DDIMSampler(LINEAR, timesteps=STEPS, eta=1.0).sample(wavy, x_T=x_T, seed=0, **extra)
    assert torch.equal(x_T, before)
    if extra:
        assert torch.equal(run.x_t[0], before)
        assert run.x_t[0].data_ptr() != x_T.data_ptr()
    else:
        assert not run.requires_grad


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every other"])
def test_a_given_start_may_have_any_layout(layout):
    plain = random(1, (2, 4, 6, 6), torch.float32)
    other = {
        "channels_last": lambda: plain.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: plain.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda: plain.repeat_interleave(2, dim=3)[..., ::2],
    }[layout]()
    assert torch.equal(other, plain)
    assert not other.is_contiguous()
    sampler = DDIMSampler(LINEAR, 4, 1.0)
    assert torch.equal(sampler.sample(wavy, x_T=other, seed=3), sampler.sample(wavy, x_T=plain, seed=3))


def test_a_given_start_and_seeds_are_the_start_and_the_noise_of_the_steps():
    shape = (2, 3, 4)
    x_T, noises = standard_noises([6, 7], 3, shape)
    sampler = DDIMSampler(LINEAR, 3, 1.0)
    start = random(0, shape, torch.float32)
    got = sampler.sample(wavy, x_T=start, seeds=[6, 7])
    states, _ = textbook_loop(
        wavy, start.double().numpy(), [z.astype(float) for z in noises], sampler.timesteps, eta=1.0
    )
    np.testing.assert_allclose(got.numpy(), states[-1], atol=1e-4)
    assert torch.equal(
        sampler.sample(wavy, x_T=torch.from_numpy(x_T), seeds=[6, 7]), sampler.sample(wavy, shape, seeds=[6, 7])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_dtype_asked_for_and_the_model_sees_it(dtype, eta):
    seen = set()

    def model(x, t):
        seen.add((x.dtype, t.dtype, tuple(t.shape)))
        return wavy(x, t)

    sampler = DDIMSampler(LINEAR, 5, eta, clip_sample=True)
    got = sampler.sample(model, SHAPE, seed=0, dtype=dtype)
    assert got.dtype == dtype
    assert seen == {(dtype, torch.int64, (3,))}
    exact = sampler.sample(wavy, SHAPE, seed=0, dtype=torch.float64)
    allowed = {torch.float64: 1e-15, torch.float32: 1e-5}.get(dtype, 40 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("model_dtype", [*HALF, torch.float64])
def test_the_model_may_work_in_another_dtype_than_the_samples(model_dtype):
    def model(x, t):
        assert x.dtype == model_dtype
        return wavy(x, t)

    def rounding(x, t):  # the same by hand: round what the model is given and what it returns
        return wavy(x.to(model_dtype), t).float()

    sampler = DDIMSampler(LINEAR, 6, 1.0, clip_sample=True)
    run = sampler.sample(model, SHAPE, seed=0, model_dtype=model_dtype, return_trajectory=True)
    by_hand = sampler.sample(rounding, SHAPE, seed=0)
    assert all(x.dtype == torch.float32 for x in (*run.x_t, *run.x0))
    torch.testing.assert_close(run.samples, by_hand, rtol=0, atol=1e-5)
    assert torch.equal(sampler.sample(model, SHAPE, seed=0, model_dtype=model_dtype), run.samples)


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 0, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "extra", [dict(), dict(generator=0), dict(dtype=torch.float64), dict(dtype=torch.float16)], ids=str
)
def test_nothing_to_sample_is_fine(shape, eta, extra):
    extra = {k: torch.Generator() if k == "generator" else v for k, v in extra.items()}
    calls = []
    got = DDIMSampler(LINEAR, 3, eta).sample(lambda x, t: calls.append(x.shape) or x.clone(), shape, **extra)
    assert got.shape == shape
    assert calls == [shape] * 3
    thresholding = DDIMSampler(LINEAR, 3, eta, thresholding=True)
    assert thresholding.sample(lambda x, t: x.clone(), shape, **extra).shape == shape


@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 7), (2, 3, 4, 5), (1, 2, 3, 2, 2)], ids=str)
def test_samples_may_have_any_number_of_dimensions(shape):
    got = DDIMSampler(LINEAR, 3, 1.0).sample(wavy, shape, seed=1)
    flat = DDIMSampler(LINEAR, 3, 1.0).sample(wavy, (shape[0], math.prod(shape[1:])), seed=1)
    assert got.shape == shape
    assert torch.equal(got.flatten(1), flat)


# --- Timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.filterwarnings("ignore:one step from noise")
def test_as_many_model_calls_as_steps_at_the_timesteps_chosen(count, spacing):
    seen = []
    sampler = DDIMSampler(LINEAR, count, timestep_spacing=spacing)
    sampler.sample(lambda x, t: seen.append(t.tolist()) or x * 0, (2, 1), seed=0)
    assert seen == [[t, t] for t in select_timesteps(count, 1000, spacing)]
    assert sampler.num_inference_steps == len(seen) == count


def test_one_step_is_the_prediction_of_x0():
    x_T = random(0)
    got = DDIMSampler(LINEAR, timesteps=[700], prediction_type="v_prediction").sample(wavy, x_T=x_T)
    a = ALPHA_BAR[700]
    expected = math.sqrt(a) * x_T - math.sqrt(1 - a) * wavy(x_T, torch.full((3,), 700))
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_timesteps_may_be_a_list_or_a_respacing_string():
    for given, expected in (
        ([999, 500, 3], (999, 500, 3)),
        (np.array([999, 500, 3]), (999, 500, 3)),
        (torch.tensor([999, 500, 3]), (999, 500, 3)),
        ("ddim50", tuple(range(980, -1, -20))),
        ("10,15,20", respaced_timesteps("10,15,20", 1000)),
    ):
        sampler = DDIMSampler(LINEAR, timesteps=given)
        assert sampler.timesteps == expected
        assert tuple(s.t for s in sampler.plan().steps) == expected
        assert DDIMSampler(LINEAR, len(expected), timesteps=given).num_inference_steps == len(expected)
    assert len(DDIMSampler(LINEAR, timesteps="10,15,20").timesteps) == 45
    assert DDIMSampler(LINEAR, 10, steps_offset=1).timesteps == tuple(range(901, 0, -100))
    assert DDIMSampler(LINEAR).num_inference_steps == 50
    assert DDIMSampler(LINEAR, 7, timestep_spacing="log_snr").num_inference_steps == 7


# --- What models return -----------------------------------------------------------------------------------------------


class Output:
    def __init__(self, sample):
        self.sample = sample


Pair = namedtuple("Pair", "prediction extra")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: (m,),
        lambda m: (m, "more"),
        lambda m: [m, None],
        lambda m: Pair(m, 1),
        lambda m: {"sample": m, "other": 1},
        lambda m: OrderedDict(sample=m),
        lambda m: UserDict(sample=m),
        Output,
        lambda m: SimpleNamespace(sample=m),
        lambda m: torch.cat([m, m * 0 + math.nan], dim=1),
        lambda m: (torch.cat([m, m * 0 + math.nan], dim=1),),
        lambda m: torch.nn.Parameter(m),
        lambda m: m.transpose(1, 2).contiguous().transpose(1, 2),
        lambda m: torch.stack([m, m], dim=-1)[..., 0],
    ],
    ids=[
        "tensor",
        "tuple1",
        "tuple2",
        "list",
        "namedtuple",
        "dict",
        "OrderedDict",
        "Mapping",
        "object",
        "namespace",
        "learned_variance",
        "learned_variance_in_tuple",
        "parameter",
        "transposed",
        "strided",
    ],
)
@pytest.mark.parametrize("extra", [dict(eta=0.0), dict(eta=1.0), dict(thresholding=True)], ids=str)
def test_what_a_model_may_return(wrap, extra):
    sampler = DDIMSampler(LINEAR, 4, **extra)
    plain = sampler.sample(wavy, SHAPE, seed=0)
    got = sampler.sample(lambda x, t: wrap(wavy(x, t)), SHAPE, seed=0)
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-6)
    assert got.isfinite().all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("keep", [False, True])
def test_a_model_may_return_its_input_or_a_view_of_it(eta, keep):
    """The update works in place, so the prediction may be the memory it writes."""
    sampler = DDIMSampler(LINEAR, 4, eta, prediction_type="v_prediction")
    for view in (lambda x: x, lambda x: x.view_as(x), lambda x: x.transpose(2, 3), lambda x: x.roll(1, 1)):
        expected = sampler.sample(lambda x, t, view=view: view(x).clone(), (2, 3, 4, 4), seed=0)
        got = sampler.sample(
            lambda x, t, view=view: view(x), (2, 3, 4, 4), seed=0, callback=(lambda *_: None) if keep else None
        )
        assert torch.equal(got, expected)


def test_gradients_the_model_wants_do_not_matter():
    weight = torch.nn.Parameter(torch.tensor(0.3))

    def model(x, t):
        with torch.enable_grad():
            return x * weight

    expected = DDIMSampler(LINEAR, 4, 1.0).sample(lambda x, t: x * 0.3, SHAPE, seed=0)
    assert torch.equal(DDIMSampler(LINEAR, 4, 1.0).sample(model, SHAPE, seed=0), expected)


WRONG_OUTPUTS = [
    (lambda x: None, TypeError, "NoneType"),
    (lambda x: 3, TypeError, "int"),
    (lambda x: "x", TypeError, "str"),
    (lambda x: (), TypeError, "tuple"),
    (lambda x: [], TypeError, "list"),
    (lambda x: (None, x), TypeError, "tuple"),
    (lambda x: {}, TypeError, "dict"),
    (lambda x: {"out": x}, TypeError, "dict"),
    (lambda x: np.zeros(x.shape), TypeError, "ndarray"),
    (lambda x: torch.distributions.Normal(x, 1.0), TypeError, "Normal"),
    (lambda x: SimpleNamespace(sample=lambda: x), TypeError, "SimpleNamespace"),
    (lambda x: x[:, :1], ValueError, r"\(3, 1, 4, 5\)"),
    (lambda x: x[0], ValueError, r"\(2, 4, 5\)"),
    (lambda x: x[:2], ValueError, r"\(2, 2, 4, 5\)"),
    (lambda x: x[..., None], ValueError, r"\(3, 2, 4, 5, 1\)"),
    (lambda x: torch.cat([x, x, x], 1), ValueError, r"\(3, 6, 4, 5\)"),
    (lambda x: torch.zeros(3, 4, 2, 2), ValueError, r"got \(3, 4, 2, 2\)"),
    (lambda x: x.to("meta"), ValueError, "meta"),
    (lambda x: x.long(), TypeError, "int64"),
    (lambda x: x > 0, TypeError, "bool"),
    (lambda x: torch.complex(x, x), TypeError, "complex"),
    (lambda x: x.to_sparse(), TypeError, "sparse"),
]


@pytest.mark.parametrize(("wrong", "error", "received"), WRONG_OUTPUTS)
def test_what_a_model_must_not_return(wrong, error, received):
    with pytest.raises(error, match=f"(a model must return|dense).*{received}"):
        DDIMSampler(LINEAR, 2).sample(lambda x, t: wrong(x), SHAPE, seed=0)


def test_a_models_own_error_comes_through():
    def model(x, t):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        DDIMSampler(LINEAR, 2).sample(model, SHAPE, seed=0)
    assert not torch.is_inference_mode_enabled()


# --- What models say of themselves ------------------------------------------------------------------------------------


class Stating:
    """A model with attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.calls = []

    def __call__(self, x, t, **conditioning):
        self.calls.append(conditioning)
        return wavy(x, t)


def test_the_models_prediction_type_is_used():
    for kind in ("epsilon", "sample", "v_prediction"):
        told = DDIMSampler(LINEAR, 4, prediction_type=kind).sample(wavy, SHAPE, seed=0)
        assert torch.equal(DDIMSampler(LINEAR, 4).sample(Stating(prediction_type=kind), SHAPE, seed=0), told)
        both = DDIMSampler(LINEAR, 4, prediction_type=kind).sample(Stating(prediction_type=kind), SHAPE, seed=0)
        assert torch.equal(both, told)
    assert DDIMSampler(LINEAR, 4).plan(wavy).prediction_type == "epsilon"
    assert DDIMSampler(LINEAR, 4).plan().prediction_type == "epsilon"


def test_contradicting_prediction_types_are_refused():
    with pytest.raises(ValueError, match=r"'v_prediction'.*'epsilon'"):
        DDIMSampler(LINEAR, 4, prediction_type="epsilon").sample(Stating(prediction_type="v_prediction"), SHAPE)
    with pytest.raises(ValueError, match="'velocity'"):
        DDIMSampler(LINEAR, 4).sample(Stating(prediction_type="velocity"), SHAPE)


def test_zero_terminal_snr_is_refused_when_the_model_turns_out_to_predict_epsilon():
    schedule = LINEAR.rescale_zero_terminal_snr()
    sampler = DDIMSampler(schedule, 3, timestep_spacing="trailing")
    assert sampler.sample(Stating(prediction_type="v_prediction"), SHAPE, seed=0).isfinite().all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sampler.sample(wavy, SHAPE, seed=0)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDIMSampler(schedule, 3, timestep_spacing="trailing", prediction_type="epsilon")


def test_the_models_clip_range_is_used_unless_the_sampler_says_otherwise():
    def clip_of(model, **arguments):
        return DDIMSampler(LINEAR, 4, **arguments).plan(model).clip_sample_range

    assert clip_of(wavy) is None
    assert clip_of(Stating(clip_sample_range=2.0)) == 2.0
    assert clip_of(Stating(clip_sample_range=None)) is None
    assert clip_of(Stating(clip_sample_range=2.0), clip_sample=False) is None
    assert clip_of(Stating(clip_sample_range=2.0), clip_sample=True) == 2.0
    assert clip_of(Stating(clip_sample_range=2.0), clip_sample_range=3.0) == 3.0
    assert clip_of(wavy, clip_sample=True) == 1.0
    assert clip_of(wavy, clip_sample=True, clip_sample_range=0.5) == 0.5
    assert clip_of(wavy, clip_sample_range=0.5) == 0.5
    assert clip_of(wavy, thresholding=True) == 1.0
    assert clip_of(Stating(clip_sample_range=2.0), thresholding=True) == 2.0
    x = DDIMSampler(LINEAR, 4).sample(Stating(clip_sample_range=0.25), SHAPE, seed=0)
    assert float(x.abs().max()) == 0.25  # the last step's result is x0


def test_a_plan_for_one_model_does_not_leak_into_the_next():
    sampler = DDIMSampler(LINEAR, 4)
    first = sampler.sample(wavy, SHAPE, seed=0)
    sampler.sample(Stating(prediction_type="v_prediction", clip_sample_range=0.5), SHAPE, seed=0)
    assert torch.equal(sampler.sample(wavy, SHAPE, seed=0), first)


# --- Guidance ---------------------------------------------------------------------------------------------------------


class Conditional:
    """Its conditioning shifts the prediction; remembers what it was called with."""

    def __init__(self, with_unconditional=False):
        self.calls = []
        if with_unconditional:
            self.unconditional = lambda conditioning: {**conditioning, "label": None}

    def __call__(self, x, t, **conditioning):
        self.calls.append(conditioning)
        label = conditioning.get("label")
        shift = 0.0 if label is None else label
        return wavy(x, t) + shift * torch.tanh(2 * x + 0.3)


@pytest.mark.filterwarnings("ignore:guidance_scale should be at least 0")
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5, -1.0])
@pytest.mark.parametrize("how", ["model", "argument"])
def test_guidance_is_the_unconditional_output_plus_scale_times_the_difference(scale, how):
    model = Conditional(with_unconditional=how == "model")
    arguments = {} if how == "model" else {"unconditional_conditioning": {"label": None, "pooled": 1}}
    extra = dict(eta=0.6, clip_sample=True)
    run = DDIMSampler(LINEAR, timesteps=STEPS, **extra).sample(
        model,
        SHAPE,
        seed=0,
        conditioning={"label": 0.4, "pooled": 1},
        guidance_scale=scale,
        dtype=torch.float64,
        **arguments,
    )

    def combined(x, t):
        c, u = (wavy(x, t) + s * torch.tanh(2 * x + 0.3) for s in (0.4, 0.0))
        return u + scale * (c - u)

    expected = DDIMSampler(LINEAR, timesteps=STEPS, **extra).sample(combined, SHAPE, seed=0, dtype=torch.float64)
    torch.testing.assert_close(run, expected, rtol=0, atol=1e-11)
    assert model.calls == [{"label": 0.4, "pooled": 1}, {"label": None, "pooled": 1}] * len(STEPS)
    single = DDIMSampler(LINEAR, timesteps=STEPS, **extra).sample(
        model, SHAPE, seed=0, conditioning={"label": 0.4, "pooled": 1}, guidance_scale=scale, **arguments
    )
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-4 * (1 + abs(scale)))


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_no_guidance_calls_the_model_once(scale):
    model = Conditional()
    got = DDIMSampler(LINEAR, 5).sample(model, SHAPE, seed=0, conditioning={"label": 0.4}, guidance_scale=scale)
    assert model.calls == [{"label": 0.4}] * 5
    shifted = lambda x, t: wavy(x, t) + 0.4 * torch.tanh(2 * x + 0.3)  # noqa: E731 (a model in a line)
    assert torch.equal(got, DDIMSampler(LINEAR, 5).sample(shifted, SHAPE, seed=0))


def test_guidance_and_thresholding_see_the_guided_prediction():
    case = dict(eta=0.4, clip=1.0, ratio=0.8, maximum=3.0)
    x_T, noises = standard_noises([3, 4, 5], len(STEPS), SHAPE)

    def combined(x, t):
        return wavy(x, t) + 2.5 * 0.4 * np.tanh(2 * x + 0.3)

    states, _ = textbook_loop(combined, x_T.astype(float), [z.astype(float) for z in noises], STEPS, **case)
    got = sampler_for(case).sample(
        Conditional(True), SHAPE, seeds=[3, 4, 5], conditioning={"label": 0.4}, guidance_scale=2.5
    )
    np.testing.assert_allclose(got.numpy(), states[-1], rtol=0, atol=2e-4)


def test_guidance_without_an_unconditional_output_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale=2\.5.*unconditional_conditioning"):
        DDIMSampler(LINEAR, 5).sample(Conditional(), SHAPE, seed=0, conditioning={"label": 1.0}, guidance_scale=2.5)
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"guidance_scale.*{scale}"):
            DDIMSampler(LINEAR, 5).sample(Conditional(True), SHAPE, seed=0, guidance_scale=scale)


def test_guidance_survives_a_model_that_returns_the_same_memory_every_time():
    """As CUDA graphs do. If that is refused, it must be refused aloud."""
    buffer = torch.empty(SHAPE)
    model = Conditional(True)

    def static(x, t, **conditioning):
        return buffer.copy_(model(x, t, **conditioning))

    arguments = dict(seed=0, conditioning={"label": 0.4}, guidance_scale=3.0)
    expected = DDIMSampler(LINEAR, 3).sample(model, SHAPE, **arguments)
    try:
        got = DDIMSampler(LINEAR, 3).sample(static, SHAPE, **arguments, unconditional_conditioning={"label": None})
    except (TypeError, ValueError):
        return
    assert torch.equal(got, expected)


def test_conditioning_given_is_not_changed():
    class Rude(Conditional):
        def __call__(self, x, t, **conditioning):
            conditioning.clear()
            return wavy(x, t)

    conditioning = {"label": 0.4}
    DDIMSampler(LINEAR, 2).sample(Rude(True), SHAPE, seed=0, conditioning=conditioning, guidance_scale=2.0)
    assert conditioning == {"label": 0.4}


# --- Callback and trajectory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("model_dtype", [None, torch.float16])
def test_the_callback_is_told_what_the_model_saw_and_predicted(eta, model_dtype):
    saw, told = [], []

    def model(x, t):
        m = wavy(x, t)
        saw.append((x.clone(), t.clone(), m.clone()))
        return m

    def callback(step, t, x_t, x0):
        told.append((step, t, x_t.clone(), x0.clone()))

    sampler = DDIMSampler(LINEAR, timesteps=STEPS, eta=eta, prediction_type="v_prediction")
    sampler.sample(model, SHAPE, seed=0, callback=callback, model_dtype=model_dtype)
    assert [(step, t) for step, t, *_ in told] == list(enumerate(STEPS))
    for (x, t, m), (_, told_t, x_t, x0) in zip(saw, told, strict=True):
        assert t.tolist() == [told_t] * 3
        assert type(told_t) is int
        assert torch.equal(x, x_t.to(x.dtype))
        a = ALPHA_BAR[told_t]
        expected = math.sqrt(a) * x_t.double() - math.sqrt(1 - a) * m.double()
        torch.testing.assert_close(x0.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_callback_and_trajectory_do_not_change_the_result(eta, clip):
    for dtype in (torch.float32, torch.float16, torch.float64):
        sampler = DDIMSampler(LINEAR, timesteps=STEPS, eta=eta, clip_sample_range=clip)
        plain = sampler.sample(wavy, SHAPE, seed=0, dtype=dtype)
        assert torch.equal(sampler.sample(wavy, SHAPE, seed=0, dtype=dtype, callback=lambda *_: None), plain)
        run = sampler.sample(wavy, SHAPE, seed=0, dtype=dtype, return_trajectory=True)
        assert torch.equal(run.samples, plain)
        timed = sampler.sample(wavy, SHAPE, seed=0, dtype=dtype, timing=Timing(), progress=False)
        assert torch.equal(timed, plain)


def test_a_trajectory_holds_every_state():
    saw = []
    sampler = DDIMSampler(LINEAR, timesteps=STEPS, eta=0.5)
    run = sampler.sample(lambda x, t: saw.append(x.clone()) or wavy(x, t), SHAPE, seed=0, return_trajectory=True)
    assert isinstance(run, Trajectory)
    assert run.timesteps == list(STEPS)
    assert (len(run.x_t), len(run.x0)) == (len(STEPS) + 1, len(STEPS))
    for seen, kept in zip(saw, run.x_t[:-1], strict=True):
        assert torch.equal(seen, kept)
    assert run.samples is run.x_t[-1]
    assert torch.equal(run.x0[-1], run.samples)  # the last step goes to x0
    assert len({x.data_ptr() for x in (*run.x_t, *run.x0)}) == 2 * len(STEPS) + 1  # none shares memory


@pytest.mark.parametrize("stop_at", [0, 2, len(STEPS) - 1])
def test_a_callback_that_returns_true_stops_the_run_after_its_step(stop_at):
    sampler = DDIMSampler(LINEAR, timesteps=STEPS, eta=0.5)
    whole = sampler.sample(wavy, SHAPE, seed=0, return_trajectory=True)
    calls = []

    def model(x, t):
        calls.append(1)
        return wavy(x, t)

    def callback(step, t, x_t, x0):
        return step == stop_at

    assert torch.equal(sampler.sample(model, SHAPE, seed=0, callback=callback), whole.x_t[stop_at + 1])
    assert len(calls) == stop_at + 1
    run = sampler.sample(model, SHAPE, seed=0, callback=callback, return_trajectory=True)
    assert (len(run.timesteps), len(run.x_t), len(run.x0)) == (stop_at + 1, stop_at + 2, stop_at + 1)
    assert torch.equal(run.samples, whole.x_t[stop_at + 1])


@pytest.mark.parametrize("answer", [None, False, 1, "yes"])
def test_a_callback_that_returns_anything_else_does_not_stop_the_run(answer):
    steps = []
    DDIMSampler(LINEAR, 5).sample(wavy, SHAPE, seed=0, callback=lambda step, *_: steps.append(step) or answer)
    assert steps == [0, 1, 2, 3, 4]


def test_timing_counts_every_step():
    timing = Timing()
    DDIMSampler(LINEAR, 5).sample(wavy, SHAPE, seed=0, timing=timing)
    assert timing.steps == 5
    assert timing.model_seconds > 0
    assert timing.update_seconds > 0


# --- Memory and autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("extra", "buffers"),
    [(dict(), 1), (dict(generator=True), 1), (dict(callback=lambda *_: None), 2), (dict(model_dtype=torch.float16), 1)],
    ids=["plain", "generator", "callback", "model_dtype"],
)
def test_the_model_sees_the_same_buffers_in_every_step(extra, buffers, eta, dtype):
    extra = {k: torch.Generator() if k == "generator" else v for k, v in extra.items()}
    seen, hold = set(), []

    def model(x, t):
        seen.add(x.data_ptr())
        hold.append(torch.empty_like(x))  # whoever frees and allocates gets another address
        return wavy(x, t)

    DDIMSampler(LINEAR, 12, eta).sample(model, SHAPE, dtype=dtype, **extra)
    assert len(seen) <= buffers


def allocations(call):
    """Allocations and bytes that torch's CPU allocator served during the call, as the profiler saw them."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in events if e.nbytes() > 0]
    return len(sizes), sum(sizes)


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize(
    ("extra", "eta"),
    [
        (dict(), 0.0),
        (dict(), 1.0),
        (dict(generator=True), 1.0),
        (dict(callback=lambda *_: None), 0.0),
        (dict(model_dtype=torch.bfloat16), 1.0),
        (dict(guidance=True), 1.0),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else str(value),
)
def test_steps_allocate_nothing(extra, eta):
    """The model returns the same tensors every time, so whatever more steps allocate is the sampler's."""
    shape = (16, 3, 8, 8)
    fixed = {None: torch.zeros(shape, dtype=extra.get("model_dtype", torch.float32))}
    fixed[1] = fixed[None].clone()

    def run(count):
        arguments = {k: torch.Generator() if k == "generator" else v for k, v in extra.items() if k != "guidance"}
        if "guidance" in extra:
            arguments |= dict(conditioning={"c": 1}, unconditional_conditioning={}, guidance_scale=2.0)
        sampler = DDIMSampler(LINEAR, count, eta)
        return lambda: sampler.sample(lambda x, t, c=None: fixed[c], shape, **arguments)

    run(5)(), run(25)()  # the first run of a plan makes its timesteps
    few, few_bytes = allocations(run(5))
    many, many_bytes = allocations(run(25))
    assert few > 0  # else nothing was measured
    assert many == few
    assert many_bytes - few_bytes <= 20 * 8 * 16  # the table of timesteps


def test_samples_are_ordinary_tensors():
    weight = torch.ones((), requires_grad=True)
    x_T = random(0, dtype=torch.float32)
    sampler = DDIMSampler(LINEAR, 3, 1.0)
    results = [
        sampler.sample(wavy, SHAPE, seed=0),
        sampler.sample(wavy, x_T=x_T),
        sampler.sample(wavy, SHAPE, generator=torch.Generator()),
        sampler.sample(wavy, SHAPE, dtype=torch.float64),
        sampler.sample(wavy, SHAPE, callback=lambda *_: None),
        sampler.sample(wavy, SHAPE, backend="reference"),
    ]
    for x in results:
        assert not x.is_inference()
        assert not x.requires_grad
        (x * weight).sum().backward()
        x.mul_(2)


def test_a_trajectory_holds_ordinary_tensors():
    weight = torch.ones((), requires_grad=True)
    run = DDIMSampler(LINEAR, 3, 1.0).sample(wavy, SHAPE, seed=0, return_trajectory=True)
    for x in (*run.x_t, *run.x0):
        assert not x.is_inference()
        (x * weight).sum().backward()


def test_backends_agree_and_an_unknown_one_is_refused():
    sampler = DDIMSampler(LINEAR, 6, 1.0)
    plain = sampler.sample(wavy, SHAPE, seed=0)
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(sampler.sample(wavy, SHAPE, seed=0, backend=backend), plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'gpu'"):
        sampler.sample(wavy, SHAPE, seed=0, backend="gpu")


def test_progress_shows_a_bar(capsys):
    DDIMSampler(LINEAR, 3).sample(wavy, SHAPE, seed=0)
    assert capsys.readouterr().err == ""
    DDIMSampler(LINEAR, 3).sample(wavy, SHAPE, seed=0, progress=True)
    assert "3/3" in capsys.readouterr().err


# --- Refusals ---------------------------------------------------------------------------------------------------------


CONSTRUCTOR_REFUSALS = [
    (dict(schedule=ALPHA_BAR), TypeError, "ndarray"),
    (dict(schedule="linear"), TypeError, "str"),
    (dict(num_inference_steps=0), ValueError, "0"),
    (dict(num_inference_steps=-3), ValueError, "-3"),
    (dict(num_inference_steps=1001), ValueError, "1001"),
    (dict(num_inference_steps=2.5), TypeError, "2.5"),
    (dict(timestep_spacing="linear"), ValueError, "'linear'"),
    (dict(timesteps=[5, 7]), ValueError, "7"),
    (dict(timesteps=[1000, 7]), ValueError, "1000"),
    (dict(timesteps=[]), ValueError, r"\[\]"),
    (dict(timesteps="ddim"), ValueError, "'ddim'"),
    (dict(timesteps="ddim2000"), ValueError, "2000"),
    (dict(timesteps=[9, 7], num_inference_steps=3), ValueError, "2 entries.*3"),
    (dict(eta=math.nan), ValueError, "nan"),
    (dict(eta=-0.5), ValueError, "-0.5"),
    (dict(eta=5.0, num_inference_steps=10), ValueError, "5.0"),
    (dict(eta=0.5, sigma_hat=True), ValueError, "0.5"),
    (dict(eta_scales="both"), ValueError, "'both'"),
    (dict(prediction_type="noise"), ValueError, "'noise'"),
    (dict(thresholding=True, dynamic_thresholding_ratio=0.0), ValueError, "0.0"),
    (dict(thresholding=True, dynamic_thresholding_ratio=1.5), ValueError, "1.5"),
    (dict(thresholding=True, dynamic_thresholding_ratio=math.nan), ValueError, "nan"),
    (dict(thresholding=True, clip_sample=False), ValueError, "clip_sample=False"),
    (dict(clip_sample=True, clip_sample_range=-1.0), ValueError, "-1.0"),
    (dict(clip_sample=True, clip_sample_range=0.0), ValueError, "0.0"),
    (dict(clip_sample_range=-1.0), ValueError, "-1.0"),
    (dict(clip_sample_range=0.0), ValueError, "0.0"),
    (dict(clip_sample=False, use_clipped_model_output=True), ValueError, "use_clipped_model_output"),
    (dict(thresholding=True, sample_max_value=math.nan), ValueError, "nan"),
    (dict(thresholding=True, sample_max_value=-1.0), ValueError, "-1.0"),
]


@pytest.mark.parametrize(("arguments", "error", "received"), CONSTRUCTOR_REFUSALS, ids=lambda v: str(v)[:70])
def test_the_constructor_refuses_and_says_what_it_received(arguments, error, received):
    with pytest.raises(error, match=received):
        DDIMSampler(**{"schedule": LINEAR, **arguments})


SAMPLE_REFUSALS = [
    (dict(shape=None), ValueError, "shape is needed"),
    (dict(shape=(4,)), ValueError, r"\(4,\)"),
    (dict(shape=()), ValueError, r"\(\)"),
    (dict(shape=(2, -1)), ValueError, r"\(2, -1\)"),
    (dict(shape=(2, 2.7)), (TypeError, ValueError), r"2\.7"),
    (dict(x_T=torch.zeros(2, 3), shape=(2, 4)), ValueError, r"\(2, 4\)"),
    (dict(x_T=torch.zeros(2, 3, dtype=torch.int64), shape=None), TypeError, "x_T"),
    (dict(x_T=torch.zeros(3), shape=None), TypeError, "x_T"),
    (dict(x_T=np.zeros((2, 3)), shape=None), TypeError, "x_T"),
    (dict(seed=0, seeds=[1, 2, 3]), ValueError, "both"),
    (dict(seed=0, generator=torch.Generator()), ValueError, "generator"),
    (dict(seeds=[1, 2, 3], generator=torch.Generator()), ValueError, "generator"),
    (dict(seeds=[1, 2]), ValueError, "3, got 2"),
    (dict(seeds=[1, 2, 2**64]), ValueError, str(2**64)),
    (dict(seeds=[1, 2, -(2**63) - 1]), ValueError, str(-(2**63) - 1)),
    (dict(seeds=[1, 2, 1.5]), (TypeError, ValueError), r"1\.5"),
    (dict(seeds=torch.tensor([1.0, 2.0, 3.5])), (TypeError, ValueError), "float|3.5"),
    (dict(seeds=7), (TypeError, ValueError), "seeds"),
    (dict(seed=-1), ValueError, "-1"),
    (dict(seed=2**64), ValueError, str(2**64)),
    (dict(seed=1.5), (TypeError, ValueError), r"1\.5"),
    (dict(dtype=torch.int32), TypeError, "int32"),
    (dict(dtype=torch.complex64), TypeError, "complex64"),
    (dict(dtype="float32"), TypeError, "float32"),
    (dict(model_dtype=torch.int64), TypeError, "model_dtype.*int64"),
    (dict(backend="fast"), ValueError, "'fast'"),
    (dict(model=3), TypeError, "int"),
    (dict(model=None), TypeError, "NoneType"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "received"),
    SAMPLE_REFUSALS,
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else str(v)[:40],
)
def test_sample_refuses_and_says_what_it_received(arguments, error, received):
    with pytest.raises(error, match=received):
        DDIMSampler(LINEAR, 2, 1.0).sample(**{"model": wavy, "shape": SHAPE, **arguments})


def test_a_clip_range_beyond_float32_is_refused_by_a_sentence():
    with pytest.raises(ValueError, match=r"1e\+39"):
        DDIMSampler(LINEAR, 2, clip_sample_range=1e39).sample(wavy, SHAPE, seed=0)


# --- A sampler is a value ---------------------------------------------------------------------------------------------


def test_a_sampler_is_frozen():
    sampler = DDIMSampler(LINEAR, 4)
    for name in ("eta", "timesteps", "anything"):
        with pytest.raises(
            AttributeError, match=rf"frozen, got sampler\.{name} = 1: .*sampler\.replace\({name}=\.\.\.\)"
        ):
            setattr(sampler, name, 1)
    with pytest.raises(AttributeError, match="frozen"):
        del sampler.eta
    assert (sampler.eta, sampler.num_inference_steps) == (0.0, 4)


def test_replace_makes_what_the_constructor_would():
    sampler = DDIMSampler(LINEAR, 4, eta=0.5, timestep_spacing="trailing")
    assert sampler.replace(num_inference_steps=7) == DDIMSampler(LINEAR, 7, eta=0.5, timestep_spacing="trailing")
    assert sampler.replace(eta=0.0).timesteps == sampler.timesteps
    assert sampler.eta == 0.5
    with pytest.raises(ValueError, match="eta must be a finite number, 0"):
        sampler.replace(eta=-1)
    with pytest.raises(TypeError, match="no_such"):
        sampler.replace(no_such=1)
    explicit = DDIMSampler(LINEAR, timesteps=[9, 5])
    with pytest.raises(ValueError, match="timesteps has 2 entries"):
        explicit.replace(num_inference_steps=3)
    assert explicit.replace(num_inference_steps=3, timesteps=None) == DDIMSampler(LINEAR, 3)


CHANGES = [
    dict(num_inference_steps=5),
    dict(eta=0.5),
    dict(timesteps=[9, 5, 3]),
    dict(model_timesteps=[9, 8, 7, 6]),
    dict(timestep_spacing="trailing"),
    dict(steps_offset=1),
    dict(prediction_type="sample"),
    dict(order=2),
    dict(analytic_variance=[0.1, 0.1, 0.1, 0.1]),
    dict(eta=0.5, eta_scales="variance"),
    dict(eta=1.0, sigma_hat=True),
    dict(set_alpha_to_one=False),
    dict(clip_sample=True),
    dict(clip_sample=False),
    dict(clip_sample_range=2.0),
    dict(clip_sample=True, use_clipped_model_output=True),
    dict(thresholding=True),
    dict(thresholding=True, dynamic_thresholding_ratio=0.9),
    dict(thresholding=True, sample_max_value=2.0),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_equality_repr_and_copies_know_every_argument(changes):
    base = DDIMSampler(LINEAR, 4)
    arguments = dict(num_inference_steps=4) | changes
    if "timesteps" in changes:
        del arguments["num_inference_steps"]
    sampler, again = (DDIMSampler(LINEAR, **arguments) for _ in range(2))
    assert sampler == again
    assert hash(sampler) == hash(again)
    assert sampler != base
    assert sampler != "a sampler"
    shown = repr(sampler)
    assert shown.startswith("DDIMSampler(NoiseSchedule(name='custom'")
    assert all(f" {name}=" in shown for name in changes)
    assert not any(
        f" {name}=" in shown for other in CHANGES for name in other if name not in (*changes, "num_inference_steps")
    )
    for copied in (pickle.loads(pickle.dumps(sampler)), copy.copy(sampler), copy.deepcopy(sampler)):
        assert copied == sampler
        assert copied.plan() == sampler.plan()


def test_copies_sample_the_same_before_and_after_use():
    sampler = DDIMSampler(LINEAR, 4, eta=1.0)
    before = pickle.loads(pickle.dumps(sampler))
    result = sampler.sample(wavy, SHAPE, seed=0)
    after = pickle.loads(pickle.dumps(sampler))
    for copied in (before, after, copy.deepcopy(sampler)):
        assert torch.equal(copied.sample(wavy, SHAPE, seed=0), result)


def test_a_list_that_the_caller_changes_later_changes_nothing():
    timesteps = [9, 5]
    sampler = DDIMSampler(LINEAR, timesteps=timesteps)
    timesteps.append(1)
    assert sampler.replace(eta=1.0).timesteps == (9, 5)
    assert pickle.loads(pickle.dumps(sampler)).timesteps == (9, 5)


def test_a_pickled_sampler_takes_an_empty_cache_of_graphs_with_it():
    from ddim_fast.sampling.capture import GRAPHS, GraphCache

    own = DDIMSampler(LINEAR, 4, graphs=GraphCache(maxsize=3))
    copied = pickle.loads(pickle.dumps(own))
    assert (copied.graphs.maxsize, len(copied.graphs)) == (3, 0)
    assert copied.graphs is not own.graphs
    assert pickle.loads(pickle.dumps(DDIMSampler(LINEAR, 4))).graphs is GRAPHS
