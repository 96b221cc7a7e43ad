"""NaN and infinity in samples: said once, with the step that they come from, at no cost to a run without them."""

import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.sampling.finite import is_finite

LINEAR = NoiseSchedule.linear(100)
SAMPLER = DDIMSampler(LINEAR, timesteps=[90, 60, 30, 0])
NOISY = SAMPLER.replace(eta=1.0)
SHAPE = (3, 2, 4, 4)
X0 = torch.linspace(-1, 1, 96).view(SHAPE)


class Failing(nn.Module):
    """A model whose output is not finite at one timestep, for the second sample; it counts its calls."""

    def __init__(self, at, value=torch.nan):
        super().__init__()
        self.at, self.value, self.count = at, value, 0

    def forward(self, x, t):
        self.count += 1
        bad = (t == self.at) & (torch.arange(len(x)) % 3 == 1)
        return torch.where(bad.view(-1, 1, 1, 1), self.value, x * 0.5)


CALLS = {
    "sample": lambda model, **given: SAMPLER.sample(model, SHAPE, seed=0, **given),
    "sample, no seed": lambda model, **given: NOISY.sample(model, SHAPE, **given),
    "sample, x_T": lambda model, **given: SAMPLER.sample(model, x_T=X0, **given),
    "sample, trajectory": lambda model, **given: (
        SAMPLER.sample(model, SHAPE, seed=0, return_trajectory=True, **given).samples
    ),
    "sample, half": lambda model, **given: NOISY.sample(model, SHAPE, seed=0, dtype=torch.float16, **given),
    "img2img": lambda model, **given: SAMPLER.img2img(model, X0, 1.0, seed=0, **given),
    "inpaint": lambda model, **given: SAMPLER.inpaint(model, X0, torch.zeros(4, 4), seed=0, **given),
    "interpolate": lambda model, **given: SAMPLER.interpolate(model, X0, X0.flip(2), [0.5], seed=0, **given),
    "rollout": lambda model, **given: NOISY.rollout(model, SHAPE, seed=0, **given).samples,
    "sample_parallel": lambda model, **given: SAMPLER.sample_parallel(model, SHAPE, seed=0, window=1, **given),
    "invert": lambda model, **given: SAMPLER.invert(model, X0, **given),
    "reconstruct": lambda model, **given: SAMPLER.reconstruct(model, X0, **given),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("step", "t"), [(0, 90), (2, 30)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_step_is_named_once(name, step, t, value):
    with pytest.warns(UserWarning, match="samples must be finite") as said:
        result = CALLS[name](Failing(t, value))
    assert not result.isfinite().all()
    (warning,) = said
    assert warning.filename == __file__
    assert str(warning.message).startswith(
        f"samples must be finite, got NaN or infinity in 1 of 3, first in the x0 predicted in step {step} of 0 to 3 (t = {t}): "
    )


@pytest.mark.parametrize("name", CALLS)
def test_a_finite_run_costs_no_call_and_an_opt_out_looks_at_nothing(name):
    model = Failing(at=-1)
    CALLS[name](model)
    calls, model.count, model.at = model.count, 0, 30
    CALLS[name](model, check_finite=False)
    assert model.count == calls


def test_an_update_that_leaves_the_range_of_a_dtype_is_told_from_a_model_that_fails():
    sampler = DDIMSampler(LINEAR, timesteps=[99], prediction_type="sample", set_alpha_to_one=False)

    def sample(x0):
        return sampler.sample(lambda x, t: torch.full_like(x, x0), x_T=torch.full(SHAPE, 65000.0, dtype=torch.float16))

    sample(60000.0)
    with pytest.warns(UserWarning, match="in 3 of 3, first in the result of the last step: "):
        sample(65500.0)
    with pytest.warns(UserWarning, match=r"in 3 of 3, first in the x0 predicted in step 0 of 0 to 0 \(t = 99\)"):
        sample(torch.inf)


def test_what_was_given_is_told_from_what_was_computed():
    with pytest.warns(UserWarning, match=r"in 3 of 3, first in what goes into step 0 of 0 to 3 \(t = 90\)"):
        SAMPLER.sample(Failing(-1), x_T=torch.full(SHAPE, torch.nan))


def test_a_run_that_cannot_be_repeated_names_no_step():
    class Once(Failing):
        def forward(self, x, t):
            bad = super().forward(x, t)
            self.at = -1 if self.count == 4 else self.at
            return bad

    class Twice(Failing):
        def forward(self, x, t):
            if self.count == 4:
                raise RuntimeError("no more")
            return super().forward(x, t)

    with pytest.warns(UserWarning, match="in 1 of 3, but not in a second run from the same noise: "):
        SAMPLER.sample(Once(60), SHAPE, seed=0)
    with pytest.warns(UserWarning, match=r"in 1 of 3, from a step .* since a second run failed \(RuntimeError\): "):
        SAMPLER.sample(Twice(60), SHAPE, seed=0)
    generator, model = torch.Generator().manual_seed(0), Failing(60)
    with pytest.warns(UserWarning, match="in 1 of 3: look at"):
        NOISY.sample(model, SHAPE, generator=generator)
    assert model.count == 4


def test_the_second_run_is_not_seen_by_the_callers_callback_and_draws_nothing():
    seen, state = [], torch.get_rng_state()
    with pytest.warns(UserWarning, match="first in the x0 predicted in step 1 "):
        NOISY.sample(Failing(60), SHAPE, seed=0, callback=lambda step, *_: seen.append(step))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [1, "yes", 0.0])
def test_check_finite_is_checked(name, value):
    with pytest.raises(TypeError, match=r"^check_finite must be True, False or None, got "):
        CALLS[name](lambda x, t: pytest.fail("called"), check_finite=value)


LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.mT,
    "every other": lambda x: x[:, ::2],
    "a subclass": lambda x: x.as_subclass(Marked),
    "large": lambda x: x.repeat(3000, 1),  # above what is read without the interpreter's lock
}


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_overflows_is_not_taken_for_infinity(dtype, layout):
    x, laid_out = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype), LAYOUTS[layout]
    assert is_finite(laid_out(x))
    assert is_finite(laid_out(x[:0]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[3, 4] = bad
        assert not is_finite(laid_out(x))
    x[3, 6] = torch.inf if x[3, 4] < 0 else -torch.inf
    assert not is_finite(laid_out(x))
