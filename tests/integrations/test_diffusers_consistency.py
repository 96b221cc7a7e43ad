"""The drop-ins for diffusers' LCM, TCD and CogVideoX DDIM schedulers, against the originals and float64.

The truth restates each update in float64, from the original's own noise levels: it shares no code
with either.
"""

from __future__ import annotations

import functools
import inspect
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, LCMScheduler, TCDScheduler
from diffusers.utils import logging as diffusers_logging
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layouts import Defaults, assert_laid_out_alike, default_dtype, draw, shapes, sweep
from layouts import kinds as kinds_of_tensors
from outcomes import outcome, same_error
from scheduler_steps import (
    DTYPES,
    SHAPE,
    X,
    assert_never_further,
    assert_same_kinds,
    linear_truth,
    next_noise,
    noise_of,
    outputs,
)
from twins import twins

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.integrations.diffusers import consistency_steps, internals
from ddim_fast.verify.truth.tolerances import to_numpy

ORIGINALS = [LCMScheduler, TCDScheduler, CogVideoXDDIMScheduler]
COUNTING = [LCMScheduler, TCDScheduler]
PAIRS = {original: getattr(drop_ins, f"Fast{original.__name__}") for original in ORIGINALS}
PREDICTIONS = ["epsilon", "sample", "v_prediction"]

# Of the originals' own arithmetic, in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quiet():
    """Log no warnings about timesteps that models were not distilled at."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)


def ready(kind, config=None, **timesteps):
    scheduler = kind(**(config or {}))
    scheduler.set_timesteps(**(timesteps or {"num_inference_steps": 8}))
    return scheduler


configs = st.fixed_dictionaries(
    {
        "prediction_type": st.sampled_from(PREDICTIONS),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "rescale_betas_zero_snr": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.7, 1.0]),
    }
)
MORE_CONFIG = {
    LCMScheduler: st.fixed_dictionaries(
        {"timestep_scaling": st.sampled_from([10.0, 0.01]), "thresholding": st.sampled_from([False, False, True])}
    ),
    TCDScheduler: st.fixed_dictionaries({"thresholding": st.booleans()}),
    CogVideoXDDIMScheduler: st.fixed_dictionaries(
        {
            "snr_shift_scale": st.sampled_from([1.0, 3.0]),
            "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
        }
    ),
}
number = st.sampled_from([1, 2, 4, 7, 30]).map(lambda n: {"num_inference_steps": n})
CHOSEN = {
    LCMScheduler: number
    | st.sampled_from(
        [
            {"timesteps": [999, 700, 19, 0]},
            {"timesteps": [999, 700, 19, 0], "strength": 0.5},
            {"num_inference_steps": 4, "original_inference_steps": 100},
            {"num_inference_steps": 4, "strength": 0.5},
        ]
    ),
    TCDScheduler: number | st.sampled_from([{"timesteps": [999, 700, 19, 0]}, {"timesteps": [999, 998, 997]}]),
    CogVideoXDDIMScheduler: number,
}


def update(scheduler, t, index, eta, x, m, z):
    """(x_prev, what is returned beside it)."""
    config, bars = scheduler.config, scheduler.alphas_cumprod.double()
    visited = scheduler.timesteps.tolist()

    def level(t):
        bar = float(bars[t] if t >= 0 else scheduler.final_alpha_cumprod)
        return math.sqrt(bar), math.sqrt(1 - bar)

    alpha, sigma = level(t)
    x0, eps = {
        "epsilon": lambda: ((x - sigma * m) / alpha, m),
        "sample": lambda: (m, (x - alpha * m) / sigma),
        "v_prediction": lambda: (alpha * x - sigma * m, alpha * m + sigma * x),
    }[config.prediction_type]()
    if "CogVideoX" in type(scheduler).__name__:
        alpha_prev, sigma_prev = level(t - config.num_train_timesteps // scheduler.num_inference_steps)
        return alpha_prev * x0 + sigma_prev * (x - alpha * x0) / sigma, x0
    last = index == scheduler.num_inference_steps - 1
    beyond = index + 1 >= len(visited)
    if "LCM" in type(scheduler).__name__:
        scaled = t * config.timestep_scaling
        if config.clip_sample:
            x0 = np.clip(x0, -config.clip_sample_range, config.clip_sample_range)
        cleaner = 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * x0
        alpha_prev, sigma_prev = level(t if beyond else visited[index + 1])
        return (cleaner if last else alpha_prev * cleaner + sigma_prev * z), cleaner
    t_prev = 0 if beyond else visited[index + 1]
    at_cleaner = int(np.floor(np.float32(1 - eta) * np.float32(t_prev)))  # in float32, as the original
    alpha_s, sigma_s = level(at_cleaner)
    cleaner = alpha_s * x0 + sigma_s * eps
    if last or eta == 0:
        return cleaner, cleaner
    ratio = float(bars[t_prev]) / float(bars[at_cleaner])
    return math.sqrt(ratio) * cleaner + math.sqrt(1 - ratio) * z, cleaner


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("original", ORIGINALS)
def test_step_is_the_originals_and_never_further_from_float64(original, examples):
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        config=st.builds(lambda a, b: a | b, configs, MORE_CONFIG[original]),
        chosen=CHOSEN[original],
        place=st.floats(0, 1),
        begin=st.sampled_from(["timestep", "number", "set_begin_index"]),
        dtypes=st.sampled_from(DTYPES),
        noise=st.sampled_from(["global", "generator", "generators"]),
        eta=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
        return_dict=st.booleans(),
        scale=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 1000),
    )
    def check(config, chosen, place, begin, dtypes, noise, eta, return_dict, scale, seed):
        found = [outcome(lambda k=k: ready(k, config, **chosen)) for k in (original, PAIRS[original])]
        if found[0][1] is not None:
            return same_error(found[0][1], found[1][1])
        schedulers = [scheduler for scheduler, _ in found]
        assert torch.equal(*(s.timesteps for s in schedulers))
        first = int(place * (len(schedulers[0].timesteps) - 1))
        counts = original in COUNTING
        if counts and begin == "set_begin_index":
            for scheduler in schedulers:
                scheduler.set_begin_index(first)
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal(SHAPE) * scale).to(dtypes[0])
        states = [noise_of(noise, seed) for _ in schedulers]
        more = {"eta": eta} if original is not LCMScheduler else {}
        for index, t in enumerate(schedulers[0].timesteps[first : first + 3], start=first):
            m = torch.from_numpy(rng.standard_normal(SHAPE)).to(dtypes[1])
            torch.manual_seed(seed)
            z = next_noise(states[0][0], SHAPE, torch.promote_types(x.dtype, m.dtype))
            results, streams = [], []
            for scheduler, (generator, generators) in zip(schedulers, states, strict=True):
                torch.manual_seed(seed)
                before = x.clone(), m.clone()
                timestep = int(t) if begin == "number" else t
                call = functools.partial(scheduler.step, m, timestep, x, generator=generator, return_dict=return_dict)
                results.append(outcome(functools.partial(call, **more)))
                assert torch.equal(x, before[0])
                assert torch.equal(m, before[1])
                streams.append([torch.get_rng_state(), *[g.get_state() for g in generators]])
            for a, b in zip(*streams, strict=True):
                assert torch.equal(a, b), "the same numbers must be drawn from the same streams"
            (expected, error), (got, fast_error) = results
            if error is not None:
                return same_error(error, fast_error)
            assert fast_error is None, fast_error
            if counts:
                assert schedulers[0].step_index == schedulers[1].step_index == index + 1
            bar = float(schedulers[0].alphas_cumprod[t])
            if bar == 0 and config["prediction_type"] == "epsilon":  # left to the original
                for a, b in zip(outputs(got), outputs(expected), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                return None
            if config.get("thresholding") and original is LCMScheduler:
                eps = max(torch.finfo(d).eps for d in (torch.float32, *dtypes))
                tolerance = 40 * eps * scale / max(bar, 1e-4) ** 0.5
                for a, b in zip(outputs(got), outputs(expected), strict=True):
                    assert (a.dtype, a.stride()) == (b.dtype, b.stride())
                    if torch.isfinite(b).all():
                        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            else:
                assert_same_kinds(expected, got, return_dict, m)
                exact = linear_truth(
                    functools.partial(update, schedulers[0], int(t), index, eta), to_numpy(x), to_numpy(m), z
                )
                clips = config["clip_sample"] and original is LCMScheduler
                # x_prev is then computed from the rounded other result.
                inputs = np.abs(to_numpy(x)) + np.abs(to_numpy(m))
                assert_never_further(expected, got, exact, m, [exact[1][0]] if clips else [], inputs)
            x = expected[0]
            if not torch.isfinite(x).all():  # half precision overflows where alpha_bar is tiny
                return None
        return None

    check()


@sweep(
    original=st.sampled_from(ORIGINALS),
    prediction_type=st.sampled_from(PREDICTIONS),
    clips=st.booleans(),
    thresholds=st.booleans(),
    last=st.booleans(),
    of_sample=kinds_of_tensors,
    of_output=kinds_of_tensors,
    shape=shapes,
)
@example(
    defaults=Defaults(),
    original=LCMScheduler,
    prediction_type="epsilon",
    clips=True,
    thresholds=False,
    last=False,
    of_sample=("expanded batch", torch.float32),
    of_output=("reversed", torch.float32),
    shape=(3, 2, 4, 5),
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, original, prediction_type, clips, thresholds, last, of_sample, of_output, shape
):
    """Each step twice, since the second may take the short path."""
    sample, output = draw(0, shape, of_sample), draw(1, shape, of_output)
    index, found = (7 if last else 4), []
    for kind in (original, PAIRS[original]):
        more = {"thresholding": thresholds} if original is not CogVideoXDDIMScheduler else {}
        scheduler = ready(kind, {"prediction_type": prediction_type, "clip_sample": clips} | more)
        torch.manual_seed(5)
        results = []
        with nullcontext() if kind is original else defaults.device_mode():
            for _ in range(2):
                scheduler._step_index = index
                step = functools.partial(scheduler.step, output, scheduler.timesteps[index], sample, return_dict=False)
                results.append(outcome(step))
        found.append((results, torch.get_rng_state().double()))
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            # Under this default dtype the original's scaled timestep overflows, and its c_out is 0.
            overflows = original is LCMScheduler and defaults.dtype is torch.float16
            assert_laid_out_alike(got, expected, of_sample, of_output, values=not overflows)
    assert torch.equal(found[0][1], found[1][1])


ODD = {
    "an integer": {"timestep": 3},
    "an integer beyond": {"timestep": 5000},
    "a float": {"timestep": 0.5},
    "a timestep with a dimension": {"timestep": torch.tensor([999])},
    "no timestep": {"timestep": None},
    "no sample": {"sample": None},
    "another shape": {"model_output": X[:1]},
    "an expanded sample": {"sample": X[:1]},
    "integers": {"model_output": X.long()},
    "no elements": {"sample": X[:0], "model_output": X[:0]},
    "generators of another number": {"generator": [torch.Generator()] * 2},
    "eta above 1": {"eta": 1.5},
    "eta below 0": {"eta": -0.5},
    "eta in a tensor": {"eta": torch.tensor(0.5)},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("original", ORIGINALS)
def test_what_it_cannot_do_faster_is_left_to_the_original(original, odd):
    call = ODD[odd]
    if "eta" in call and original is LCMScheduler:
        return
    found = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind)
        torch.manual_seed(0)
        arguments = {"model_output": X.sin(), "timestep": scheduler.timesteps[2], "sample": X, **call}
        results = [outcome(lambda s=scheduler, a=arguments: s.step(**a)) for _ in range(2)]
        found.append((results, getattr(scheduler, "step_index", None)))
    assert found[0][1] == found[1][1]
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "another"])
@pytest.mark.parametrize("original", ORIGINALS)
def test_no_timesteps_and_unknown_predictions_raise_the_originals_errors(original, prediction_type):
    errors = []
    for kind in (original, PAIRS[original]):
        scheduler = kind(prediction_type=prediction_type)
        if prediction_type == "another":
            scheduler.set_timesteps(4)
        errors.append(outcome(lambda s=scheduler: s.step(X, s.timesteps[0], X))[1])
    assert errors[0] is not None
    same_error(*errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tcd_rounds_to_a_timestep_in_the_default_dtype(dtype):
    """In float64, 0.7 of each of these but the first would round to another one."""
    results = []
    with default_dtype(dtype):
        for kind in (TCDScheduler, PAIRS[TCDScheduler]):
            scheduler = ready(kind, timesteps=[999, 670, 340, 90, 87])
            torch.manual_seed(0)
            results.append([scheduler.step(X.sin(), t, X, eta=0.3).pred_noised_sample for t in scheduler.timesteps])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", COUNTING)
def test_steps_beyond_the_last_are_the_originals(original):
    found = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {}, num_inference_steps=3)
        torch.manual_seed(0)
        found.append([scheduler.step(X.sin(), t, X).prev_sample for t in (*scheduler.timesteps, 19, 19)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def after(change, t=874, index=4, config=None, **more):
    """Return what steps give after a change: of the originals, and of ours."""
    found = []
    for kind in more.pop("kinds"):
        scheduler = ready(kind, config)
        torch.manual_seed(0)
        outcome(lambda s=scheduler: s.step(X.sin(), s.timesteps[0], X))
        scheduler._step_index = index
        change(scheduler)
        torch.manual_seed(0)
        results = [
            outcome(lambda s=scheduler: s.step(**{"model_output": X.sin(), "timestep": t, "sample": X, **more}))
            for _ in range(2)
        ]
        found.append((results, getattr(scheduler, "_step_index", None), torch.get_rng_state().tolist()))
    return found


def dark(scheduler):
    scheduler.alphas_cumprod[100:] = 0


def unordered(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.flip(0)


def beyond(scheduler):
    scheduler.timesteps[5] = 5000


NO_ROW = {
    "a step to a timestep beyond": ({}, {}, beyond),
    "a timestep beyond": ({"t": 1000}, {}, None),
    "a timestep below": ({"t": -1}, {}, None),
    "a range of no number": ({}, {"clip_sample": True, "clip_sample_range": None}, None),
    "a scale that overflows": ({}, {"timestep_scaling": 1e200}, None),
    "noise from no signal": ({"eta": 1e-9}, {"prediction_type": "v_prediction"}, dark),
    "less noise at later timesteps": ({}, {}, unordered),
    "an index of no integer": ({"index": 2.0}, {}, None),
    "an index below 0": ({"index": -3}, {}, None),
    "samples without values": ({"sample": X.to("meta"), "model_output": X.to("meta")}, {}, None),
    "a timestep without a value": ({"t": torch.tensor(874, device="meta")}, {}, None),
    "a first timestep without a value": ({"t": torch.tensor(874, device="meta"), "index": None}, {}, None),
}


@pytest.mark.parametrize("which", NO_ROW)
@pytest.mark.parametrize("original", COUNTING)
def test_a_step_without_a_row_is_left_to_the_original(original, which):
    call, config, change = NO_ROW[which]
    if original is LCMScheduler:
        call = {name: value for name, value in call.items() if name != "eta"}
    known = set(inspect.signature(original).parameters)
    config = {name: value for name, value in config.items() if name in known}
    expected, got = after(change or (lambda s: None), config=config, kinds=(original, PAIRS[original]), **call)
    assert got[1:] == expected[1:]
    for (e, error), (g, fast_error) in zip(expected[0], got[0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            for name in e:
                assert g[name].device == e[name].device
                if g[name].device.type != "meta":
                    torch.testing.assert_close(g[name], e[name], rtol=1e-5, atol=1e-5, equal_nan=True)


def written(scheduler):
    scheduler.alphas_cumprod[:] *= 0.9


def replaced(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9


def reconfigured(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")


def halved(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.half()


def other_timesteps(scheduler):
    scheduler.timesteps[4] += 9
    scheduler.timesteps[5] -= 40


def another_number(scheduler):
    scheduler.num_inference_steps = 5


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("change", [written, replaced, reconfigured, halved, other_timesteps, another_number])
@pytest.mark.parametrize("original", ORIGINALS)
def test_a_change_after_a_step_counts(original, change, eta):
    more, results = ({"eta": eta} if original is not LCMScheduler else {}), []
    for kind in (original, PAIRS[original]):
        scheduler, found = ready(kind), []
        for changes in (lambda s: None, change):
            changes(scheduler)
            for _ in range(2):
                torch.manual_seed(0)
                scheduler._step_index = 4
                found.append(scheduler.step(X.sin(), scheduler.timesteps[4], X, **more).prev_sample)
        results.append(found)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    unread = original is TCDScheduler and eta == 0 and change is another_number
    assert torch.equal(results[1][1], results[1][2]) == unread


OTHER_VALUES = {
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "clip_sample_range": 0.1,
    "thresholding": True,
    "timestep_scaling": 0.001,
    "num_train_timesteps": 500,
    "explicit_pairs": True,
}


READ = {
    LCMScheduler: {*OTHER_VALUES} - {"num_train_timesteps"},
    TCDScheduler: {"prediction_type"},
    CogVideoXDDIMScheduler: {"prediction_type", "num_train_timesteps", "explicit_pairs"},
}
"""The fields that steps depend on."""


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_field_written_to_the_config_after_a_step_counts(original):
    more = {"eta": 0.0} if original is TCDScheduler else {}
    for field in set(OTHER_VALUES) & set(PAIRS[original]().config):
        results = []
        for kind in (original, PAIRS[original]):
            clips = {"clip_sample": field == "clip_sample_range", "timestep_spacing": "linspace"}
            scheduler, found = ready(kind, clips), []
            for _ in range(2):
                for index in (7, 7, 4, 4):
                    torch.manual_seed(0)
                    scheduler._step_index = index
                    t = scheduler.timesteps[index]
                    found.append(scheduler.step(3 * X.sin(), t, 3 * X, **more).prev_sample)
                if field != "explicit_pairs" or kind is not original:
                    vars(scheduler.config)[field] = OTHER_VALUES[field]
            results.append(found)
        if field == "explicit_pairs":
            assert not torch.equal(results[1][2], results[1][6])
            continue
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
        reads = field in READ[original]
        assert reads != torch.equal(results[1][2], results[1][6])


@pytest.mark.parametrize("missing", ["COUNTS_WRITES", "config_entry"])
@pytest.mark.parametrize("change", [written, reconfigured])
@pytest.mark.parametrize("original", COUNTING)
def test_a_change_counts_without_the_private_names(original, change, missing, monkeypatch):
    monkeypatch.setattr(internals, missing, (lambda scheduler: None) if missing == "config_entry" else False)
    more = {"eta": 0.0} if original is TCDScheduler else {}
    results = []
    for kind in (original, PAIRS[original]):
        scheduler, found = ready(kind), []
        for changes in (lambda s: None, change):
            changes(scheduler)
            for _ in range(2):
                scheduler._step_index = 7
                found.append(scheduler.step(X.sin(), scheduler.timesteps[7], X, **more).prev_sample)
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", COUNTING)
def test_repeated_plain_steps_take_the_short_path(original, monkeypatch):
    more = {"eta": 0.0} if original is TCDScheduler else {}
    scheduler = ready(PAIRS[original])

    def last():
        scheduler._step_index = 7
        return scheduler.step(X.sin(), scheduler.timesteps[7], X, **more, return_dict=False)

    expected = last()
    monkeypatch.setattr(type(scheduler), "_checked_step", None)
    got = last()
    assert torch.equal(got[0], expected[0])
    assert got[0] is got[1]
    with monkeypatch.context() as without:
        without.setattr(consistency_steps, "plain_step", lambda *_: None)
        with pytest.raises(TypeError):
            last()


def test_a_repeated_last_step_is_thresholded_again():
    results = []
    for kind in (LCMScheduler, PAIRS[LCMScheduler]):
        scheduler = ready(kind, {"thresholding": True, "sample_max_value": 5.0})
        for _ in range(3):
            scheduler._step_index = 7
            results.append(scheduler.step(9 * X.sin(), scheduler.timesteps[7], 5 * X).prev_sample)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", ORIGINALS)
def test_gradients_are_the_originals(original):
    found = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind)
        x, m = X.clone().requires_grad_(), X.sin().requires_grad_()
        torch.manual_seed(0)
        prev, other = scheduler.step(m, scheduler.timesteps[3], x, return_dict=False)
        found.append(torch.autograd.grad((prev * X.cos()).sum() + other.square().sum(), (x, m)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_compiled_step_is_the_originals(original):
    found = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind)
        torch._dynamo.reset()
        step = torch.compile(lambda m, x, s=scheduler: s.step(m, 874, x, return_dict=False)[0], backend="eager")
        torch.manual_seed(0)
        if original in COUNTING:
            scheduler.set_begin_index(1)
        found.append(step(X.sin(), X))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("original", ORIGINALS)
def test_copies_and_saved_configs(original, tmp_path):
    fast = ready(PAIRS[original], {"beta_schedule": "linear"})
    m = X.sin()

    def step(scheduler):
        scheduler._step_index = None
        return scheduler.step(m, fast.timesteps[2], X, generator=torch.Generator().manual_seed(2)).prev_sample

    expected = step(fast)
    for again in twins(fast):
        assert torch.equal(step(again), expected)
    fast.save_pretrained(tmp_path)
    for kind in (original, PAIRS[original]):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_timesteps(8)
        torch.testing.assert_close(step(loaded), expected, rtol=1e-5, atol=1e-5)
    assert len(fast) == len(original())
    t = torch.tensor([3, 500, 998])
    for name in ("add_noise", "get_velocity"):
        torch.testing.assert_close(
            getattr(fast, name)(X, m, t), getattr(original(beta_schedule="linear"), name)(X, m, t), rtol=1e-5, atol=1e-5
        )


def test_the_steps_of_cogvideox_can_lead_to_the_next_timestep():
    fast = ready(PAIRS[CogVideoXDDIMScheduler], {"timestep_spacing": "linspace", "explicit_pairs": True})
    original = ready(CogVideoXDDIMScheduler, {"timestep_spacing": "linspace"})
    t, t_next = (int(t) for t in fast.timesteps[3:5])
    assert t - 1000 // 8 != t_next
    bars = original.alphas_cumprod.double()
    x0 = (X.double() - (1 - bars[t]).sqrt() * X.double().sin()) / bars[t].sqrt()
    exact = bars[t_next].sqrt() * x0 + (1 - bars[t_next]).sqrt() * X.double().sin()
    torch.testing.assert_close(fast.step(X.sin(), t, X).prev_sample.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"a timestep must be one of scheduler\.timesteps, got 998"):
        fast.step(X, 998, X)
    with pytest.raises(TypeError, match="explicit_pairs must be True or False, got 1"):
        PAIRS[CogVideoXDDIMScheduler](explicit_pairs=1)


def test_cogvideox_reads_nothing_that_its_original_does_not_read():
    unread = {"eta": 0.5, "use_clipped_model_output": True, "variance_noise": X.cos()}
    found = []
    for kind in (PAIRS[CogVideoXDDIMScheduler], CogVideoXDDIMScheduler):
        scheduler, generator = ready(kind, {"clip_sample": True}), torch.Generator().manual_seed(0)
        for _ in range(2):
            found.append(scheduler.step(3 * X.sin(), 874, 3 * X, generator=generator, **unread).prev_sample)
        found.append(generator.get_state().double())
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-5, atol=1e-5)
