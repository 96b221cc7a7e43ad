"""DDPO's ``ddim_step_with_logprob``: the original's formulas in float64, its draws, gradients and types, with diffusers' scheduler."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddim_fast.integrations.ddpo_pytorch import ddim_step_with_logprob
from ddim_fast.verify.truth import density, oracle, tolerances
from ddim_fast.verify.truth.tolerances import to_numpy

F, H, B, D = torch.float32, torch.float16, torch.bfloat16, torch.float64
TYPES = [(F, F), (H, H), (B, B), (D, D), (F, H), (F, B), (H, F), (B, F)]


def scheduler_of(count=50, **changes):
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip
    scheduler = DDIMScheduler(**(config | changes))
    scheduler.set_timesteps(count)
    return scheduler


def tensors(shape=(2, 4, 8, 8), types=(F, F), seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for dtype in types]


def row_of(scheduler, t, eta, recomputed=False):
    """The original's step in float64: from the level of t to that of t - T // N, or of timestep 0."""
    config = scheduler.config
    target = max(t - config.num_train_timesteps // scheduler.num_inference_steps, 0)
    clip = config.clip_sample_range if config.clip_sample else math.inf
    at, to = (float(scheduler.alphas_cumprod[i]) for i in (t, target))
    return oracle.textbook_row(config.prediction_type, at, to, eta=eta, clip=clip, use_clipped_model_output=recomputed)


def exact(rows, x_t, m, x_prev):
    """The mean of each sample's log-probabilities in float64, and the error allowed."""
    found, allowed = [], []
    for i in range(len(x_t)):
        one = slice(i, i + 1)
        row = rows[i] if len(rows) > 1 else rows[0]
        normal = density.gaussian(row, to_numpy(x_t[one]), to_numpy(m[one]))
        values = density.flat(to_numpy(x_prev[one]))
        offset = math.log(normal.std) + density.HALF_LOG_2_PI
        dtype = D if x_t.dtype == D else F
        error = tolerances.allowed_density_error(dtype, values - normal.mean, normal.terms, 0.5 / normal.std**2, offset)
        found.append(normal.log_prob(values, "mean"))
        allowed.append(error / values.shape[1])
    return np.concatenate(found), np.concatenate(allowed)


def assert_near(got, wanted, allowed):
    assert (np.abs(to_numpy(got) - wanted) <= allowed).all()


cases = {
    "types": st.sampled_from(TYPES),
    "shape": st.sampled_from([(1, 1), (2, 127), (3, 128), (2, 129), (2, 4, 8, 8), (5,)]),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "clip": st.sampled_from([None, 1.0, 2.5]),
    "recomputed": st.booleans(),
    "eta": st.sampled_from([1.0, 0.7, 0.05]),
    "count": st.sampled_from([50, 10, 7]),
    "place": st.integers(0, 6),
    "several": st.booleans(),
    "seed": st.integers(0, 2**20),
}


@given(options=st.fixed_dictionaries(cases))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_steps_and_their_log_probabilities_are_those_of_the_original(options):
    clip = options["clip"]
    scheduler = scheduler_of(
        options["count"], prediction_type=options["prediction_type"], clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )  # fmt: skip
    x_t, m = tensors(options["shape"], options["types"], options["seed"])
    t = scheduler.timesteps[options["place"]]
    if options["several"]:
        t = scheduler.timesteps[(options["place"] + torch.arange(len(x_t))) % (options["count"] - 1)]
    call = {"eta": options["eta"], "use_clipped_model_output": options["recomputed"]}
    x_prev, log_prob = ddim_step_with_logprob(
        scheduler, m, t, x_t, generator=torch.Generator().manual_seed(options["seed"]), **call
    )
    z = randn_tensor(m.shape, generator=torch.Generator().manual_seed(options["seed"]), dtype=m.dtype)
    rows = [row_of(scheduler, int(one), options["eta"], options["recomputed"]) for one in t.reshape(-1)]
    assert x_prev.dtype == x_t.dtype
    assert log_prob.dtype == (D if D in options["types"] else F)
    assert log_prob.shape == x_t.shape[:1]
    for i in range(len(x_t)):
        one = slice(i, i + 1)
        step = oracle.row_step(
            rows[i] if len(rows) > 1 else rows[0], *map(to_numpy, (x_t[one], m[one])), noise=to_numpy(z[one])
        )
        computed_in = D if D in options["types"] else F
        tolerances.assert_within(x_prev[one], step.x_prev, tolerances.allowed_error(computed_in, step.terms))
    assert_near(log_prob, *exact(rows, x_t, m, x_prev))
    again, new = ddim_step_with_logprob(scheduler, m, t, x_t, prev_sample=x_prev, **call)
    assert torch.equal(again, x_prev)
    assert torch.equal(new, log_prob)  # a ratio of exactly 1, in half precision, too


def originals_log_prob(scheduler, m, timesteps, x_t, eta, x_prev):
    """The original's formulas with torch's operations in float64, for autograd."""
    shape = (-1, *[1] * (x_t.ndim - 1))
    bars = scheduler.alphas_cumprod.double()
    targets = (timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
    a, p = bars[timesteps].reshape(shape), bars[targets].reshape(shape)
    std = eta * ((1 - p) / (1 - a) * (1 - a / p)).sqrt()
    x0 = (x_t - (1 - a).sqrt() * m) / a.sqrt()
    mean = p.sqrt() * x0 + (1 - p - std**2).sqrt() * m
    return torch.distributions.Normal(mean, std).log_prob(x_prev).flatten(1).mean(1)


@pytest.mark.parametrize("places", [[3], [0, 20, 48]])
def test_gradients_are_those_of_the_originals_formulas(places):
    scheduler = scheduler_of()
    x_t, m = tensors((3, 4, 5))
    timesteps = scheduler.timesteps[places]
    x_prev, _ = ddim_step_with_logprob(
        scheduler, m, timesteps, x_t, eta=1.0, generator=torch.Generator().manual_seed(1)
    )
    leaves = [x_t.clone().requires_grad_(), m.clone().requires_grad_()]
    _, log_prob = ddim_step_with_logprob(scheduler, leaves[1], timesteps, leaves[0], eta=1.0, prev_sample=x_prev)
    weights = torch.tensor([1.0, -0.5, 2.0])
    got = torch.autograd.grad(log_prob, leaves, weights)
    wide = [x_t.double().requires_grad_(), m.double().requires_grad_()]
    original = originals_log_prob(scheduler, wide[1], timesteps, wide[0], 1.0, x_prev.double())
    for mine, theirs in zip(got, torch.autograd.grad(original, wide, weights.double()), strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * size)
    # Where a step draws, too: x_prev is a constant.
    m_leaf = m.clone().requires_grad_()
    drawn, log_prob = ddim_step_with_logprob(
        scheduler, m_leaf, timesteps, x_t, eta=1.0, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(drawn, x_prev, rtol=1e-5, atol=1e-6)  # by the reference, which records gradients
    assert drawn.requires_grad  # as the original's
    (of_drawn,) = torch.autograd.grad(log_prob, m_leaf, weights)
    torch.testing.assert_close(of_drawn, got[1], rtol=1e-4, atol=1e-5 * float(got[1].abs().max()))


def test_every_way_to_draw_leaves_generators_where_the_original_does():
    scheduler = scheduler_of()
    x_t, m = tensors((2, 4, 8, 8))
    t = scheduler.timesteps[3]
    several = [[torch.Generator().manual_seed(i) for i in (5, 6)] for _ in range(2)]
    first, _ = ddim_step_with_logprob(scheduler, m, t, x_t, eta=0.5, generator=several[0])
    z = randn_tensor(m.shape, generator=several[1], dtype=F)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(*several, strict=True))
    step = oracle.row_step(row_of(scheduler, int(t), 0.5), *map(to_numpy, (x_t, m)), noise=to_numpy(z))
    tolerances.assert_near(first, step.x_prev, step.terms)
    torch.manual_seed(3)
    ddim_step_with_logprob(scheduler, m, t, x_t, eta=0.5)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    randn_tensor(m.shape, dtype=F)
    assert torch.equal(torch.get_rng_state(), state)


def test_timesteps_may_be_numbers_and_a_batch_may_be_empty():
    scheduler = scheduler_of()
    x_t, m = tensors((2, 129))
    given = torch.zeros_like(x_t)
    as_tensor = ddim_step_with_logprob(scheduler, m, scheduler.timesteps[3], x_t, eta=1.0, prev_sample=given)[1]
    as_number = ddim_step_with_logprob(scheduler, m, int(scheduler.timesteps[3]), x_t, eta=1.0, prev_sample=given)[1]
    assert torch.equal(as_tensor, as_number)
    none = ddim_step_with_logprob(scheduler, m[:0], scheduler.timesteps[3], x_t[:0], eta=1.0)
    assert none[0].shape == (0, 129)
    assert none[1].shape == (0,)


def test_at_eta_0_a_step_is_ddims_and_has_no_log_probability():
    scheduler = scheduler_of()
    x_t, m = tensors((2, 129))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    x_prev, log_prob = ddim_step_with_logprob(scheduler, m, scheduler.timesteps[3], x_t, generator=generators[0])
    expected = scheduler.step(m, scheduler.timesteps[3], x_t).prev_sample
    torch.testing.assert_close(x_prev, expected, rtol=1e-5, atol=1e-6)
    assert log_prob.isnan().all()
    randn_tensor(m.shape, generator=generators[1])  # the original draws, and multiplies by 0
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_scheduler_that_is_set_again_has_other_rows():
    scheduler = scheduler_of(50)
    x_t, m = tensors((2, 129))
    call = {"eta": 1.0, "prev_sample": torch.zeros_like(x_t)}
    for count, levels in ((50, None), (10, None), (10, scheduler.alphas_cumprod**2)):
        scheduler.set_timesteps(count)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod if levels is None else levels
        _, log_prob = ddim_step_with_logprob(scheduler, m, 501, x_t, **call)
        assert_near(log_prob, *exact([row_of(scheduler, 501, 1.0)], x_t, m, call["prev_sample"]))


REFUSED = {
    "no density": (
        {"eta": 0.0, "prev_sample": torch.zeros(2, 129), "generator": None},
        ValueError,
        ["needs noise, got eta = 0.0 at timestep 981", "eta above 0"],
    ),
    "no density at timestep 0": ({"timestep": 0}, ValueError, ["at timestep 0", "steps_offset=1"]),
    "one of several": ({"timestep": torch.tensor([981, 0])}, ValueError, ["at timestep 0"]),
    "negative eta": ({"eta": -1.0}, ValueError, ["eta must be a finite number"]),
    "much eta": ({"eta": 60.0, "timestep": 21}, ValueError, ["eta may be at most"]),
    "no such timestep": ({"timestep": 1000}, ValueError, ["timestep must be an integer from 0 to 999, got 1000"]),
    "half a timestep": ({"timestep": 3.5}, ValueError, ["timestep must be an integer"]),
    "many timesteps": ({"timestep": torch.tensor([1, 2, 3])}, ValueError, ["one for each of the 2 samples, got (3,)"]),
    "no timestep": ({"timestep": None}, TypeError, ["timestep must be a number"]),
    "shape": ({"model_output": torch.zeros(2, 5)}, ValueError, ["model_output must have the shape", "(2, 5)"]),
    "kind": ({"sample": "x"}, TypeError, ["sample must be a floating-point tensor"]),
    "shape of prev_sample": ({"prev_sample": torch.zeros(2, 5)}, ValueError, ["prev_sample must have the shape"]),
    "kind of prev_sample": ({"prev_sample": 3}, TypeError, ["prev_sample must be a floating-point tensor"]),
    "both": ({"prev_sample": torch.zeros(2, 129)}, ValueError, ["both generator and prev_sample"]),
    "another scheduler": ({"self": DDPMScheduler()}, TypeError, ["DDIMScheduler"]),
    "not set": ({"self": DDIMScheduler()}, ValueError, ["set_timesteps first"]),
    "thresholding": ({"self": scheduler_of(thresholding=True)}, ValueError, ["thresholding=True"]),
    "prediction": ({"self": scheduler_of(prediction_type="flow")}, ValueError, ["prediction_type must be one of"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_before_anything_is_drawn(name):
    changes, kind, parts = REFUSED[name]
    x_t, m = tensors((2, 129))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    arguments = {
        "self": scheduler_of(), "model_output": m, "timestep": torch.tensor(981), "sample": x_t, "eta": 1.0,
        "generator": generator,
    }  # fmt: skip
    with pytest.raises(kind) as error:
        ddim_step_with_logprob(**(arguments | changes))
    for part in parts:
        assert part in str(error.value)
    assert torch.equal(generator.get_state(), state)
