"""The drop-ins for diffusers' DDPM scheduler and for those that few pipelines have, against the originals and float64.

The truth restates each update in float64, from the original's own noise levels: it shares no code
with either.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
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
    next_noise,
    noise_of,
    outputs,
)
from twins import twins

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.integrations.diffusers.sigma_steps import SigmaSteps
from ddim_fast.integrations.host_copy import HostCopy
from ddim_fast.verify.truth.tolerances import to_numpy

# Of the originals' own arithmetic, in NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Case:
    """A scheduler, how its steps are called, and what they compute."""

    configs = st.just({})
    options = st.just({})
    """What else a call may have."""
    change = types.MappingProxyType({})
    """Fields of the config that change a step."""

    def __init__(self):
        self.name = type(self).__name__
        self.original = getattr(diffusers, self.name)

    def ready(self, kind, config=None, steps=8):
        scheduler = kind(**(config or {}))
        scheduler.set_timesteps(steps)
        return scheduler

    def number_of_steps(self, scheduler):
        return len(scheduler.timesteps)

    def start_of_step(self, index):
        """Return the index at which the step of this one begins."""
        return index

    def arguments(self, scheduler, index, m, x, options):
        """Return the arguments of the step at this index, but for the generator."""
        return {"model_output": m, "timestep": scheduler.timesteps[index], "sample": x}

    def state(self, scheduler):
        """Return what a step leaves behind."""
        return getattr(scheduler, "step_index", None)

    def results_left(self, scheduler):
        """Return the tensors that a step leaves behind."""
        return ()

    def drawn(self, scheduler, index, m, x, options):
        """Return the dtypes of the noise that a step draws; None if it takes no generator."""
        return [m.dtype]

    def is_left(self, scheduler, index, m, x, options):
        """Return whether a step is left to the original."""
        return False

    def is_compared_roughly(self, scheduler):
        """Return whether part of a step is computed by the original's operations."""
        return False

    def more(self, scheduler, options):
        """Return the other tensors that a step reads."""
        return []

    def update(self, scheduler, index, options, x, m, z, *more):
        """Return the results in float64; called before the original takes its step."""
        raise NotImplementedError


class DDPMWuerstchenScheduler(Case):
    configs = st.fixed_dictionaries({"scaler": st.sampled_from([1.0, 0.5, 2.0]), "s": st.sampled_from([0.008, 0.1])})
    options = st.fixed_dictionaries(
        {"dtype": st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]), "one": st.booleans()}
    )

    def number_of_steps(self, scheduler):
        return len(scheduler.timesteps) - 1

    def arguments(self, scheduler, index, m, x, options):
        t = scheduler.timesteps[index].to(options.get("dtype", torch.float32))
        t = t[None] if options.get("one") else t.expand(len(x))
        return {"model_output": m, "timestep": t, "sample": x}

    def is_left(self, scheduler, index, m, x, options):
        return scheduler.scaler != 1 and options["dtype"] is torch.bfloat16

    def update(self, scheduler, index, options, x, m, z):
        visited, scaler = scheduler.timesteps.tolist(), scheduler.config.scaler
        t = float(scheduler.timesteps[index].to(options["dtype"]))
        t_prev = visited[min(range(len(visited)), key=lambda i: abs(visited[i] - t)) + 1]

        def alpha_bar(t):
            t = 1 - (1 - t) ** scaler if scaler > 1 else t**scaler
            s = float(scheduler.s)
            at_t, at_0 = (math.cos((time + s) / (1 + s) * math.pi / 2) ** 2 for time in (t, 0))
            return min(max(at_t / at_0, 0.0001), 0.9999)

        bar, bar_prev = alpha_bar(t), alpha_bar(t_prev)
        alpha = bar / bar_prev
        std_dev = math.sqrt((1 - alpha) * (1 - bar_prev) / (1 - bar)) if t_prev else 0.0
        return (math.sqrt(1 / alpha) * (x - (1 - alpha) / math.sqrt(1 - bar) * m) + std_dev * z,)


def posterior(config, t, bar, bar_prev, alpha, beta, x, m, z):
    """(x_prev, x0) of equation 7 of the DDPM paper, with noise. Neither alpha nor beta = 1 - alpha has the other's digits."""
    x0 = {
        "epsilon": lambda: (x - math.sqrt(1 - bar) * m) / math.sqrt(bar),
        "sample": lambda: m,
        "v_prediction": lambda: math.sqrt(bar) * x - math.sqrt(1 - bar) * m,
    }[config.prediction_type]()
    if config.clip_sample:
        x0 = np.clip(x0, -config.clip_sample_range, config.clip_sample_range)
    mean = math.sqrt(bar_prev) * beta / (1 - bar) * x0 + math.sqrt(alpha) * (1 - bar_prev) / (1 - bar) * x
    variance = beta if config.variance_type == "fixed_large" else max((1 - bar_prev) / (1 - bar) * beta, 1e-20)
    return mean + (math.sqrt(variance) * z if t > 0 else 0.0), x0


def stepped(scheduler, index, options):
    """The timestep, and the one that the step of UnCLIP leads to."""
    visited = scheduler.timesteps.tolist()
    after = visited[index + 1] if index + 1 < len(visited) else None
    return visited[index], after if options.get("next") else None


class UnCLIPScheduler(Case):
    configs = st.fixed_dictionaries(
        {
            "prediction_type": st.sampled_from(["epsilon", "sample"]),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.sampled_from([0.7, 5.0]),
            "variance_type": st.sampled_from(["fixed_small_log", "fixed_small_log", "learned_range"]),
        }
    )
    options = st.fixed_dictionaries({"next": st.booleans()})
    change = types.MappingProxyType({"prediction_type": "sample"})

    def arguments(self, scheduler, index, m, x, options):
        t, t_prev = stepped(scheduler, index, options)
        if scheduler.variance_type == "learned_range":
            m = torch.cat([m, m.flip(0).tanh()], dim=1)
        return {"model_output": m, "timestep": t, "sample": x, "prev_timestep": t_prev}

    def drawn(self, scheduler, index, m, x, options):
        return [m.dtype] if scheduler.timesteps[index] > 0 else []

    def is_compared_roughly(self, scheduler):
        return scheduler.variance_type == "learned_range"

    def update(self, scheduler, index, options, x, m, z):
        config, (t, t_prev) = scheduler.config, stepped(scheduler, index, options)
        t_prev = t - 1 if t_prev is None else t_prev
        bar, bar_prev = (float(scheduler.alphas_cumprod[t]) if t >= 0 else 1.0 for t in (t, t_prev))
        alpha, beta = bar / bar_prev, 1 - bar / bar_prev
        if t_prev == t - 1:
            beta = float(scheduler.betas[t])
            alpha = 1 - beta
        return posterior(config, t, bar, bar_prev, alpha, beta, x, m, z)


class DDPMScheduler(Case):
    configs = st.fixed_dictionaries(
        {
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.sampled_from([0.7, 5.0]),
            "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large", "learned"]),
        }
    )
    change = types.MappingProxyType({"prediction_type": "v_prediction"})

    def arguments(self, scheduler, index, m, x, options):
        if scheduler.variance_type == "learned":
            m = torch.cat([m, m.flip(0).tanh().abs() + 0.01], dim=1)
        return super().arguments(scheduler, index, m, x, options)

    def drawn(self, scheduler, index, m, x, options):
        return [m.dtype] if scheduler.timesteps[index] > 0 else []

    def is_left(self, scheduler, index, m, x, options):
        return scheduler.variance_type == "learned"

    def update(self, scheduler, index, options, x, m, z):
        t, t_prev = [*scheduler.timesteps.tolist(), -1][index : index + 2]
        bar, bar_prev = (float(scheduler.alphas_cumprod[t]) if t >= 0 else 1.0 for t in (t, t_prev))
        return posterior(scheduler.config, t, bar, bar_prev, bar / bar_prev, 1 - bar / bar_prev, x, m, z)


class CogVideoXDPMScheduler(Case):
    configs = st.fixed_dictionaries(
        {
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "rescale_betas_zero_snr": st.booleans(),
            "set_alpha_to_one": st.booleans(),
            "snr_shift_scale": st.sampled_from([1.0, 3.0]),
            "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
        }
    )
    change = types.MappingProxyType({"prediction_type": "v_prediction"})

    def arguments(self, scheduler, index, m, x, options):
        back = scheduler.timesteps[index - 1] if index else None
        return super().arguments(scheduler, index, m, x, options) | {
            "old_pred_original_sample": options.get("last"),
            "timestep_back": back,
        }

    def levels(self, scheduler, index, options):
        """alpha_bar of the step before, of the step, and of its target; None for the first in one of first order."""
        t = int(scheduler.timesteps[index])
        t_prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        bars = scheduler.alphas_cumprod.double().tolist()
        second = options.get("last") is not None and t_prev >= 0
        before = bars[int(scheduler.timesteps[index - 1])] if second else None
        return before, bars[t], bars[t_prev] if t_prev >= 0 else float(scheduler.final_alpha_cumprod)

    def drawn(self, scheduler, index, m, x, options):
        return [x.dtype] * (1 if self.levels(scheduler, index, options)[0] is None else 2)

    def is_left(self, scheduler, index, m, x, options):
        return scheduler.config.prediction_type == "epsilon" and self.levels(scheduler, index, options)[1] == 0

    def more(self, scheduler, options):
        return [options["last"]] if options.get("last") is not None else []

    def update(self, scheduler, index, options, x, m, z, last=0.0):
        before, bar, bar_prev = self.levels(scheduler, index, options)
        x0 = {
            "epsilon": lambda: (x - math.sqrt(1 - bar) * m) / (math.sqrt(bar) or math.nan),
            "sample": lambda: m,
            "v_prediction": lambda: math.sqrt(bar) * x - math.sqrt(1 - bar) * m,
        }[scheduler.config.prediction_type]()

        def half_log_snr(bar):
            return math.copysign(math.inf, bar - 0.5) if bar in (0, 1) else math.log(bar / (1 - bar)) / 2

        h = half_log_snr(bar_prev) - half_log_snr(bar)
        d = x0
        if before is not None:
            r = (half_log_snr(bar) - half_log_snr(before)) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        of_x = math.sqrt((1 - bar_prev) / (1 - bar)) * math.exp(-h)
        of_z = math.sqrt(1 - bar_prev) * math.sqrt(-math.expm1(-2 * h))
        return of_x * x - math.expm1(-2 * h) * math.sqrt(bar_prev) * d + of_z * z, x0


class LTXEulerAncestralRFScheduler(Case):
    configs = st.fixed_dictionaries(
        {"eta": st.sampled_from([0.0, 0.4, 1.0]), "s_noise": st.sampled_from([0.0, 0.7, 1.0])}
    )
    change = types.MappingProxyType({"eta": 0.4})

    def drawn(self, scheduler, index, m, x, options):
        config = scheduler.config
        return [torch.float32] if config.eta and config.s_noise and float(scheduler.sigmas[index + 1]) > 1e-8 else []

    def is_left(self, scheduler, index, m, x, options):
        return torch.float64 in (x.dtype, m.dtype)

    def update(self, scheduler, index, options, x, m, z):
        sigma, after = scheduler.sigmas[index : index + 2].double().tolist()
        eta, s_noise = scheduler.config.eta, scheduler.config.s_noise
        if after < 1e-8:
            return (x - sigma * m,)
        below = after * (1 + (after / sigma - 1) * eta)
        x_prev = x - (sigma - below) * m
        if not eta or not s_noise:
            return (x_prev,)
        added = after**2 - below**2 * (1 - after) ** 2 / ((1 - below) ** 2 + 1e-12)
        return ((1 - after) / (1 - below + 1e-12) * x_prev + math.sqrt(max(added, 0)) * s_noise * z,)


class FlowMapEulerDiscreteScheduler(Case):
    configs = st.fixed_dictionaries({"shift": st.sampled_from([1.0, 5.0])})
    options = st.fixed_dictionaries({"r": st.sampled_from([None, None, 500.0]), "t": st.sampled_from([None, 333.0])})

    def arguments(self, scheduler, index, m, x, options):
        found = super().arguments(scheduler, index, m, x, options)
        if options.get("r") is not None:
            found |= {
                "r_timestep": options["r"],
                "timestep": found["timestep"] if options["t"] is None else options["t"],
            }
        return found

    def drawn(self, scheduler, index, m, x, options):
        return None

    def is_left(self, scheduler, index, m, x, options):
        halves = (torch.float16, torch.bfloat16)
        return m.dtype not in halves or x.dtype is torch.float64 or options["r"] is not None

    def update(self, scheduler, index, options, x, m, z):
        sigma, after = scheduler.sigmas[index : index + 2].tolist()
        return (x - (sigma - after) * m,)


class HeunDiscreteScheduler(Case):
    configs = st.fixed_dictionaries(
        {
            "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
            "clip_sample": st.booleans(),
            "clip_sample_range": st.sampled_from([0.7, 1.0]),
            "use_karras_sigmas": st.booleans(),
        }
    )
    change = types.MappingProxyType({"prediction_type": "v_prediction"})

    def start_of_step(self, index):
        return index - index % 2

    def state(self, scheduler):
        return scheduler.step_index, scheduler.dt, getattr(scheduler, "sample", None) is None

    def results_left(self, scheduler):
        return () if scheduler.state_in_first_order else (scheduler.prev_derivative,)

    def drawn(self, scheduler, index, m, x, options):
        return None

    def is_left(self, scheduler, index, m, x, options):
        return torch.float64 in (x.dtype, m.dtype)

    def more(self, scheduler, options):
        return [] if scheduler.state_in_first_order else [scheduler.sample, scheduler.prev_derivative]

    def update(self, scheduler, at, options, x, m, z, began=None, derivative=None):
        config, index = scheduler.config, scheduler.step_index
        if index is None:
            index = at
        second = not scheduler.state_in_first_order
        sigma = float(scheduler.sigmas[index])
        x0 = {
            "epsilon": lambda: x - sigma * m,
            "v_prediction": lambda: x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * m,
            "sample": lambda: m,
        }[config.prediction_type]()
        if config.clip_sample:
            x0 = np.clip(x0, -config.clip_sample_range, config.clip_sample_range)
        d = (x - x0) / sigma
        if second:
            return began + float(scheduler.dt) * (derivative + d) / 2, x0
        return x + (float(scheduler.sigmas[index + 1]) - sigma) * d, x0, d


ALL = [
    DDPMScheduler, DDPMWuerstchenScheduler, UnCLIPScheduler, CogVideoXDPMScheduler, HeunDiscreteScheduler,
    LTXEulerAncestralRFScheduler, FlowMapEulerDiscreteScheduler,
]  # fmt: skip
CASES = {kind.__name__: kind() for kind in ALL if hasattr(diffusers, kind.__name__)}
"""Those that this version of diffusers has."""
PAIRS = {name: (case.original, getattr(drop_ins, f"Fast{name}")) for name, case in CASES.items()}
each = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
@each
def test_step_is_the_originals_and_never_further_from_float64(name, examples):
    case, kinds = CASES[name], PAIRS[name]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        config=case.configs,
        options=case.options,
        steps=st.sampled_from([1, 2, 4, 7, 30]),
        place=st.floats(0, 1),
        dtypes=st.sampled_from(DTYPES),
        noise=st.sampled_from(["global", "generator", "generators"]),
        begins=st.booleans(),
        return_dict=st.booleans(),
        scale=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 1000),
    )
    def check(config, options, steps, place, dtypes, noise, begins, return_dict, scale, seed):
        found = [outcome(lambda k=k: case.ready(k, config, steps)) for k in kinds]
        if found[0][1] is not None:
            return same_error(found[0][1], found[1][1])
        schedulers = [scheduler for scheduler, _ in found]
        last = case.number_of_steps(schedulers[0])
        first = int(place * (last - 1))
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal(SHAPE) * scale).to(dtypes[0])
        states = [noise_of(noise, seed) for _ in kinds]
        first = case.start_of_step(first)
        for scheduler in schedulers if begins and hasattr(schedulers[0], "set_begin_index") else []:
            scheduler.set_begin_index(first)
        for index in range(first, min(first + 3, last)):
            m = torch.from_numpy(rng.standard_normal(SHAPE)).to(dtypes[1])
            torch.manual_seed(seed)
            z = next_noise(states[0][0], SHAPE, *(case.drawn(schedulers[0], index, m, x, options) or []))
            more = case.more(schedulers[0], options)
            exact = linear_truth(
                functools.partial(case.update, schedulers[0], index, options),
                to_numpy(x), to_numpy(m), z, *map(to_numpy, more), clips=bool(config.get("clip_sample")),
            )  # fmt: skip
            left = case.is_left(schedulers[0], index, m, x, options)
            results, streams = [], []
            for scheduler, (generator, generators) in zip(schedulers, states, strict=True):
                torch.manual_seed(seed)
                before = x.clone(), m.clone()
                arguments = case.arguments(scheduler, index, m, x, options) | {"return_dict": return_dict}
                if case.drawn(scheduler, index, m, x, options) is not None:
                    arguments["generator"] = generator
                results.append(outcome(lambda s=scheduler, a=arguments: s.step(**a)))
                assert torch.equal(x, before[0])
                assert torch.equal(m, before[1])
                streams.append([torch.get_rng_state(), *[g.get_state() for g in generators]])
            for a, b in zip(*streams, strict=True):
                assert torch.equal(a, b), "the same numbers must be drawn from the same streams"
            (expected, error), (got, fast_error) = results
            if error is not None:
                return same_error(error, fast_error)
            assert fast_error is None, fast_error
            assert case.state(schedulers[0]) == case.state(schedulers[1])
            assert_same_kinds(expected, got, return_dict, m)
            expected, got = outputs(expected), outputs(got)
            kept = [case.results_left(scheduler) for scheduler in schedulers]
            assert_same_kinds(*kept, return_dict, m)
            expected, got = (*expected, *kept[0]), (*got, *kept[1])
            if case.is_compared_roughly(schedulers[0]):
                eps = max(torch.finfo(d).eps for d in (torch.float32, *dtypes))
                for a, b in zip(got, expected, strict=True):
                    assert float((a - b).abs().max()) <= 60 * eps * max(float(b.abs().max()), 1)
            elif left:
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            else:
                assert_never_further(expected, got, exact, m)
            x = expected[0]
            if len(expected) > 1:
                options = options | {"last": expected[1]}
            if kept[0]:  # the same for both in the next step
                schedulers[1].prev_derivative = kept[0][0]
            if not torch.isfinite(x).all():  # half precision overflows where there is little signal
                return None
        return None

    check()


def run(case, kind, steps, config=None, options=None, first=2, m=X.sin(), x=X, **more):  # noqa: B008 (never written)
    """Return the outcomes of steps with the same tensors, what they leave, and the random state."""
    scheduler = case.ready(kind, config)
    torch.manual_seed(0)
    found = []
    for index in range(first, first + steps):
        arguments = case.arguments(scheduler, index, m, x, options or {}) | more
        found.append(outcome(lambda a=arguments: outputs(scheduler.step(**a))))
    return found, case.state(scheduler), torch.get_rng_state().double()


def assert_same_runs(expected, got, rtol=1e-5, atol=1e-5):
    assert got[1] == expected[1]
    assert torch.equal(got[2], expected[2])
    for (e, error), (g, fast_error) in zip(expected[0], got[0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            torch.testing.assert_close(g, e, rtol=rtol, atol=atol, equal_nan=True, check_stride=True)


@sweep(
    name=st.sampled_from(sorted(CASES)),
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    clips=st.booleans(),
    second=st.booleans(),
    first=st.sampled_from([4, 6]),
    of_sample=kinds_of_tensors,
    of_output=kinds_of_tensors,
    of_last=kinds_of_tensors,
    shape=shapes,
)
@example(
    defaults=Defaults(),
    name="CogVideoXDPMScheduler",
    prediction_type="sample",
    clips=False,
    second=True,
    first=4,
    of_sample=("contiguous", torch.float32),
    of_output=("expanded batch", torch.float32),
    of_last=("contiguous", torch.float32),
    shape=(3, 2, 4, 5),
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, name, prediction_type, clips, second, first, of_sample, of_output, of_last, shape
):
    """The second step is the second half of Heun's, and one with a history."""
    case, found = CASES[name], []
    wanted = {"prediction_type": prediction_type, "clip_sample": clips}
    x, m, last = draw(0, shape, of_sample), draw(1, shape, of_output), draw(2, shape, of_last)
    for kind in PAIRS[name]:
        known = set(inspect.signature(case.original).parameters)
        scheduler = case.ready(kind, {field: value for field, value in wanted.items() if field in known})
        torch.manual_seed(5)
        results = []
        with nullcontext() if kind is case.original else defaults.device_mode():
            for index in range(first, first + 2):
                options = {"last": last if second else None}
                arguments = case.arguments(scheduler, index, m, x, options)
                arguments["timestep"] = torch.as_tensor(arguments["timestep"], device="cpu")
                results.append(outcome(lambda s=scheduler, a=arguments: outputs(s.step(**a, return_dict=False))))
                results.append(outcome(lambda s=scheduler: case.results_left(s)))
        found.append((results, torch.get_rng_state().double()))
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            assert_laid_out_alike(got, expected, of_sample, of_output, of_last)
    assert torch.equal(found[0][1], found[1][1])


ODD = {
    "an integer": {"timestep": 3},
    "an integer beyond": {"timestep": 5000},
    "an integer below": {"timestep": -1},
    "a float": {"timestep": 0.5},
    "a timestep with a dimension": {"timestep": torch.tensor([500.0])},
    "two timesteps": {"timestep": torch.tensor([0.9, 0.9, 0.4])},
    "integers as timesteps": {"timestep": torch.tensor([1, 1, 1])},
    "no timestep": {"timestep": None},
    "no sample": {"sample": None},
    "another shape": {"model_output": X[:1]},
    "an expanded sample": {"sample": X[:1]},
    "integers": {"model_output": X.long()},
    "no elements": {"sample": X[:0], "model_output": X[:0]},
    "generators of another number": {"generator": [torch.Generator()] * 2},
    "a timestep before": {"prev_timestep": 20},
    "a timestep before beyond": {"prev_timestep": 5000},
    "a timestep before just beyond": {"prev_timestep": 1000},
    "nothing before": {"old_pred_original_sample": X.cos(), "timestep_back": None},
    "nothing before that is beyond": {"old_pred_original_sample": X.cos(), "timestep_back": 5000},
    "the same timestep before": {"old_pred_original_sample": X.cos(), "timestep_back": torch.tensor(624)},
    "x0 of another shape": {"old_pred_original_sample": X.cos()[:1]},
    "x0 in float64": {"old_pred_original_sample": X.cos().double()},
    "a target": {"r_timestep": 100.0},
    "a target for each": {"r_timestep": torch.tensor([100.0, 200.0, 300.0])},
}


@pytest.mark.parametrize("odd", ODD)
@each
def test_what_it_cannot_do_faster_is_left_to_the_original(name, odd):
    case = CASES[name]
    if set(ODD[odd]) - set(inspect.signature(case.original.step).parameters):
        return
    assert_same_runs(*(run(case, kind, 2, **ODD[odd]) for kind in PAIRS[name]))
    if name == "UnCLIPScheduler":
        learned = {"variance_type": "learned_range"}
        assert_same_runs(*(run(case, kind, 2, learned, **ODD[odd]) for kind in PAIRS[name]))


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "another"},
        {"prediction_type": "original_sample"},
        {"variance_type": "another"},
        {"clip_sample_range": None},
    ],
)
@each
def test_unknown_configs_and_no_timesteps_raise_the_originals_errors(name, config):
    case = CASES[name]
    if set(config) - set(inspect.signature(case.original).parameters):
        return
    clips = {"clip_sample": True} if "clip_sample_range" in config else {}
    assert_same_runs(*(run(case, kind, 2, config | clips) for kind in PAIRS[name]))
    errors = [outcome(lambda k=kind: k().step(**case.arguments(case.ready(k), 2, X, X, {}))) for kind in PAIRS[name]]
    assert (errors[0][1] is None) == (errors[1][1] is None)
    if errors[0][1] is not None:
        same_error(errors[0][1], errors[1][1])


@pytest.mark.skipif("FlowMapEulerDiscreteScheduler" not in CASES, reason="not in this version of diffusers")
@pytest.mark.parametrize("steps", [0, 8])
def test_a_flow_map_without_timesteps_and_beyond_its_schedule(steps):
    case = CASES["FlowMapEulerDiscreteScheduler"]
    errors = []
    for kind in PAIRS["FlowMapEulerDiscreteScheduler"]:
        scheduler = case.ready(kind, steps=steps)
        errors.append(outcome(lambda s=scheduler: s.step(X.bfloat16(), 333.0, X.bfloat16()))[1])
    assert errors[0] is not None
    same_error(*errors)


@pytest.mark.parametrize("index", [-2, 2.0, 7, 8, 40])
@each
def test_any_index_of_a_step_is_the_originals(name, index):
    case, found = CASES[name], []
    if not hasattr(case.original, "step_index"):
        return
    for kind in PAIRS[name]:
        scheduler = case.ready(kind)
        scheduler._step_index = index
        torch.manual_seed(0)
        arguments = case.arguments(scheduler, 2, X.sin().bfloat16(), X.bfloat16(), {})
        results = [outcome(lambda s=scheduler, a=arguments: outputs(s.step(**a))) for _ in range(2)]
        found.append((results, case.state(scheduler), torch.get_rng_state().double()))
    assert_same_runs(*found, rtol=0.05, atol=0.05)


def levels(scheduler):
    for attribute in ("alphas_cumprod", "betas", "sigmas"):
        if hasattr(scheduler, attribute):
            getattr(scheduler, attribute)[:] *= 0.8
    if hasattr(scheduler, "betas"):
        scheduler.alphas = 1 - scheduler.betas


def replaced(scheduler):
    for attribute in ("alphas_cumprod", "scaler", "sigmas"):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, getattr(scheduler, attribute) * 0.9)


def halved(scheduler):
    for attribute in ("alphas_cumprod", "s", "sigmas"):
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, getattr(scheduler, attribute).half())


def reconfigured(scheduler):
    scheduler.register_to_config(**CASES[type(scheduler).__name__.removeprefix("Fast")].change)


def another_number(scheduler):
    if hasattr(scheduler, "_step_index") or "Wuerstchen" in type(scheduler).__name__:
        scheduler.timesteps[3:] *= 0.9
    else:
        scheduler.num_inference_steps = 5


def dark(scheduler):
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod[100:] = 0


def bright(scheduler):
    if hasattr(scheduler, "one"):  # of the posterior
        scheduler.alphas_cumprod[100:] = 1


FIELDS = {
    "prediction_type": "sample",
    "clip_sample": True,
    "clip_sample_range": 0.1,
    "thresholding": True,
    "variance_type": "fixed_large",
    "num_train_timesteps": 500,
    "eta": 0.4,
    "s_noise": 0.5,
}


def rewritten(field):
    """Write a field of the config, which stays the same object."""

    def change(scheduler):
        if field in vars(scheduler.config):
            vars(scheduler.config)[field] = FIELDS[field]

    change.__name__ = field
    return change


CHANGES = [levels, replaced, halved, reconfigured, another_number, dark, bright, *map(rewritten, FIELDS)]


@pytest.mark.parametrize("change", CHANGES)
@each
def test_a_change_after_a_step_counts(name, change):
    case, results = CASES[name], []
    config = {"clip_sample": change.__name__ == "clip_sample_range", "clip_sample_range": 0.3}
    if change.__name__ in ("eta", "s_noise"):
        config[change.__name__] = 0.0  # a step without noise may take the short path
    config = known_fields(case.original, config)
    for kind in PAIRS[name]:
        scheduler, found = case.ready(kind, config), []
        m, x = (X.sin().bfloat16(), X.bfloat16()) if "FlowMap" in name else (X.sin(), X)
        for changes in (lambda s: None, change):
            changes(scheduler)
            for _ in range(2):
                torch.manual_seed(0)
                if hasattr(scheduler, "_step_index"):
                    scheduler._step_index, scheduler.dt = 2, None
                found.append(outputs(scheduler.step(**case.arguments(scheduler, 2, m, x, {})))[0])
        results.append(found)
    tolerance = 0.02 if "FlowMap" in name else 1e-5
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(results[0][1], results[0][2]) == torch.equal(results[1][1], results[1][2])


@pytest.mark.parametrize(
    "config", [{}, {"prediction_type": "sample"}, {"prediction_type": "sample", "clip_sample": True}]
)
@pytest.mark.parametrize("dtypes", DTYPES)
@each
def test_a_repeated_step_is_the_same(name, dtypes, config):
    """From the second time on, a step may take the short path."""
    case, results = CASES[name], []
    config = {"clip_sample": False} | config
    x, m = X.to(dtypes[0]), X.sin().to(dtypes[1])
    for kind in PAIRS[name]:
        scheduler, found = case.ready(kind, known_fields(case.original, config)), []
        for _ in range(3):
            torch.manual_seed(0)
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index, scheduler.dt = 2, None
            found.append(outputs(scheduler.step(**case.arguments(scheduler, 2, m, x, {}))))
        results.append(found)
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))
    torch.testing.assert_close(results[1], results[0], rtol=30 * eps, atol=30 * eps)
    torch.testing.assert_close(results[1][1:], [results[1][0]] * 2, rtol=0, atol=0)
    assert [[result is m for result in found] for found in results[1]] == [
        [r is m for r in found] for found in results[0]
    ]


@pytest.mark.parametrize(
    ("kept", "value"),
    [
        ("sample", X.cos()),
        ("sample", X[:1]),
        ("prev_derivative", X.cos()),
        ("prev_derivative", X[:, :1]),
        ("dt", torch.tensor(-0.5)),
        ("dt", None),
    ],
)
def test_what_heun_keeps_between_its_halves_may_be_replaced(kept, value):
    case, results = CASES["HeunDiscreteScheduler"], []
    for kind in PAIRS["HeunDiscreteScheduler"]:
        scheduler = case.ready(kind)
        scheduler._step_index = 2
        scheduler.step(**case.arguments(scheduler, 2, X.sin(), X, {}))
        setattr(scheduler, kept, value)
        arguments = case.arguments(scheduler, 3, X.cos(), X, {})
        results.append(outcome(lambda s=scheduler, a=arguments: outputs(s.step(**a))))
    (expected, error), (got, fast_error) = results
    assert error is None
    assert fast_error is None
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_heun_knows_its_halves_by_its_state_and_not_by_their_index():
    case, results = CASES["HeunDiscreteScheduler"], []
    for kind in PAIRS["HeunDiscreteScheduler"]:
        scheduler, found = case.ready(kind), []
        for index in (2, 3, 2):  # a run may begin with either; the third goes on with its second half
            scheduler._step_index, scheduler.dt = index, None
            found.append(outputs(scheduler.step(**case.arguments(scheduler, index, X.sin(), X, {}))))
        found.append(outputs(scheduler.step(**case.arguments(scheduler, 3, X.cos(), X, {}))))
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@each
def test_steps_are_fused(name, monkeypatch):
    case, (original, kind) = CASES[name], PAIRS[name]
    monkeypatch.setattr(original, "step", None)
    for dtype in (torch.bfloat16,) if "FlowMap" in name else (torch.float32, torch.bfloat16):
        scheduler, x = case.ready(kind), X.to(dtype)
        for index in range(case.number_of_steps(scheduler)):
            results = outputs(
                scheduler.step(**case.arguments(scheduler, index, x.sin(), x, {"last": x if index else None}))
            )
            assert all(result.dtype is dtype and torch.isfinite(result).all() for result in results)


@each
def test_on_a_device_no_timestep_is_read(name):
    """A view into ``timesteps`` of a scheduler with sigmas is known by its place in memory."""
    case, (_, kind) = CASES[name], PAIRS[name]
    if not issubclass(kind, SigmaSteps):
        return
    fast, x = case.ready(kind), X.bfloat16()
    values, fast.timesteps = fast.timesteps.tolist(), fast.timesteps.as_subclass(OnDevice)
    fast._host_copies = {"timesteps": HostCopy.of(fast.timesteps, values)}
    for index in range(4, 6):
        fast.step(**case.arguments(fast, index, x.sin(), x, {}))
        assert fast.step_index == index + 1


@each
def test_what_moves_to_a_device_is_known_on_the_host(name):
    """The device meta has no values to read."""
    original, kind = PAIRS[name]
    if not issubclass(kind, SigmaSteps):
        return
    fast, expected = kind(), original()
    fast.set_timesteps(5, device="meta")
    expected.set_timesteps(5)
    assert fast.timesteps.device.type == "meta"
    assert fast.sigmas.device.type == ("cpu" if name == "HeunDiscreteScheduler" else "meta")
    for attribute in ("timesteps", "sigmas"):
        assert fast._values_on_host(attribute) == getattr(expected, attribute).tolist()


@each
def test_gradients_are_the_originals(name):
    case, found = CASES[name], []
    for kind in PAIRS[name]:
        scheduler = case.ready(kind)
        x, m = X.clone().requires_grad_(), X.sin().requires_grad_()
        total = 0
        torch.manual_seed(0)
        for index in (4, 5):
            results = outputs(scheduler.step(**case.arguments(scheduler, index, m, x, {"last": X.cos()})))
            total = total + sum((result * X.cos()).sum() for result in results)
        found.append(torch.autograd.grad(total, (x, m)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "Flow" not in name and "RF" not in name])
def test_a_compiled_step_is_the_originals(name):
    """With its breaks of the graph, and no more."""
    case, found, graphs = CASES[name], [], []
    for kind in PAIRS[name]:
        scheduler = case.ready(kind)
        torch._dynamo.reset()
        graphs.append([])
        arguments = case.arguments(scheduler, 2, X, X, {})
        step = torch.compile(
            lambda m, s=scheduler, a=arguments: outputs(s.step(**a | {"model_output": m}))[0],
            backend=lambda graph, inputs, seen=graphs[-1]: seen.append(graph) or graph.forward,
        )
        torch.manual_seed(0)
        found.append(step(arguments["model_output"].sin()))
    assert len(graphs[1]) == len(graphs[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@each
def test_copies_and_saved_configs(name, tmp_path):
    case, (original, kind) = CASES[name], PAIRS[name]
    config = case.change if name != "UnCLIPScheduler" else {}
    fast, dtype = case.ready(kind, config), torch.bfloat16 if "FlowMap" in name else torch.float32
    first = case.arguments(fast, 2, X.sin().to(dtype), X.to(dtype), {})
    fast.step(**first)

    def step(scheduler):
        torch.manual_seed(0)
        return outputs(scheduler.step(**case.arguments(scheduler, 3, X.cos().to(dtype), X.to(dtype), {"last": X})))[0]

    again = twins(fast)
    expected = step(fast)
    for twin in again:
        assert torch.equal(step(twin), expected)
    fast.save_pretrained(tmp_path)
    for loaded in (original.from_pretrained(tmp_path), kind.from_pretrained(tmp_path), kind.from_config(fast.config)):
        loaded.set_timesteps(8)
        loaded.step(**first)
        torch.testing.assert_close(step(loaded), expected, rtol=1e-2 if "FlowMap" in name else 1e-5, atol=1e-5)
    assert type(drop_ins.fast_scheduler(original(**config))) is kind
    for method in ("step", "set_timesteps", "__init__", "add_noise"):
        if hasattr(original, method):
            ours, theirs = (inspect.signature(getattr(k, method)).parameters for k in (kind, original))
            named = [[(p.name, p.default) for p in parameters.values()] for parameters in (ours, theirs)]
            assert named[0] == named[1]


@each
def test_other_methods_are_the_originals(name):
    case, found = CASES[name], []
    for kind in PAIRS[name]:
        scheduler = case.ready(kind)
        results = [torch.as_tensor(scheduler.init_noise_sigma)] if hasattr(scheduler, "init_noise_sigma") else []
        t = scheduler.timesteps[[1, 2, 3]]
        for method in ("add_noise", "scale_noise"):
            if hasattr(case.original, method):
                arguments = (X, t, X.cos()) if method == "scale_noise" else (X, X.cos(), t)
                results.append(getattr(scheduler, method)(*arguments))
        if hasattr(scheduler, "scale_model_input"):
            results.append(scheduler.scale_model_input(X, scheduler.timesteps[2]))
        found.append([*results, scheduler.timesteps])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
