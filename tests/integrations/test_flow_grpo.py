"""Flow-GRPO's ``sde_step_with_logprob``: the original's formulas in float64, its draws, gradients and types, with diffusers' scheduler."""

import math

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddim_fast.integrations.flow_grpo import sde_step_with_logprob
from ddim_fast.verify.truth.tolerances import allowed_density_error, allowed_error, to_numpy

F, H, B, D = torch.float32, torch.float16, torch.bfloat16, torch.float64
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def scheduler_of(count=10, shift=3.0, **changes):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **changes)
    scheduler.set_timesteps(count)
    return scheduler


def tensors(shape=(2, 4, 8, 8), types=(F, F), seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for dtype in types]


class Original:
    """The original's formulas in float64, with torch's operations, for one index or one for each sample."""

    def __init__(self, scheduler, index, x_t, m, noise_level, sde_type):
        sigmas = scheduler.sigmas.double()
        shape = (-1, *[1] * (x_t.ndim - 1))
        sigma, sigma_prev = sigmas[index].reshape(shape), sigmas[index + 1].reshape(shape)
        dt = sigma_prev - sigma
        self.sqrt_dt = (-dt).sqrt()
        if sde_type == "sde":
            largest = sigmas[1] if len(sigmas) > 1 else sigma
            self.std_dev_t = noise_level * (sigma / (1 - torch.where(sigma == 1, largest, sigma))).sqrt()
            drift = self.std_dev_t**2 / (2 * sigma)
            self.mean = x_t * (1 + drift * dt) + m * (1 + drift * (1 - sigma)) * dt
            self.std = self.std_dev_t * self.sqrt_dt
        else:
            self.std_dev_t = self.std = sigma_prev * math.sin(noise_level * math.pi / 2)
            kept = (sigma_prev**2 - self.std**2).sqrt()
            self.mean = (x_t - sigma * m) * (1 - sigma_prev) + (x_t + m * (1 - sigma)) * kept
        self.terms = self.mean.abs() + x_t.abs() + m.abs()

    def log_prob(self, x_prev, density=True):
        each = -((x_prev - self.mean) ** 2)
        if density:
            each = each / (2 * self.std**2) - self.std.log() - HALF_LOG_2_PI
        return each.flatten(1).mean(1)

    def allowed(self, x_prev):
        deviation, terms = (a.detach().flatten(1).numpy() for a in (x_prev - self.mean, self.terms))
        found = []
        for i in range(len(deviation)):
            std = float((self.std[i] if len(self.std) > 1 else self.std).reshape(-1)[0])
            one = slice(i, i + 1)
            offset = abs(math.log(std)) + HALF_LOG_2_PI
            found.append(
                allowed_density_error(F, deviation[one], terms[one], 0.5 / std**2, offset)[0] / deviation.shape[1]
            )
        return np.array(found)


cases = {
    "types": st.sampled_from([(F, F), (H, H), (B, B), (F, B), (D, F)]),
    "shape": st.sampled_from([(1, 1), (2, 127), (3, 128), (2, 129), (2, 4, 8, 8), (2, 3, 5)]),
    "sde_type": st.sampled_from(["sde", "cps"]),
    "noise_level": st.sampled_from([0.7, 1.0, 0.1]),
    "count": st.sampled_from([10, 28, 2]),
    "shift": st.sampled_from([3.0, 1.0]),
    "place": st.integers(0, 27),
    "several": st.booleans(),
    "seed": st.integers(0, 2**20),
}


@given(options=st.fixed_dictionaries(cases))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_steps_and_their_log_probabilities_are_those_of_the_original(options):
    scheduler = scheduler_of(options["count"], options["shift"])
    x_t, m = tensors(options["shape"], options["types"], options["seed"])
    last = options["count"] - (options["sde_type"] == "cps")  # CPS' last step adds no noise
    index = torch.tensor([options["place"] % last])
    if options["several"]:
        index = (index + torch.arange(len(x_t))) % last
    call = {"noise_level": options["noise_level"], "sde_type": options["sde_type"]}
    generators = [torch.Generator().manual_seed(options["seed"]) for _ in range(2)]
    found = sde_step_with_logprob(
        scheduler, m, scheduler.timesteps[index], x_t, generator=generators[0], return_sqrt_dt=True, **call
    )
    x_prev, log_prob, mean, std_dev_t, sqrt_dt = found
    z = randn_tensor(m.shape, generator=generators[1], dtype=F)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert all(tensor.dtype == F for tensor in found)
    original = Original(scheduler, index, x_t.float().double(), m.float().double(), **call)
    allowed = allowed_error(F, original.terms.numpy())
    assert (np.abs(to_numpy(mean) - original.mean.numpy()) <= allowed).all()
    exact = (original.mean + original.std * z.double()).numpy()
    assert (np.abs(to_numpy(x_prev) - exact) <= allowed_error(F, original.terms.numpy() + np.abs(exact))).all()
    for got, wanted in ((std_dev_t, original.std_dev_t), (sqrt_dt, original.sqrt_dt)):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=2e-7, atol=0)
    is_density = options["sde_type"] == "sde"
    off = original.allowed(x_prev.double()) * (1 if is_density else 2 * original.std.reshape(-1).numpy() ** 2)
    assert (np.abs(to_numpy(log_prob) - original.log_prob(x_prev.double(), is_density).numpy()) <= off).all()
    again = sde_step_with_logprob(scheduler, m, scheduler.timesteps[index], x_t, prev_sample=x_prev, **call)
    assert torch.equal(again[0], x_prev)
    assert torch.equal(again[1], log_prob)  # a ratio of exactly 1
    assert torch.equal(again[2], mean)
    if not is_density:
        call |= {"log_density": True}
        density = sde_step_with_logprob(scheduler, m, scheduler.timesteps[index], x_t, prev_sample=x_prev, **call)[1]
        wanted = original.log_prob(x_prev.double()).numpy()
        assert (np.abs(to_numpy(density) - wanted) <= original.allowed(x_prev.double())).all()


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("places", [[3], [0, 4, 8]])
def test_gradients_are_those_of_the_originals_formulas(places, sde_type):
    scheduler = scheduler_of()
    x_t, m = tensors((3, 4, 5))
    index = torch.tensor(places)
    x_prev = sde_step_with_logprob(scheduler, m, scheduler.timesteps[index], x_t, sde_type=sde_type)[0]
    weights = torch.tensor([1.0, -0.5, 2.0])

    def loss(log_prob, mean):
        """Flow-GRPO's: a ratio, and a divergence from the means."""
        return (weights.to(log_prob) * log_prob).sum() + 0.3 * (mean**2).mean()

    leaves = [x_t.clone().requires_grad_(), m.clone().requires_grad_()]
    _, log_prob, mean, _ = sde_step_with_logprob(
        scheduler, leaves[1], scheduler.timesteps[index], leaves[0], prev_sample=x_prev, sde_type=sde_type
    )
    got = torch.autograd.grad(loss(log_prob, mean), leaves)
    wide = [x_t.double().requires_grad_(), m.double().requires_grad_()]
    original = Original(scheduler, index, *wide, 0.7, sde_type)
    wanted = torch.autograd.grad(loss(original.log_prob(x_prev.double(), sde_type == "sde"), original.mean), wide)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    leaf = m.clone().requires_grad_()
    drawn = sde_step_with_logprob(
        scheduler, leaf, scheduler.timesteps[index], x_t, generator=torch.Generator().manual_seed(2), sde_type=sde_type
    )
    (of_drawn,) = torch.autograd.grad(loss(drawn[1], drawn[2]), leaf)
    wide = m.double().requires_grad_()
    original = Original(scheduler, index, x_t.double(), wide, 0.7, sde_type)
    exact = loss(original.log_prob(drawn[0].detach().double(), sde_type == "sde"), original.mean)
    (theirs,) = torch.autograd.grad(exact, wide)
    torch.testing.assert_close(of_drawn.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_without_noise_a_step_is_eulers():
    """As the original's evaluation takes it; it draws noise, and multiplies it by 0."""
    scheduler = scheduler_of()
    x_t, m = tensors()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    x_prev, log_prob, mean, std_dev_t = sde_step_with_logprob(
        scheduler, m, scheduler.timesteps[3], x_t, noise_level=0, generator=generators[0]
    )
    expected = x_t + (scheduler.sigmas[4] - scheduler.sigmas[3]) * m
    torch.testing.assert_close(x_prev, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mean, x_prev)
    assert log_prob.isnan().all()
    assert std_dev_t.tolist() == [[[[0.0]]]]
    randn_tensor(m.shape, generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_the_last_steps():
    """The SDE's adds noise to clean data, as the original; that of CPS ends at x0, and its squares are 0."""
    scheduler = scheduler_of()
    x_t, m = tensors()
    t, x0 = scheduler.timesteps[-1], x_t - scheduler.sigmas[-2] * m
    x_prev, log_prob, _, _ = sde_step_with_logprob(scheduler, m, t, x_t, generator=torch.Generator().manual_seed(0))
    assert 0.005 < float((x_prev - x0).std()) < 0.008  # 0.7 sqrt(sigma / (1 - sigma)) sqrt(sigma)
    assert log_prob.isfinite().all()
    x_prev, log_prob, _, std_dev_t = sde_step_with_logprob(scheduler, m, t, x_t, sde_type="cps")
    torch.testing.assert_close(x_prev, x0, rtol=1e-5, atol=1e-6)
    assert float(log_prob.abs().max()) < 1e-12
    assert float(std_dev_t) == 0
    moved = sde_step_with_logprob(scheduler, m, t, x_t, prev_sample=x_prev + 0.5, sde_type="cps")[1]
    torch.testing.assert_close(moved, torch.full_like(moved, -0.25), rtol=1e-4, atol=0)


def test_a_scheduler_that_is_set_again_has_other_steps_and_is_not_kept_alive():
    import gc
    import weakref

    scheduler = scheduler_of(10)
    x_t, m = tensors((2, 129))
    given = torch.zeros_like(x_t)
    for count in (10, 20, 10):
        scheduler.set_timesteps(count)
        _, log_prob, _, _ = sde_step_with_logprob(scheduler, m, scheduler.timesteps[3], x_t, prev_sample=given)
        original = Original(scheduler, torch.tensor([3]), x_t.double(), m.double(), 0.7, "sde")
        wanted = original.log_prob(given.double()).numpy()
        assert (np.abs(to_numpy(log_prob) - wanted) <= original.allowed(given.double())).all()
    gone = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None


REFUSED = {
    "no noise, given": (
        {"noise_level": 0.0, "prev_sample": torch.zeros(2, 129)},
        ValueError,
        ["needs noise, got noise_level = 0.0"],
    ),
    "negative": ({"noise_level": -0.1}, ValueError, ["noise_level must be a finite number, at least 0"]),
    "kind": ({"sde_type": "ode"}, ValueError, ["sde_type must be one of sde, cps, got 'ode'"]),
    "no such timestep": ({"timestep": 3.25}, ValueError, ["timestep must be one of scheduler.timesteps, got 3.25"]),
    "many": ({"timestep": torch.zeros(3)}, ValueError, ["one for each of the 2 samples, got (3,)"]),
    "another scheduler": ({"self": EulerDiscreteScheduler()}, TypeError, ["FlowMatchEulerDiscreteScheduler"]),
    "not set": ({"self": FlowMatchEulerDiscreteScheduler()}, ValueError, ["set_timesteps first"]),
    "shape": ({"model_output": torch.zeros(2, 5)}, ValueError, ["model_output must have the shape"]),
    "prev_sample": ({"prev_sample": torch.zeros(2, 5)}, ValueError, ["prev_sample must have the shape"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_refused_before_anything_is_drawn(name):
    changes, kind, parts = REFUSED[name]
    x_t, m = tensors((2, 129))
    scheduler, generator = scheduler_of(), torch.Generator().manual_seed(0)
    state = generator.get_state()
    arguments = {
        "self": scheduler,
        "model_output": m,
        "timestep": scheduler.timesteps[3],
        "sample": x_t,
        "generator": generator,
    }
    with pytest.raises(kind) as error:
        sde_step_with_logprob(**(arguments | changes))
    for part in parts:
        assert part in str(error.value)
    assert torch.equal(generator.get_state(), state)
