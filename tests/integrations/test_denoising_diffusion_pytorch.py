"""The drop-in for denoising-diffusion-pytorch against its loops, restated here in float64."""

import copy
import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from layouts import assert_laid_out_alike, default_dtype, kinds, laid_out, sweep
from mistakes import mistakes
from page_examples import examples
from torch import nn
from twins import twins

from ddim_fast.integrations import denoising_diffusion_pytorch as drop_in
from ddim_fast.integrations import original_results
from ddim_fast.integrations.denoising_diffusion_pytorch import (
    ddim_sample,
    ddim_sample_1d,
    use_fast_ddim,
    use_original_ddim,
)

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
DTYPES = [torch.float64, torch.float32]
TOLERANCE = 400
"""The tolerance, in eps of the dtype at the largest sample.

Full loops of a model that amplifies errors reach 80.
"""


@pytest.fixture(autouse=True)
def _restored_state():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)


class Net(nn.Module):
    """A small model of t and the self-conditioning that mixes channels and leaves [-1, 1]."""

    def __init__(self, self_condition=False):
        super().__init__()
        self.channels = self.out_dim = 2
        self.self_condition = self_condition
        self.weight = nn.Parameter(torch.tensor([[0.6, -0.4], [0.3, 0.8]], dtype=torch.float64))

    def forward(self, x, t, x_self_cond=None, bias=0.0):
        assert t.dtype == torch.int64
        assert t.shape == x.shape[:1]
        x = x if x_self_cond is None else x + 0.7 * x_self_cond
        mixed = torch.einsum("oc,bc...->bo...", self.weight.to(x.dtype), x + bias)
        t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return 1.4 * torch.tanh(mixed * (0.4 + t / 700))


class Restated(nn.Module):
    """What both diffusions share: attributes, and x0 and eps by objective, in float64."""

    def __init__(self, model, *, timesteps=1000, sampling_timesteps=7, objective="pred_noise", ddim_sampling_eta=0.0,
                 auto_normalize=True, buffers=torch.float32):  # fmt: skip
        super().__init__()
        self.model, self.self_condition = model, model.self_condition
        self.num_timesteps, self.sampling_timesteps = timesteps, sampling_timesteps
        self.objective, self.ddim_sampling_eta = objective, ddim_sampling_eta
        self.is_ddim_sampling = sampling_timesteps < timesteps
        betas = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        self.exact = torch.cumprod(1 - betas, 0).tolist()
        ab = torch.tensor(self.exact, dtype=torch.float64)
        for name, value in {
            "betas": betas,
            "alphas_cumprod": ab,
            "sqrt_one_minus_alphas_cumprod": torch.sqrt(1 - ab),
        }.items():
            self.register_buffer(name, value.to(buffers))
        self.unnormalize = (lambda x: (x + 1) / 2) if auto_normalize else (lambda x: x)

    def predict_start_from_noise(self, x, t, noise):
        return (x - math.sqrt(1 - self.exact[t]) * noise) / math.sqrt(self.exact[t])

    def predict_start_from_v(self, x, t, v):
        return math.sqrt(self.exact[t]) * x - math.sqrt(1 - self.exact[t]) * v

    def predict_noise_from_start(self, x, t, x0):
        return (x - math.sqrt(self.exact[t]) * x0) / math.sqrt(1 - self.exact[t])

    def predictions(self, x, t, m, clip, use_clipped_model_output):
        """(eps, x0)"""
        x0 = {
            "pred_noise": lambda: self.predict_start_from_noise(x, t, m),
            "pred_x0": lambda: m,
            "pred_v": lambda: self.predict_start_from_v(x, t, m),
        }[self.objective]()
        if clip:
            x0 = x0.clamp(-1, 1)
        if self.objective == "pred_noise" and not (clip and use_clipped_model_output):
            return m, x0
        return self.predict_noise_from_start(x, t, x0), x0

    def loop(self, shape, call, clip, use_clipped_model_output):
        """Return every state in float64; noise has torch's default dtype and their layout."""
        S, T = self.sampling_timesteps, self.num_timesteps
        times = torch.linspace(-1, T - 1, steps=S + 1).int().tolist()[::-1]
        img = torch.randn(shape).double()
        states, x0 = [img], None
        for i in range(S):
            t, t_next = times[i], times[i + 1]
            m = call(img, torch.full((shape[0],), t), x0 if self.self_condition else None)
            eps, x0 = self.predictions(img, t, m, clip, use_clipped_model_output)
            if t_next < 0:
                img = x0
            else:
                a, a_next = self.exact[t], self.exact[t_next]
                sigma = self.ddim_sampling_eta * math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
                z = torch.randn_like(img, dtype=torch.get_default_dtype()).double()
                img = x0 * math.sqrt(a_next) + math.sqrt(max(1 - a_next - sigma**2, 0)) * eps + sigma * z
            states.append(img)
        return states


class GaussianDiffusion(Restated):
    @torch.no_grad()
    def ddim_sample(self, shape, return_all_timesteps=False):
        states = self.loop(shape, self.model, True, True)
        return self.unnormalize(torch.stack(states, 1) if return_all_timesteps else states[-1])

    def model_predictions(self, x, t, x_self_cond=None, clip_x_start=False, rederive_pred_noise=False):
        raise NotImplementedError

    predict_start_from_noise = Restated.predict_start_from_noise
    predict_start_from_v = Restated.predict_start_from_v
    predict_noise_from_start = Restated.predict_noise_from_start

    def sample(self, batch_size=16, return_all_timesteps=False):
        return self.ddim_sample((batch_size, 2, 3, 4), return_all_timesteps=return_all_timesteps)


class GaussianDiffusion1D(Restated):
    @torch.no_grad()
    def ddim_sample(self, shape, clip_denoised=True, model_forward_kwargs=dict(), return_noise=False):  # noqa: B006 (the original's)
        def call(x, t, x0):
            return self.model(x, t, **model_forward_kwargs, **({} if x0 is None else {"x_self_cond": x0}))

        states = self.loop(shape, call, clip_denoised, False)
        return (self.unnormalize(states[-1]), states[0]) if return_noise else self.unnormalize(states[-1])

    def model_predictions(
        self, x, t, x_self_cond=None, clip_x_start=False, rederive_pred_noise=False, model_forward_kwargs=None
    ):
        raise NotImplementedError

    predict_start_from_noise = Restated.predict_start_from_noise
    predict_start_from_v = Restated.predict_start_from_v
    predict_noise_from_start = Restated.predict_noise_from_start

    def sample(self, batch_size=16, return_noise=False, model_forward_kwargs=dict()):  # noqa: B006 (the original's)
        return self.ddim_sample(
            (batch_size, 2, 5), return_noise=return_noise, model_forward_kwargs=model_forward_kwargs
        )


def both(diffusion, run, *, dtype=torch.float32):
    """Return ``run(diffusion)`` by the restated loop and by ours, from one seed.

    The generator must end in the same state.
    """
    torch.set_default_dtype(dtype)
    torch.manual_seed(11)
    expected = run(diffusion)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    got = run(use_fast_ddim(diffusion))
    assert torch.equal(torch.get_rng_state(), after)
    use_original_ddim(diffusion)
    return got, expected


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert not got.requires_grad
    allowed = TOLERANCE * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=allowed, atol=allowed * float(expected.abs().max()))


# --- The loops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pictures(objective, self_condition, eta, dtype):
    for count in (1, 7, 26):  # 26: the float32 linspace rounds below an integer
        diffusion = GaussianDiffusion(
            Net(self_condition),
            objective=objective,
            ddim_sampling_eta=eta,
            sampling_timesteps=count,
            buffers=dtype,
        )
        got, expected = both(diffusion, lambda d: d.sample(3, return_all_timesteps=True), dtype=dtype)
        assert got.shape == (3, count + 1, 2, 3, 4)
        assert_near(got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sequences(objective, self_condition, clip_denoised, dtype):
    diffusion = GaussianDiffusion1D(
        Net(self_condition),
        objective=objective,
        ddim_sampling_eta=0.6,
        auto_normalize=clip_denoised,
        buffers=dtype,
    )
    kwargs = {"clip_denoised": clip_denoised, "model_forward_kwargs": {"bias": 0.3}}
    got, expected = both(diffusion, lambda d: d.ddim_sample((3, 2, 5), **kwargs), dtype=dtype)
    assert_near(got, expected, dtype)
    without = both(diffusion, lambda d: d.ddim_sample((3, 2, 5), clip_denoised), dtype=dtype)
    assert_near(*without, dtype)
    assert (without[0] - got).abs().max() > 0.01  # so the bias matters


def test_float32_buffers_give_the_schedule_that_was_rounded():
    diffusion = GaussianDiffusion(Net(), sampling_timesteps=250, ddim_sampling_eta=1.0)
    got, expected = both(diffusion, lambda d: d.sample(3))
    assert_near(got, expected, torch.float32)
    alpha_bars, exact = drop_in._alpha_bars(diffusion), torch.tensor(diffusion.exact, dtype=torch.float64).numpy()
    eps = 2 * torch.finfo(torch.float32).eps
    assert abs(alpha_bars / exact - 1).max() < eps
    assert abs((1 - alpha_bars) / (1 - exact) - 1).max() < eps


def original_states(diffusion, shape, kwargs, recomputes_eps):
    """Run the originals' loop, operation by operation, with their buffers; return its states and x0s."""

    def at(numbers, t):
        return numbers[torch.full((shape[0],), t)].reshape(-1, *[1] * (len(shape) - 1))

    levels = diffusion.alphas_cumprod
    times = torch.linspace(-1, diffusion.num_timesteps - 1, steps=diffusion.sampling_timesteps + 1).int().tolist()[::-1]
    img, x0, states, x0s = torch.randn(shape), None, [], []
    for t, t_next in itertools.pairwise(times):
        x_self_cond = {"x_self_cond": x0} if diffusion.self_condition else {}
        m = diffusion.model(img, torch.full((shape[0],), t), **x_self_cond)
        x0 = m
        if diffusion.objective == "pred_noise":
            x0 = at((1 / levels).sqrt(), t) * img - at((1 / levels - 1).sqrt(), t) * m
        elif diffusion.objective == "pred_v":
            x0 = at(levels.sqrt(), t) * img - at((1 - levels).sqrt(), t) * m
        x0 = x0.clamp(-1, 1) if kwargs.get("clip_denoised", True) else x0
        eps = (at((1 / levels).sqrt(), t) * img - x0) / at((1 / levels - 1).sqrt(), t)
        eps = m if diffusion.objective == "pred_noise" and not recomputes_eps else eps
        if t_next < 0:
            img = x0
        else:
            a, a_next = levels[t], levels[t_next]
            sigma = diffusion.ddim_sampling_eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
            noise = torch.randn_like(img)
            img = x0 * a_next.sqrt() + (1 - a_next - sigma**2).sqrt() * eps + sigma * noise
        states.append(img)
        x0s.append(x0)
    return states, x0s


@sweep(
    one_dimension=st.booleans(),
    objective=st.sampled_from(OBJECTIVES),
    self_condition=st.booleans(),
    clip=st.booleans(),
    of_model=kinds,
    shape=st.sampled_from([(3, 2, 4, 5), (1, 2, 2, 2), (2, 2, 1, 1)]),
    eta=st.sampled_from([0.0, 0.7]),
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, one_dimension, objective, self_condition, clip, of_model, shape, eta
):
    """The originals draw each step's noise in the order of the samples' memory."""
    seen = []

    class LaidOut(Net):
        def forward(self, x, t, x_self_cond=None):
            seen.extend([x] if x_self_cond is None else [x, x_self_cond])
            return laid_out(super().forward(x.double(), t, x_self_cond), of_model)

    kind, sampler = (GaussianDiffusion1D, ddim_sample_1d) if one_dimension else (GaussianDiffusion, ddim_sample)
    diffusion = kind(
        LaidOut(self_condition),
        objective=objective,
        ddim_sampling_eta=eta,
        sampling_timesteps=3,
        auto_normalize=False,
        timesteps=250,
    )
    kwargs = {"clip_denoised": clip} if one_dimension else {}
    torch.manual_seed(11)
    states, _ = original_states(diffusion, shape, kwargs, recomputes_eps=not one_dimension)
    after, originals = torch.get_rng_state(), list(seen)
    seen.clear()
    torch.manual_seed(11)
    with defaults.device_mode():
        got = sampler(diffusion, shape, progress=False, **kwargs)
    assert torch.equal(torch.get_rng_state(), after)
    assert_laid_out_alike([*seen, got], [*originals, states[-1]], of_model)


def test_timesteps_that_a_default_dtype_rounds_to_one_that_does_not_exist():
    """The original fails there: 999 is 1000 in bfloat16. The timesteps are then those of float32."""
    expected = drop_in._time_pairs(1000, 7)
    with default_dtype(torch.bfloat16):
        assert drop_in._time_pairs(1000, 7) == expected
        with pytest.raises(IndexError):
            original_states(GaussianDiffusion(Net()), (1, 2, 2, 2), {}, recomputes_eps=True)


def test_the_noise_returned_is_where_sampling_started():
    diffusion = GaussianDiffusion1D(Net())
    (got, noise), (expected, x_T) = both(diffusion, lambda d: d.sample(3, return_noise=True))
    assert torch.equal(noise.double(), x_T)
    assert_near(got, expected, torch.float32)


def test_all_timesteps_may_be_visited():
    diffusion = GaussianDiffusion(Net(), timesteps=60, sampling_timesteps=60, auto_normalize=False)
    torch.manual_seed(0)
    expected = diffusion.sample(2)
    torch.manual_seed(0)
    assert_near(ddim_sample(diffusion, (2, 2, 3, 4), progress=False), expected, torch.float32)


def test_a_device_without_float64_is_asked_for_none():
    """As Apple's: only a buffer on the host becomes float64."""

    class OnSuchADevice(torch.Tensor):
        def double(self):
            raise TypeError("this device has no float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    diffusion = GaussianDiffusion(Net())
    expected = drop_in._alpha_bars(diffusion)
    for name in ("alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        setattr(diffusion, name, getattr(diffusion, name).as_subclass(OnSuchADevice))
    assert (drop_in._alpha_bars(diffusion) == expected).all()


def test_settings_are_read_in_each_call():
    diffusion = GaussianDiffusion(Net())
    use_fast_ddim(diffusion)
    diffusion.sample(1)
    diffusion.sampling_timesteps, diffusion.ddim_sampling_eta = 5, 0.8
    use_original_ddim(diffusion)
    assert_near(*both(diffusion, lambda d: d.sample(3)), torch.float32)


def test_half_precision_models():
    """As under autocast: the model's output is half, the samples are float32.

    One step, since an output may round the other way.
    """

    class Half(Net):
        def forward(self, x, t, x_self_cond=None):
            return super().forward(x.float(), t, x_self_cond).bfloat16()

    diffusion = GaussianDiffusion(Half(), objective="pred_v", sampling_timesteps=1)
    torch.manual_seed(0)
    got = ddim_sample(diffusion, (2, 2, 3, 4), progress=False)
    torch.manual_seed(0)
    assert_near(got, diffusion.ddim_sample((2, 2, 3, 4)), torch.float32)


def test_one_pass_per_step(monkeypatch):
    calls = []
    step = original_results.ddim_step
    monkeypatch.setattr(original_results, "ddim_step", lambda *a, **k: calls.append(k.get("x0_out")) or step(*a, **k))
    for self_condition in (False, True):
        calls.clear()
        ddim_sample(GaussianDiffusion(Net(self_condition)), (2, 2, 3, 4), progress=False)
        assert len(calls) == 7
        assert all((x0 is not None) == self_condition for x0 in calls)


# --- The object -------------------------------------------------------------------------------------------------------


def test_it_can_be_undone():
    diffusion = GaussianDiffusion(Net())
    keys = list(diffusion.state_dict())
    assert use_fast_ddim(use_fast_ddim(diffusion)) is diffusion
    assert diffusion.ddim_sample.func is ddim_sample
    assert list(diffusion.state_dict()) == keys
    assert use_original_ddim(use_original_ddim(diffusion)) is diffusion
    assert diffusion.ddim_sample.__func__ is GaussianDiffusion.ddim_sample
    assert use_fast_ddim(GaussianDiffusion1D(Net())).ddim_sample.func is ddim_sample_1d


def test_a_copy_is_fast_with_weights_of_its_own():
    """A trainer samples from a deep copy, whose weights are a moving average."""
    diffusion = use_fast_ddim(GaussianDiffusion(Net()))
    diffusion.unnormalize = torch.abs  # a lambda is no state of its own, either
    average = copy.deepcopy(diffusion)
    with torch.no_grad():
        average.model.weight.neg_()
    torch.manual_seed(0)
    got = average.sample(2)
    torch.manual_seed(0)
    assert_near(got, use_original_ddim(average).sample(2), torch.float32)
    assert diffusion.ddim_sample.args == (diffusion,)


def absolute(x):
    return x.abs()


@pytest.mark.parametrize("kind", [GaussianDiffusion, GaussianDiffusion1D])
def test_a_saved_object_is_fast_when_it_is_loaded(kind):
    diffusion = use_fast_ddim(kind(Net()))
    diffusion.unnormalize = absolute  # the restated one is a lambda
    for _ in range(2):  # before and after it has sampled
        for twin in twins(diffusion):
            assert twin.ddim_sample.func in (ddim_sample, ddim_sample_1d)
            assert twin.ddim_sample.args[0] is twin
            torch.manual_seed(0)
            got = twin.sample(2)
            torch.manual_seed(0)
            assert torch.equal(got, diffusion.sample(2))


def test_the_progress_bar(monkeypatch):
    shown = []
    monkeypatch.setattr(drop_in, "tqdm", lambda it, desc, disable: shown.append((desc, disable)) or it)
    diffusion = GaussianDiffusion(Net())
    use_fast_ddim(diffusion).sample(1)
    ddim_sample(diffusion, (1, 2, 3, 4), progress=False)
    ddim_sample_1d(GaussianDiffusion1D(Net()), (1, 2, 5), progress=False)
    name = "sampling loop time step"
    assert shown == [(name, False), (name, True), (name, True)]


def test_the_page_runs(monkeypatch):
    def of_page(model, image_size, **kwargs):
        assert image_size == 16
        return GaussianDiffusion(model, **kwargs)

    library = SimpleNamespace(GaussianDiffusion=of_page, Unet=lambda dim, dim_mults, channels: Net())
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", library)
    (example,) = examples("drop_ins/denoising_diffusion_pytorch.md")
    names = {}
    example.run(names)
    assert len(names["pictures"]) == 4
    assert names["diffusion"].ddim_sample.func is ddim_sample


CALLS = {
    "ddim_sample": dict(diffusion=GaussianDiffusion(Net()), shape=(3, 2, 4, 5), return_all_timesteps=False, progress=False),
    "ddim_sample_1d": dict(
        diffusion=GaussianDiffusion1D(Net()), shape=(3, 2, 5), clip_denoised=True, model_forward_kwargs={},
        return_noise=False, progress=False,
    ),
    "use_fast_ddim": dict(diffusion=GaussianDiffusion(Net())),
}  # fmt: skip


@mistakes(CALLS)
def test_a_mistake_ends_as_in_the_original_or_by_its_name(name, arguments):
    if name == "use_fast_ddim":
        return use_fast_ddim, arguments
    sampler = {"ddim_sample": ddim_sample, "ddim_sample_1d": ddim_sample_1d}[name]
    if not isinstance(arguments["diffusion"], nn.Module):
        return sampler, arguments
    return sampler, arguments, lambda diffusion, progress, **rest: diffusion.ddim_sample(**rest)


# --- Errors -----------------------------------------------------------------------------------------------------------


class Learned(GaussianDiffusion):
    def model_predictions(self, x, t, x_self_cond=None, clip_x_start=False, rederive_pred_noise=False):
        raise NotImplementedError


class OwnLoop(GaussianDiffusion):
    def ddim_sample(self, shape, return_all_timesteps=False):
        raise NotImplementedError


class Classes(GaussianDiffusion):
    def ddim_sample(self, classes, shape, cond_scale=6.0, rescaled_phi=0.7, clip_denoised=True):
        raise NotImplementedError


class Older(GaussianDiffusion):
    ddim_sample = GaussianDiffusion.ddim_sample

    def model_predictions(self, x, t, x_self_cond=None, clip_x_start=False):
        raise NotImplementedError


class Repaint(GaussianDiffusion):
    def sample(self, batch_size=16, return_all_timesteps=False, gt=None, mask=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Net(), TypeError, "must be a GaussianDiffusion or GaussianDiffusion1D.*got .*Net"),
        (lambda: Learned(Net()), TypeError, "got a model_predictions of its own"),
        (lambda: OwnLoop(Net()), TypeError, "the step of .*OwnLoop must be that of OwnLoop"),
        (lambda: Classes(Net()), TypeError, r"ddim_sample\(classes, shape, cond_scale"),
        (lambda: Older(Net()), TypeError, "version 2"),
        (lambda: Repaint(Net()), TypeError, "never uses ddim_sample"),
        (lambda: GaussianDiffusion(Net(), sampling_timesteps=1000), ValueError, "got 1000 and 1000: make"),
    ],
)
def test_what_cannot_be_replaced(make, error, message):
    diffusion = make()
    with pytest.raises(error, match=message):
        use_fast_ddim(diffusion)
    assert "ddim_sample" not in vars(diffusion)


@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("ddim_sampling_eta", -0.1, ValueError, "0 .deterministic. or more, got -0.1"),
        ("ddim_sampling_eta", math.nan, ValueError, "finite number.* got nan"),
        ("ddim_sampling_eta", None, ValueError, "finite number.* got None"),
        ("ddim_sampling_eta", 40.0, ValueError, r"in the step from 999 to 856 .ddim_sampling_eta., eta may be at most"),
        ("objective", "pred_score", ValueError, "one of pred_noise, pred_x0, pred_v, got 'pred_score'"),
        ("sampling_timesteps", 0, ValueError, r"in \[1, 1000\], got 0"),
        ("sampling_timesteps", 1001, ValueError, r"in \[1, 1000\], got 1001"),
        (
            "alphas_cumprod",
            torch.ones(1000, dtype=torch.float16),
            TypeError,
            "got torch.float16.*diffusion.model alone",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(setting, value, error, message):
    diffusion = GaussianDiffusion(Net())
    setattr(diffusion, setting, value)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        ddim_sample(diffusion, (1, 2, 3, 4), progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_other_variant_is_named():
    with pytest.raises(
        TypeError, match="ddim_sample takes a GaussianDiffusion, got a GaussianDiffusion1D: use ddim_sample_1d"
    ):
        ddim_sample(GaussianDiffusion1D(Net()), (1, 2, 5))
    with pytest.raises(
        TypeError, match="ddim_sample_1d takes a GaussianDiffusion1D, got a GaussianDiffusion: use ddim_sample"
    ):
        ddim_sample_1d(GaussianDiffusion(Net()), (1, 2, 3, 4))
