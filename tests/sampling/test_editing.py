"""img2img, inpaint, interpolate and guidance in its variants: against a loop in float64 NumPy, closed forms, and identities."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast.kernels.noise import NoiseStream, standard_normals
from ddim_fast.plans.coefficients import classifier_guidance_weight
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler
from ddim_fast.sampling.editing import slerp
from ddim_fast.verify.truth.oracle import split

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
LINEAR = NoiseSchedule.from_alphas_cumprod(ALPHA_BAR)
STEPS = (999, 700, 433, 101, 7)  # no two strides alike
SHAPE = (3, 2, 4, 5)
SEEDS = [3, -1, 2**63 + 7]
KINDS = ("epsilon", "sample", "v_prediction")
EPS64, EPS32 = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32))
AMPLIFIED = 1 / math.sqrt(ALPHA_BAR[999])  # what the first step divides by: rounding errors grow as much


@pytest.fixture(autouse=True)
def _restored_state():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# --- The textbook, in NumPy float64 -----------------------------------------------------------------------------------


def wavy(x, t, label=0.0):
    """A model that is not linear and knows the timestep and its label; tensors and arrays alike."""
    wave = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    if isinstance(t, torch.Tensor):
        t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return 0.9 * wave(x * (0.6 + t / 1500)) + 0.2 + label * wave(2 * x + 0.3)


def no_label(conditioning):
    return {"label": 0.0}


def cond_fn(x_t, t, label):
    """By autograd: the gradient of -label t / 1000 cos(x_t)."""
    assert torch.is_grad_enabled()
    x_t.requires_grad_()
    log_p = torch.cos(x_t) * t.view(-1, 1, 1, 1) * (-label / 1000)
    return torch.autograd.grad(log_p.sum(), x_t)[0]


def gradient_of_cond_fn(x_t, t, label):
    return label * t / 1000 * np.sin(x_t)


def at_level(x0, alpha_bar, z):
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * z


def deviation(m):
    """Over each sample."""
    return np.sqrt(np.mean((m - m.mean((1, 2, 3), keepdims=True)) ** 2, axis=(1, 2, 3), keepdims=True))


def textbook_loop(
    x_T, timesteps, noises, *, kind, eta=0.0, clip=None, label=0.0, scales=None, phi=0.0, gradient=None, known=None
):
    """Every x_t and x0. ``known``: the mask, the picture, and its noise at x_T and after each step."""
    x, states, x0s = x_T, [], []
    if known is not None:
        mask, picture, known_noises = known
        x = mask * at_level(picture, ALPHA_BAR[timesteps[0]], known_noises[0]) + (1 - mask) * x
    for i, t in enumerate(timesteps):
        alpha_bar_t = ALPHA_BAR[t]
        alpha_bar_prev = ALPHA_BAR[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        states.append(x)
        m = wavy(x, t, label)
        if scales is not None:
            conditional, unconditional = m, wavy(x, t)
            m = (1 - scales[i]) * unconditional + scales[i] * conditional
            m = phi * m * deviation(conditional) / deviation(m) + (1 - phi) * m
        x0, eps = split(kind, x, m, alpha_bar_t)
        if gradient is not None:  # algorithm 2 of Dhariwal and Nichol
            eps = eps - math.sqrt(1 - alpha_bar_t) * gradient(x, t, label)
            x0 = (x - math.sqrt(1 - alpha_bar_t) * eps) / math.sqrt(alpha_bar_t)
        if clip is not None:
            x0 = np.clip(x0, -clip, clip)
        x0s.append(x0)
        beta = 1 - alpha_bar_t / alpha_bar_prev
        variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta
        x = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev - variance) * eps
        x = x + math.sqrt(variance) * noises[i]
        if known is not None:
            x = mask * at_level(picture, alpha_bar_prev, known_noises[i + 1]) + (1 - mask) * x
    return [*states, x], x0s


def random(seed, shape=SHAPE, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def uniform(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def noise_of(stream, step, seeds=SEEDS, shape=SHAPE):
    """The noise standard's, for step -1 as for any other."""
    return standard_normals(seeds, math.prod(shape[1:]), step % 2**32, stream).reshape(shape).astype(float)


def step_noises(count):
    return [noise_of(NoiseStream.STEP, i) for i in range(count)]


def known_noises(count):
    """At x_T, then after each step."""
    return [noise_of(NoiseStream.KNOWN_REGION, i) for i in range(-1, count)]


def sampler_for(kind="epsilon", eta=0.0, clip=None, timesteps=STEPS, **options):
    return DDIMSampler(
        LINEAR, timesteps=timesteps, eta=eta, prediction_type=kind, clip_sample_range=clip, clip_sample=clip is not None, **options
    )  # fmt: skip


def assert_states(run, states, x0s, eps=EPS64):
    for got, expected in zip((*run.x_t, *run.x0), (*states, *x0s), strict=True):
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=100 * AMPLIFIED * eps * scale)


# --- Every state is the textbook's ------------------------------------------------------------------------------------

RULES = [
    dict(kind="epsilon", eta=0.6),
    dict(kind="sample", eta=1.0),
    dict(kind="v_prediction", clip=0.8),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("strength", [0.2, 0.61, 1])
def test_img2img_is_the_textbook_loop_from_the_noised_picture(rule, strength, dtype):
    count = {0.2: 1, 0.61: 3, 1: 5}[strength]
    x0 = random(0).to(dtype)
    x_T = at_level(x0.double().numpy(), ALPHA_BAR[STEPS[-count]], noise_of(NoiseStream.INITIAL, 0))
    expected = textbook_loop(x_T, STEPS[-count:], step_noises(count), **rule)
    run = sampler_for(**rule).img2img(wavy, x0, strength, seeds=SEEDS, return_trajectory=True)
    assert run.timesteps == list(STEPS[-count:])
    assert_states(run, *expected, eps=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("strength", [0.61, 1.0])
def test_inpaint_is_the_textbook_loop_with_the_known_part_put_in(rule, strength, dtype):
    count = {0.61: 3, 1.0: 5}[strength]
    x0, mask = random(0).to(dtype), uniform(1, (SHAPE[0], 1, *SHAPE[2:])).to(dtype)
    mask[:, :, 1], mask[:, :, 2] = 0, 1
    x_T = noise_of(NoiseStream.INITIAL, 0)
    if strength < 1:
        x_T = at_level(x0.double().numpy(), ALPHA_BAR[STEPS[-count]], x_T)
    known = (mask.double().numpy(), x0.double().numpy(), known_noises(count))
    expected = textbook_loop(x_T, STEPS[-count:], step_noises(count), known=known, **rule)
    run = sampler_for(**rule).inpaint(wavy, x0, mask, strength=strength, seeds=SEEDS, return_trajectory=True)
    assert_states(run, *expected, eps=torch.finfo(dtype).eps)
    assert torch.equal(run.samples[:, :, 2], x0[:, :, 2])


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("strength", [0.61, 1.0])
def test_a_generator_draws_in_the_documented_order(eta, strength):
    """x_T, the known part's noise there; then for each step its own noise, where it adds some, and the known part's, but for the last."""
    count = {0.61: 3, 1.0: 5}[strength]
    x0, mask = random(0), uniform(1, SHAPE)
    stream = torch.Generator().manual_seed(8)

    def draw():
        return torch.randn(SHAPE, generator=stream, dtype=torch.float64).numpy()

    x_T, known = draw(), [draw()]
    own = []
    for i in range(count):
        adds = i + 1 < count
        own.append(draw() if adds and eta else np.zeros(SHAPE))
        known.append(draw() if adds else np.zeros(SHAPE))
    if strength < 1:
        x_T = at_level(x0.numpy(), ALPHA_BAR[STEPS[-count]], x_T)
    known = (mask.numpy(), x0.numpy(), known)
    expected = textbook_loop(x_T, STEPS[-count:], own, kind="v_prediction", eta=eta, known=known)
    generator = torch.Generator().manual_seed(8)
    run = sampler_for("v_prediction", eta).inpaint(
        wavy, x0, mask, strength=strength, generator=generator, return_trajectory=True
    )
    assert_states(run, *expected)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=stream))


GUIDANCE = [
    dict(scales=[4.0, -1.0, 2.5, 1.0, 7.0]),
    dict(scales=[4.0, -1.0, 2.5, 1.0, 7.0], phi=0.7),
    dict(scales=[3.1] * 5, phi=1.0),
    dict(gradient=gradient_of_cond_fn),
    dict(gradient=gradient_of_cond_fn, scales=[4.0, -1.0, 2.5, 1.0, 7.0]),
    dict(gradient=gradient_of_cond_fn, scales=[4.0, -1.0, 2.5, 1.0, 7.0], phi=0.4),
]


@pytest.mark.filterwarnings("ignore:guidance_scale should be at least 0")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("guidance", GUIDANCE, ids=lambda g: "-".join(g) + str(g.get("phi", "")))
def test_guidance_in_every_variant_is_the_textbook_loop(rule, guidance, dtype):
    """In a whole inpainting run: previews of x0 included, and nothing of it is in the way of anything else."""
    x0, mask = random(0).to(dtype), uniform(1, SHAPE).to(dtype)
    known = (mask.double().numpy(), x0.double().numpy(), known_noises(5))
    x_T = noise_of(NoiseStream.INITIAL, 0)
    expected = textbook_loop(x_T, STEPS, step_noises(5), known=known, label=0.4, **rule, **guidance)
    run = sampler_for(**rule).inpaint(
        wavy,
        x0,
        mask,
        seeds=SEEDS,
        conditioning={"label": 0.4},
        unconditional_conditioning=no_label({}),
        guidance_scale=guidance.get("scales"),
        guidance_rescale=guidance.get("phi", 0.0),
        cond_fn=cond_fn if "gradient" in guidance else None,
        return_trajectory=True,
    )
    assert_states(run, *expected, eps=torch.finfo(dtype).eps)


# --- Strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "strength", "count"), [(50, 0.25, 12), (50, 0.29, 14), (50, 1, 50), (3, 0.17, 1), (7, 0.999, 7)]
)
def test_strength_is_the_share_of_the_steps_that_is_run(steps, strength, count):
    sampler = DDIMSampler(LINEAR, steps)
    run = sampler.img2img(wavy, random(0), strength, seed=0, return_trajectory=True)
    assert run.timesteps == list(sampler.timesteps[-count:])
    assert sampler.num_inference_steps == steps  # and the sampler is what it was
    assert sampler.plan(wavy).num_inference_steps == steps


@pytest.mark.parametrize("steps", [1, 3, 11, 50, 1000])
@pytest.mark.filterwarnings("ignore:one step from noise")
def test_a_strength_that_leaves_no_step_is_refused_with_one_that_does(steps):
    sampler = DDIMSampler(LINEAR, steps)
    with pytest.raises(ValueError, match=rf"with {steps} steps, got {0.5 / steps}") as caught:
        sampler.img2img(wavy, random(0), 0.5 / steps, seed=0)
    smallest = float(str(caught.value).split("at least ")[1].split()[0])
    assert len(sampler.img2img(wavy, random(0), smallest, seed=0, return_trajectory=True).timesteps) == 1
    assert smallest < 0.5 / steps + 2e-6


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_img2img_is_a_plain_sample_of_the_last_timesteps(eta):
    """Bit by bit, with everything that a sampler was told: clipping, thresholding, eta, and one guidance scale for each step."""
    options = dict(eta=eta, thresholding=True, sample_max_value=1.5, set_alpha_to_one=False)
    whole, last = DDIMSampler(LINEAR, timesteps=STEPS, **options), DDIMSampler(LINEAR, timesteps=STEPS[2:], **options)
    x0 = random(0, dtype=torch.float32)
    call = dict(
        seeds=SEEDS,
        conditioning={"label": 0.4},
        unconditional_conditioning={"label": 0.0},
        guidance_scale=[3.0, 2.0, 0.5],
        return_trajectory=True,
    )
    run = whole.img2img(wavy, x0, 0.6, **call)
    again = last.sample(wavy, x_T=run.x_t[0], **call)
    assert run.timesteps == again.timesteps == list(STEPS[2:])
    for a, b in zip((*run.x_t, *run.x0), (*again.x_t, *again.x0), strict=True):
        assert torch.equal(a, b)


# --- Identities, bit by bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("noise", ["seeds", "generator"])
@pytest.mark.parametrize("strength", [0.61, 1.0])
def test_what_is_known_is_kept_and_what_is_not_is_sampled(strength, noise, eta, dtype):
    sampler, x0 = sampler_for(eta=eta, clip=1.0), 3 * random(0).to(dtype)
    assert x0.abs().max() > 1  # the known part is not clipped

    def source():
        return dict(seeds=SEEDS) if noise == "seeds" else dict(generator=torch.Generator().manual_seed(4))

    ones, zeros = torch.ones(SHAPE), torch.zeros(SHAPE)
    assert torch.equal(sampler.inpaint(wavy, x0, ones, strength=strength, **source()), x0)
    if noise == "generator" and eta:
        return  # it draws for the known part, too, so what it draws for steps is other noise
    plain = (
        sampler.sample(wavy, SHAPE, dtype=dtype, **source())
        if strength == 1
        else sampler.img2img(wavy, x0, strength, **source())
    )
    assert plain.dtype == dtype
    assert torch.equal(sampler.inpaint(wavy, x0, zeros, strength=strength, **source()), plain)


def test_a_mask_may_have_any_shape_that_broadcasts_any_dtype_and_layout():
    sampler, x0 = sampler_for(eta=0.6), random(0, dtype=torch.float32)
    full = (uniform(1, SHAPE[2:]) > 0.5).expand(SHAPE)
    wanted = sampler.inpaint(wavy, x0, full.float(), seeds=SEEDS)
    for mask in (full, full[0, 0], full[:1, :1], full[:, :1].to(torch.uint8), full[0].double(), full[0].long()):
        assert torch.equal(sampler.inpaint(wavy, x0, mask, seeds=SEEDS), wanted)
    last = x0.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sampler.inpaint(wavy, last, full, seeds=SEEDS), wanted)
    assert torch.equal(sampler.img2img(wavy, last, 0.6, seeds=SEEDS), sampler.img2img(wavy, x0, 0.6, seeds=SEEDS))


@pytest.mark.parametrize("thresholding", [False, True])
def test_a_list_and_a_function_of_equal_scales_are_the_one_scale(thresholding):
    sampler = sampler_for(eta=0.6, clip=1.0, thresholding=thresholding)
    call = dict(seeds=SEEDS, conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0})
    for scale in (2.7, 1):
        plain = sampler.sample(wavy, SHAPE, guidance_scale=scale, **call)
        for same in (
            [scale] * 5,
            np.full(5, scale),
            torch.full((5,), scale, dtype=torch.float64),
            {}.fromkeys(STEPS, scale).get,
        ):
            assert torch.equal(sampler.sample(wavy, SHAPE, guidance_scale=same, **call), plain)
        assert torch.equal(sampler.sample(wavy, SHAPE, guidance_scale=scale, guidance_rescale=0, **call), plain)


def test_a_function_of_the_timestep_is_asked_once_for_each():
    asked = []
    call = dict(seeds=SEEDS, conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0})
    by_function = sampler_for().sample(wavy, SHAPE, guidance_scale=lambda t: asked.append(t) or t / 100, **call)
    assert asked == list(STEPS)
    assert all(type(t) is int for t in asked)
    assert torch.equal(by_function, sampler_for().sample(wavy, SHAPE, guidance_scale=[t / 100 for t in STEPS], **call))


def test_seeds_and_not_the_batch_say_what_a_sample_is():
    sampler, x0 = sampler_for(eta=0.6, clip=1.0), random(0, (5, 2, 4, 5), torch.float32)
    mask, seeds = uniform(1, (5, 1, 4, 5)) > 0.5, [9, 8, 7, 6, 5]
    call = dict(
        conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0}, guidance_scale=3.1, guidance_rescale=0.7
    )
    for method, extra in (
        (lambda i, j, **kw: sampler.img2img(wavy, x0[i:j], 0.6, **kw), {}),
        (lambda i, j, **kw: sampler.inpaint(wavy, x0[i:j], mask[i:j], **kw), {}),
        (lambda i, j, **kw: sampler.inpaint(wavy, x0[i:j], mask[i:j], strength=0.6, **kw), {}),
        (lambda i, j, **kw: sampler.inpaint(wavy, x0[i:j], mask[i:j], **kw), dict(cond_fn=cond_fn)),
    ):
        whole = method(0, 5, seeds=seeds, **call, **extra)
        parts = [method(i, j, seeds=seeds[i:j], **call, **extra) for i, j in ((0, 1), (1, 4), (4, 5))]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(method(0, 5, seeds=seeds[::-1], **call, **extra), whole)


def test_one_seed_and_the_global_generator_serve_start_known_part_and_steps():
    sampler, x0, mask = sampler_for(eta=0.6), random(0, dtype=torch.float32), torch.eye(4, 5)
    for method in (
        lambda **kw: sampler.img2img(wavy, x0, 0.6, **kw),
        lambda **kw: sampler.inpaint(wavy, x0, mask, **kw),
    ):
        seeded = method(seed=5)
        assert torch.equal(method(seed=5), seeded)
        assert not torch.equal(method(seed=6), seeded)
        torch.manual_seed(1)
        first, second = method(), method()
        torch.manual_seed(1)
        assert torch.equal(method(), first)
        assert not torch.equal(first, second)


# --- Watching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["img2img", "inpaint", "interpolate"])
def test_callback_and_trajectory_see_every_step_and_change_nothing(how):
    sampler, x0, mask = sampler_for(eta=0.6), random(0, dtype=torch.float32), torch.eye(4, 5)
    call = dict(conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0}, guidance_scale=3.0, seeds=SEEDS)
    call |= dict(guidance_rescale=0.5, cond_fn=cond_fn)

    def run(**extra):
        if how == "interpolate":
            return sampler.interpolate(wavy, x0, x0.flip(0), [0.25, 0.5], **call, **extra)
        if how == "inpaint":
            return sampler.inpaint(wavy, x0, mask, **call, **extra)
        return sampler.img2img(wavy, x0, 0.6, **call, **extra)

    plain, seen = run(), []
    watch = lambda step, t, x_t, x0: seen.append((step, t, x_t.clone(), x0.clone()))  # noqa: E731 (a callback in a line)
    states = run(callback=watch, return_trajectory=True)
    assert torch.equal(states.samples, plain)
    assert [(step, t) for step, t, *_ in seen] == list(enumerate(states.timesteps))
    for (_, _, x_t, x0_seen), kept, x0_kept in zip(seen, states.x_t[:-1], states.x0, strict=True):
        assert torch.equal(x_t, kept.flatten(0, -4))
        assert torch.equal(x0_seen, x0_kept.flatten(0, -4))
    stopped = run(callback=lambda step, *_: step == 1)
    assert torch.equal(stopped, states.x_t[2])


@pytest.mark.parametrize("inside", [False, True])
def test_results_are_ordinary_tensors_and_what_is_given_is_not_changed(inside):
    x0 = random(0, dtype=torch.float32).requires_grad_()
    mask = torch.eye(4, 5).requires_grad_()
    before, sampler = x0.detach().clone(), sampler_for(eta=0.6)
    with torch.inference_mode(inside):
        results = [
            sampler.img2img(wavy, x0, 0.6, seed=0),
            sampler.inpaint(wavy, x0, mask, seed=0),
            sampler.inpaint(wavy, x0, mask, seed=0, cond_fn=cond_fn, conditioning={"label": 0.4}),
            sampler.interpolate(wavy, x0, x0.flip(0), [0.5], seed=0),
        ]
    assert torch.equal(x0, before)
    assert torch.equal(mask, torch.eye(4, 5))
    for result in results:
        assert not result.requires_grad
        assert inside or not result.is_inference()


# --- Interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("angle", [3.0, 1.2, 1e-3, 1e-7])
def test_slerp_goes_along_the_great_circle_at_even_speed(angle, dtype):
    """Of vectors built in a plane: the way is a rotation by weight * angle, and the length is kept."""
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(rng.standard_normal((24, 2)))[0].T
    first, last = 5 * a, 5 * (math.cos(angle) * a + math.sin(angle) * b)
    given = [torch.from_numpy(x.reshape(1, 2, 3, 4)).to(dtype) for x in (first, last)]
    for weight in (0.0, 0.3, 0.5, 1.0):
        expected = 5 * (math.cos(weight * angle) * a + math.sin(weight * angle) * b)
        got = slerp(*given, weight)
        assert got.dtype == dtype
        # The sine of an angle that is not small divides; at a small one the numerator is as small.
        allowed = 40 * torch.finfo(dtype).eps / (math.sin(angle) if angle > 1 else 1)
        np.testing.assert_allclose(got.double().numpy().ravel(), expected, rtol=0, atol=allowed)
        # In float64, whatever it is given: rounded once.
        assert torch.equal(slerp(*(x.double() for x in given), weight).to(dtype), got)
    assert torch.equal(slerp(*given, 0), given[0])
    assert torch.equal(slerp(*given, 1), given[1])


def test_slerp_is_of_each_sample_alone_and_linear_where_there_is_no_angle():
    first, last = random(0), random(1)
    first[1], last[1] = 1.0, 3.0
    first[2] = 0.0
    got = slerp(first, last, 0.25)
    assert torch.equal(slerp(first[:1], last[:1], 0.25), got[:1])
    torch.testing.assert_close(got[1], torch.full(SHAPE[1:], 1.5, dtype=torch.float64), rtol=4 * EPS64, atol=0)
    assert torch.equal(got[2], 0.25 * last[2])
    # Each by its own angle and its own norm (equation 67), by arccosine.
    a, b = first[0].flatten().numpy(), last[0].flatten().numpy()
    theta = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    expected = math.sin(0.75 * theta) / math.sin(theta) * a + math.sin(0.25 * theta) / math.sin(theta) * b
    np.testing.assert_allclose(got[0].flatten().numpy(), expected, rtol=0, atol=16 * EPS64)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_interpolate_samples_what_slerp_gives_with_each_pairs_own_noise_and_conditioning(eta, pairs):
    sampler, weights = sampler_for(eta=eta), [0.0, 0.3, 1.0, 0.5]
    first, last = (random(seed, (pairs, 2, 4, 5), torch.float32) for seed in (0, 1))
    labels, seeds = torch.linspace(0.1, 0.9, pairs).view(-1, 1, 1, 1), list(range(pairs))
    unlabelled = 0.01 * torch.ones(pairs, 1, 1, 1)
    call = dict(seeds=seeds, guidance_scale=2.5)
    call |= dict(conditioning={"label": labels}, unconditional_conditioning={"label": unlabelled})
    got = sampler.interpolate(wavy, first, last, weights, **call)
    assert got.shape == ((4, 2, 4, 5) if pairs == 1 else (4, 3, 2, 4, 5))
    for row, weight in zip(got.view(4, pairs, 2, 4, 5), weights, strict=True):
        assert torch.equal(row, sampler.sample(wavy, x_T=slerp(first, last, weight), **call))
    assert torch.equal(got.view(4, pairs, 2, 4, 5)[0], sampler.sample(wavy, x_T=first, **call))
    states = sampler.interpolate(wavy, first, last, weights, return_trajectory=True, **call)
    assert torch.equal(states.samples, got)
    assert {x.shape for x in (*states.x_t, *states.x0)} == {got.shape}


def test_interpolate_draws_from_a_generator_or_a_seed():
    sampler, first, last = sampler_for(eta=0.6), random(0), random(1)
    by_seed = sampler.interpolate(wavy, first, last, [0.5, 0.5], seed=3)
    assert torch.equal(by_seed[0], by_seed[1])
    assert torch.equal(by_seed[0], sampler.sample(wavy, x_T=slerp(first, last, 0.5), seed=3))
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    drawn = sampler.interpolate(wavy, first, last, [0.5, 0.2], generator=generators[0])
    x_T = torch.cat([slerp(first, last, 0.5), slerp(first, last, 0.2)])
    assert torch.equal(drawn.flatten(0, 1), sampler.sample(wavy, x_T=x_T, generator=generators[1]))


# --- Guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rescaled_output_has_the_deviation_of_the_conditional_one(dtype):
    """The model predicts x0, so the preview is the output that the step was given."""
    outputs, guided = [], []

    def model(x, t, label):
        outputs.append(wavy(x, t, label).to(x.dtype))
        return outputs[-1]

    call = dict(conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0}, guidance_scale=9.0, dtype=dtype)
    for phi in (0.0, 0.5, 1.0):
        del outputs[:], guided[:]
        sampler_for("sample").sample(
            model, SHAPE, seed=0, guidance_rescale=phi, callback=lambda *a: guided.append(a[3].clone()), **call
        )
        for conditional, unconditional, used in zip(outputs[::2], outputs[1::2], guided, strict=True):
            wanted, plain = (
                m.double().flatten(1).std(1)
                for m in (conditional, unconditional.double() + 9 * (conditional.double() - unconditional.double()))
            )
            expected = phi * wanted + (1 - phi) * plain
            torch.testing.assert_close(
                used.double().flatten(1).std(1), expected, rtol=8 * torch.finfo(dtype).eps, atol=0
            )
            assert (plain > 1.5 * wanted).all()


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_an_output_without_deviation_is_left_as_it_is(phi):
    def constant(x, t, label):
        return torch.full_like(x, label)

    call = dict(conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.1}, guidance_scale=3.0)
    got = sampler_for("sample").sample(constant, SHAPE, seed=0, guidance_rescale=phi, **call)
    torch.testing.assert_close(got, torch.full(SHAPE, 1.0), rtol=4 * EPS32, atol=0)
    empty = sampler_for().sample(wavy, (2, 0, 4, 5), seed=0, guidance_rescale=phi, **call)
    assert empty.shape == (2, 0, 4, 5)


MU, S = 0.7, 0.9  # data N(MU, S^2)
TAU, Y = 0.6, 2.0  # y = x0 + N(0, TAU^2)
POSTERIOR = (MU / S**2 + Y / TAU**2) / (1 / S**2 + 1 / TAU**2), (1 / S**2 + 1 / TAU**2) ** -0.5


def denoiser(kind, mean, deviation):
    """E[x0 | x_t] for data N(mean, deviation^2), as the model of this prediction type."""

    def model(x, t, **conditioning):
        a = torch.tensor(ALPHA_BAR)[t].view(-1, *[1] * (x.ndim - 1))
        x0 = mean + deviation**2 * a.sqrt() / (a * deviation**2 + 1 - a) * (x - a.sqrt() * mean)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

    return model


def log_likelihood(x_t, t, y):
    """log p(y | x_t), up to a constant: x0 given x_t is normal, and so is y."""
    a = torch.tensor(ALPHA_BAR)[t].view(-1, *[1] * (x_t.ndim - 1))
    variance = S**2 * (1 - a) / (a * S**2 + 1 - a)
    return -((y - denoiser("sample", MU, S)(x_t, t)) ** 2) / (2 * (variance + TAU**2))


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_likelihood_makes_samples_of_the_posterior(kind, eta):
    """Bayes' rule for scores: guided by log p(y | x_t), the model of the data is the model of the data given y, at every x_t."""

    def towards_y(x_t, t, y):
        x_t.requires_grad_()
        return torch.autograd.grad(log_likelihood(x_t, t, y).sum(), x_t)[0]

    sampler, call = DDIMSampler(LINEAR, 50, eta, prediction_type=kind), dict(dtype=torch.float64, seed=0)
    shape = (4, 1000)
    guided = sampler.sample(denoiser(kind, MU, S), shape, cond_fn=towards_y, conditioning={"y": Y}, **call)
    exact = sampler.sample(denoiser(kind, *POSTERIOR), shape, **call)
    torch.testing.assert_close(guided, exact, rtol=0, atol=1000 * AMPLIFIED * EPS64)
    plain = sampler.sample(denoiser(kind, MU, S), shape, **call)
    assert abs(float(plain.mean()) - MU) < 0.05
    assert abs(float(guided.mean()) - POSTERIOR[0]) < 0.05
    assert abs(float(guided.std()) / POSTERIOR[1] - 1) < 0.1


def test_cond_fn_is_given_the_samples_as_they_are_and_may_do_with_them_what_it_likes():
    seen, told, network = [], [], nn.Conv2d(2, 1, 3)

    def rude(x_t, t, label):
        assert not torch.is_inference_mode_enabled()
        assert (x_t.is_leaf, x_t.is_inference(), x_t.requires_grad) == (True, False, False)
        seen.append((x_t.clone(), t.clone(), label))
        gradient = torch.autograd.grad(network(x_t.requires_grad_()).sum(), x_t)[0]
        x_t.data.zero_()
        t.zero_()
        return gradient * 0

    sampler = sampler_for(eta=0.6)
    call = dict(seed=0, conditioning={"label": 0.4})
    watch = lambda step, t, x_t, x0: told.append((x_t.clone(), t))  # noqa: E731 (a callback in a line)
    got = sampler.sample(wavy, SHAPE, cond_fn=rude, model_dtype=torch.float64, callback=watch, **call)
    torch.testing.assert_close(got, sampler.sample(wavy, SHAPE, model_dtype=torch.float64, **call), rtol=0, atol=1e-4)
    assert not got.requires_grad
    for (x_t, t, label), (x_told, t_told) in zip(seen, told, strict=True):
        assert torch.equal(x_t, x_told)
        assert x_t.dtype == torch.float32
        assert t.tolist() == [t_told] * 3
        assert label == 0.4
    assert network.weight.grad is None


def test_the_weight_of_a_gradient():
    """By finite differences of the textbook: eps moves by -sqrt(1 - alpha_bar_t) where the output moves by the weight."""
    for alpha_bar_t in (0.999, 0.5, 1e-4):
        for kind in KINDS:
            weight = classifier_guidance_weight(alpha_bar_t, kind)
            moved = split(kind, 0.3, 0.7 + weight, alpha_bar_t)[1] - split(kind, 0.3, 0.7, alpha_bar_t)[1]
            assert moved == pytest.approx(-math.sqrt(1 - alpha_bar_t), rel=1e-9)
    assert [classifier_guidance_weight(1.0, kind) for kind in KINDS] == [0.0] * 3


# --- Refusals ---------------------------------------------------------------------------------------------------------

X0, MASK = torch.zeros(SHAPE), torch.zeros(SHAPE[2:])
GUIDED = dict(conditioning={"label": 0.4}, unconditional_conditioning={"label": 0.0})


def edit(how, **arguments):
    sampler, model = arguments.pop("sampler", DDIMSampler(LINEAR, 5)), arguments.pop("model", wavy)
    given = {
        "sample": dict(shape=SHAPE),
        "img2img": dict(x0=X0, strength=0.5),
        "inpaint": dict(x0=X0, mask=MASK),
        "interpolate": dict(x_T_first=X0 + 1, x_T_last=X0 + 2, weights=[0.5]),
    }[how]
    return getattr(sampler, how)(model, **given | arguments)


REFUSALS = [
    ("img2img", dict(strength=0.0), ValueError, r"strength must be in \(0, 1\].*got 0\.0"),
    ("img2img", dict(strength=1.5), ValueError, r"strength .*1\.5"),
    ("img2img", dict(strength=math.nan), ValueError, "strength .*nan"),
    ("img2img", dict(strength="all"), TypeError, "strength .*'all'"),
    ("img2img", dict(strength=True), TypeError, "strength .*True"),
    ("img2img", dict(x0=[1.0]), TypeError, r"x0 must be .*\[1\.0\]"),
    ("img2img", dict(x0=X0.long()), TypeError, "x0 must be a floating-point"),
    ("img2img", dict(x0=torch.zeros(3)), TypeError, "x0 must be"),
    ("img2img", dict(x_T=X0), TypeError, "from x0, got x_T: leave it out"),
    ("img2img", dict(dtype=torch.float16), TypeError, "from x0, got dtype"),
    ("img2img", dict(seeds=[1, 2]), ValueError, "3, got 2"),
    ("img2img", dict(seed=1, generator=torch.Generator()), ValueError, "one place"),
    ("inpaint", dict(strength=0.01), ValueError, r"strength must leave a step: at least 0\.100001 with 5 steps, got 0\.01"),
    ("inpaint", dict(x0=X0.long()), TypeError, "x0 must be a floating-point"),
    ("inpaint", dict(mask=None), ValueError, "both mask and known_x0, got only known_x0: pass mask"),
    ("inpaint", dict(mask=1.0), TypeError, r"mask must be a real tensor.*1\.0"),
    ("inpaint", dict(mask=MASK * 1j), TypeError, "mask must be a real tensor"),
    ("inpaint", dict(mask=torch.zeros(3, 5, 5)), ValueError, r"broadcast to known_x0, \(3, 2, 4, 5\), got \(3, 5, 5\)"),
    ("inpaint", dict(mask=MASK + 255), ValueError, r"mask must be in \[0, 1\], .*got 255\.0 to 255\.0"),
    ("inpaint", dict(mask=MASK - 0.5), ValueError, r"mask must be in \[0, 1\], .*-0\.5"),
    ("inpaint", dict(mask=MASK + math.nan), ValueError, r"mask must be in \[0, 1\], .*nan"),
    ("inpaint", dict(shape=SHAPE), TypeError, "from x0, got shape"),
    ("inpaint", dict(device="cpu", strength=0.5), TypeError, "from x0, got device"),
    ("sample", dict(mask=MASK), ValueError, "got only mask: pass known_x0"),
    ("sample", dict(known_x0=X0), ValueError, "got only known_x0: pass mask"),
    ("sample", dict(mask=MASK, known_x0=X0[:2]), ValueError, r"shape must be that of known_x0, \(2, 2, 4, 5\)"),
    ("sample", dict(mask=MASK, known_x0=X0, x_T=X0.double()), ValueError, "known_x0 must have the dtype of x_T"),
    ("sample", dict(mask=MASK, known_x0=X0[:2], x_T=X0, shape=None), ValueError, r"known_x0 must have the shape of x_T, \(3, "),
    ("interpolate", dict(weights=[]), ValueError, "at least one"),
    ("interpolate", dict(weights=[0.5, 1.5]), ValueError, r"weights .*1\.5"),
    ("interpolate", dict(weights=[0.5, math.nan]), ValueError, "weights .*nan"),
    ("interpolate", dict(weights=0.5), TypeError, r"weights must be a list.*0\.5"),
    ("interpolate", dict(weights=["a"]), TypeError, "weights .*'a'"),
    ("interpolate", dict(x_T_first=[1.0]), TypeError, r"first must be .*\[1\.0\]"),
    ("interpolate", dict(x_T_last=X0[:2]), ValueError, r"last must have the shape of .*first, \(3, 2, 4, 5\), got \(2, "),
    ("interpolate", dict(x_T_last=X0.double()), ValueError, "last must have the dtype of .*first"),
    ("interpolate", dict(x_T_last=-X0 - 1), ValueError, "opposite"),
    ("interpolate", dict(x_T=X0), TypeError, "got x_T: leave it out"),
    ("interpolate", dict(seeds=[1, 2]), ValueError, "3, got 2"),
    ("sample", dict(guidance_scale=[2.0, 3.0], **GUIDED), ValueError, "each of the 5 steps, got 2"),
    ("img2img", dict(strength=0.4, guidance_scale=[2.0] * 5, **GUIDED), ValueError, "each of the 2 steps, got 5"),
    ("sample", dict(guidance_scale=[2.0, math.inf, 1, 1, 1], **GUIDED), ValueError, "guidance_scale must be finite.*inf"),
    ("sample", dict(guidance_scale=1e39, **GUIDED), ValueError, r"guidance_scale must be finite.*1e\+39"),
    ("sample", dict(guidance_scale="high", **GUIDED), TypeError, "guidance_scale .*'high'"),
    ("sample", dict(guidance_scale=lambda t: None, **GUIDED), TypeError, "guidance_scale .*None"),
    ("sample", dict(guidance_scale=[2.0] * 5), ValueError, r"guidance_scale=2\.0 alone: pass unconditional_conditioning"),
    ("sample", dict(guidance_rescale=0.5), ValueError, r"got guidance_rescale=0\.5 without one"),
    ("sample", dict(guidance_rescale=1.5, guidance_scale=2.0, **GUIDED), ValueError, r"\[0, 1\], got 1\.5"),
    ("sample", dict(guidance_rescale=math.nan, guidance_scale=2.0, **GUIDED), ValueError, r"\[0, 1\], got nan"),
    ("sample", dict(guidance_rescale="all", guidance_scale=2.0, **GUIDED), TypeError, "guidance_rescale .*'all'"),
    ("sample", dict(cond_fn=3), TypeError, "cond_fn must be callable.*int"),
    ("sample", dict(cond_fn=lambda x, t: None), TypeError, "cond_fn must return .*None"),
    ("sample", dict(cond_fn=lambda x, t: x > 0), TypeError, "cond_fn must return a floating-point"),
    ("sample", dict(cond_fn=lambda x, t: x[:1]), ValueError, r"cond_fn must return the shape .*got \(1, 2, 4, 5\)"),
    ("sample", dict(cond_fn=lambda x, t: x.to("meta")), ValueError, "cond_fn must return the shape and device .*meta"),
    ("sample", dict(cond_fn=lambda x, t: x, capture="step"), ValueError, "capture='step' cannot be used"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "arguments", "error", "message"),
    REFUSALS,
    ids=[f"{i}-{r[0]}-{'-'.join(r[1])}" for i, r in enumerate(REFUSALS)],
)
def test_what_is_refused_and_what_the_message_says(how, arguments, error, message):
    with pytest.raises(error, match=message):
        edit(how, **arguments)


def test_classifier_guidance_at_zero_terminal_snr_is_refused_before_the_model_is_called():
    sampler = DDIMSampler(
        LINEAR.rescale_zero_terminal_snr(), 5, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    calls = []
    with pytest.raises(ValueError, match="zero terminal SNR"):
        edit("sample", sampler=sampler, cond_fn=lambda x, t: x, model=lambda x, t: calls.append(1) or x)
    assert calls == []


def test_zero_terminal_snr_makes_a_start_of_noise_alone():
    schedule = LINEAR.rescale_zero_terminal_snr()
    sampler = DDIMSampler(schedule, 5, timestep_spacing="trailing", prediction_type="v_prediction")
    for dtype in (torch.float32, torch.float64):
        x0 = random(0).to(dtype)
        plain = sampler.sample(wavy, SHAPE, seeds=SEEDS, dtype=dtype)
        assert torch.equal(sampler.img2img(wavy, x0, 1.0, seeds=SEEDS), plain)
