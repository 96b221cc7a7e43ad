"""The sampler of latent-diffusion against its formulas, restated in float64, over whole loops."""

import inspect
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st
from layouts import Defaults, assert_alike, assert_laid_out_alike, draw, kinds, laid_out, modelled, shapes, sweep
from mistakes import mistakes
from twins import twins

from ddim_fast.gpu_lab.fake_cuda import fake_cuda
from ddim_fast.integrations import original_results
from ddim_fast.integrations.latent_diffusion import DDIMSampler, make_ddim_timesteps

T = 60
BETAS = torch.linspace(0.02, 0.3, T) ** 2
SHAPE = (2, 3, 2, 4)
DTYPES = [torch.float32, torch.float64]
# Rounding of each of about ten steps, amplified by guidance and by 1 / sqrt(alpha_bar) <= 5.
TOLERANCE = 1000


def random(seed, shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def total(c):
    """A number for each sample of a conditioning of any form."""
    if c is None:
        return 0.0
    if isinstance(c, torch.Tensor):
        return c.double().mean(dim=tuple(range(1, c.ndim))).view(-1, 1, 1, 1)
    parts = c.values() if isinstance(c, dict) else c
    return sum((i + 1) * total(part) for i, part in enumerate(parts))


class Model:
    """An elementwise, nonlinear model of x, timestep and conditioning; it records its calls.

    It computes in the dtype of x.
    """

    num_timesteps = T
    device = torch.device("cpu")

    def __init__(self, parameterization="eps"):
        self.betas = BETAS
        self.alphas_cumprod = torch.cumprod(1 - BETAS.double(), 0).float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        if parameterization is not None:
            self.parameterization = parameterization
        self.first_stage_model = SimpleNamespace(quantize=lambda x: (torch.round(2 * x) / 2, None, (1, 2, 3)))
        self.calls = []

    def apply_model(self, x, t, c):
        assert t.dtype == torch.long
        assert t.shape == x.shape[:1]
        self.calls.append((len(x), t[0].item()))
        bent = 0.8 * torch.tanh(x * (0.6 + t.to(x.dtype).view(-1, 1, 1, 1) / 90))
        return (bent + 0.2 * total(c)).to(x.dtype)

    def q_sample(self, x0, t):
        a = self.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x0 + (1 - a).sqrt() * torch.randn(SHAPE)).to(x0.dtype)


class ScoreCorrector:
    def modify_score(self, model, e_t, x, t, c, strength=0.5):
        return (e_t + strength * x * t.view(-1, 1, 1, 1) / T + 0.1 * total(c)).to(e_t.dtype)


# --- The original, restated -------------------------------------------------------------------------------------------


def uniform(S):
    return np.arange(0, T, T // S) + 1


def levels(model, timesteps=None):
    """(timesteps, alpha_bar_t, alpha_bar_prev), float64; of all timesteps if none are named."""
    a = model.alphas_cumprod.double()
    if timesteps is None:
        return np.arange(T), a, torch.cat([torch.ones(1), a[:-1]])
    return timesteps, a[timesteps], torch.cat([a[:1], a[timesteps[:-1]]])


def sigma_of(a, a_prev, eta):
    return eta * torch.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))


def split(parameterization, x, m, a):
    """(x0, eps) that the model's output m means."""
    if parameterization == "v":
        return a.sqrt() * x - (1 - a).sqrt() * m, (1 - a).sqrt() * x + a.sqrt() * m
    if parameterization == "x0":
        return m, (x - a.sqrt() * m) / (1 - a).sqrt()
    return (x - (1 - a).sqrt() * m) / a.sqrt(), m


def joined(uncond, c):
    if isinstance(c, dict):
        return {key: joined(uncond[key], c[key]) for key in c}
    if isinstance(c, list):
        return [joined(u, one) for u, one in zip(uncond, c, strict=True)]
    return torch.cat([uncond, c])


def guided_output(model, x, t, c, scale, uncond):
    if uncond is None or scale == 1:
        return model.apply_model(x, t, c)
    without, with_c = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), joined(uncond, c)).chunk(2)
    return without + scale * (with_c - without)


def original_loop(
    model,
    schedule,
    x=None,
    c=None,
    *,
    eta=0.0,
    mask=None,
    x0=None,
    temperature=1.0,
    noise_dropout=0.0,
    score_corrector=None,
    corrector_kwargs=None,
    quantize=False,
    log_every_t=100,
    scale=1.0,
    uncond=None,
    ucg_schedule=None,
):
    """Return (samples, x_inter, pred_x0, what img_callback gets) in float64.

    Noise is drawn in float32, as in the original.
    """
    timesteps, a, a_prev = schedule
    x = torch.randn(SHAPE).double() if x is None else x.double()
    x_inter, pred_x0s, seen = [x], [x], []
    for i in range(len(timesteps)):
        index = len(timesteps) - 1 - i
        t = torch.full((len(x),), int(timesteps[index]))
        if mask is not None:
            x = mask * model.q_sample(x0.double(), t) + (1 - mask) * x
        m = guided_output(model, x, t, c, scale if ucg_schedule is None else ucg_schedule[i], uncond)
        if score_corrector is not None:
            m = score_corrector.modify_score(model, m, x, t, c, **(corrector_kwargs or {}))
        pred_x0, eps = split(getattr(model, "parameterization", "eps"), x, m, a[index])
        if quantize:
            pred_x0 = model.first_stage_model.quantize(pred_x0)[0]
        sigma = sigma_of(a[index], a_prev[index], eta)
        noise = torch.randn(SHAPE)
        if noise_dropout > 0:
            noise = torch.nn.functional.dropout(noise, noise_dropout)
        noise = sigma * noise.double() * temperature
        x = a_prev[index].sqrt() * pred_x0 + (1 - a_prev[index] - sigma**2).clamp(min=0).sqrt() * eps + noise
        seen.append(pred_x0)
        if index % log_every_t == 0 or index == len(timesteps) - 1:
            x_inter.append(x)
            pred_x0s.append(pred_x0)
    return x, x_inter, pred_x0s, seen


def assert_close(got, want, dtype):
    tolerance = TOLERANCE * torch.finfo(dtype).eps
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


# --- Whole loops ------------------------------------------------------------------------------------------------------

C = random(10, (2, 5))
UNCOND = random(11, (2, 5))
MASK = torch.rand((2, 1, 2, 4), generator=torch.Generator().manual_seed(12), dtype=torch.float64).clamp(0.2, 0.8)
MASK[:, :, 0, 1:3] = torch.tensor([0.0, 1.0])
KNOWN = random(13)
GUIDED = {"c": C, "scale": 3.0, "uncond": UNCOND}
CASES = {
    "plain": {},
    "no parameterization": {"parameterization": None},
    "conditioned": {"c": C},
    "eta 0.5": {"eta": 0.5},
    "eta 1": {"eta": 1.0},
    "S that does not divide T": {"S": 8, "eta": 1.0},
    "temperature": {"eta": 1.0, "temperature": 0.6},
    "dropout": {"eta": 1.0, "noise_dropout": 0.3},
    "dropout of no noise": {"noise_dropout": 0.3},
    "all noise dropped": {"eta": 1.0, "noise_dropout": 1.0},
    "mask": {"mask": MASK, "x0": KNOWN},
    "guidance": GUIDED,
    "guidance of a dict": {
        "c": {"a": C, "b": [UNCOND, 2 * C]},
        "scale": 3.0,
        "uncond": {"b": [C, UNCOND], "a": UNCOND},
    },
    "guidance of a list": {"c": [C, 3 * C], "scale": -1.5, "uncond": [UNCOND, C]},
    "scale 1": GUIDED | {"scale": 1.0},
    "a scale for each step": GUIDED | {"ucg_schedule": [4.0, 1.0, 0.0, 2.5, -1.0]},
    "score corrector": {"c": C, "score_corrector": ScoreCorrector()},
    "score corrector with guidance": GUIDED
    | {"score_corrector": ScoreCorrector(), "corrector_kwargs": {"strength": -0.3}},
    "log every 2": {"S": 10, "log_every_t": 2},
    "log every step": {"log_every_t": 1},
    "quantized": {"eta": 0.5, "quantize": True},
    "v": {"parameterization": "v", "eta": 0.5},
    "x0": {"parameterization": "x0", "eta": 0.5},
    "v quantized": GUIDED | {"parameterization": "v", "eta": 0.5, "quantize": True},
    "everything": GUIDED
    | {
        "S": 7,
        "eta": 0.8,
        "mask": MASK,
        "x0": KNOWN,
        "temperature": 1.3,
        "noise_dropout": 0.2,
        "score_corrector": ScoreCorrector(),
        "quantize": True,
        "log_every_t": 3,
    },
}


def originals_name(options):
    names = {"scale": "unconditional_guidance_scale", "uncond": "unconditional_conditioning", "c": "conditioning"}
    return {{**names, "quantize": "quantize_x0"}.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sample(case, dtype, capsys):
    options = dict(CASES[case])
    S, kind = options.pop("S", 5), options.pop("parameterization", "eps")
    ours, theirs = Model(kind), Model(kind)
    x_T = random(1, dtype=dtype)
    before, steps, seen = x_T.clone(), [], []
    if "mask" in options:
        options |= {"mask": MASK.to(dtype), "x0": KNOWN.to(dtype)}
    torch.manual_seed(5)
    samples, intermediates = DDIMSampler(ours).sample(
        S,
        2,
        SHAPE[1:],
        x_T=x_T,
        verbose=False,
        callback=steps.append,
        img_callback=lambda x0, i: seen.append((i, x0)),
        **originals_name(options),
    )
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    want, x_inter, pred_x0, want_seen = original_loop(theirs, levels(theirs, uniform(S)), x_T, **options)
    assert torch.equal(stream, torch.get_rng_state())
    assert ours.calls == theirs.calls
    assert torch.equal(x_T, before)
    assert intermediates["x_inter"][0] is x_T
    assert intermediates["pred_x0"][0] is x_T
    assert set(intermediates) == {"x_inter", "pred_x0"}
    assert steps == [i for i, _ in seen] == list(range(len(uniform(S))))
    assert_close(samples, want, dtype)
    got = [*intermediates["x_inter"], *intermediates["pred_x0"], *(x0 for _, x0 in seen)]
    for one, its in zip(got, [*x_inter, *pred_x0, *want_seen], strict=True):
        assert_close(one, its, dtype)
    assert capsys.readouterr().out == ""


def test_the_start_is_drawn_as_the_original_draws_it():
    torch.manual_seed(6)
    samples, intermediates = DDIMSampler(Model()).sample(5, 2, SHAPE[1:], eta=1.0, verbose=False)
    stream = torch.get_rng_state()
    torch.manual_seed(6)
    want, x_inter, *_ = original_loop(Model(), levels(Model(), uniform(5)), eta=1.0)
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(intermediates["x_inter"][0].double(), x_inter[0])
    assert_close(samples, want, torch.float32)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_original_steps(kind):
    sampler = DDIMSampler(Model(kind))
    sampler.make_schedule(5, ddim_eta=0.7, verbose=False)
    torch.manual_seed(7)
    got, _ = sampler.ddim_sampling(C, SHAPE, x_T=random(2), ddim_use_original_steps=True, timesteps=11)
    torch.manual_seed(7)
    schedule = [part[:11] for part in levels(Model())]
    want, *_ = original_loop(Model(kind), schedule, random(2), C, eta=0.7)
    assert_close(got, want, torch.float64)
    full, _ = sampler.ddim_sampling(C, SHAPE, x_T=random(2), ddim_use_original_steps=True)
    torch.manual_seed(7)
    assert len(sampler.model.calls) == 11 + T
    assert_close(
        sampler.decode(random(2), C, 11, use_original_steps=True),
        want,
        torch.float64,
    )
    assert full.isfinite().all()


@pytest.mark.parametrize(("timesteps", "ran"), [(10, 9), (12, 9), (7, 6), (1, 0)])
def test_a_number_of_timesteps_means_one_fewer(timesteps, ran):
    sampler = DDIMSampler(Model())
    sampler.make_schedule(10, verbose=False)
    got, _ = sampler.ddim_sampling(None, SHAPE, x_T=random(2), timesteps=timesteps)
    want, *_ = original_loop(Model(), [part[:ran] for part in levels(Model(), uniform(10))], random(2))
    assert len(sampler.model.calls) == ran
    assert_close(got, want, torch.float64)


@pytest.mark.parametrize("repeat_noise", [False, True])
def test_one_step(repeat_noise):
    """``repeat_noise`` and the index are arguments of a single step only."""
    sampler, model = DDIMSampler(Model()), Model()
    sampler.make_schedule(5, ddim_eta=1.0, verbose=False)
    t = torch.tensor([13, 13])
    torch.manual_seed(8)
    got, x0 = sampler.p_sample_ddim(random(3), C, t, 1, repeat_noise=repeat_noise)
    torch.manual_seed(8)
    z = torch.randn((1, *SHAPE[1:])).repeat(2, 1, 1, 1) if repeat_noise else torch.randn(SHAPE)
    z = z.double()
    _, a, a_prev = (part[1] for part in levels(model, uniform(5)))
    x0_want, eps = split("eps", random(3), model.apply_model(random(3), t, C), a)
    sigma = sigma_of(a, a_prev, 1.0)
    assert_close(x0, x0_want, torch.float64)
    assert_close(got, a_prev.sqrt() * x0_want + (1 - a_prev - sigma**2).sqrt() * eps + sigma * z, torch.float64)


def test_half_precision_becomes_float32_as_beside_float32_coefficients():
    sampler = DDIMSampler(Model())
    sampler.make_schedule(5, verbose=False)
    x, t = random(3, dtype=torch.bfloat16), torch.tensor([13, 13])
    got, x0 = sampler.p_sample_ddim(x, None, t, 1)
    _, a, a_prev = (part[1] for part in levels(sampler.model, uniform(5)))
    x0_want, eps = split("eps", x.double(), sampler.model.apply_model(x, t, None).double(), a)
    assert_close(x0, x0_want, torch.float32)
    assert_close(got, a_prev.sqrt() * x0_want + (1 - a_prev).sqrt() * eps, torch.float32)
    assert sampler.stochastic_encode(x, t[:1] * 0).dtype == torch.float32
    assert sampler.encode(x, None, 2)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("quantize", "passes"), [(False, 1), (True, 2)])
def test_kernel_passes_of_a_step(monkeypatch, quantize, passes):
    calls = []
    step = original_results.ddim_step
    monkeypatch.setattr(original_results, "ddim_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    options = originals_name(GUIDED) | {"eta": 1.0, "quantize_x0": quantize, "noise_dropout": 0.1}
    DDIMSampler(Model()).sample(5, 2, SHAPE[1:], verbose=False, **options)
    assert len(calls) == 5 * passes


def test_on_a_gpu_a_loop_waits_for_nothing_and_a_step_is_one_launch():
    sampler = DDIMSampler(Model())
    sampler.make_schedule(5, ddim_eta=1.0, verbose=False)
    with fake_cuda() as device:
        x, c = torch.empty(SHAPE, device="cuda"), torch.empty(2, 1, 1, 1, device="cuda")
        sampler.model = SimpleNamespace(betas=torch.empty(T, device="cuda"), apply_model=lambda x, t, c: x * c)
        guidance = {"unconditional_conditioning": c, "unconditional_guidance_scale": 2.0}
        with device.steady_state(refuse=False) as steady:
            sampler.ddim_sampling(c, SHAPE, x_T=x, noise_dropout=0.1, **guidance)
    assert steady.syncs == []
    # A step's row is made and copied, when the device first sees it.
    assert ["coefficients.py" in copy for copy in steady.copies] == [True, False] * 5
    assert ["transfer.py" in copy for copy in steady.copies] == [False, True] * 5
    assert steady.own_launches == 5


def test_a_subclass_may_replace_the_step():
    class Doubled(DDIMSampler):
        def p_sample_ddim(self, x, c, t, index, use_original_steps=False, quantize_denoised=False, temperature=1.0,
                          noise_dropout=0.0, score_corrector=None, corrector_kwargs=None,
                          unconditional_guidance_scale=1.0, unconditional_conditioning=None):  # fmt: skip
            return 2 * x, x

    got, _ = Doubled(Model()).sample(5, 2, SHAPE[1:], x_T=random(2), verbose=False)
    assert torch.equal(got, 32 * random(2))


# --- The original's operations ----------------------------------------------------------------------------------------


def original_step(sampler, x, c, t, index, scale, uncond, quantize, levels=None):
    """Run ``p_sample_ddim``, operation by operation, in the original's dtypes; its levels are in torch's default one."""
    m = guided_output(sampler.model, x, t, c, scale, uncond)
    k = {name: torch.full((len(x), 1, 1, 1), float(getattr(sampler, name)[index]), dtype=levels) for name in (
        "ddim_alphas", "ddim_alphas_prev", "ddim_sigmas", "ddim_sqrt_one_minus_alphas"
    )}  # fmt: skip
    a, a_prev, sigma, root = k.values()
    e_t, pred_x0 = m, (x - root * m) / a.sqrt()
    if sampler.model.parameterization == "v":
        e_t, pred_x0 = a.sqrt() * m + root * x, a.sqrt() * x - root * m
    if quantize:
        pred_x0, *_ = sampler.model.first_stage_model.quantize(pred_x0)
    dir_xt = (1.0 - a_prev - sigma**2).sqrt() * e_t
    return a_prev.sqrt() * pred_x0 + dir_xt + sigma * torch.randn(x.shape), pred_x0


@sweep(
    parameterization=st.sampled_from(["eps", "v"]),
    of_noise=kinds,
    of_model=kinds,
    of_quantized=st.one_of(st.none(), kinds),
    guided=st.booleans(),
    shape=shapes,
    eta=st.sampled_from([0.0, 0.7]),
)
@example(
    defaults=Defaults(),
    parameterization="eps",
    of_noise=("contiguous", torch.float64),
    of_model=("contiguous", torch.float32),
    of_quantized=("contiguous", torch.float32),  # of which alone the step is taken: float32
    guided=False,
    shape=(3, 2, 4, 5),
    eta=0.0,
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, parameterization, of_noise, of_model, of_quantized, guided, shape, eta
):
    model = Model(parameterization)
    model.apply_model = lambda x, t, c: modelled(x, of_model)
    model.first_stage_model.quantize = lambda x: (
        laid_out(torch.round(2 * x.clamp(-1, 1)) / 8, of_quantized),
        None,
        None,
    )
    sampler = DDIMSampler(model)
    with defaults.device_mode():
        sampler.make_schedule(5, ddim_eta=eta, verbose=False)
    scale, uncond = (1.5, torch.zeros(shape[0], 1)) if guided else (1.0, None)
    c = torch.ones(shape[0], 1)
    x, quantize, both = draw(3, shape, of_noise), of_quantized is not None, (of_noise, of_model, of_quantized)
    torch.manual_seed(4)
    with defaults.device_mode():
        _, intermediates = sampler.ddim_sampling(
            c,
            shape,
            x_T=x,
            timesteps=4,
            quantize_denoised=quantize,
            log_every_t=1,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uncond,
        )
    stream, want = torch.get_rng_state(), x
    torch.manual_seed(4)
    for index, one, one_x0 in zip((2, 1, 0), intermediates["x_inter"][1:], intermediates["pred_x0"][1:], strict=True):
        t = torch.full((shape[0],), int(sampler.ddim_timesteps[index]))
        before, arguments = torch.get_rng_state(), (sampler, want, c, t, index, scale, uncond, quantize)
        half = defaults.dtype in (torch.float16, torch.bfloat16)  # in which the original's 1 - alpha_bar may be nan
        assert_laid_out_alike([one, one_x0], original_step(*arguments), *both, values=not half)
        torch.set_rng_state(before)
        assert_alike([one, one_x0], original_step(*arguments, levels=torch.float32 if half else None), *both)
        want = one
    assert torch.equal(torch.get_rng_state(), stream)

    with defaults.device_mode():
        got, _ = sampler.encode(x, c, 2, unconditional_guidance_scale=scale, unconditional_conditioning=uncond)
    want, a, a_prev = x, sampler.ddim_alphas, torch.from_numpy(sampler.ddim_alphas_prev).float()
    for i, step in enumerate(sampler.ddim_timesteps[:2]):
        m = guided_output(model, want, torch.full((shape[0],), int(step)), c, scale, uncond)
        weighted = a[i].sqrt() * ((1 / a[i] - 1).sqrt() - (1 / a_prev[i] - 1).sqrt()) * m
        want = (a[i] / a_prev[i]).sqrt() * want + weighted
    if parameterization == "eps":
        assert_laid_out_alike([got], [want], *both)
    noise, a = draw(5, shape, of_model), a[torch.arange(shape[0])].view(-1, 1, 1, 1)
    indices = torch.arange(shape[0])
    with defaults.device_mode():
        got = sampler.stochastic_encode(x, indices, noise=noise)
    assert_laid_out_alike([got], [a.sqrt() * x + (1 - a).sqrt() * noise], *both)


# --- Encoding and decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [[0, 4], [3, 3], [2]])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_encode(t, original, dtype):
    sampler, x0 = DDIMSampler(Model()), random(4, dtype=dtype)
    sampler.make_schedule(5, verbose=False)
    _, a, _ = levels(sampler.model, None if original else uniform(5))
    a = a[t].view(-1, 1, 1, 1)
    noise = random(9, dtype=dtype)
    got = sampler.stochastic_encode(x0, torch.tensor(t), use_original_steps=original, noise=noise)
    assert_close(got, a.sqrt() * x0.double() + (1 - a).sqrt() * noise.double(), dtype)
    torch.manual_seed(9)
    drawn = sampler.stochastic_encode(x0, torch.tensor(t), use_original_steps=original)
    stream = torch.get_rng_state()
    torch.manual_seed(9)
    noise = torch.randn_like(x0)
    assert torch.equal(stream, torch.get_rng_state())
    assert_close(drawn, a.sqrt() * x0.double() + (1 - a).sqrt() * noise.double(), dtype)


def test_it_prints_what_it_does():
    sampler = DDIMSampler(Model())
    total = sampler.ddpm_num_timesteps
    assert repr(sampler) == f"DDIMSampler(Model, {total} timesteps, no schedule made)"
    sampler.make_schedule(5, verbose=False)
    assert repr(sampler) == f"DDIMSampler(Model, {total} timesteps, {len(sampler.ddim_timesteps)} steps)"


def test_copies_before_and_after_each_method():
    sampler, x, t = DDIMSampler(Model()), random(4), torch.tensor([1, 2])
    sampler.model.first_stage_model = None  # the restated one is a lambda
    for method in (
        lambda: None,
        lambda: sampler.make_schedule(5, verbose=False),
        lambda: sampler.p_sample_ddim(x, None, t, 1),
        lambda: sampler.sample(5, 2, SHAPE[1:], x_T=x, verbose=False),
        lambda: sampler.stochastic_encode(x, t),
        lambda: sampler.stochastic_encode(x, t, use_original_steps=True),
        lambda: sampler.encode(x, None, 2),
        lambda: sampler.decode(x, None, 2),
    ):
        method()
        for twin in twins(sampler):
            if not sampler._levels:
                twin.make_schedule(5, verbose=False)
                assert twin.decode(x, None, 5).isfinite().all()
                continue
            assert torch.equal(twin.decode(x, None, 5), sampler.decode(x, None, 5))


def test_a_device_without_float64_gets_float32(monkeypatch):
    """As Apple's, for which the "meta" device stands in here."""
    to = torch.Tensor.to

    def without_float64(self, *args, **kwargs):
        if self.dtype == torch.float64 and torch.device("meta") in (*args, *kwargs.values()):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", without_float64)
    sampler = DDIMSampler(Model(), device=torch.device("meta"))
    sampler.make_schedule(5, ddim_eta=0.5, verbose=False)
    buffers = [value for value in vars(sampler).values() if isinstance(value, torch.Tensor)]
    assert len(buffers) == 12
    assert {(b.dtype, b.device.type) for b in buffers} == {(torch.float32, "meta")}


def test_a_new_schedule_replaces_all_of_the_old():
    again, fresh = DDIMSampler(Model()), DDIMSampler(Model())
    results = []
    for sampler, schedules in ((again, [(10, 0.0), (5, 0.8)]), (fresh, [(5, 0.8)])):
        for S, eta in schedules:
            sampler.make_schedule(S, ddim_eta=eta, verbose=False)
            torch.manual_seed(1)
            encoded = sampler.stochastic_encode(random(4), torch.tensor([4, 2]))
            loops = [
                sampler.ddim_sampling(None, SHAPE, x_T=encoded, temperature=0.5)[0],
                sampler.ddim_sampling(None, SHAPE, x_T=encoded, ddim_use_original_steps=True)[0],
            ]
        results.append([encoded, *loops])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_decode(kind):
    sampler, steps = DDIMSampler(Model(kind)), []
    sampler.make_schedule(6, ddim_eta=0.5, verbose=False)
    torch.manual_seed(9)
    got = sampler.decode(
        random(4), C, 4, unconditional_guidance_scale=2.0, unconditional_conditioning=UNCOND, callback=steps.append
    )
    stream = torch.get_rng_state()
    torch.manual_seed(9)
    schedule = [part[:4] for part in levels(Model(), uniform(6))]
    want, *_ = original_loop(Model(kind), schedule, random(4), **(GUIDED | {"scale": 2.0}), eta=0.5)
    assert torch.equal(stream, torch.get_rng_state())
    assert steps == [0, 1, 2, 3]
    assert_close(got, want, torch.float64)
    assert sampler.decode(random(4), C, 0).equal(random(4))


def original_encode(model, schedule, x, c, scale, uncond, indices=False):
    """Return every state. With ``indices`` the model is given the number of the step.

    The model predicts noise; a v is converted to noise at the level of the model timestep.
    """
    states = []
    for i, (timestep, a_next, a) in enumerate(zip(*schedule, strict=True)):
        t = torch.full((len(x),), i if indices else int(timestep))
        eps = guided_output(model, x, t, c, scale, uncond)
        if model.parameterization == "v":
            eps = a_next.sqrt() * eps + (1 - a_next).sqrt() * x
        x = (a_next / a).sqrt() * x + a_next.sqrt() * ((1 / a_next - 1).sqrt() - (1 / a - 1).sqrt()) * eps
        states.append(x)
    return states


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode(kind, scale, original, dtype):
    sampler, steps = DDIMSampler(Model(kind)), []
    sampler.make_schedule(10, verbose=False)
    torch.manual_seed(2)
    stream = torch.get_rng_state()
    got, out = sampler.encode(
        random(4, dtype=dtype),
        C,
        8,
        use_original_steps=original,
        return_intermediates=3,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=UNCOND,
        callback=steps.append,
    )
    assert torch.equal(stream, torch.get_rng_state())
    model = Model(kind)
    schedule = [part[:8] for part in levels(model, None if original else uniform(10))]
    states = original_encode(model, schedule, random(4, dtype=dtype).double(), C, scale, UNCOND)
    assert sampler.model.calls == model.calls
    assert_close(got, states[-1], dtype)
    assert out["x_encoded"] is got
    assert steps == list(range(8))
    assert out["intermediate_steps"] == [0, 2, 4, 6, 7]  # each second, 8 // 3, and the last two
    for state, i in zip(out["intermediates"], out["intermediate_steps"], strict=True):
        assert_close(state, states[i], dtype)


@pytest.mark.parametrize("original", [False, True])
def test_encode_can_give_the_model_the_index_of_the_step_as_stability_does(original):
    sampler, model = DDIMSampler(Model()), Model()
    sampler.make_schedule(10, verbose=False)
    options = {
        "unconditional_guidance_scale": 2.5,
        "unconditional_conditioning": UNCOND,
        "use_original_steps": original,
    }
    got, _ = sampler.encode(random(4), C, 8, **options, model_timesteps="index")
    schedule = [part[:8] for part in levels(model, None if original else uniform(10))]
    states = original_encode(model, schedule, random(4), C, 2.5, UNCOND, indices=True)
    assert sampler.model.calls == model.calls == [(4, i) for i in range(8)]
    assert_close(got, states[-1], torch.float64)


def test_encode_without_intermediates():
    sampler = DDIMSampler(Model())
    sampler.make_schedule(10, verbose=False)
    got, out = sampler.encode(random(4), None, 8)
    assert out == {"x_encoded": got, "intermediate_steps": []}


def test_encode_of_no_steps_has_no_intermediates():
    sampler, x = DDIMSampler(Model()), random(4)
    sampler.make_schedule(10, verbose=False)
    got, out = sampler.encode(x, None, 0, return_intermediates=3)
    assert got is x
    assert out == {"x_encoded": x, "intermediate_steps": [], "intermediates": []}


def test_decode_takes_back_what_encode_did_where_the_noise_does_not_depend_on_x():
    model = Model()
    model.apply_model = lambda x, t, c: (torch.cos(t.double()).view(-1, 1, 1, 1) * KNOWN[: len(x)]).to(x.dtype)
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    encoded, _ = sampler.encode(random(4), None, 10)
    assert (encoded - random(4)).abs().max() > 0.5
    assert_close(sampler.decode(encoded, None, 10), random(4), torch.float64)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_round_trip_comes_closer_with_more_steps(kind):
    """For normal data of variance 0.3, whose best model is known, more steps come closer.

    With a v taken for noise they would not.
    """
    errors = []
    for total_steps in (100, 400):
        model = Model(kind)
        model.num_timesteps = total_steps
        a = torch.linspace(0.9999, 0.02, total_steps, dtype=torch.float64)
        model.alphas_cumprod, model.alphas_cumprod_prev = a, torch.cat([torch.ones(1), a[:-1]])

        def apply_model(x, t, c, a=a, kind=kind):
            a = a[t].view(-1, 1, 1, 1)
            eps = (1 - a).sqrt() * x / (0.3 * a + 1 - a)
            x0 = 0.3 * a.sqrt() * x / (0.3 * a + 1 - a)
            return {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

        model.apply_model = apply_model
        sampler = DDIMSampler(model)
        sampler.make_schedule(total_steps // 2, verbose=False)
        encoded, _ = sampler.encode(random(4), None, total_steps // 2)
        errors.append((sampler.decode(encoded, None, total_steps // 2) - random(4)).abs().max().item())
    assert errors[1] < 0.4 * errors[0] < 0.1


# --- The schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_attributes_of_a_schedule(eta):
    model = Model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(8, ddim_eta=eta, verbose=False)
    timesteps, a, a_prev = levels(model, uniform(8))
    _, every, every_prev = levels(model)
    assert sampler.ddim_timesteps.tolist() == timesteps.tolist() == [1, 8, 15, 22, 29, 36, 43, 50, 57]
    assert isinstance(sampler.ddim_timesteps, np.ndarray)
    assert isinstance(sampler.ddim_alphas_prev, np.ndarray)
    assert sampler.ddim_alphas_prev.dtype == np.float64
    assert np.array_equal(sampler.ddim_alphas_prev, a_prev.numpy())
    assert sampler.ddim_sigmas.dtype == torch.float64
    torch.testing.assert_close(sampler.ddim_sigmas, sigma_of(a, a_prev, eta))
    float32 = {
        "ddim_alphas": a,
        "ddim_sqrt_one_minus_alphas": (1 - a).sqrt(),
        "ddim_sigmas_for_original_num_steps": sigma_of(every, every_prev, eta),
        "betas": BETAS.double(),
        "alphas_cumprod": every,
        "alphas_cumprod_prev": every_prev,
        "sqrt_alphas_cumprod": every.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - every).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - every).log(),
        "sqrt_recip_alphas_cumprod": every.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / every - 1).sqrt(),
    }
    for name, want in float32.items():
        got = getattr(sampler, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=0, msg=name)
    assert sampler.betas is not model.betas
    assert sampler.ddpm_num_timesteps == T
    assert (sampler.schedule, sampler.model) == ("linear", model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("converted", ["all", "levels", "previous levels"])
def test_levels_of_a_model_in_half_precision_come_from_its_betas(converted, dtype):
    """1 - alpha_bar of half-precision levels is off by up to 14 % at the last step: of the betas, by their rounding."""
    model = Model()
    model.betas = torch.linspace(0.00085**0.5, 0.012**0.5, T) ** 2
    exact = torch.cumprod(1 - model.betas.double(), 0)
    names = {"all": ("betas", "alphas_cumprod", "alphas_cumprod_prev"), "levels": ("alphas_cumprod",)}
    model.alphas_cumprod, model.alphas_cumprod_prev = exact.float(), torch.cat([torch.ones(1), exact[:-1].float()])
    for name in names.get(converted, ("alphas_cumprod_prev",)):
        setattr(model, name, getattr(model, name).to(dtype))
    sampler = DDIMSampler(model)
    sampler.make_schedule(5, ddim_eta=1.0, verbose=False)
    eps = torch.finfo(dtype if converted == "all" else torch.float32).eps
    for original, at in ((False, uniform(5)), (True, np.arange(T))):
        a, a_prev = torch.tensor(sampler._levels[original], dtype=torch.float64).T
        torch.testing.assert_close(1 - a, 1 - exact[at], rtol=eps, atol=0)
        torch.testing.assert_close(
            1 - a_prev[1:], 1 - exact[at - 1 if original else np.roll(at, 1)][1:], rtol=eps, atol=0
        )
    assert sampler.alphas_cumprod.dtype == sampler.alphas_cumprod_prev.dtype == torch.float32


def test_levels_in_half_precision_that_are_not_those_of_the_betas_are_refused():
    model = Model()
    model.alphas_cumprod = (0.9 * model.alphas_cumprod).half()
    with pytest.raises(ValueError, match=r"got torch.float16: convert the network alone"):
        DDIMSampler(model).make_schedule(5, verbose=False)


def test_buffers_go_where_they_are_asked_to():
    sampler = DDIMSampler(Model(), "linear", "meta")
    sampler.make_schedule(5, verbose=False)
    assert sampler.ddim_alphas.device.type == "meta"
    sampler.register_buffer("name", 3)
    assert sampler.name == 3
    elsewhere = DDIMSampler(Model())
    elsewhere.make_schedule(5, verbose=False)
    assert elsewhere.ddim_alphas.device.type == "cpu"
    # Steps read none of them: nothing waits for a device.
    assert sampler.decode(random(1), None, 5).equal(elsewhere.decode(random(1), None, 5))


def test_quad():
    """As the original computes it, repeated timesteps included."""
    sampler = DDIMSampler(Model())
    sampler.make_schedule(20, "quad", ddim_eta=1.0, verbose=False)
    want = np.array([int((math.sqrt(0.8 * T) * i / 19) ** 2) for i in range(20)]) + 1
    assert sampler.ddim_timesteps.tolist() == want.tolist()
    assert len(set(want.tolist())) < 20
    torch.manual_seed(1)
    got, _ = sampler.ddim_sampling(None, SHAPE, x_T=random(1))
    torch.manual_seed(1)
    assert_close(got, original_loop(Model(), levels(Model(), want), random(1), eta=1.0)[0], torch.float64)


def test_uniform_timesteps_for_every_number_of_steps():
    """The original's timesteps at T = 1000, or an error if the last of them is 1000."""
    impossible = set()
    for S in range(1, 1001):
        want = list(range(1, 1001, 1000 // S))
        if want[-1] > 999:
            impossible.add(S)
            with pytest.raises(ValueError, match=r"or before, got 1000 .* take \d+ steps") as caught:
                make_ddim_timesteps("uniform", S, 1000, verbose=False)
            fewer = int(re.search(r"take (\d+) steps", str(caught.value))[1])
            assert fewer < S
            assert make_ddim_timesteps("uniform", fewer, 1000, verbose=False)[-1] < 1000
        else:
            assert make_ddim_timesteps("uniform", S, 1000, verbose=False).tolist() == want
    assert len(impossible) == 599
    assert {3, 9, 27, 37, 333, *range(501, 1001)} < impossible
    assert impossible.isdisjoint({1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500})


def test_zero_terminal_snr():
    model = Model("v")
    model.alphas_cumprod = torch.linspace(0.99, 0, T)
    model.num_timesteps = T
    sampler = DDIMSampler(model)
    sampler.make_schedule(T // 2, verbose=False)
    assert sampler.ddim_alphas[-1] == 0
    assert sampler.decode(random(1), None, T).isfinite().all()
    model.parameterization = "eps"
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDIMSampler(model).make_schedule(T // 2, verbose=False)


def test_a_schedule_that_fails_changes_nothing():
    sampler = DDIMSampler(Model())
    sampler.make_schedule(5, verbose=False)
    want = sampler.decode(random(1), None, 5)
    with pytest.raises(ValueError, match="eta may be at most"):
        sampler.make_schedule(2, ddim_eta=9.0, verbose=False)
    assert sampler.ddim_timesteps.tolist() == uniform(5).tolist()
    assert sampler.decode(random(1), None, 5).equal(want)


def test_verbose_prints_the_schedule(capsys):
    DDIMSampler(Model()).sample(5, 2, SHAPE[1:], eta=0.5)
    printed = capsys.readouterr().out
    assert "[ 1 13 25 37 49]" in printed
    assert "eta = 0.5" in printed
    assert str(SHAPE) in printed


# --- Errors -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "S = 0": ({"S": 0}, r"S must be an integer in \[1, 60\]"),
    "S > T": ({"S": 61}, r"S must be an integer in \[1, 60\]"),
    "S = T": ({"S": 60}, "last one, 59, or before, got 60 for S=60: take 30 .*or all 60 by .*use_original_steps=True"),
    "eta < 0": ({"eta": -0.1}, "eta must be a finite number"),
    "eta a tensor": ({"eta": torch.tensor(0.5)}, r"eta must be a finite number.*got tensor\(0.5"),
    "eta too large": ({"eta": 9.0}, "eta may be at most"),
    "mask without x0": ({"mask": MASK}, "mask needs x0, whose masked region is kept, got None"),
    "dropout": ({"noise_dropout": 1.5}, r"noise_dropout must be a finite number in \[0, 1\]"),
    "temperature": ({"temperature": math.inf}, "temperature must be a finite number"),
    "threshold": ({"dynamic_threshold": 0.9}, "dynamic_threshold must be None"),
    "log_every_t": ({"log_every_t": 0}, "log_every_t must be an integer, at least 1"),
    "ucg_schedule": (
        {"ucg_schedule": [2.0] * 4, "conditioning": C, "unconditional_conditioning": UNCOND},
        "each of the 5 steps, got 4",
    ),
    "other conditioning": (
        {"conditioning": C, "unconditional_conditioning": [UNCOND], "unconditional_guidance_scale": 2.0},
        "got a list of 1 beside a Tensor",
    ),
    "other keys": (
        {
            "conditioning": {"a": C},
            "unconditional_conditioning": {"b": UNCOND},
            "unconditional_guidance_scale": 2.0,
        },
        r"keys \['b'\] beside a dict with the keys \['a'\]",
    ),
    "corrector of v": ({"score_corrector": ScoreCorrector(), "parameterization": "v"}, "parameterization 'eps', got 'v'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_called(case):
    options, message = REFUSED[case]
    options = dict(options)
    model = Model(options.pop("parameterization", "eps"))
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=message):
        DDIMSampler(model).sample(options.pop("S", 5), 2, SHAPE[1:], x_T=random(1), verbose=False, **options)
    assert model.calls == []


def made(**options):
    sampler = DDIMSampler(Model())
    sampler.make_schedule(5, verbose=False, **options)
    return sampler


OTHERS_REFUSED = {
    "parameterization": (lambda: DDIMSampler(Model("score")), "must be one of eps, v, x0, got 'score'"),
    "no schedule": (lambda: DDIMSampler(Model()).decode(random(1), None, 1), "call make_schedule first"),
    "discretization": (lambda: made(ddim_discretize="trailing"), "one of uniform, quad, got 'trailing'"),
    "quad of none": (lambda: make_ddim_timesteps("quad", 0, T), "at least 1, got 0"),
    "quad of few": (lambda: make_ddim_timesteps("quad", 6, 5), "or before, got 5"),
    "index": (lambda: made().p_sample_ddim(random(1), None, torch.zeros(2).long(), 5), "index must be 0 to 4, .*got 5"),
    "negative index": (lambda: made().p_sample_ddim(random(1), None, None, -1), "index must be 0 to 4, .*got -1"),
    "timesteps": (lambda: made().ddim_sampling(None, SHAPE, timesteps=0), "timesteps must be 1"),
    "original timesteps": (
        lambda: made().ddim_sampling(None, SHAPE, timesteps=61, ddim_use_original_steps=True),
        "60 steps of the schedule, got 61",
    ),
    "dropout of one step": (
        lambda: made().p_sample_ddim(random(1), None, None, 0, noise_dropout=2.0),
        r"noise_dropout must be a finite number in \[0, 1\]",
    ),
    "t_enc": (lambda: made().encode(random(1), None, 6), "t_enc must be 0 to the 5 steps"),
    "model_timesteps": (
        lambda: made().encode(random(1), None, 2, model_timesteps="steps"),
        "model_timesteps must be one of timestep, index, got 'steps'",
    ),
    "intermediates": (lambda: made().encode(random(1), None, 2, return_intermediates=3), "at most t_enc, 2, got 3"),
    "encode unguided": (lambda: made().encode(random(1), C, 2, unconditional_guidance_scale=2.0), "got None: pass it"),
    "t in steps": (
        lambda: made().stochastic_encode(random(1), torch.tensor([5])),
        "t must be 0 to 4, got 5.*strength of 1",
    ),
    "t for others": (lambda: made().stochastic_encode(random(1), torch.tensor([1, 2, 3])), "each of the 2 samples"),
    "t of floats": (lambda: made().stochastic_encode(random(1), torch.tensor([1.0])), "t must be int64"),
}


@pytest.mark.parametrize("case", OTHERS_REFUSED)
def test_refused(case):
    call, message = OTHERS_REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


X = random(0, (3, 2, 4, 5), torch.float32)
GUIDANCE = dict(unconditional_guidance_scale=1.5, unconditional_conditioning=torch.zeros(3, 1))
STEP = dict(
    temperature=1.0, noise_dropout=0.0, score_corrector=None, corrector_kwargs=None, dynamic_threshold=None, **GUIDANCE
)
LOOP = dict(mask=None, x0=None, x_T=X, callback=None, img_callback=None, log_every_t=100, ucg_schedule=None, **STEP)
CALLS = {
    "DDIMSampler": dict(schedule="linear", device=None),
    "make_ddim_timesteps": dict(ddim_discr_method="uniform", num_ddim_timesteps=5, num_ddpm_timesteps=T, verbose=False),
    "make_schedule": dict(ddim_num_steps=5, ddim_discretize="uniform", ddim_eta=0.0, verbose=False),
    "sample": dict(S=5, batch_size=3, shape=(2, 4, 5), conditioning=torch.ones(3, 1), quantize_x0=False, eta=0.0, verbose=False) | LOOP,
    "ddim_sampling": dict(
        cond=torch.ones(3, 1), shape=X.shape, ddim_use_original_steps=False, timesteps=None, quantize_denoised=False
    ) | LOOP,
    "p_sample_ddim": dict(
        x=X, c=torch.ones(3, 1), t=torch.tensor([13] * 3), index=1, repeat_noise=False, use_original_steps=False, quantize_denoised=False
    ) | STEP,
    "encode": dict(
        x0=X, c=torch.ones(3, 1), t_enc=2, use_original_steps=False, return_intermediates=None, callback=None, model_timesteps="timestep"
    ) | GUIDANCE,
    "stochastic_encode": dict(x0=X, t=torch.tensor([1, 2, 3]), use_original_steps=False, noise=X),
    "decode": dict(x_latent=X, cond=torch.ones(3, 1), t_start=2, use_original_steps=False, callback=None) | GUIDANCE,
}  # fmt: skip
CALLS = {name: right if name == "make_ddim_timesteps" else {"model": Model()} | right for name, right in CALLS.items()}


@mistakes(CALLS)
def test_a_mistake_is_refused_by_its_name(name, arguments):
    def call(model, device=None, schedule="linear", **given):
        sampler = DDIMSampler(model, schedule, device)
        sampler.make_schedule(**(given if name == "make_schedule" else {"ddim_num_steps": 5, "verbose": False}))
        if name not in ("DDIMSampler", "make_schedule"):
            getattr(sampler, name)(**given)

    return make_ddim_timesteps if name == "make_ddim_timesteps" else call, arguments


@pytest.mark.parametrize("shape", [(), (1, 2, 4, 5), (2, 1, 1)])
def test_noise_is_broadcast_as_in_the_original(shape):
    sampler, noise = made(), random(3, shape)
    a = sampler.alphas_cumprod[sampler.ddim_timesteps[[1, 2, 3]]].double().view(-1, 1, 1, 1)
    got = sampler.stochastic_encode(X, torch.tensor([1, 2, 3]), noise=noise.float())
    torch.testing.assert_close(got.double(), a.sqrt() * X.double() + (1 - a).sqrt() * noise.float().double())


def test_a_mask_may_be_a_number():
    x, x0 = random(1), random(13)
    whole = [made().ddim_sampling(None, SHAPE, x_T=x, mask=mask, x0=x0)[0] for mask in (0.0, torch.zeros(1))]
    assert torch.equal(*whole)


def test_a_schedule_of_another_length():
    model = Model()
    model.num_timesteps = 50
    with pytest.raises(ValueError, match=r"must have shape \(50,\), one entry for each timestep, got"):
        DDIMSampler(model).make_schedule(5)


WARNED = {
    "unknown": ({"quantize_denoised": True, "foo": 1}, "ignores quantize_denoised, foo"),
    "normals_sequence": ({"normals_sequence": [1]}, "ignores normals_sequence"),
    "x0 alone": ({"x0": KNOWN}, r"ignores x0 \(without mask\)"),
    "scale alone": ({"unconditional_guidance_scale": 2.0}, "without unconditional_conditioning"),
    "batch size": ({"conditioning": {"a": [random(1, (1, 5))]}}, "batch_size is 2, got conditioning for 1 samples"),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_the_original_ignores_is_ignored_with_a_warning(case):
    options, message = WARNED[case]
    with pytest.warns(UserWarning, match=message) as caught:
        got, _ = DDIMSampler(Model()).sample(5, 2, SHAPE[1:], x_T=random(1), verbose=False, **options)
    assert caught[0].filename == __file__
    c = options.get("conditioning")
    assert_close(got, original_loop(Model(), levels(Model(), uniform(5)), random(1), c)[0], torch.float64)


def test_unknown_argument_at_construction():
    with pytest.warns(UserWarning, match="ignores verbose") as caught:
        DDIMSampler(Model(), verbose=True)
    assert caught[0].filename == __file__


def test_arguments_are_the_originals_in_order():
    """Positional arguments keep their meaning."""
    names = {
        "make_schedule": "ddim_num_steps ddim_discretize ddim_eta verbose",
        "sample": "S batch_size shape conditioning callback normals_sequence img_callback quantize_x0 eta mask x0 temperature "
        "noise_dropout score_corrector corrector_kwargs verbose x_T log_every_t unconditional_guidance_scale "
        "unconditional_conditioning dynamic_threshold ucg_schedule kwargs",
        "ddim_sampling": "cond shape x_T ddim_use_original_steps callback timesteps quantize_denoised mask x0 img_callback "
        "log_every_t temperature noise_dropout score_corrector corrector_kwargs unconditional_guidance_scale "
        "unconditional_conditioning dynamic_threshold ucg_schedule",
        "p_sample_ddim": "x c t index repeat_noise use_original_steps quantize_denoised temperature noise_dropout "
        "score_corrector corrector_kwargs unconditional_guidance_scale unconditional_conditioning dynamic_threshold",
        "stochastic_encode": "x0 t use_original_steps noise",
        "decode": "x_latent cond t_start unconditional_guidance_scale unconditional_conditioning use_original_steps callback",
        "encode": "x0 c t_enc use_original_steps return_intermediates unconditional_guidance_scale "
        "unconditional_conditioning callback model_timesteps",
    }
    for method, arguments in names.items():
        assert list(inspect.signature(getattr(DDIMSampler, method)).parameters) == ["self", *arguments.split()]
