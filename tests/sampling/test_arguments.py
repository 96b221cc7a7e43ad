"""The arguments of the sampler's methods: a mistake in any of them is refused by its name, and before the model is called."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler

_NO_NUMBERS = st.one_of(st.text(max_size=3), st.binary(max_size=2), st.just([None, None]), st.just(object()))
_SPARSE = torch.zeros(2, 2, 2).to_sparse()
MISTAKES = {
    "seed": st.one_of(_NO_NUMBERS, st.floats(), st.integers(max_value=-1)),
    "seeds": st.one_of(_NO_NUMBERS, st.integers(), st.lists(st.floats(), min_size=2, max_size=2), st.just([0, 2**64])),
    "generator": st.one_of(_NO_NUMBERS, st.integers(), st.lists(st.builds(torch.Generator), max_size=2)),
    "x_T": st.one_of(_NO_NUMBERS, st.just(_SPARSE), st.just(np.zeros((2, 2, 2)))),
    "x0": st.one_of(_NO_NUMBERS, st.just(_SPARSE), st.just(np.zeros((2, 2, 2))), st.none()),
    "x_T_first": st.one_of(_NO_NUMBERS, st.just(_SPARSE), st.just(torch.zeros(2)), st.none()),
    "x_T_last": st.one_of(_NO_NUMBERS, st.just(_SPARSE), st.just(torch.zeros(3, 2, 2)), st.none()),
    "conditioning": st.one_of(
        st.text(min_size=1), st.just(torch.zeros(2)), st.just(torch.tensor(1.0)), st.just([1, 2]), st.just({1: 2})
    ),
    "unconditional_conditioning": st.one_of(st.text(min_size=1), st.just(torch.zeros(2)), st.just([1, 2])),
    "device": st.one_of(st.none(), st.just("meta"), st.just("gpu"), st.floats(), st.just(10**30)),
    "capture": st.one_of(_NO_NUMBERS, st.just(np.zeros(2)), st.none()),
    "normals": st.one_of(_NO_NUMBERS, st.just(np.zeros(2)), st.none()),
    "callback": st.one_of(st.text(), st.integers(), st.just([print])),
    "timing": st.one_of(st.text(), st.booleans(), st.floats()),
    "strength": st.one_of(
        _NO_NUMBERS, st.just(np.zeros(2)), st.just(torch.zeros(2)), st.floats(min_value=1.01), st.none()
    ),
    "mask": st.one_of(_NO_NUMBERS, st.just(_SPARSE)),
}
PICTURES = torch.zeros(2, 2, 2)
CALLS = {
    "sample": dict(shape=(2, 2, 2)),
    "img2img": dict(x0=PICTURES, strength=0.5),
    "inpaint": dict(x0=PICTURES, mask=torch.ones(2, 2), strength=0.5),
    "interpolate": dict(x_T_first=PICTURES, x_T_last=PICTURES, weights=[0.5]),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method, given in CALLS.items()
        for name in MISTAKES
        if name in given or (name != "mask" and name in inspect.signature(getattr(DDIMSampler, method)).parameters)
    ],
)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_mistake_is_refused_by_the_name_of_the_argument(method, name, data):
    """Before the model is called: no error of torch's or of a function further down."""

    def uncalled(*arguments, **keywords):
        raise AssertionError("the model was called")

    given_arguments = CALLS[method] | {name: data.draw(MISTAKES[name])}
    if name == "unconditional_conditioning":
        given_arguments["guidance_scale"] = 2.0
    with pytest.raises((TypeError, ValueError), match=rf"^(a tensor of )?{name}\b.* got "):
        getattr(DDIMSampler(NoiseSchedule.linear(), 2), method)(uncalled, **given_arguments)


def test_a_list_of_generators_is_refused_with_seeds_as_the_remedy():
    generators = [torch.Generator(), torch.Generator(), torch.Generator()]
    with pytest.raises(TypeError, match=r"generator must be one torch.Generator.*seeds=\[\.\.\.\]"):
        DDIMSampler(NoiseSchedule.linear(), 2).sample(lambda x, t: x, (3, 2, 2), generator=generators)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ValueError, r"num_inference_steps must be given .* fewer than 50 timesteps, got None: pass 1 to 20"),
        ({"timestep_spacing": "even"}, ValueError, r"timestep_spacing must be one of .*'even': .*timesteps=\[\.\.\.\]"),
        ({"timesteps": "ddim"}, ValueError, "timesteps must be 'ddim' and a count, .*got 'ddim'"),
        ({"timesteps": "0,0"}, ValueError, "timesteps must ask for at least one timestep, got"),
        (
            {"analytic_variance": None},
            TypeError,
            "analytic_variance must be True, False or a list of numbers, got None",
        ),
        ({"analytic_variance": "x"}, TypeError, "analytic_variance must be True, False or a list of numbers, got 'x'"),
        ({"analytic_variance": torch.tensor(1.0)}, TypeError, "analytic_variance must be one number for each"),
        (
            {"analytic_variance": ["a"]},
            TypeError,
            r"analytic_variance\[0\] must be a finite number, at least 0, got 'a'",
        ),
    ],
)
def test_a_mistake_in_the_constructor_is_refused_by_the_name_of_the_argument(arguments, error, said):
    with pytest.raises(error, match=f"^{said}"):
        DDIMSampler(NoiseSchedule.linear(20), **arguments)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.complex64, True])
def test_sample_parallel_refuses_a_dtype_by_its_name(dtype):
    with pytest.raises(TypeError, match=r"^dtype must be a floating-point torch\.dtype"):
        DDIMSampler(NoiseSchedule.linear(), 2).sample_parallel(lambda x, t: x, (2, 2), dtype=dtype, seed=0)
