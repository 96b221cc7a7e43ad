"""Inversion against sampling written here in float64 NumPy, its iterates against fixed-point iterations written out, and diffusers."""

import itertools
import math

import numpy as np
import pytest
import torch

import ddim_fast as df
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler, Trajectory
from ddim_fast.sampling.inversion import reconstruction_error

invert, reconstruct = DDIMSampler.invert, DDIMSampler.reconstruct

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LINEAR = NoiseSchedule.from_alphas_cumprod(ALPHA_BAR)
STEPS = (999, 910, 840, 777, 700, 640, 560, 500, 433, 370, 300, 240, 180, 101, 60, 20, 0)  # no two strides alike
SHAPE = (3, 2, 4, 5)
KINDS = ("epsilon", "sample", "v_prediction")
EPS64, EPS32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))


@pytest.fixture(autouse=True)
def _restored_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# --- The textbook, in NumPy float64 -----------------------------------------------------------------------------------


def two_peaks(kind, label=0.0):
    """E[x0 | x_t] for data in two peaks, N(label +- 0.8, 0.3^2), as the model of this prediction type: not linear, and a sensible model."""

    def of(x, t):
        a = ALPHA_BAR[t].reshape(-1, *[1] * (x.ndim - 1))
        variance, centred = a * 0.3**2 + 1 - a, x - np.sqrt(a) * label
        peak = label + 0.8 * np.tanh(0.8 * np.sqrt(a) * centred / variance)
        x0 = peak + 0.3**2 * np.sqrt(a) / variance * (x - np.sqrt(a) * peak)
        eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        return {"epsilon": eps, "sample": x0, "v_prediction": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}[kind]

    return of


def as_torch(kind):
    """``model(x, t, label=0.0)`` in torch, computed in NumPy."""

    def model(x, t, label=0.0):
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        return torch.from_numpy(two_peaks(kind, label)(x.double().numpy(), t.numpy())).to(x.dtype)

    return model


def split(kind, x_t, m, a):
    """(x0, eps) that the model's output m means."""
    signal, spread = math.sqrt(a), math.sqrt(1 - a)
    if kind == "epsilon":
        return (x_t - spread * m) / signal, m
    if kind == "sample":
        return m, (x_t - signal * m) / spread
    return signal * x_t - spread * m, spread * x_t + signal * m


def levels(timesteps, final=1.0):
    """(t, alpha_bar_t, alpha_bar_prev) of each step."""
    return [
        (t, *pair) for t, pair in zip(timesteps, itertools.pairwise([*ALPHA_BAR[list(timesteps)], final]), strict=True)
    ]


def sampled(kind, model, x_T, timesteps=STEPS, final=1.0):
    """Equation 12 of the DDIM paper: every state, and every x0."""
    x, states, x0s = x_T, [x_T], []
    for t, a, prev in levels(timesteps, final):
        x0, eps = split(kind, x, model(x, np.full(len(x), t)), a)
        x = math.sqrt(prev) * x0 + math.sqrt(1 - prev) * eps
        states.append(x)
        x0s.append(x0)
    return states, x0s


def iterated(kind, model, x0, iterations, timesteps=STEPS, tolerance=-1.0):
    """The documented iteration, from what is held constant: eps for a plain inversion and for epsilon prediction, otherwise v.

    Returns x_T and how often the model was called for each step, first the last step's.
    """
    x_prev, last, counts = x0, None, []
    for t, a, prev in levels(timesteps)[::-1]:
        theta, theta_prev = math.acos(math.sqrt(a)), math.acos(math.sqrt(prev))
        x = x_prev
        if last is not None and iterations > 1:  # equation 14 with the last output
            clean, eps = split(kind, x_prev, last, prev)
            x = math.sqrt(a) * clean + math.sqrt(1 - a) * eps
        calls = 0
        for _ in range(iterations):
            last = model(x, np.full(len(x), t))
            clean, eps = split(kind, x, last, a)
            v = math.cos(theta) * eps - math.sin(theta) * clean
            if iterations == 1 or kind == "epsilon":
                clean_prev = (x_prev - math.sin(theta_prev) * eps) / math.cos(theta_prev)
                new = math.cos(theta) * clean_prev + math.sin(theta) * eps
            else:  # x_prev = cos(theta - theta_prev) x - sin(theta - theta_prev) v
                # With v from x itself: "sample" has no v of its own.
                held = math.cos(theta - theta_prev) * x - math.sin(theta - theta_prev) * v
                new = x + (x_prev - held) / math.cos(theta - theta_prev)
            calls, change, x = calls + 1, np.abs(new - x).max(), new
            if change <= tolerance:
                break
        counts.append(calls)
        x_prev = x
    return x_prev, counts


def random(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape)


def sampler_of(kind="v_prediction", **options):
    return DDIMSampler(LINEAR, timesteps=STEPS, prediction_type=kind, clip_sample=False, **options)


# --- The inverse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [1.0, ALPHA_BAR[0]])
@pytest.mark.parametrize("kind", KINDS)
def test_many_iterations_find_every_state_of_the_sampling(kind, final):
    states, x0s = sampled(kind, two_peaks(kind, 0.2), random(0), final=final)
    run = invert(
        sampler_of(kind, set_alpha_to_one=final == 1),
        as_torch(kind),
        torch.from_numpy(states[-1]),
        iterations=300,
        tolerance=1e-15,
        conditioning={"label": 0.2},
        return_trajectory=True,
    )
    assert isinstance(run, Trajectory)
    assert run.timesteps == list(STEPS[::-1])
    # The way back from data to noise stretches what lies between the peaks: a thousand roundings, stretched as much.
    for got, wanted in zip(run.x_t, states[::-1], strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e5 * EPS64)
    for got, wanted in zip(run.x0, x0s[::-1], strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e7 * EPS64)  # from eps: / sqrt(4e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_iteration_is_the_documented_one(kind, iterations, dtype):
    x0 = 0.7 * random(1)
    wanted, _ = iterated(kind, two_peaks(kind), x0, iterations)
    given = torch.from_numpy(x0).to(dtype)
    before = given.clone()
    got = invert(sampler_of(kind), as_torch(kind), given, iterations=iterations)
    assert got.dtype == dtype
    assert not got.is_inference()
    assert torch.equal(given, before)
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e4 * eps)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_a_plain_inversion_is_that_of_diffusers(timestep_spacing):
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing=timestep_spacing
    )
    scheduler.set_timesteps(25)
    x0 = torch.from_numpy(0.7 * random(2)).float()
    wanted = x0
    for t in scheduler.timesteps:
        with torch.no_grad():
            m = as_torch("epsilon")(wanted, t.repeat(len(wanted)))
        wanted = scheduler.step(m, t, wanted).prev_sample
    sampler = DDIMSampler(NoiseSchedule.linear(), 25, timestep_spacing=timestep_spacing)
    got = invert(sampler, as_torch("epsilon"), x0)
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=0, atol=1e4 * EPS32)  # its alphas are float32


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("scale", [2.5, list(np.linspace(1, 3, len(STEPS)))], ids=["one", "list"])
def test_guidance(scale, iterations):
    scales = dict(zip(STEPS, np.broadcast_to(scale, len(STEPS)), strict=True))

    def guided(x, t):
        cond, uncond = two_peaks("epsilon", 0.3)(x, t), two_peaks("epsilon", -0.1)(x, t)
        return (1 - scales[t[0]]) * uncond + scales[t[0]] * cond

    x0 = 0.7 * random(3)
    wanted, _ = iterated("epsilon", guided, x0, iterations)
    got = invert(
        sampler_of("epsilon"),
        as_torch("epsilon"),
        torch.from_numpy(x0),
        iterations=iterations,
        conditioning={"label": 0.3},
        unconditional_conditioning={"label": -0.1},
        guidance_scale=scale,
    )
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e4 * EPS64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [0.01, 1e-5])
def test_a_tolerance_ends_the_iterations_of_a_step(kind, tolerance):
    x0, called = 0.7 * random(4), []

    def model(x, t):
        called.append(int(t[0]))
        return as_torch(kind)(x, t)

    wanted, counts = iterated(kind, two_peaks(kind), x0, 12, tolerance=tolerance)
    assert min(counts) < 12
    got = invert(sampler_of(kind), model, torch.from_numpy(x0), iterations=12, tolerance=tolerance)
    assert [called.count(t) for t in STEPS[::-1]] == counts
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e4 * EPS64)


def test_zero_terminal_snr():
    """The first step is from pure noise; v-prediction has an inverse of it."""
    alpha_bar = ALPHA_BAR.copy()
    alpha_bar[-1] = 0
    schedule = NoiseSchedule.from_alphas_cumprod(alpha_bar)

    def model(x, t):
        return 0.5 * torch.tanh(x * (0.6 + t.view(-1, 1, 1, 1) / 1500)) + 0.2

    sampler = DDIMSampler(schedule, timesteps=STEPS, prediction_type="v_prediction", clip_sample=False)
    x_T = torch.from_numpy(random(5))
    x0 = sampler.sample(model, x_T=x_T, seed=0)
    got = invert(sampler, model, x0, iterations=200, tolerance=1e-15)
    np.testing.assert_allclose(got.numpy(), x_T.numpy(), rtol=0, atol=1e4 * EPS64)
    single = DDIMSampler(schedule, timesteps=[999], prediction_type="v_prediction", clip_sample=False)
    with pytest.raises(
        ValueError, match=r"from pure noise to clean data has no inverse, got a step from alpha_bar = 0 to"
    ):
        invert(single, model, x0)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float64, 0.0), (torch.float32, EPS32 / 10)], ids=str)
def test_what_is_left_is_rounding(dtype, smallest):
    """Float32 computes in float32: it does not get below its rounding."""
    states, _ = sampled("v_prediction", two_peaks("v_prediction"), random(6))
    x0, eps = torch.from_numpy(states[-1]).to(dtype), torch.finfo(dtype).eps
    again = reconstruct(sampler_of(), as_torch("v_prediction"), x0, iterations=300, tolerance=4 * eps)
    error = reconstruction_error(x0, again).sqrt()
    assert smallest <= error.max() < 10 * eps


def test_the_shipped_model_is_inverted_a_hundred_times_better_by_two_iterations():
    model = df.load_model("fashion")
    sampler, conditioning = DDIMSampler(model.schedule, 50), {"class_labels": torch.tensor([1, 8])}
    # Pictures such as it draws itself: the data set is not here.
    x0 = sampler.sample(model, (2, 1, 28, 28), seed=0, conditioning=conditioning)
    plain, refined = (
        reconstruction_error(x0, reconstruct(sampler, model, x0, iterations=k, conditioning=conditioning)).mean()
        for k in (1, 2)
    )
    assert refined < plain / 100


# --- Reconstruction ---------------------------------------------------------------------------------------------------


def test_reconstruct_is_invert_and_sample_without_clipping():
    sampler = DDIMSampler(LINEAR, timesteps=STEPS, prediction_type="epsilon")
    x0, seen = torch.from_numpy(2 * random(7)), []

    def model(x, t, label):
        seen.append(label)
        return as_torch("epsilon")(x, t, label)

    model.clip_sample_range = 1.0  # what it says of itself would clip x0
    options = {"conditioning": {"label": 0.3}, "unconditional_conditioning": {"label": 0.1}, "guidance_scale": 1.5}
    before = torch.get_rng_state()
    got = reconstruct(sampler, model, x0, iterations=3, tolerance=0.01, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) == {0.3, 0.1}
    x_T = invert(sampler_of("epsilon"), as_torch("epsilon"), x0, iterations=3, tolerance=0.01, **options)
    assert torch.equal(got, sampler_of("epsilon").sample(as_torch("epsilon"), x_T=x_T, seed=1, **options))
    assert float(got.abs().max()) > 1.5


def test_reconstruction_error_is_table_2s():
    x0, again = random(8), random(9)
    wanted = [np.mean(((a + 2) / 4 - (b + 2) / 4) ** 2) for a, b in zip(x0, again, strict=True)]
    got = reconstruction_error(torch.from_numpy(x0), torch.from_numpy(again), clip_sample_range=2.0)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=100 * EPS64)
    halves = reconstruction_error(torch.zeros(2, 3).half(), torch.full((2, 3), 1e-4).half())
    assert halves.dtype == torch.float64
    np.testing.assert_allclose(halves.numpy(), 2.5e-9, rtol=1e-2)  # a square that half precision does not have


# --- Arguments --------------------------------------------------------------------------------------------------------


def test_any_memory_layout_and_no_samples():
    x0 = torch.from_numpy(random(10))
    got = invert(sampler_of(), as_torch("v_prediction"), x0.transpose(1, 3).contiguous().transpose(1, 3))
    assert torch.equal(got, invert(sampler_of(), as_torch("v_prediction"), x0))
    empty = torch.empty(0, 2, 3)
    assert invert(sampler_of(), lambda x, t: x, empty, iterations=2, tolerance=0.1).shape == (0, 2, 3)


def test_backend_and_progress(capsys):
    x0 = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="backend must be one of"):
        invert(sampler_of(), lambda x, t: x, x0, backend="none")
    invert(sampler_of(), lambda x, t: x, x0)
    assert capsys.readouterr().err == ""
    reconstruct(sampler_of(), lambda x, t: x, x0, progress=True)
    shown = capsys.readouterr().err
    assert "inverting" in shown
    assert "sampling" in shown


def told(**options):
    return DDIMSampler(LINEAR, timesteps=STEPS, **options)


X0 = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("sampler", "x0", "options", "error", "message"),
    [
        (told(eta=0.5), X0, {}, ValueError, "has an inverse, got eta=0.5: make one with eta=0"),
        (told(clip_sample=True), X0, {}, ValueError, "got a sampler with clip_sample=True: make one"),
        (told(clip_sample_range=2.0), X0, {}, ValueError, "got a sampler with clip_sample_range=2.0"),
        (told(thresholding=True), X0, {}, ValueError, "got a sampler with thresholding=True"),
        (
            told(use_clipped_model_output=True, clip_sample_range=1.0),
            X0,
            {},
            ValueError,
            "got a sampler with use_clipped_model_output=True",
        ),
        (told(), X0, {"iterations": 0}, ValueError, "iterations must be an integer, at least 1, got 0"),
        (told(), X0, {"iterations": 2.0}, TypeError, "iterations must be an integer, at least 1, got 2.0"),
        (told(), X0, {"iterations": True}, TypeError, "iterations must be an integer, at least 1, got True"),
        (told(), X0, {"tolerance": 0.1}, ValueError, "ends iterations early, and there is only one, got tolerance=0.1"),
        (told(), X0, {"iterations": 2, "tolerance": -0.1}, ValueError, "tolerance must be a finite number, at least 0, got -0.1"),
        (told(), X0, {"iterations": 2, "tolerance": "0"}, TypeError, "tolerance must be a finite number, at least 0, got '0'"),
        (told(), X0.int(), {}, TypeError, "x0 must be a floating-point tensor"),
        (told(), X0[0, 0, 0], {}, TypeError, "x0 must be a floating-point tensor"),
        (told(), X0, {"guidance_scale": 2.0}, ValueError, "pass unconditional_conditioning"),
    ],
    ids=[
        "eta", "clip_sample", "clip_sample_range", "thresholding", "use_clipped_model_output", "no iterations", "float iterations",
        "bool iterations", "tolerance alone", "negative tolerance", "tolerance as text", "integers", "no batch", "guidance",
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [invert, reconstruct])
def test_errors_come_before_the_model_is_called(function, sampler, x0, options, error, message):
    def model(x, t):
        pytest.fail("called")

    with pytest.raises(error, match=message):
        function(sampler, model, x0, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": None}, TypeError, "x0 must be a floating-point tensor"),
        ({"reconstructed": X0[:1]}, ValueError, "reconstructed must have the shape of x0"),
        ({"reconstructed": X0.double()}, ValueError, "reconstructed must have the dtype of x0"),
        ({"clip_sample_range": 0.0}, ValueError, "clip_sample_range must be a finite number, above 0, got 0.0"),
    ],
    ids=["x0", "shape", "dtype", "range"],
)
def test_errors_of_the_error(options, error, message):
    with pytest.raises(error, match=message):
        reconstruction_error(**{"x0": X0, "reconstructed": X0, **options})
