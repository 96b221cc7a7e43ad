"""The drop-in for azula against its update rule, restated here in float64.

The schedules have any alpha and sigma.
"""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from layouts import assert_laid_out_alike, draw, kinds, modelled, shapes, sweep
from mistakes import mistakes
from page_examples import examples
from twins import twins

from ddim_fast.integrations import azula as drop_in
from ddim_fast.integrations import original_results
from ddim_fast.integrations.azula import FastDDIMSampler
from ddim_fast.plans.coefficients import mean_coefficients

DTYPES = [torch.float64, torch.float32]
TOLERANCE = 100
"""In eps of the dtype, of the largest sample."""


def variance_exploding(t):
    return torch.ones_like(t), 0.01 * 8000**t


def variance_preserving(t):
    alpha = 1e-3 ** (t**2)
    return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


def rectified(t):
    return 1 - 0.999 * t, t + (1 - t) * 1e-3


def clean_at_0(t):
    return 1 - 0.999 * t, t


def pure_noise_at_1(t):
    return 1 - t, t + (1 - t) * 1e-3


SCHEDULES = [variance_exploding, variance_preserving, rectified, clean_at_0, pure_noise_at_1]


class Denoiser:
    """A mean within [-1, 1] that mixes channels; it depends on time, scale and a condition."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.times = []

    def __call__(self, x_t, t, bias=0.0):
        assert t.ndim == 0
        self.times.append(t)
        alpha, sigma = (float(scale) for scale in self.schedule(t))
        x = x_t / math.hypot(alpha, sigma) + bias
        mean = torch.tanh(0.8 * x + 0.3 * x.flip(1) + 0.2 * float(t))
        return SimpleNamespace(mean=mean)


def restated(denoiser, x, times, eta, **kwargs):
    """Run the loop in float64, with noise drawn in the dtype and memory layout of ``x``."""
    dtype, x = x.dtype, x.double()
    for t, s in itertools.pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (map(float, denoiser.schedule(time)) for time in (t, s))
        mean = denoiser(x, t, **kwargs).mean
        z = (x - alpha_t * mean) / sigma_t
        tau = 1 - (alpha_t * sigma_s) ** 2 / (alpha_s * sigma_t) ** 2
        variance = min(max(eta * tau, 0), 1)
        noise = torch.randn_like(x, dtype=dtype).double()
        x = alpha_s * mean + sigma_s * (math.sqrt(1 - variance) * z + math.sqrt(variance) * noise)
    return x


def random(shape=(3, 2, 4, 5), dtype=torch.float64, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    allowed = TOLERANCE * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=allowed, atol=allowed * float(expected.abs().max()))


def compare(schedule, *, eta=0.0, dtype=torch.float64, kwargs=None, **options):
    """Compare a full loop by ours and by the restated one, and the generator states after it."""
    denoiser = Denoiser(schedule)
    sampler = FastDDIMSampler(denoiser, eta, silent=True, **options)
    times, kwargs = sampler.timesteps, kwargs or {}
    x = random(dtype=dtype) * math.hypot(*map(float, schedule(times[0])))
    before = x.clone()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        got = sampler(x, **kwargs)
        after = torch.get_rng_state()
        seen = list(denoiser.times)
        torch.manual_seed(3)
        expected = restated(denoiser, x, times, eta, **kwargs)
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.stack(seen), times[:-1])
    assert torch.equal(x, before)
    assert_near(got, expected, dtype)
    return got


# --- The loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_full_loops(schedule, eta, dtype):
    for steps in (1, 2, 16):
        compare(schedule, eta=eta, steps=steps, dtype=dtype)
        compare(schedule, eta=eta, steps=steps, dtype=dtype, kwargs={"bias": 0.4})


def test_the_defaults_are_those_of_azula():
    sampler = FastDDIMSampler(Denoiser(rectified))
    assert (sampler.start, sampler.stop, sampler.steps, sampler.silent) == (1.0, 0.0, 64, False)
    assert (sampler.dtype, sampler.device, sampler.eta) == (None, None, 0.0)
    assert torch.equal(sampler.timesteps, torch.linspace(1, 0, 65))


@pytest.mark.parametrize("times", [torch.float32, torch.float64])
def test_start_stop_and_the_dtype_of_the_times(times):
    """Also upwards, from less noise to more, where no noise is added at any eta."""
    assert FastDDIMSampler(Denoiser(rectified), dtype=times, device="cpu").timesteps.dtype == times
    down = compare(variance_preserving, eta=0.5, start=0.8, stop=0.1, steps=9, dtype=torch.float64)
    up = {"start": 0.1, "stop": 0.8, "steps": 9}
    noiseless = compare(variance_preserving, eta=0.0, **up)
    assert torch.equal(compare(variance_preserving, eta=1.0, **up), noiseless)
    assert not torch.equal(down, noiseless)


@pytest.mark.parametrize("schedule", [variance_preserving, variance_exploding])
def test_close_times_keep_their_digits(schedule):
    """tau = 1 - ratio^2 is small there: float32 would exceed the tolerance."""
    compare(schedule, eta=1.0, start=0.5, stop=0.4999, steps=3, dtype=torch.float64)


@sweep(
    of_samples=kinds,
    of_mean=kinds,
    shape=shapes,
    eta=st.sampled_from([0.0, 0.7]),
    times=st.sampled_from([None, *DTYPES]),
)
def test_layouts_and_dtypes_are_the_originals(defaults, of_samples, of_mean, shape, eta, times):
    """azula draws each step's noise in the order of the samples' memory."""
    seen = []

    def denoiser(x, t):
        seen.append(x)
        return SimpleNamespace(mean=modelled(x, of_mean))

    denoiser.schedule = rectified
    sampler = FastDDIMSampler(denoiser, eta, steps=3, silent=True, dtype=times)
    x = draw(5, shape, of_samples)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        with defaults.device_mode():
            got = sampler(x)
        after, ours = torch.get_rng_state(), list(seen)
        seen.clear()
        torch.manual_seed(3)
        for t, s in itertools.pairwise(sampler.timesteps.unbind()):  # azula's operations
            (alpha_t, sigma_t), (alpha_s, sigma_s) = rectified(t), rectified(s)
            tau = torch.clip(eta * (1 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2), min=0, max=1)
            mean = denoiser(x, t).mean
            noise = torch.randn_like(x)
            x = (
                alpha_s * mean
                + sigma_s * torch.sqrt(1 - tau) / sigma_t * (x - alpha_t * mean)
                + sigma_s * torch.sqrt(tau) * noise
            )
        assert torch.equal(torch.get_rng_state(), after)
    assert_laid_out_alike([*ours, got], [*seen, x], of_samples, of_mean)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_schedule_is_computed_in_float32_where_times_are_in_half_precision(half):
    """The denoiser is still told azula's times. In half precision most of 1 - alpha^2 would be lost."""
    told, x = [], random(dtype=torch.float32)

    def denoiser(x_t, t):
        told.append(t.dtype)
        return SimpleNamespace(mean=torch.tanh(x_t))

    denoiser.schedule = variance_preserving
    sampler = FastDDIMSampler(denoiser, 0.5, steps=5, silent=True, dtype=half)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        got = sampler(x)
        assert told == [half] * 5
        torch.manual_seed(3)
        expected = restated(denoiser, x, sampler.timesteps.float(), 0.5)
    assert_near(got, expected, torch.float32)


def test_a_schedule_in_half_precision_is_refused():
    levels = variance_preserving(torch.linspace(0, 1, 101))

    def from_a_table(t):
        return tuple(level.half()[round(float(t) * 100)] for level in levels)

    sampler = FastDDIMSampler(SimpleDenoiser(from_a_table), steps=2, silent=True)
    with pytest.raises(TypeError, match=r"^denoiser\.schedule must .*float32 or float64, got torch.float16: convert"):
        sampler(random())


def test_the_wider_dtype_wins_as_in_torch():
    class Wide(Denoiser):
        def __call__(self, x_t, t):
            return SimpleNamespace(mean=super().__call__(x_t, t).mean.double())

    sampler = FastDDIMSampler(Wide(rectified), 1.0, steps=1, silent=True)
    x = random(dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = sampler(x)
        torch.manual_seed(0)
        noise = torch.randn_like(x).double()
    alpha, sigma = (float(scale) for scale in rectified(torch.tensor(0.0)))
    mean = Wide(rectified)(x, torch.tensor(1.0)).mean
    last_alpha, last_sigma = (float(scale) for scale in rectified(torch.tensor(1.0)))
    tau = 1 - (last_alpha * sigma / alpha / last_sigma) ** 2
    z = (x.double() - last_alpha * mean) / last_sigma
    assert_near(got, alpha * mean + sigma * (math.sqrt(1 - tau) * z + math.sqrt(tau) * noise), torch.float64)


# --- A step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_loop_of_one(dtype):
    denoiser, x = Denoiser(variance_preserving), random(dtype=dtype)
    t, s = torch.tensor(0.7), torch.tensor(0.4)
    sampler = FastDDIMSampler(denoiser, 0.8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got = sampler.step(x, t, s, bias=0.2)
        torch.manual_seed(1)
        expected = restated(denoiser, x, torch.stack([t, s]), 0.8, bias=0.2)
    assert_near(got, expected, dtype)
    sampler.eta = 0.0  # an attribute, as azula's is
    assert_near(sampler.step(x, t, s), restated(denoiser, x, torch.stack([t, s]), 0.0), dtype)


def test_a_step_has_derivatives():
    denoiser = Denoiser(rectified)
    x = random((2, 2, 3)).requires_grad_()
    t, s = torch.tensor(0.7), torch.tensor(0.4)
    FastDDIMSampler(denoiser).step(x, t, s).square().sum().backward()
    got, x.grad = x.grad, None
    restated(denoiser, x, torch.stack([t, s]), 0.0).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    assert not FastDDIMSampler(denoiser, steps=2, silent=True)(x).requires_grad


def test_one_pass_per_step_and_the_schedule_before_the_first(monkeypatch):
    passes, looks = [], []
    step = original_results.ddim_step
    monkeypatch.setattr(original_results, "ddim_step", lambda *a, **k: passes.append(a) or step(*a, **k))
    denoiser = SimpleDenoiser(lambda t: looks.append(len(passes)) or rectified(t))
    FastDDIMSampler(denoiser, steps=6, silent=True)(random(dtype=torch.float32))
    assert len(passes) == 6
    assert looks == [0] * 7


class SimpleDenoiser:
    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t):
        return SimpleNamespace(mean=torch.tanh(x_t))


def test_it_prints_what_it_does():
    sampler = FastDDIMSampler(SimpleDenoiser(rectified), eta=0.5, steps=3)
    assert repr(sampler) == "FastDDIMSampler(SimpleDenoiser, eta=0.5, start=1.0, stop=0.0, steps=3)"


def test_copies_before_and_after_each_method():
    sampler, x = FastDDIMSampler(SimpleDenoiser(rectified), steps=3, silent=True), random()
    for method in (lambda: None, lambda: sampler(x), lambda: sampler.step(x, *torch.tensor([0.7, 0.4]))):
        method()
        for twin in twins(sampler):
            assert torch.equal(twin(x), sampler(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_device_without_float64_is_asked_for_none(monkeypatch, dtype):
    """As Apple's: the values of a float32 schedule are read as they are."""
    monkeypatch.setattr(torch.Tensor, "double", lambda self: pytest.fail("float64 on the device"))
    rows = drop_in._rows(rectified, torch.tensor([0.7, 0.4], dtype=dtype).unbind(), 0.5)
    scales = [float(scale) for time in torch.tensor([0.7, 0.4], dtype=dtype) for scale in rectified(time)]
    assert rows == [mean_coefficients(*scales, 0.5)]


def test_a_subclass_with_a_step_of_its_own_is_asked():
    class Twice(FastDDIMSampler):
        def step(self, x_t, t, s, **kwargs):
            return 2 * super().step(x_t, t, s, **kwargs)

    denoiser, x = SimpleDenoiser(rectified), random()
    once = FastDDIMSampler(denoiser, steps=1, silent=True)(x)
    torch.testing.assert_close(Twice(denoiser, steps=1, silent=True)(x), 2 * once)


# --- init, the bar, the page ------------------------------------------------------------------------------------------


def test_init():
    sampler = FastDDIMSampler(Denoiser(rectified), start=0.6)
    mean, var = torch.tensor([0.5, -1.0]).view(2, 1), torch.tensor(0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = sampler.init((4, 2, 3), mean, var, dtype=torch.float64)
        torch.manual_seed(0)
        z = torch.randn_like(mean.expand(4, 2, 3)).double()  # of the mean's dtype, in the order of its strides
        plain = sampler.init((4, 2, 3))
    alpha, sigma = (scale.double() for scale in rectified(torch.tensor(0.6)))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, alpha * mean + torch.sqrt(alpha**2 * var + sigma**2) * z)
    assert plain.dtype == torch.float32
    assert plain.shape == (4, 2, 3)


def test_the_progress_bar(monkeypatch):
    shown = []
    monkeypatch.setattr(drop_in, "tqdm", lambda it, **options: shown.append(options) or it)
    x = random()
    FastDDIMSampler(SimpleDenoiser(rectified), steps=2, silent=True)(x)
    assert not shown
    FastDDIMSampler(SimpleDenoiser(rectified), steps=2)(x)
    assert shown == [{"miniters": 1, "unit": "step", "ncols": 79, "ascii": True}]
    assert len(list(FastDDIMSampler(SimpleDenoiser(rectified)).progress_bar(torch.arange(3)))) == 3


def test_the_page_runs(monkeypatch):
    modules = {
        "azula": SimpleNamespace(),
        "azula.denoise": SimpleNamespace(KarrasDenoiser=lambda backbone, schedule: Denoiser(schedule)),
        "azula.nn": SimpleNamespace(),
        "azula.nn.unet": SimpleNamespace(UNet=lambda in_channels, out_channels: None),
        "azula.noise": SimpleNamespace(VPSchedule=lambda: variance_preserving),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (example,) = examples("drop_ins/azula.md")
    names = {}
    with torch.random.fork_rng():
        example.run(names)
    assert names["x"].shape == (4, 3, 16, 16)
    assert names["x"].isfinite().all()


CALLS = {
    "__init__": dict(denoiser=Denoiser(rectified), eta=0.0, start=1.0, stop=0.0, steps=3),
    "__call__": dict(x=random()),
    "step": dict(x_t=random(), t=torch.tensor(0.7), s=torch.tensor(0.4)),
}


@mistakes(CALLS)
def test_a_mistake_is_refused_by_its_name(name, arguments):
    """(What azula's own operations refuse, in ``init`` and in ``device``, are their errors.)"""
    if name == "__init__":
        return lambda **given: FastDDIMSampler(**given, silent=True)(random()), arguments
    return getattr(FastDDIMSampler(SimpleDenoiser(rectified), steps=2, silent=True), name), arguments


# --- Errors and edges -------------------------------------------------------------------------------------------------


def test_a_step_to_no_signal_adds_no_noise():
    row = mean_coefficients(0.5, 0.5, 0.0, 1.0, eta=1.0)
    assert (row.prev_x0, row.prev_eps, row.prev_noise) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("denoiser", "options", "error", "message"),
    [
        (lambda x, t: x, {}, TypeError, "have a schedule"),
        (SimpleNamespace(schedule=rectified), {}, TypeError, "callable as denoiser.*got SimpleNamespace"),
        (Denoiser(rectified), {"eta": -0.5}, ValueError, "0 .deterministic. or more, got -0.5"),
        (Denoiser(rectified), {"eta": math.inf}, ValueError, "got inf"),
        (Denoiser(rectified), {"eta": torch.tensor(0.5)}, ValueError, "got tensor"),
        (Denoiser(rectified), {"steps": 0}, ValueError, "at least 1, got 0"),
        (Denoiser(rectified), {"steps": 2.0}, TypeError, "an integer, at least 1, got 2.0"),
    ],
    ids=["function", "schedule_only", "negative_eta", "infinite_eta", "tensor_eta", "no_steps", "float_steps"],
)
def test_arguments_that_are_refused(denoiser, options, error, message):
    with pytest.raises(error, match=message):
        FastDDIMSampler(denoiser, **options)


def test_steps_that_are_refused():
    x, t, s = random(), torch.tensor(0.5), torch.tensor(0.2)
    denoiser = Denoiser(clean_at_0)
    sampler = FastDDIMSampler(denoiser, start=0.0, stop=0.5, steps=2, silent=True)
    with pytest.raises(ValueError, match=r"sigma_t > 0, got alpha_t = 1.0, sigma_t = 0.0"):
        sampler(x)
    with pytest.raises(ValueError, match=r"t must be a tensor without dimensions, got a tensor \(3,\) of float32"):
        sampler.step(x, t.expand(3), s)
    with pytest.raises(ValueError, match=r"s must be a tensor without dimensions, got 0\.2"):
        sampler.step(x, t, 0.2)
    sampler.eta = math.nan
    with pytest.raises(ValueError, match="eta must be a finite number"):
        sampler.step(x, t, s)
    assert not denoiser.times  # all before the model is called


@pytest.mark.parametrize(
    ("mean", "error"), [(lambda x: x[:, :1], ValueError), (lambda x: None, TypeError)], ids=["shape", "none"]
)
def test_a_mean_of_another_shape_is_refused(mean, error):
    def denoiser(x_t, t):
        return SimpleNamespace(mean=mean(x_t))

    denoiser.schedule = rectified
    with pytest.raises(error, match=r"denoiser\(x_t, t\).mean must be a tensor of shape \(3, 2, 4, 5\), got"):
        FastDDIMSampler(denoiser, silent=True)(random())
