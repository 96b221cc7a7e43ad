"""The drop-in for guided-diffusion and improved-diffusion against their DDIM, over full loops.

Their formulas are restated here in float64.
"""

import copy
import enum
import inspect
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from layouts import Defaults, assert_laid_out_alike, kinds, modelled, shapes, sweep
from layouts import draw as draw_laid_out
from mistakes import mistakes
from page_examples import examples
from twins import twins

from ddim_fast.integrations import guided_diffusion, rows_by_timestep
from ddim_fast.integrations.guided_diffusion import FastDiffusion
from ddim_fast.kernels.dispatch import ddim_step_from_table

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps
SHAPE = (3, 2, 4, 5)
NORMAL = Defaults()
BETAS = np.linspace(0.02, 0.4, 9)
FINE_BETAS = np.linspace(0.004, 0.1, 40)
KEPT = (0, 3, 4, 9, 17, 25, 26, 39)  # no two strides alike


@pytest.fixture(autouse=True)
def _restored_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# --- The originals, from their interface and their formulas ------------------------------------------------------------


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()  # of no original: to be refused


class ModelVarType(enum.Enum):
    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class GaussianDiffusion:
    """``levels``: the dtype of noise levels, float32 in the originals, float64 in the formulas."""

    def __init__(self, *, betas, model_mean_type, model_var_type, rescale_timesteps=False, levels=torch.float64):
        self.betas = np.asarray(betas, dtype=np.float64)
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.rescale_timesteps, self.levels = rescale_timesteps, levels
        self.num_timesteps = len(self.betas)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        self.alphas_cumprod_next = np.concatenate([self.alphas_cumprod[1:], [0.0]])

    def at(self, numbers, t, x):
        return torch.from_numpy(numbers)[t].to(self.levels).reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        m = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        if "LEARNED" in self.model_var_type.name:
            m, variance_values = m.chunk(2, dim=1)
            assert variance_values.shape == x.shape
        if self.model_mean_type is ModelMeanType.START_X:
            x0 = m
        elif self.model_mean_type is ModelMeanType.EPSILON:
            x0 = self._predict_xstart_from_eps(x, t, m)
        else:  # m is the mean of q(x_{t-1} | x_t, x0): a weighted sum of x0 and x_t
            of_x0 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
            of_x_t = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
            x0 = self.at(1 / of_x0, t, x) * m - self.at(of_x_t / of_x0, t, x) * x
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        return {"pred_xstart": x0.clamp(-1, 1) if clip_denoised else x0}

    def _predict_xstart_from_eps(self, x, t, eps):
        return (
            self.at(np.sqrt(1 / self.alphas_cumprod), t, x) * x
            - self.at(np.sqrt(1 / self.alphas_cumprod - 1), t, x) * eps
        )

    def _predict_eps_from_xstart(self, x, t, x0):
        return (self.at(np.sqrt(1 / self.alphas_cumprod), t, x) * x - x0) / self.at(
            np.sqrt(1 / self.alphas_cumprod - 1), t, x
        )

    def condition_score(self, cond_fn, out, x, t, model_kwargs=None):
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = eps - torch.sqrt(1 - self.at(self.alphas_cumprod, t, x)) * gradient
        return {"pred_xstart": self._predict_xstart_from_eps(x, t, eps)}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        level, to = self.at(self.alphas_cumprod, t, x), self.at(self.alphas_cumprod_prev, t, x)
        sigma = eta * torch.sqrt((1 - to) / (1 - level)) * torch.sqrt(1 - level / to)
        noise = torch.randn_like(x)
        mean = out["pred_xstart"] * torch.sqrt(to) + torch.sqrt(1 - to - sigma**2) * eps
        there_is_noise = (t != 0).float().reshape(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + there_is_noise * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        x0 = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        to = self.at(self.alphas_cumprod_next, t, x)
        eps = self._predict_eps_from_xstart(x, t, x0)
        return {"sample": x0 * torch.sqrt(to) + torch.sqrt(1 - to) * eps, "pred_xstart": x0}

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        return list(self.ddim_sample_loop_progressive(model, shape, noise, *options))[-1]["sample"]

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                t = torch.tensor([i] * shape[0])
                out = self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
                yield out
                x = out["sample"]

    def q_sample(self, x_start, t, noise):
        level = self.at(self.alphas_cumprod, t, x_start)
        return torch.sqrt(level) * x_start + torch.sqrt(1 - level) * noise


class Respaced:
    def __init__(self, model, diffusion):
        self.model, self.diffusion = model, diffusion

    def __call__(self, x, t, **kwargs):
        t = torch.tensor(self.diffusion.timestep_map)[t]
        if self.diffusion.rescale_timesteps:
            t = t.float() * (1000.0 / self.diffusion.original_num_steps)
        return self.model(x, t, **kwargs)


class SpacedDiffusion(GaussianDiffusion):
    def __init__(self, use_timesteps, *, betas, **kwargs):
        self.timestep_map, self.original_num_steps = sorted(use_timesteps), len(betas)
        kept = np.cumprod(1 - np.asarray(betas))[self.timestep_map]
        super().__init__(betas=1 - kept / np.concatenate([[1.0], kept[:-1]]), **kwargs)

    def _wrap_model(self, model):
        return model if isinstance(model, Respaced) else Respaced(model, self)

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _scale_timesteps(self, t):
        return t


# --- What the loops run on ---------------------------------------------------------------------------------------------


def original(mean="EPSILON", variance="FIXED_SMALL", respaced=False, rescaled=False, **options):
    options |= dict(
        model_mean_type=ModelMeanType[mean], model_var_type=ModelVarType[variance], rescale_timesteps=rescaled
    )
    if respaced:
        return SpacedDiffusion(KEPT, **{"betas": FINE_BETAS} | options)
    return GaussianDiffusion(**{"betas": BETAS} | options)


def wave(x, t, pull, y):
    """Not linear, and another function for each timestep, scale of the timesteps, and ``y``."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return pull * torch.tanh(x * (0.6 + 0.01 * t) + y) + 0.1 * x.flip(1) * torch.cos(t)


def model_of(diffusion):
    channels = 2 if "LEARNED" in diffusion.model_var_type.name else 1

    def model(x, t, y=0.0):
        return torch.cat([wave(x, t, 0.9, y), 1e3 * torch.ones_like(x)][:channels], dim=1)

    return model


def cond_fn(x, t, y=0.0):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(wave(x, t, -0.3, y).square().sum(), x)[0]


def denoised_fn(x0):
    return 1.3 * x0.roll(1, -1) + 0.2


def draw(seed, shape=SHAPE, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def assert_same(got, expected, factor=1e4, eps=EPS):
    """Compare all tensors to ``factor`` eps of the largest element: rounding grows step by step."""
    assert len(got) == len(expected) > 0
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert set(a) == set(b) == {"sample", "pred_xstart"}
        for name in b:
            scale = max(1.0, float(b[name].abs().max()))
            error = float((a[name].to(torch.float64) - b[name].to(torch.float64)).abs().max()) / scale
            assert error <= factor * eps, f"step {step}, {name}: off by {error / eps:.0f} eps"


def run_both(diffusion, method, *args, fast=None, defaults=NORMAL, **kwargs):
    """Return (ours, the original's), lists of dicts from the same random state.

    The random state must be the same afterwards, too.
    """
    results, states = [], []
    for one in (FastDiffusion(diffusion) if fast is None else fast, diffusion):
        torch.manual_seed(11)
        with nullcontext() if one is diffusion else defaults.device_mode():
            out = getattr(one, method)(*args, **kwargs)
            results.append([out] if isinstance(out, dict) else list(out))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return results


KINDS = [  # every two of these choices together, and every three of the first, third and fourth
    (mean, variance, respaced, rescaled)
    for i, mean in enumerate(("PREVIOUS_X", "START_X", "EPSILON"))
    for variance, (respaced, rescaled) in zip(
        np.roll(("FIXED_LARGE", "LEARNED", "LEARNED_RANGE", "FIXED_SMALL"), i),
        itertools.product([False, True], repeat=2),
        strict=True,
    )
]
per_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))


# --- Loops -------------------------------------------------------------------------------------------------------------


@per_kind
def test_every_state_of_every_loop(kind):
    diffusion = original(*kind)
    fast, model, noise = FastDiffusion(diffusion), model_of(diffusion), draw(0)
    for clip, denoise, guide, eta in itertools.product(
        [True, False], [None, denoised_fn], [None, cond_fn], [0.0, 0.5, 1.0]
    ):
        options = dict(clip_denoised=clip, denoised_fn=denoise, cond_fn=guide, eta=eta, model_kwargs={"y": 0.3})
        got, expected = run_both(
            diffusion, "ddim_sample_loop_progressive", model, SHAPE, noise, fast=fast, device="cpu", **options
        )
        assert_same(got, expected)


@per_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_sample_at_its_own_timestep(kind, dtype):
    diffusion = original(*kind)
    x, t, fast, model = draw(1, dtype=dtype), torch.tensor([0, 7, 3]), FastDiffusion(diffusion), model_of(diffusion)
    factor, eps = (1e4, EPS) if dtype == torch.float64 else (60.0, EPS32)
    for clip, denoise, guide in itertools.product([True, False], [None, denoised_fn], [None, cond_fn]):
        args = (x, t, clip, denoise, guide, {"y": 0.3}, 0.7)
        assert_same(*run_both(diffusion, "ddim_sample", model, *args, fast=fast), factor, eps)
        if guide is None:
            args = (x, t, clip, denoise, {"y": 0.3})
            assert_same(*run_both(diffusion, "ddim_reverse_sample", model, *args, fast=fast), factor, eps)


def test_defaults_are_the_originals():
    """Clipped, unguided, eta = 0, in float32, from torch's noise on the device of the model."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.9))

        def forward(self, x, t):
            return self.scale * wave(x, t, 1.0, 0.0)

    diffusion, model = original(levels=torch.float32), Model()
    got, expected = run_both(diffusion, "ddim_sample_loop_progressive", model, list(SHAPE))
    assert got[0]["sample"].dtype == torch.float32
    assert not got[-1]["sample"].requires_grad
    assert_same(got, expected, 100.0, EPS32)
    torch.manual_seed(11)
    assert torch.equal(FastDiffusion(diffusion).ddim_sample_loop(model, SHAPE), got[-1]["sample"])
    x, t = draw(2), torch.tensor([8, 4, 0])
    for method in ("ddim_sample", "ddim_reverse_sample"):
        with torch.no_grad():
            assert_same(*run_both(original(), method, model.double(), x, t))


def test_arguments_in_the_originals_order():
    diffusion = original(respaced=True)
    fast, model, noise = FastDiffusion(diffusion), model_of(diffusion), draw(0)
    options = (False, denoised_fn, cond_fn, {"y": 0.3}, "cpu", False, 0.5)
    args = (model, SHAPE, noise, *options)
    got, expected = run_both(diffusion, "ddim_sample_loop_progressive", *args, fast=fast)
    assert_same(got, expected)
    torch.manual_seed(11)
    assert torch.equal(fast.ddim_sample_loop(*args), got[-1]["sample"])
    for method in ("ddim_sample_loop", "ddim_sample_loop_progressive", "ddim_sample", "ddim_reverse_sample"):
        assert (
            inspect.getfullargspec(getattr(fast, method))[:4] == inspect.getfullargspec(getattr(diffusion, method))[:4]
        )
    x, rest = draw(4), (False, denoised_fn, {"y": 0.3}, False, 0.0)
    expected = list(
        fast.ddim_reverse_sample_loop_progressive(
            model, x, clip_denoised=False, denoised_fn=denoised_fn, model_kwargs={"y": 0.3}, progress=False, eta=0.0
        )
    )
    assert_same(list(fast.ddim_reverse_sample_loop_progressive(model, x, *rest)), expected, 0.0)
    assert torch.equal(fast.ddim_reverse_sample_loop(model, x, *rest), expected[-1]["sample"])


def test_improved_diffusion_has_no_cond_fn():
    class Improved(GaussianDiffusion):
        condition_score = None

        def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
            return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, None, model_kwargs, eta)

    Improved.__name__ = "GaussianDiffusion"
    diffusion = Improved(betas=BETAS, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_LARGE)
    fast, model, x, t = FastDiffusion(diffusion), model_of(diffusion), draw(1), torch.tensor([0, 7, 3])
    assert_same(*run_both(diffusion, "ddim_sample", model, x, t, fast=fast, model_kwargs={"y": 0.3}, eta=0.5))
    guided = original()
    args = (model, x, t, True, None, cond_fn, {"y": 0.3}, 0.5)
    assert_same(run_both(guided, "ddim_sample", *args, fast=fast)[0], run_both(guided, "ddim_sample", *args)[1])
    with pytest.raises(TypeError, match=r"cond_fn must be a function or None, got dict: .* cond_fn comes before"):
        fast.ddim_sample(model, x, t, True, None, {"y": 0.3})
    with pytest.raises(TypeError, match="model_kwargs must be a dict, got float"):
        fast.ddim_sample(model, x, t, True, None, None, 0.5)


# --- Encoding ----------------------------------------------------------------------------------------------------------


@per_kind
def test_the_reverse_loop_is_reverse_steps(kind):
    diffusion = original(*kind)
    fast, model = FastDiffusion(diffusion), model_of(diffusion)
    for clip, denoise in itertools.product([True, False], [None, denoised_fn]):
        x, expected = draw(4), []
        options = dict(clip_denoised=clip, denoised_fn=denoise, model_kwargs={"y": 0.3})
        for i in range(diffusion.num_timesteps - 1):
            expected.append(diffusion.ddim_reverse_sample(model, x, torch.tensor([i] * 3), **options))
            x = expected[-1]["sample"]
        state = torch.get_rng_state()
        got = list(fast.ddim_reverse_sample_loop_progressive(model, draw(4), **options))
        got.append(got[-1] | {"sample": fast.ddim_reverse_sample_loop(model, draw(4), **options)})
        assert_same(got, [*expected, expected[-1]])
        assert torch.equal(torch.get_rng_state(), state)


def test_the_last_reverse_step_goes_to_nothing_but_eps():
    diffusion = original(mean="START_X")
    model, x, t = model_of(diffusion), draw(4), torch.tensor([8, 8, 8])
    out = FastDiffusion(diffusion).ddim_reverse_sample(model, x, t)
    torch.testing.assert_close(out["sample"], diffusion._predict_eps_from_xstart(x, t, out["pred_xstart"]))


@pytest.mark.parametrize("width", [0.3, 1.0])
def test_encoding_then_sampling_comes_back(width):
    """For normal data, whose eps is known, the round-trip error halves as timesteps double."""

    def error(kept):
        diffusion = SpacedDiffusion(
            range(0, 1000, 1000 // kept),
            betas=np.linspace(1e-4, 0.02, 1000),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
        )
        levels = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

        def model(x, t):
            level = levels[t].reshape(-1, 1, 1, 1)
            return torch.sqrt(1 - level) / (level * width**2 + 1 - level) * x

        fast, x0 = FastDiffusion(diffusion), width * draw(5)
        encoded = fast.ddim_reverse_sample_loop(model, x0, clip_denoised=False)
        back = fast.ddim_sample_loop(model, SHAPE, encoded, clip_denoised=False, device="cpu")
        return float((back - x0).abs().max() / x0.abs().max())

    errors = [error(kept) for kept in (25, 50, 100)]
    assert errors[2] < 0.1
    for coarse, fine in itertools.pairwise(errors):
        assert 1.6 < coarse / fine < 2.5


# --- One pass ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """The model outputs of every kernel pass."""
    seen, step = [], rows_by_timestep.ddim_step
    monkeypatch.setattr(
        rows_by_timestep, "ddim_step", lambda x, m, *args, **kwargs: seen.append(m) or step(x, m, *args, **kwargs)
    )
    return seen


@pytest.mark.parametrize("mean", ["PREVIOUS_X", "START_X", "EPSILON"])
def test_kernel_passes_of_a_step(passes, mean):
    diffusion = original(mean)
    fast, model = FastDiffusion(diffusion), model_of(diffusion)

    def count(**options):
        passes.clear()
        fast.ddim_sample_loop(model, SHAPE, device="cpu", **options)
        return len(passes) / diffusion.num_timesteps

    first = mean != "START_X"
    assert count() == count(eta=1.0, clip_denoised=False) == 1
    assert count(denoised_fn=denoised_fn) == 1 + first
    assert count(cond_fn=cond_fn) == 2
    assert count(cond_fn=cond_fn, denoised_fn=denoised_fn) == 2 + first
    passes.clear()
    fast.ddim_sample(model, draw(0), torch.tensor([4, 4, 4]))
    assert len(passes) == 1


def test_learned_variance_is_a_view_that_is_not_read(passes):
    diffusion = original(variance="LEARNED_RANGE")
    outputs = []

    def model(x, t):
        outputs.append(torch.cat([wave(x, t, 0.9, 0.0), torch.full_like(x, math.nan)], dim=1))
        return outputs[-1]

    samples = FastDiffusion(diffusion).ddim_sample_loop(model, SHAPE, device="cpu")
    assert samples.isfinite().all()
    assert [m.data_ptr() for m in passes] == [m.data_ptr() for m in outputs]


@pytest.mark.parametrize("mean", ["PREVIOUS_X", "START_X", "EPSILON"])
def test_a_step_by_the_tables_that_a_gpu_reads(monkeypatch, mean):
    """Where ``t`` is on a GPU, rows are looked up there: here in the same tables, on the CPU."""

    def step(steps, x_t, model_output, t, **tensors):
        table = steps.table(t.device)
        return ddim_step_from_table(x_t, model_output, table, t, **tensors)

    monkeypatch.setattr(rows_by_timestep.RowsByTimestep, "step", step)
    diffusion = original(mean)
    x, t, fast, model = (
        draw(1),
        torch.tensor([0, 7, 3], dtype=torch.int32),
        FastDiffusion(diffusion),
        model_of(diffusion),
    )
    for clip, denoise, guide in itertools.product([True, False], [None, denoised_fn], [None, cond_fn]):
        got, expected = run_both(
            diffusion, "ddim_sample", model, x, t, clip, denoise, guide, {"y": 0.3}, 0.7, fast=fast
        )
        assert_same(got, expected, 20.0, EPS32)
    assert_same(*run_both(diffusion, "ddim_reverse_sample", model, x, t, fast=fast), 20.0, EPS32)


def test_rows_are_made_once(monkeypatch):
    made, coefficients = [], guided_diffusion.ddim_coefficients
    monkeypatch.setattr(
        guided_diffusion,
        "ddim_coefficients",
        lambda *args, **kwargs: made.append(args) or coefficients(*args, **kwargs),
    )
    diffusion = original()
    fast = FastDiffusion(diffusion)
    for _ in range(2):
        fast.ddim_sample_loop(model_of(diffusion), SHAPE, device="cpu")
    assert len(made) == diffusion.num_timesteps + 1  # the last one's was made first, unclipped
    for eta in np.linspace(0, 1, 200):
        fast.ddim_sample(model_of(diffusion), draw(0), torch.tensor([4, 4, 4]), eta=float(eta))
    assert len(fast._cached) <= 64


# --- What a caller sees ------------------------------------------------------------------------------------------------


def test_random_draws_of_the_model_come_before_the_steps():
    """A model and callables that draw random numbers: the order of all draws is the original's."""
    diffusion = original()

    def noisy(function):
        return lambda *args, **kwargs: function(*args, **kwargs) + 0.1 * torch.randn(1)

    options = dict(denoised_fn=noisy(denoised_fn), cond_fn=noisy(cond_fn), eta=1.0, device="cpu")
    model = noisy(model_of(diffusion))
    assert_same(*run_both(diffusion, "ddim_sample_loop_progressive", model, SHAPE, draw(0), **options))


@sweep(
    mean=st.sampled_from(["PREVIOUS_X", "START_X", "EPSILON"]),
    learned=st.booleans(),
    clip=st.booleans(),
    of_noise=kinds,
    of_model=kinds,
    of_denoised=st.one_of(st.none(), kinds),
    of_gradient=st.one_of(st.none(), kinds),
    shape=shapes,
    eta=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, mean, learned, clip, of_noise, of_model, of_denoised, of_gradient, shape, eta
):
    """The originals draw each step's noise in the order of the samples' memory."""
    diffusion = original(mean, "LEARNED" if learned else "FIXED_SMALL", betas=[0.1, 0.2, 0.3], levels=torch.float32)
    seen = []

    def model(x, t):
        seen.append(x)
        return modelled(torch.cat([x, x], dim=1) if learned else x, of_model)

    def denoised(x0):
        seen.append(x0)
        return modelled(x0, of_denoised)

    def gradient(x, t):
        return modelled(x, of_gradient, pull=-0.3)

    options = dict(clip_denoised=clip, denoised_fn=of_denoised and denoised, model_kwargs={})
    noise, loop = draw_laid_out(0, shape, of_noise), "ddim_sample_loop_progressive"
    start = dict(noise=noise, cond_fn=of_gradient and gradient, device="cpu", eta=eta)
    results = run_both(diffusion, loop, model, shape, defaults=defaults, **options, **start)
    for_both = of_noise, of_model, of_denoised, of_gradient
    for got, expected in zip(*results, strict=True):
        assert_laid_out_alike(got.values(), [expected[name] for name in got], *for_both)
    assert_laid_out_alike(seen[: len(seen) // 2], seen[len(seen) // 2 :], *for_both)
    t = torch.ones(shape[0], dtype=torch.int64)
    (got,), (expected,) = run_both(diffusion, "ddim_reverse_sample", model, noise, t, defaults=defaults, **options)
    assert_laid_out_alike(got.values(), [expected[name] for name in got], *for_both)


def test_x0_of_a_model_that_predicts_it_is_its_output():
    """Unclipped, the originals return the model's tensor itself, in its own dtype."""
    diffusion, outputs = original("START_X", levels=torch.float32), []

    def model(x, t):
        outputs.append(modelled(x, ("channels last", torch.bfloat16)))
        return outputs[-1]

    x, t = draw(0, dtype=torch.float32), torch.tensor([5, 5, 5])
    got, expected = run_both(diffusion, "ddim_sample", model, x, t, clip_denoised=False)
    assert got[0]["pred_xstart"] is outputs[0]
    assert expected[0]["pred_xstart"] is outputs[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_becomes_float32_as_in_the_original(dtype):
    diffusion = original(levels=torch.float32)
    for half in ("samples", "outputs"):
        x = draw(0, dtype=dtype if half == "samples" else torch.float32)
        model = model_of(diffusion) if half == "samples" else lambda x, t: wave(x, t, 0.9, 0.0).to(dtype)
        got, expected = run_both(diffusion, "ddim_sample", model, x, torch.tensor([5, 5, 5]), eta=1.0)
        assert got[0]["sample"].dtype == expected[0]["sample"].dtype == torch.float32
        assert_same(got, expected, 60.0, EPS32)


def test_gradients_of_a_single_step():
    diffusion = original("PREVIOUS_X", "LEARNED")
    model, t, gradients = model_of(diffusion), torch.tensor([5, 1, 5]), []
    for one in (FastDiffusion(diffusion), diffusion):
        x = draw(0).requires_grad_(True)
        out = one.ddim_sample(model, x, t, denoised_fn=denoised_fn)
        (out["sample"].square().sum() + out["pred_xstart"].sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_between_steps_the_callers_mode_holds_and_a_replaced_sample_counts():
    diffusion = original()
    noise, model = draw(0), model_of(diffusion)
    runs = FastDiffusion(diffusion).ddim_sample_loop_progressive(model, SHAPE, noise, device="cpu")
    seen = []
    for out in runs:
        assert torch.is_grad_enabled()
        seen.append(out["sample"].clone())
        out["sample"] = 0.5 * out["sample"]
    assert torch.equal(noise, draw(0))
    second = diffusion.ddim_sample(model, 0.5 * seen[0], torch.tensor([7, 7, 7]))["sample"]
    torch.testing.assert_close(seen[1], second, rtol=1e-12, atol=1e-12)
    assert len({out.data_ptr() for out in seen}) == len(seen) == 9


def test_nothing_is_drawn_before_the_first_step():
    diffusion = original()
    state = torch.get_rng_state()
    FastDiffusion(diffusion).ddim_sample_loop_progressive(model_of(diffusion), SHAPE, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_bars(monkeypatch):
    bars = []
    monkeypatch.setattr(guided_diffusion, "tqdm", lambda steps: bars.append(list(steps)) or steps)
    diffusion = original()
    fast, model = FastDiffusion(diffusion), model_of(diffusion)
    for progress in (False, True):
        fast.ddim_sample_loop(model, SHAPE, device="cpu", progress=progress)
        fast.ddim_reverse_sample_loop(model, draw(0), progress=progress)
    assert bars == [list(range(9))[::-1], list(range(8))]


def test_everything_else_is_the_originals():
    diffusion = original(respaced=True)
    fast = FastDiffusion(diffusion)
    x, t = draw(0), torch.tensor([1, 2, 3])
    assert fast.num_timesteps == len(KEPT)
    assert torch.equal(fast.q_sample(x, t, noise=x), diffusion.q_sample(x, t, noise=x))
    with pytest.raises(AttributeError, match="no_such_method"):
        fast.no_such_method  # noqa: B018 (looked up, that is all)


def test_it_prints_what_it_does():
    diffusion = original(respaced=True)
    name, count = type(diffusion).__name__, len(diffusion.betas)
    assert repr(FastDiffusion(diffusion)) == f"FastDiffusion({name}, {count} timesteps)"


def test_copies_before_and_after_each_method():
    diffusion = original(respaced=True)
    x, t, model = draw(0), torch.tensor([1, 2, 3]), model_of(diffusion)
    fast, want = FastDiffusion(diffusion), FastDiffusion(diffusion).ddim_sample(model, x, t)["sample"]
    for method in (
        lambda: None,
        lambda: fast.ddim_sample(model, x, t, denoised_fn=denoised_fn),
        lambda: fast.ddim_reverse_sample(model, x, t),
        lambda: fast.ddim_sample_loop(model, SHAPE, x, cond_fn=cond_fn, device="cpu"),
        lambda: fast.ddim_reverse_sample_loop(model, x),
        lambda: fast._steps("epsilon", "prev").table(torch.device("cpu")),  # as a step on a GPU does
    ):
        method()
        for twin in [copy.copy(fast), *twins(fast)]:
            assert torch.equal(twin.ddim_sample(model, x, t)["sample"], want)


def test_no_samples():
    diffusion = original()
    out = FastDiffusion(diffusion).ddim_sample(model_of(diffusion), draw(0)[:0], torch.empty(0, dtype=torch.int64))
    assert out["sample"].shape == out["pred_xstart"].shape == (0, 2, 4, 5)


# --- Where the originals have no numbers -------------------------------------------------------------------------------


def test_largest_noise_has_room_for_itself():
    """Cosine schedule, eta = 1, spacing "20": the original takes the root of a negative float32."""
    levels = np.cos((np.arange(4001) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    spaced = [round(i * 3999 / 19) for i in range(20)]
    results = []
    for dtype in (torch.float32, torch.float64):
        diffusion = SpacedDiffusion(
            spaced,
            betas=np.clip(1 - levels[1:] / levels[:-1], 0, 0.999),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            levels=dtype,
        )
        options = dict(noise=draw(0, dtype=dtype), eta=1.0, device="cpu")
        results += run_both(diffusion, "ddim_sample_loop_progressive", model_of(diffusion), SHAPE, **options)
    ours, theirs, ours_exact, exact = results
    assert all(out["sample"].isnan().any() for out in theirs)
    assert all(out["sample"].isfinite().all() for out in ours)
    assert_same(ours_exact, exact, 1e6)  # the first step divides by sqrt(alpha_bar) = 1.2e-5


def test_zero_terminal_snr():
    """A last beta of 1: x0 prediction has an answer there, epsilon prediction none."""
    betas = np.append(BETAS, 1.0)
    for mean in ("START_X", "PREVIOUS_X"):
        diffusion = original(mean, betas=betas)
        x, t = draw(0), torch.tensor([9, 9, 9])
        out = FastDiffusion(diffusion).ddim_sample(model_of(diffusion), x, t, clip_denoised=False)
        x0, level = out["pred_xstart"], diffusion.alphas_cumprod[8]
        torch.testing.assert_close(out["sample"], math.sqrt(level) * x0 + math.sqrt(1 - level) * x)
        if mean == "START_X":
            assert torch.equal(x0, model_of(diffusion)(x, t))
        torch.manual_seed(11)
        noisy = FastDiffusion(diffusion).ddim_sample(model_of(diffusion), x, t, clip_denoised=False, eta=1.0)["sample"]
        torch.manual_seed(11)
        torch.testing.assert_close(noisy, math.sqrt(level) * x0 + math.sqrt(1 - level) * torch.randn_like(x))
    with pytest.raises(ValueError, match="epsilon prediction needs alpha_bar_t > 0"):
        FastDiffusion(original("EPSILON", betas=betas))
    with pytest.raises(ValueError, match="epsilon prediction needs alpha_bar_t > 0"):
        FastDiffusion(diffusion).ddim_sample(None, x, t, cond_fn=cond_fn)


# --- Errors ------------------------------------------------------------------------------------------------------------


def uncallable(*args, **kwargs):
    raise AssertionError("the model was called before the arguments were checked")


X, T = torch.zeros(SHAPE), torch.tensor([1, 2, 3])
STEP_ERRORS = [
    (dict(t=torch.tensor(3)), ValueError, r"t must have one timestep per sample, shape \(3,\), got \(\)"),
    (dict(t=torch.tensor([3])), ValueError, "t must have one timestep per sample"),
    (dict(t=T.float()), TypeError, "t must be a torch.Tensor of integers, got torch.float32"),
    (dict(t=3), TypeError, "t must be a torch.Tensor of integers, got int"),
    (dict(t=torch.tensor([1, 2, 9])), ValueError, "t must be 0 to 8, got 9"),
    (dict(t=torch.tensor([1, 2, -1])), ValueError, "t must be 0 to 8, got -1"),
    (dict(x=X.long()), TypeError, "x must be a floating-point torch.Tensor, got torch.int64"),
    (dict(x=X[:, 0, 0, 0]), ValueError, "x must have a batch and a channel dimension"),
    (dict(denoised_fn=3), TypeError, "denoised_fn must be a function or None, got int"),
    (dict(model_kwargs=[1]), TypeError, "model_kwargs must be a dict, got list"),
]
FORWARD_ERRORS = [
    (dict(eta=-0.1), ValueError, "eta must be a finite number, 0"),
    (dict(eta=None), ValueError, "eta must be a finite number"),
    (dict(eta=torch.tensor(0.5)), ValueError, r"eta must be a finite number.*got tensor\(0.5"),
    (dict(eta=3.0), ValueError, r"at timestep [123], eta may be at most [\d.]+, got 3.0"),
    (dict(cond_fn=3), TypeError, "cond_fn must be a function or None, got int"),
]


@pytest.mark.parametrize("wrong", range(len(STEP_ERRORS + FORWARD_ERRORS)))
def test_arguments_of_a_step_are_checked_before_the_model_is_called(wrong):
    wrong, error, message = (STEP_ERRORS + FORWARD_ERRORS)[wrong]
    fast, options = FastDiffusion(original()), {"x": X, "t": T} | wrong
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fast.ddim_sample(uncallable, **options)
    if "eta" not in wrong and "cond_fn" not in wrong:
        with pytest.raises(error, match=message):
            fast.ddim_reverse_sample(uncallable, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_encoding_is_deterministic():
    fast = FastDiffusion(original())
    with pytest.raises(ValueError, match=r"eta must be 0 in the reverse process, which is deterministic, got 0\.5"):
        fast.ddim_reverse_sample(uncallable, X, T, eta=0.5)
    with pytest.raises(ValueError, match=r"eta must be 0 in the reverse process, which is deterministic, got 0\.5"):
        fast.ddim_reverse_sample_loop(uncallable, X, eta=0.5)
    with pytest.raises(ValueError, match="keep at least two"):
        FastDiffusion(original(betas=[0.5])).ddim_reverse_sample_loop(uncallable, X)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(shape=torch.Size([3]).numel()), TypeError, "shape must be a tuple or a list"),
        (dict(shape=(3,)), ValueError, "shape must have a batch and a channel dimension"),
        (dict(noise=X[:, :1]), ValueError, r"noise must have the given shape, \(3, 2, 4, 5\), got \(3, 1, 4, 5\)"),
        (dict(noise=X.long()), TypeError, "must be a floating-point torch.Tensor"),
        (dict(noise=X, device="meta"), ValueError, "noise must be on the device of the samples, meta, got cpu"),
        (dict(device=None), ValueError, "for a model without parameters, got None: pass device"),
        (dict(eta=3.0), ValueError, "eta may be at most"),
    ],
    ids=str,
)
def test_arguments_of_a_loop_are_checked_when_it_is_made(wrong, error, message):
    options = {"shape": SHAPE, "device": "cpu"} | wrong
    with pytest.raises(error, match=message):
        FastDiffusion(original()).ddim_sample_loop_progressive(uncallable, **options)


def test_what_callables_return_is_checked():
    fast, learned = FastDiffusion(original()), FastDiffusion(original(variance="LEARNED"))
    model = model_of(original())
    with pytest.raises(ValueError, match=r"output of model must be .*\(3, 4, 4, 5\), got .*ModelVarType.LEARNED"):
        learned.ddim_sample(model, X, T)
    with pytest.raises(ValueError, match=r"output of model .*\(3, 2, 4, 5\), got \(3, 4, 4, 5\): .*FIXED_SMALL"):
        fast.ddim_sample(model_of(learned), X, T)
    with pytest.raises(TypeError, match=r"output of model must be a tensor .*tuple"):
        fast.ddim_sample(lambda x, t: (x, x), X, T)
    with pytest.raises(ValueError, match="output of denoised_fn must be"):
        fast.ddim_sample(model, X, T, denoised_fn=lambda x0: x0[:1])
    with pytest.raises(ValueError, match="output of cond_fn must be"):
        fast.ddim_sample(model, X, T, cond_fn=lambda x, t: x[:1])


def changed(**attributes):
    diffusion = original()
    for name, value in attributes.items():
        setattr(diffusion, name, value)
    return diffusion


class Inpainting(SpacedDiffusion):
    def p_mean_variance(self, *args, **kwargs):
        return super().p_mean_variance(*args, **kwargs)


class Fork(GaussianDiffusion):
    def ddim_sample(self, model, residual_model, x, t):
        raise NotImplementedError


Fork.__name__ = "GaussianDiffusion"
OPTIONS = dict(betas=BETAS, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.LEARNED)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (object, TypeError, "got object, which has no model_mean_type"),
        (lambda: original("VELOCITY"), ValueError, "model_mean_type must be one of PREVIOUS_X, START_X, EPSILON, got"),
        (lambda: changed(model_var_type="learned"), ValueError, "model_var_type must be one of LEARNED,"),
        (lambda: changed(alphas_cumprod=BETAS), ValueError, "alphas_cumprod must decrease"),
        (
            lambda: changed(alphas_cumprod=np.cumprod(1 - BETAS).astype(np.float16)),
            TypeError,
            "alphas_cumprod must be float64 or float32, got float16",
        ),
        (
            lambda: changed(num_timesteps=8),
            ValueError,
            "alphas_cumprod must have one level for each of the 8 timesteps",
        ),
        (
            lambda: Inpainting(KEPT, **OPTIONS | {"betas": FINE_BETAS}),
            ValueError,
            "p_mean_variance .* an override in Inpainting,",
        ),
        (lambda: changed(ddim_sample=uncallable), ValueError, "ddim_sample is replaced by fused steps"),
        (
            lambda: Fork(**OPTIONS),
            TypeError,
            "ddim_sample must have the original's arguments .* got model, residual_model",
        ),
        (lambda: FastDiffusion(original()), ValueError, "ddim_sample is replaced by fused steps"),
    ],
    ids=["no attributes", "velocity", "names", "levels", "half", "timesteps", "subclass", "patched", "fork", "twice"],
)
def test_a_diffusion_that_would_be_misunderstood_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        FastDiffusion(make())


ARGUMENTS = dict(clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0)
REVERSE = {name: value for name, value in ARGUMENTS.items() if name != "cond_fn"}
LOOP = dict(shape=SHAPE, noise=None, device="cpu", progress=False)
CALLS = {
    "__init__": dict(diffusion=original()),
    "ddim_sample": dict(model=model_of(original()), x=draw(0), t=torch.tensor([1, 2, 3]), **ARGUMENTS),
    "ddim_reverse_sample": dict(model=model_of(original()), x=draw(0), t=torch.tensor([1, 2, 3]), **REVERSE),
    "ddim_sample_loop": dict(model=model_of(original()), **LOOP, **ARGUMENTS),
    "ddim_sample_loop_progressive": dict(model=model_of(original()), **LOOP, **ARGUMENTS),
    "ddim_reverse_sample_loop": dict(model=model_of(original()), x=draw(0), progress=False, **REVERSE),
}


@mistakes(CALLS)
def test_a_mistake_ends_as_in_the_original_or_by_its_name(name, arguments):
    if name == "__init__":
        return FastDiffusion, arguments
    diffusion, run = original(levels=torch.float32), list if "progressive" in name else lambda result: result
    its_own = getattr(diffusion, name, None)
    return (
        lambda **given: run(getattr(FastDiffusion(diffusion), name)(**given)),
        arguments,
        its_own and (lambda **given: run(its_own(**given))),
    )


# --- The page ----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs():
    (example,) = examples("drop_ins/guided_diffusion.md")
    diffusion = original(respaced=True)
    names = {"diffusion": diffusion, "model": model_of(diffusion), "cond_fn": cond_fn, "torch": torch}
    example.run(names)
    torch.manual_seed(0)
    shape = (4, 3, 64, 64)
    expected = diffusion.ddim_sample_loop(names["model"], shape, cond_fn=cond_fn, device="cpu")
    scale = float(expected.abs().max())
    torch.testing.assert_close(names["images"].double(), expected.double(), rtol=0, atol=1000 * EPS32 * scale)
    assert names["again"].shape == shape
