"""The drop-ins for diffusers' schedulers with a list of sigmas, against the originals and float64.

The truth restates each update in float64, from the original's own sigmas: it shares no code with
either.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layouts import Defaults, assert_laid_out_alike, draw, shapes, sweep
from layouts import kinds as kinds_of_tensors
from outcomes import outcome, same_error
from scheduler_steps import (
    DTYPES,
    SHAPE,
    OnDevice,
    X,
    assert_never_further,
    assert_same_kinds,
    known_fields,
    linear_truth,
    merged,
    next_noise,
    noise_of,
    outputs,
)
from twins import twins

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.gpu_lab.fake_cuda import fake_cuda
from ddim_fast.integrations.host_copy import HostCopy
from ddim_fast.verify.truth.tolerances import to_numpy

try:
    from diffusers import FlowMatchLCMScheduler
except ImportError:  # an old version
    ORIGINALS = [FlowMatchEulerDiscreteScheduler]
else:
    ORIGINALS = [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler]
ORIGINALS += [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, EDMEulerScheduler]
FLOW = [original for original in ORIGINALS if original.__name__.startswith("Flow")]
PAIRS = {original: getattr(drop_ins, f"Fast{original.__name__}") for original in ORIGINALS}

# Of the originals' own arithmetic, in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

sigma_kinds = st.sampled_from(
    [{}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
)
flow_fields = st.fixed_dictionaries(
    {
        "shift": st.sampled_from([1.0, 3.0]),
        "use_dynamic_shifting": st.booleans(),
        "invert_sigmas": st.sampled_from([False, False, True]),
        "shift_terminal": st.sampled_from([None, None, 0.1]),
        "time_shift_type": st.sampled_from(["exponential", "linear"]),
    }
)
stochastic = st.sampled_from([{}, {"stochastic_sampling": True}])
beta_fields = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": st.booleans(),
}
euler_fields = st.fixed_dictionaries(
    {
        **beta_fields,
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "original_sample"]),
        "interpolation_type": st.sampled_from(["linear", "log_linear"]),
        "timestep_type": st.sampled_from(["discrete", "continuous"]),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    }
)
ancestral_fields = st.fixed_dictionaries(
    {**beta_fields, "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"])}
)
edm_fields = st.fixed_dictionaries(
    {
        "sigma_data": st.sampled_from([0.5, 1.0]),
        "sigma_schedule": st.sampled_from(["karras", "exponential"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    }
)
CONFIGS = {
    "FlowMatchEulerDiscreteScheduler": merged(flow_fields, sigma_kinds, stochastic),
    "FlowMatchLCMScheduler": merged(flow_fields, sigma_kinds),
    "EulerDiscreteScheduler": merged(euler_fields, sigma_kinds),
    "EulerAncestralDiscreteScheduler": ancestral_fields,
    "EDMEulerScheduler": edm_fields,
}


def ready(kind, config, steps=10, **more):
    """Return a scheduler before its first step."""
    scheduler = kind(**config)
    if config.get("use_dynamic_shifting"):
        more["mu"] = 0.8
    scheduler.set_timesteps(**({} if steps is None else {"num_inference_steps": steps}), **more)
    scheduler.is_scale_input_called = True  # else the originals warn, and ours leaves the step to them
    return scheduler


def update(scheduler, index, x, m, z):
    """(x_prev, x0) in float64, of the papers' formulas."""
    sigma, after = (float(s) for s in scheduler.sigmas[index : index + 2].double())
    config, name = scheduler.config, type(scheduler).__name__
    if "Flow" in name:
        x0 = x - sigma * m
        if "LCM" in name or getattr(config, "stochastic_sampling", False):
            return (1 - after) * x0 + after * z, x0
        return x + (after - sigma) * m, x0
    if "EDM" in name:
        data, sign = config.sigma_data, 1 if config.prediction_type == "epsilon" else -1
        root = math.sqrt(sigma**2 + data**2)
        x0 = data**2 / root**2 * x + sign * sigma * data / root * m
    elif config.prediction_type == "epsilon":
        x0 = x - sigma * m
    elif config.prediction_type == "v_prediction":
        x0 = x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * m
    else:
        x0 = m
    up = 0.0
    if "Ancestral" in name:
        up = math.sqrt(max(after**2 * (sigma**2 - after**2) / sigma**2, 0.0))
    down = math.sqrt(max(after**2 - up**2, 0.0))
    return x0 + down / sigma * (x - x0) + up * z, x0


def drawn(scheduler, m):
    """Return the dtypes of the noise that a step draws."""
    if "Ancestral" in type(scheduler).__name__:
        return [m.dtype]
    renoised = "LCM" in type(scheduler).__name__ or getattr(scheduler.config, "stochastic_sampling", False)
    return [torch.float32] if renoised else []


@pytest.mark.parametrize("original", ORIGINALS)
def test_step_is_the_originals_and_never_further_from_float64(original):
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(
        config=CONFIGS[original.__name__],
        steps=st.sampled_from([1, 2, 7, 30]),
        place=st.floats(0, 1),
        begin=st.sampled_from(["timestep", "number", "set_begin_index"]),
        dtypes=st.sampled_from(DTYPES),
        noise=st.sampled_from(["global", "generator", "generators"]),
        return_dict=st.booleans(),
        scale=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 1000),
    )
    def check(config, steps, place, begin, dtypes, noise, return_dict, scale, seed):
        config = known_fields(original, config)
        found = [outcome(lambda k=k: ready(k, config, steps)) for k in (original, PAIRS[original])]
        if found[0][1] is not None:
            return same_error(found[0][1], found[1][1])
        schedulers = [scheduler for scheduler, _ in found]
        for name in ("timesteps", "sigmas"):
            assert torch.equal(*(getattr(s, name) for s in schedulers))
        first = int(place * (len(schedulers[0].timesteps) - 1))
        if begin == "set_begin_index":
            for scheduler in schedulers:
                scheduler.set_begin_index(first)
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal(SHAPE) * scale).to(dtypes[0])
        states = [noise_of(noise, seed) for _ in schedulers]
        for t in schedulers[0].timesteps[first : first + 3]:
            m = torch.from_numpy(rng.standard_normal(SHAPE)).to(dtypes[1])
            torch.manual_seed(seed)
            z = next_noise(states[0][0], SHAPE, *drawn(schedulers[0], m))
            results, streams = [], []
            for scheduler, (generator, generators) in zip(schedulers, states, strict=True):
                torch.manual_seed(seed)
                before = x.clone(), m.clone()
                timestep = float(t) if begin == "number" else t
                results.append(
                    outcome(
                        lambda s=scheduler, g=generator: s.step(m, timestep, x, generator=g, return_dict=return_dict)  # noqa: B023
                    )
                )
                assert torch.equal(x, before[0])
                assert torch.equal(m, before[1])
                streams.append([torch.get_rng_state(), *[g.get_state() for g in generators]])
            for a, b in zip(*streams, strict=True):
                assert torch.equal(a, b), "the same numbers must be drawn from the same streams"
            (expected, error), (got, fast_error) = results
            assert schedulers[0].step_index == schedulers[1].step_index
            if error is not None:
                return same_error(error, fast_error)
            assert fast_error is None, fast_error
            index = schedulers[0].step_index - 1
            assert_same_kinds(expected, got, return_dict, m)
            expected, got = outputs(expected), outputs(got)
            if torch.float64 in dtypes:  # left to the original
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            else:
                exact = linear_truth(functools.partial(update, schedulers[0], index), to_numpy(x), to_numpy(m), z)
                assert_never_further(expected, got, exact[: len(got)], m)
            x = expected[0]
        return None

    check()


PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def config_of(original, prediction_type):
    """A config with this prediction, or with noise in each step where there are no predictions."""
    if "prediction_type" in inspect.signature(original).parameters:
        return {"prediction_type": prediction_type}
    return known_fields(original, {"stochastic_sampling": prediction_type == "sample"})


@sweep(
    original=st.sampled_from(ORIGINALS),
    prediction_type=st.sampled_from(PREDICTIONS),
    of_sample=kinds_of_tensors,
    of_output=kinds_of_tensors,
    shape=shapes,
)
@example(
    defaults=Defaults(),
    original=FlowMatchEulerDiscreteScheduler,
    prediction_type="epsilon",
    of_sample=("expanded batch", torch.float32),  # leaves the order to the model's output
    of_output=("reversed", torch.float32),
    shape=(3, 2, 4, 5),
)
@example(
    defaults=Defaults(),
    original=EulerDiscreteScheduler,
    prediction_type="epsilon",
    of_sample=("expanded batch", torch.bfloat16),
    of_output=("reversed", torch.bfloat16),
    shape=(3, 2, 4, 5),
)
def test_layouts_and_dtypes_are_the_originals(defaults, original, prediction_type, of_sample, of_output, shape):
    """Each step twice, since the second may take the short path."""
    config = config_of(original, prediction_type)
    sample, output = draw(0, shape, of_sample), draw(1, shape, of_output)
    found = []
    for kind in (original, PAIRS[original]):
        scheduler, results = ready(kind, config), []
        torch.manual_seed(5)
        with nullcontext() if kind is original else defaults.device_mode():
            for _ in range(2):
                scheduler._step_index = 4
                results.append(outcome(lambda s=scheduler: s.step(output, s.timesteps[4], sample, return_dict=False)))
        found.append((results, torch.get_rng_state().double()))
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            assert_laid_out_alike(got, expected, of_sample, of_output)
    assert torch.equal(found[0][1], found[1][1])


ODD = {
    "an integer": {"timestep": 3},
    "an integer in a tensor": {"timestep": torch.tensor(3)},
    "an unknown timestep": {"timestep": 0.123},
    "no timestep": {"timestep": None},
    "no sample": {"sample": None},
    "another shape": {"model_output": X[:1]},
    "an expanded sample": {"sample": X[:1]},
    "integers": {"model_output": X.long()},
    "no elements": {"sample": X[:0], "model_output": X[:0]},
    "generators of another number": {"generator": [torch.Generator()] * 2},
    "churn": {"s_churn": 2.0},
    "churn at another level": {"s_churn": 2.0, "s_tmin": 1e9},
    "no churn, a level": {"s_tmin": 0.5},
    "tokens": {"per_token_timesteps": torch.full((3, 2), 500.0)},
    "x0": {"pred_original_sample": X.flip(0)},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("original", ORIGINALS)
def test_what_it_cannot_do_faster_is_left_to_the_original(original, odd):
    call = ODD[odd]
    if set(call) - set(inspect.signature(original.step).parameters):
        return
    found = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {})
        torch.manual_seed(0)
        arguments = {"model_output": X.sin(), "timestep": scheduler.timesteps[2], "sample": X, **call}
        results = [outcome(lambda s=scheduler, a=arguments: s.step(**a)) for _ in range(2)]
        found.append((results, scheduler.step_index))
    assert found[0][1] == found[1][1]
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_run_does_not_go_beyond_its_last_step(original):
    errors = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {}, 3)
        for t in scheduler.timesteps:
            scheduler.step(X, t, X)
        errors.append(outcome(lambda s=scheduler: s.step(X, s.timesteps[-1], X))[1])
    assert errors[0] is not None
    same_error(*errors)


def written(scheduler):
    scheduler.sigmas[3] *= 0.9


def replaced(scheduler):
    scheduler.sigmas = scheduler.sigmas * 0.9


def reconfigured(scheduler):
    for name, value in {"prediction_type": "v_prediction", "stochastic_sampling": True, "sigma_data": 0.7}.items():
        if name in scheduler.config:
            scheduler.register_to_config(**{name: value})


def rewritten(scheduler):
    """The same config, with other attributes."""
    for name, value in {"prediction_type": "v_prediction", "stochastic_sampling": True, "sigma_data": 0.7}.items():
        if name in scheduler.config:
            vars(scheduler.config)[name] = value


def halved(scheduler):
    scheduler.sigmas = scheduler.sigmas.half()


def another_number(scheduler):
    scheduler.set_timesteps(7)
    scheduler.is_scale_input_called = True


@pytest.mark.parametrize("change", [written, replaced, reconfigured, rewritten, halved, another_number])
@pytest.mark.parametrize("original", ORIGINALS)
def test_a_change_after_a_step_counts(original, change):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler, found = ready(kind, {}), []
        for changes in (lambda s: None, change):
            changes(scheduler)
            for _ in range(2):
                torch.manual_seed(0)
                scheduler._step_index = 3
                found.append(scheduler.step(X.sin(), scheduler.timesteps[3], X).prev_sample)
        results.append(found)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # Not every class has a field to change, in old versions.
    counts = change not in (reconfigured, rewritten) or {"prediction_type", "stochastic_sampling"} & set(
        ready(original, {}).config
    )
    assert not counts or not torch.equal(results[1][1], results[1][2])


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_short_step_is_taken_and_gives_the_same_bits(original, monkeypatch):
    fast = ready(PAIRS[original], config_of(original, "epsilon"))
    if fast._noise_dtype(X) is not None:
        return
    results = []
    for _ in range(2):
        fast._step_index = 3
        results.append(fast.step(X.sin(), fast.timesteps[3], X).prev_sample)
    assert set(fast._row_cache.plain) >= set(range(3, len(fast.sigmas) - 1))
    monkeypatch.setattr(type(fast), "_short_step", lambda *_: None)
    fast._step_index = 3
    results.append(fast.step(X.sin(), fast.timesteps[3], X).prev_sample)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_run_checks_its_first_step_alone_and_takes_short_ones_then(original, monkeypatch):
    """In pipelines, set_timesteps comes first: each step of a run is taken once."""
    fast = ready(PAIRS[original], config_of(original, "epsilon"))
    if fast._noise_dtype(X) is not None:
        return
    checked, whole = [], type(fast)._checked_step
    monkeypatch.setattr(
        type(fast), "_checked_step", lambda self, *a: checked.append(self._step_index) or whole(self, *a)
    )
    for steps in (10, 10, 7, 100):
        checked.clear()
        fast.set_timesteps(steps)
        fast.is_scale_input_called = True
        for t in fast.timesteps:
            fast.step(X.sin(), t, X)
        assert checked == [None, 64][: 1 + (steps == 100)]  # which looks up so many rows at once


@pytest.mark.parametrize("original", ORIGINALS)
def test_it_is_saved_copied_and_configured_as_the_original(original, tmp_path):
    kind, config = PAIRS[original], config_of(original, "v_prediction")
    fast = ready(kind, config)
    fast.step(X, fast.timesteps[0], X)
    for twin in twins(fast):
        assert twin.step_index == 1
        torch.manual_seed(0)
        expected = copy.copy(fast).step(X, fast.timesteps[1], X).prev_sample
        torch.manual_seed(0)
        assert torch.equal(twin.step(X, fast.timesteps[1], X).prev_sample, expected)
    fast.save_pretrained(tmp_path)
    for other in (
        original.from_pretrained(tmp_path),
        kind.from_pretrained(tmp_path),
        original.from_config(fast.config),
        kind.from_config(original(**config).config),
    ):
        of_other, ours = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (other, fast))
        assert of_other == ours
    assert issubclass(kind, original)
    assert len(fast) == len(original(**config))
    for method in ("step", "set_timesteps", "__init__", "scale_noise", "add_noise", "scale_model_input"):
        if hasattr(original, method):
            ours, theirs = (inspect.signature(getattr(k, method)).parameters for k in (kind, original))
            named = [[(p.name, p.default) for p in parameters.values()] for parameters in (ours, theirs)]
            assert named[0][: len(named[1])] == named[1]  # old versions have fewer


@pytest.mark.parametrize("original", ORIGINALS)
def test_without_scale_model_input_there_is_the_originals_warning(original, caplog):
    if not hasattr(original, "scale_model_input") or original in FLOW:
        return
    scheduler = PAIRS[original]()
    scheduler.set_timesteps(3)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("diffusers").propagate = True
        scheduler.step(X, scheduler.timesteps[0], X)
    assert "scale_model_input" in caplog.text


@pytest.mark.parametrize("original", ORIGINALS)
def test_other_methods_are_the_originals(original):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {})
        found = [scheduler.init_noise_sigma] if hasattr(original, "init_noise_sigma") else []
        noise = scheduler.scale_noise if original in FLOW else lambda x, t, z, s=scheduler: s.add_noise(x, z, t)
        found.append(noise(X, scheduler.timesteps[[1, 2, 3]], X.cos()))
        scheduler.set_begin_index(2)
        found.append(noise(X, scheduler.timesteps[[2, 2, 2]], X.cos()))
        if hasattr(original, "scale_model_input"):
            found.append(scheduler.scale_model_input(X, scheduler.timesteps[2]))
        torch.manual_seed(0)
        found.append(scheduler.step(X, scheduler.timesteps[2], X).prev_sample)
        found.append(noise(X, scheduler.timesteps[[2, 2, 2]], X.cos()))
        results.append([torch.as_tensor(value) for value in found] + [torch.tensor(scheduler.step_index)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", FLOW)
@pytest.mark.parametrize("more", [{"sigmas": [0.9, 0.5, 0.2]}, {"timesteps": [900.0, 400.0, 400.0]}])
def test_lists_of_sigmas_and_timesteps(original, more):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {"shift": 2.0}, None, **more)
        torch.manual_seed(0)
        found = []
        for t in scheduler.timesteps[1:]:
            found.append(outcome(lambda s=scheduler, t=t: s.step(X.sin(), t, X).prev_sample))
        results.append(([value for value, _ in found], [type(error) for _, error in found], scheduler.step_index))
    assert results[0][1:] == results[1][1:]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(len(FLOW) < 2, reason="this version of diffusers has no FlowMatchLCMScheduler")
def test_a_step_that_scales_up_is_left_to_the_original():
    results = []
    for kind in (FLOW[1], PAIRS[FLOW[1]]):
        scheduler = ready(kind, {"scale_factors": [1.5, 2.0], "upscale_mode": "nearest"}, 3)
        torch.manual_seed(0)
        found, x = [], X
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x, return_dict=False)[0]
            found.append(x)
        results.append(found)
    assert results[0][-1].shape[-1] > X.shape[-1]
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


# --- On a GPU nothing waits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("original", ORIGINALS)
def test_the_first_step_finds_a_view_of_its_timesteps_without_their_values(original, first):
    fast = ready(PAIRS[original], {})
    values = fast.timesteps.tolist()
    fast.timesteps = fast.timesteps.as_subclass(OnDevice)
    with pytest.raises(AssertionError, match="is read"):
        fast._init_step_index(fast.timesteps[first])
    copied = type(fast)._host_copies | {"timesteps": HostCopy.of(fast.timesteps, values)}
    fast._host_copies = copied
    for i, t in enumerate(fast.timesteps.unbind()[first:]):
        fast._step_index = fast._step_index if i else None
        assert isinstance(t, OnDevice)
        fast.step(X, t, X)
        assert fast.step_index == first + i + 1


def test_a_timestep_that_comes_twice_is_the_second_one_as_in_the_original():
    fast = ready(PAIRS[FLOW[0]], {}, None, timesteps=[900.0, 400.0, 400.0, 400.0])
    values = fast.timesteps.tolist()
    fast._host_copies = {"timesteps": HostCopy.of(fast.timesteps, values)}
    for place in range(4):
        assert fast._index_of_view(fast.timesteps[place]) == fast.index_for_timestep(fast.timesteps[place])
    assert fast._index_of_view(fast.timesteps[1].clone()) is None
    assert fast._index_of_view(fast.sigmas[1]) is None
    fast.timesteps[2] = 300.0  # the copy is outdated
    assert fast._index_of_view(fast.timesteps[2]) is None


@pytest.mark.parametrize("original", ORIGINALS)
def test_what_moves_to_a_device_is_known_on_the_host(original):
    """The device meta has no values to read."""
    fast, expected = ready(PAIRS[original], {}, 5, device="meta"), ready(original, {}, 5)
    assert fast.timesteps.device.type == "meta"
    assert fast.sigmas.device.type == ("meta" if original in FLOW else "cpu")
    for name in ("timesteps", "sigmas"):
        assert fast._values_on_host(name) == getattr(expected, name).tolist()
    assert fast._index_of_view(fast.timesteps[3]) == 3
    with pytest.raises(RuntimeError, match="nowhere"):
        PAIRS[original]().set_timesteps(5, device="nowhere")
    with pytest.raises(TypeError, match="nothing"):
        PAIRS[original]().set_timesteps(5, nothing=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("original", ORIGINALS)
def test_on_a_device_no_step_waits(original, dtype):
    fast = ready(PAIRS[original], {}, 5)
    values = {name: fast._values_on_host(name) for name in ("timesteps", "sigmas")}
    for _ in values["timesteps"]:  # reads the sigmas: inside, they would not be real numbers
        fast.step(X, 500.0, X) if fast.step_index else fast.step(X, fast.timesteps[0], X)
    fast._step_index = None
    with fake_cuda() as device:
        for name in ("timesteps", *(["sigmas"] if original in FLOW else [])):
            moved = getattr(fast, name).to("cuda")
            setattr(fast, name, moved)
            fast._host_copies = {**fast._host_copies, name: HostCopy.of(moved, values[name])}
        x, m = (torch.empty(2, 4, 8, 8, dtype=dtype, device="cuda") for _ in range(2))
        for t in fast.timesteps:  # the rows are copied to the device once
            fast.step(m, t, x)
        fast._step_index = None
        with device.steady_state() as steady:
            for t in fast.timesteps:
                fast.step(m, t, x)
    assert steady.region().own_launches["ddim_fast::ddim_step_kernel"] == 5
    assert (steady.syncs, steady.copies) == ([], [])


# --- Transforms, and old versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_compiled_step_and_its_derivative(original):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {})
        scheduler.set_begin_index(2)
        t = scheduler.timesteps[2]
        scheduler.step(X, t, X)

        def step(m, s=scheduler, t=t):
            s._step_index = 3
            return s.step(m, t, X, return_dict=False)[0]

        torch.manual_seed(0)
        m = X.sin().requires_grad_()
        (gradient,) = torch.autograd.grad(step(m).square().sum(), m)
        torch.manual_seed(0)
        results.append([gradient, torch.func.grad(lambda m: step(m).square().sum())(X.sin())])
        torch.manual_seed(0)
        results[-1].append(torch.compile(step, backend="eager")(X.sin()))
        assert scheduler.step_index == 4
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_what_an_old_version_lacks_is_named(monkeypatch):
    monkeypatch.setattr(drop_ins, "_missing", {"FastOtherScheduler": "OtherScheduler"})
    with pytest.raises(ImportError, match=r"FastOtherScheduler needs a diffusers that has OtherScheduler, got .*pip"):
        drop_ins.FastOtherScheduler  # noqa: B018
    assert not hasattr(drop_ins, "FastNoScheduler")


def test_a_config_without_the_newest_fields():
    fast = PAIRS[FLOW[0]]()
    vars(fast.config).pop("stochastic_sampling", None)
    fast.set_timesteps(3)
    expected = FLOW[0]()
    expected.set_timesteps(3)
    got, want = (s.step(X.sin(), s.timesteps[0], X).prev_sample for s in (fast, expected))
    torch.testing.assert_close(got, want)
