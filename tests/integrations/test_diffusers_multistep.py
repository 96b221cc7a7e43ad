"""The drop-ins for diffusers' multistep schedulers, against the originals and float64.

The truth restates each update in float64, from the original's own sigmas: it shares no code with
either.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, UniPCMultistepScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import assert_laid_out_alike, draw, shapes, sweep
from layouts import kinds as kinds_of_tensors
from outcomes import half_unit, outcome, same_error
from scheduler_steps import DTYPES, SHAPE, X, assert_same_kinds, known_fields, merged, next_noise, noise_of, outputs
from twins import twins

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.gpu_lab.fake_cuda import fake_cuda
from ddim_fast.integrations.host_copy import HostCopy
from ddim_fast.verify.truth.tolerances import allowed_error, assert_within, to_numpy

DPM, EDM, UNIPC = DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, UniPCMultistepScheduler
ORIGINALS = [DPM, EDM, UNIPC]
PAIRS = {original: getattr(drop_ins, f"Fast{original.__name__}") for original in ORIGINALS}

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the originals' own, in NumPy
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*:FutureWarning"),
]

beta_fields = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.sampled_from([0, 1]),
    "rescale_betas_zero_snr": st.sampled_from([False, False, True]),
    "thresholding": st.sampled_from([False] * 7 + [True]),
}
sigma_kinds = st.sampled_from(
    [
        {},
        {},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True},
    ]
)
solver_fields = {
    "solver_order": st.sampled_from([1, 2, 2, 3, 3]),
    "solver_type": st.sampled_from(["midpoint", "heun"]),
    "lower_order_final": st.booleans(),
    "euler_at_final": st.booleans(),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
}
dpm_fields = st.fixed_dictionaries(
    {
        **beta_fields,
        **solver_fields,
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
        "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]),
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
        "variance_type": st.sampled_from([None] * 7 + ["learned"]),
    }
)
edm_fields = st.fixed_dictionaries(
    {
        **solver_fields,
        "sigma_data": st.sampled_from([0.5, 1.0]),
        "sigma_schedule": st.sampled_from(["karras", "exponential"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
        "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++"]),
        "thresholding": st.sampled_from([False] * 7 + [True]),
    }
)
unipc_fields = st.fixed_dictionaries(
    {
        **beta_fields,
        **{name: solver_fields[name] for name in ("solver_order", "lower_order_final", "final_sigmas_type")},
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"]),
        "solver_type": st.sampled_from(["bh1", "bh2"]),
        "predict_x0": st.sampled_from([True, True, True, False]),
        "disable_corrector": st.sampled_from([[], [], [0, 1]]),
    }
)
CONFIGS = {
    DPM: merged(dpm_fields, st.one_of(sigma_kinds, st.just({"use_lu_lambdas": True}))),
    EDM: edm_fields,
    UNIPC: merged(unipc_fields, sigma_kinds),
}


def ready(kind, config, steps=10):
    """Return a scheduler before its first step."""
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


# --- The truth --------------------------------------------------------------------------------------------------------


def level(scheduler, index):
    """(alpha, sigma, lambda) in float64."""
    sigma = float(scheduler.sigmas[index].double())
    if "EDM" in type(scheduler).__name__:
        alpha, noise = 1.0, sigma
    elif getattr(scheduler.config, "use_flow_sigmas", False):
        alpha, noise = 1 - sigma, sigma
    else:
        alpha = 1 / np.sqrt(1 + sigma**2)
        noise = sigma * alpha
    with np.errstate(divide="ignore"):
        return alpha, noise, np.log(np.float64(alpha)) - np.log(np.float64(noise))


def integrates_noise(scheduler):
    """Whether the original remembers eps, rather than x0."""
    return not getattr(scheduler, "predict_x0", getattr(scheduler.config, "algorithm_type", "++").endswith("++"))


def prediction(scheduler, index, x, m):
    """What the original remembers of this step: x0, or eps."""
    kind, (alpha, sigma, _) = scheduler.config.prediction_type, level(scheduler, index)
    if "EDM" in type(scheduler).__name__:
        data, sign = scheduler.config.sigma_data, 1 if kind == "epsilon" else -1
        total = sigma**2 + data**2
        return data**2 / total * x + sign * sigma * data / np.sqrt(total) * m
    if integrates_noise(scheduler):
        return {
            "epsilon": lambda: m,
            "sample": lambda: (x - alpha * m) / sigma,
            "v_prediction": lambda: alpha * m + sigma * x,
        }[kind]()
    return {
        "epsilon": lambda: (x - sigma * m) / alpha,
        "sample": lambda: m,
        "v_prediction": lambda: alpha * x - sigma * m,
        "flow_prediction": lambda: x - sigma * m,
    }[kind]()


@np.errstate(all="ignore")  # weights that a step to clean data does not use
def dpm_update(scheduler, index, order, x, z, last, *earlier):
    """x_prev of the originals' formulas: the third order with half of its second derivative, the wrong
    sign in the SDE form."""
    config = scheduler.config
    (alpha_s, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = (level(scheduler, i) for i in (index, index + 1))
    h = lambda_t - lambda_s
    noise, sde = integrates_noise(scheduler), config.algorithm_type.startswith("sde")
    d1 = d2 = 0.0
    if order >= 2:
        lambda_1 = level(scheduler, index - 1)[2]
        r0 = (lambda_s - lambda_1) / h
        d1 = d1_0 = (last - earlier[0]) / r0
    if order == 3:
        r1 = (lambda_1 - level(scheduler, index - 2)[2]) / h
        d1_1 = (earlier[0] - earlier[1]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
    integral = order == 3 or config.solver_type == "heun"
    if noise:
        e = np.expm1(h)
        factor = 2 if sde else 1
        w1 = e / h - 1 if integral else e / 2
        w2 = (e - h) / h**2 - 0.5
        x_t = alpha_t / alpha_s * x - sigma_t * factor * (e * last + (w1 * d1 if order > 1 else 0.0))
        x_t = x_t - (sigma_t * w2 * d2 if order == 3 else 0.0)
        return x_t + (sigma_t * np.sqrt(np.expm1(2 * h)) * z if sde else 0.0)
    g = 2 * h if sde else h
    e = np.expm1(-g)
    w1 = e / g + 1 if integral else -e / 2
    w2 = -(e + g) / g**2 - 0.5 if sde else 0.5 - (e + g) / g**2
    x_t = sigma_t / sigma_s * (np.exp(-h) if sde else 1.0) * x
    x_t = x_t + alpha_t * (-e * last + (w1 * d1 if order > 1 else 0.0) + (w2 * d2 if order == 3 else 0.0))
    return x_t + (sigma_t * np.sqrt(-np.expm1(-2 * h)) * z if sde else 0.0)


def order_of_step(scheduler, index, taken):
    """The order of the step at this index, after ``taken`` steps of this run."""
    config, left = scheduler.config, len(scheduler.timesteps) - index
    order = min(config.solver_order, taken + 1)
    if type(scheduler) is UNIPC:
        return min(order, left) if config.lower_order_final else order
    few = config.lower_order_final and len(scheduler.timesteps) < 15
    if left == 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
        return 1
    return min(order, 2) if left == 2 and few else order


@np.errstate(all="ignore")
def unipc_update(scheduler, start, end, order, corrects, x, *predictions):
    """The original's predictor from ``start``, whose prediction is the first, or its corrector: then the first
    is that at the end."""
    (alpha_s, sigma_s, lambda_s), (alpha_t, sigma_t, lambda_t) = (level(scheduler, i) for i in (start, end))
    h = lambda_t - lambda_s
    at_end, *predictions = predictions if corrects else (None, *predictions)
    hh = h if integrates_noise(scheduler) else -h
    kept, scale = (alpha_t / alpha_s, sigma_t) if integrates_noise(scheduler) else (sigma_t / sigma_s, alpha_t)
    rks = [(level(scheduler, start - i)[2] - lambda_s) / h for i in range(1, order)]
    differences = [(value - predictions[0]) / rk for value, rk in zip(predictions[1:], rks, strict=True)]
    if corrects:
        rks, differences = [*rks, 1.0], [*differences, at_end - predictions[0]]
    factor = hh if scheduler.config.solver_type == "bh1" else np.expm1(hh)
    if len(rks) == 1:
        rhos = [0.5]
    else:
        phi, b = np.expm1(hh) / hh - 1, []
        for factorial, following in ((1, 2), (2, 6), (6, 24))[: len(rks)]:
            b.append(phi * factorial / factor)
            phi = phi / hh - 1 / following
        rhos = np.linalg.solve(np.vander(rks, increasing=True).T, b) if np.isfinite([*rks, *b]).all() else [np.nan] * 3
    x = kept * x - scale * np.expm1(hh) * predictions[0]
    return x - (scale * factor * sum(rho * d for rho, d in zip(rhos, differences, strict=False)) if rks else 0.0)


def linear(function, *pairs):
    """(value, sum of the magnitudes of its terms, weights) of a linear function of (value, magnitude)s."""
    one, no = np.ones(()), np.zeros(())
    n = range(len(pairs))
    weights = [abs(float(function(*(one if i == k else no for i in n)))) for k in n]
    return (
        function(*(value for value, _ in pairs)),
        sum(weight * size for weight, (_, size) in zip(weights, pairs, strict=True)),
        weights,
    )


def sized(tensor):
    return to_numpy(tensor), np.abs(to_numpy(tensor))


class Before:
    """What an original remembers before a step, and the truth of the step."""

    def __init__(self, scheduler):
        self.scheduler, self.order = scheduler, getattr(scheduler, "this_order", None)
        self.outputs = [sized(value) for value in reversed(scheduler.model_outputs) if value is not None]
        self.last_sample = getattr(scheduler, "last_sample", None)

    def truth(self, index, order, x, m, z):
        """By name: (value, terms, what the rounding of other results may cost, in their eps)."""
        scheduler = self.scheduler
        predicted, size, _ = linear(lambda x, m: prediction(scheduler, index, x, m), sized(x), sized(m))
        found = {"prediction": (predicted, size, 0.0)}
        used = [(predicted, size), *self.outputs]
        if type(scheduler) is not UNIPC:
            value, terms, _ = linear(
                lambda x, z, *values: dpm_update(scheduler, index, order, x, z, *values),
                sized(x), (z, np.abs(z)), *used[:order],
            )  # fmt: skip
            return found | {"prev_sample": (value, terms, 0.0)}
        sample, cost = sized(x), 0.0
        corrected = index > 0 and index - 1 not in scheduler.disable_corrector and self.last_sample is not None
        if corrected:
            sample = *_, weights = linear(
                lambda *values: unipc_update(scheduler, index - 1, index, self.order, True, *values),
                sized(self.last_sample), *used[: self.order + 1],
            )  # fmt: skip
            found["last_sample"] = (*sample[:2], 0.0)
        value, terms, weights = linear(
            lambda *values: unipc_update(scheduler, index, index + 1, order, False, *values), sample[:2], *used[:order]
        )
        if corrected:  # the predictor reads the results of the corrector
            cost = weights[0] * np.abs(sample[0]) + weights[1] * np.abs(predicted)
        return found | {"prev_sample": (value, terms, cost)}


def close(values, original_values, exact, terms, cost):
    """Compare a result with float64, and the original's with it."""
    assert (values.dtype, values.shape) == (original_values.dtype, original_values.shape)
    assert values.stride() == original_values.stride()
    allowed = allowed_error(values.dtype, terms) + cost * torch.finfo(values.dtype).eps / 2
    assert_within(values, exact, allowed)
    worst, originals = (float(np.abs(to_numpy(v) - exact).max()) for v in (values, original_values))
    assert not worst > originals + float(allowed.max()) + half_unit(values, exact)


def drawn(scheduler, x, m):
    """Return the dtypes of the noise that a step draws."""
    if not getattr(scheduler.config, "algorithm_type", "").startswith("sde"):
        return []
    return [torch.promote_types(x.dtype, m.dtype) if type(scheduler) is EDM else torch.float32]


def left_to_the_original(scheduler, x, m):
    """Whether no step of this config, or with these dtypes, has a fused form."""
    config = scheduler.config
    of_flow, kind = getattr(config, "use_flow_sigmas", False), config.prediction_type
    is_output = kind == ("epsilon" if integrates_noise(scheduler) else "sample")
    if type(scheduler) is UNIPC and x.dtype != m.dtype and (is_output or x.dtype != torch.float32):
        return True
    return (
        config.thresholding
        or getattr(config, "variance_type", None) is not None
        or torch.float64 in (x.dtype, m.dtype)
        or (of_flow and kind == "v_prediction")
        or (not of_flow and kind == "flow_prediction")
    )


# --- Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [50, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("original", ORIGINALS)
def test_steps_are_the_originals_and_never_further_from_float64(original, examples):
    takes_noise = "generator" in inspect.signature(original.step).parameters

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        config=CONFIGS[original],
        steps=st.sampled_from([1, 2, 4, 7, 30]),
        place=st.floats(0, 1),
        begin=st.sampled_from(["timestep", "number", "set_begin_index"]),
        dtypes=st.sampled_from(DTYPES),
        noise=st.sampled_from(["global", "generator", "generators", "given"]),
        return_dict=st.booleans(),
        scale=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 1000),
    )
    def check(config, steps, place, begin, dtypes, noise, return_dict, scale, seed):
        found = [
            outcome(lambda k=k: ready(k, known_fields(original, config), steps)) for k in (original, PAIRS[original])
        ]
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
        states = [noise_of("global" if noise == "given" else noise, seed) for _ in schedulers]
        given = {}
        for taken, t in enumerate(schedulers[0].timesteps[first : first + 5]):
            m = torch.from_numpy(rng.standard_normal(SHAPE)).to(dtypes[1])
            torch.manual_seed(seed)
            z = next_noise(states[0][0], SHAPE, *drawn(schedulers[0], x, m))
            if noise == "given" and "variance_noise" in inspect.signature(original.step).parameters:
                given = {"variance_noise": torch.from_numpy(rng.standard_normal(SHAPE)).to(dtypes[1])}
                z = to_numpy(given["variance_noise"].float())
            results, streams, before_step = [], [], Before(schedulers[0])
            for scheduler, (generator, generators) in zip(schedulers, states, strict=True):
                torch.manual_seed(seed)
                before = x.clone(), m.clone()
                timestep = t.item() if begin == "number" else t
                arguments = ({"generator": generator} if takes_noise else {}) | given
                results.append(
                    outcome(lambda s=scheduler, a=arguments: s.step(m, timestep, x, return_dict=return_dict, **a))  # noqa: B023
                )
                assert torch.equal(x, before[0])
                assert torch.equal(m, before[1])
                streams.append([torch.get_rng_state(), *[g.get_state() for g in generators]])
            for a, b in zip(*streams, strict=True):
                assert torch.equal(a, b), "the same numbers must be drawn from the same streams"
            (expected, error), (got, fast_error) = results
            assert schedulers[0].step_index == schedulers[1].step_index
            assert schedulers[0].lower_order_nums == schedulers[1].lower_order_nums
            if error is not None:
                return same_error(error, fast_error)
            assert fast_error is None, fast_error
            assert_same_kinds(expected, got, return_dict, m)
            (expected,), (got,) = outputs(expected), outputs(got)
            remembered = [scheduler.model_outputs for scheduler in schedulers]
            assert [value is None for value in remembered[1]] == [value is None for value in remembered[0]]
            assert (remembered[1][-1] is m) == (remembered[0][-1] is m)
            index, results = schedulers[0].step_index - 1, [
                {"prev_sample": x_prev, "prediction": s.model_outputs[-1], "last_sample": getattr(s, "last_sample", None)}
                for s, x_prev in zip(schedulers, (expected, got), strict=True)
            ]  # fmt: skip
            assert (results[1]["last_sample"] is x) == (results[0]["last_sample"] is x)
            left = left_to_the_original(schedulers[0], x, m)
            if left:
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            if not all(bool(value.isfinite().all()) for value in (expected, remembered[0][-1])):
                return None
            if not left:
                exact = before_step.truth(index, order_of_step(schedulers[0], index, taken), x, m, z)
                if not np.isfinite(exact["prev_sample"][0]).all():  # a step of the SDE form towards more noise
                    assert torch.equal(got, expected)
                    return None
                for name, truth in exact.items():
                    close(results[1][name], results[0][name], *truth)
            # From here on both remember the same.
            schedulers[1].model_outputs[:] = schedulers[0].model_outputs
            if results[0]["last_sample"] is not None:
                schedulers[1].last_sample = schedulers[0].last_sample
            x = expected
        return None

    check()


SOLVERS = {
    DPM: [
        {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "final_sigmas_type": "sigma_min"}
        for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        if (algorithm, order) != ("sde-dpmsolver", 3)
    ],
    EDM: [{"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}],
    UNIPC: [
        {"solver_order": order, "predict_x0": order != 1, "solver_type": "bh1" if order == 3 else "bh2", **final}
        for order, final in ((1, {"final_sigmas_type": "sigma_min"}), (2, {}), (3, {"final_sigmas_type": "sigma_min"}))
    ],
}
ALL_SOLVERS = [(original, config) for original in ORIGINALS for config in SOLVERS[original]]


def model(x, t):
    return (0.8 * x).sin() + 0.1 * float(t) / 1000


def run(scheduler, x=X, steps=None, seed=0):
    """Return the samples of a run from where the scheduler is."""
    torch.manual_seed(seed)
    found = []
    for t in scheduler.timesteps[scheduler.step_index or scheduler.begin_index or 0 :][:steps]:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        found.append(x)
    return found


@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_every_step_of_every_solver_is_fused(original, config, monkeypatch):
    """With 14 steps, the last ones are of lower order."""
    expected = [run(ready(original, config, steps)) for steps in (14, 15)]
    monkeypatch.setattr(original, "step", None)
    for steps, samples in zip((14, 15), expected, strict=True):
        torch.testing.assert_close(run(ready(PAIRS[original], config, steps)), samples, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("original", [DPM, EDM])
def test_a_run_takes_short_steps_once_it_is_of_full_order(original, order, dtype, monkeypatch):
    """In pipelines, set_timesteps comes first: each step of a run is taken once."""
    x, kind, taken = X.to(dtype), PAIRS[original], []
    fast, whole = ready(kind, {"solver_order": order}), kind._take
    monkeypatch.setattr(kind, "_take", lambda self, *args: taken.append(self._step_index) or whole(self, *args))
    found = []
    for _ in range(2):
        taken.clear()
        fast.set_timesteps(20)
        found.append(run(fast, x))
        assert taken in ([*range(order)], [*range(order), 19])  # the last one may be of first order
    monkeypatch.setattr(kind, "_short_take", lambda *_: None)
    fast.set_timesteps(20)
    found.append(run(fast, x))
    assert len(taken) > 20
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_original_and_drop_in_alternate_in_one_run(original, config):
    expected = run(ready(original, config))
    mixed, x, got = ready(original, config), X, []
    torch.manual_seed(0)
    for i, t in enumerate(mixed.timesteps):
        mixed.__class__ = (original, PAIRS[original])[i % 2]
        x = mixed.step(model(x, t), t, x, return_dict=False)[0]
        got.append(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_what_a_step_remembers_stays_as_it_is(original, config):
    """Somebody may hold a tensor of ``model_outputs``, or the list."""
    fast = ready(PAIRS[original], config)
    outputs, held = fast.model_outputs, []
    for t in fast.timesteps:
        run(fast, steps=1, seed=int(float(t) * 100) & 0xFFFF)
        held.append((outputs[-1], outputs[-1].clone()))
        assert outputs is fast.model_outputs
    for tensor, value in held:
        assert torch.equal(tensor, value)
    for i in range(1, 1 + config.get("solver_order", 2)):
        assert outputs[-i] is held[-i][0]


def without_history(scheduler):
    scheduler.model_outputs[-1] = None


def another_history(scheduler):
    scheduler.model_outputs[-1] = X.cos()


def of_another_shape(scheduler):
    scheduler.model_outputs[-1] = X[:, :1]


def in_half_precision(scheduler):
    scheduler.model_outputs = [None if value is None else value.bfloat16() for value in scheduler.model_outputs]


def a_longer_list(scheduler):
    scheduler.model_outputs.append(X.cos())


def sigmas_written(scheduler):
    scheduler.sigmas[4] *= 0.9


def sigmas_replaced(scheduler):
    scheduler.sigmas = scheduler.sigmas * 0.9


def sigmas_halved(scheduler):
    scheduler.sigmas = scheduler.sigmas.half()


def reconfigured(scheduler):
    scheduler.register_to_config(prediction_type="v_prediction")


def rewritten(scheduler):
    vars(scheduler.config)["prediction_type"] = "v_prediction"


def of_first_order(scheduler):
    scheduler.lower_order_nums = 0


def thresholded(scheduler):
    scheduler.register_to_config(thresholding=True)


def begun_again(scheduler):
    scheduler.set_timesteps(7)


CHANGES = [
    without_history, another_history, of_another_shape, in_half_precision, a_longer_list, sigmas_written,
    sigmas_replaced, sigmas_halved, reconfigured, rewritten, of_first_order, thresholded, begun_again,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("original", ORIGINALS)
def test_a_change_between_steps_counts(original, change):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {"solver_order": 3})
        for _ in range(2):  # the second run, too, in which rows are known
            scheduler.set_timesteps(10)
            before = run(scheduler, steps=3)[-1]
        unchanged = run(copy.deepcopy(scheduler), before, 2)
        change(scheduler)
        results.append((outcome(lambda s=scheduler, x=before: run(s, x, 2)), unchanged, scheduler.step_index))
    ((expected, error), _, index), ((got, fast_error), unchanged, fast_index) = results
    if error is not None:
        return same_error(error, fast_error)
    tolerance = 1e-2 if change is in_half_precision else 2e-4  # the original rounds their differences, too
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert index == fast_index
    assert change is a_longer_list or not torch.equal(got[-1], unchanged[-1])
    return None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last_sample", None),
        ("last_sample", X.cos()),
        ("this_order", 1),
        ("this_order", None),
        ("predict_x0", False),
        ("disable_corrector", [3]),
        ("solver_p", DPM()),
    ],
)
def test_what_unipc_remembers_may_be_replaced(name, value):
    results = []
    for kind in (UNIPC, PAIRS[UNIPC]):
        scheduler = ready(kind, {"solver_order": 3})
        before = run(scheduler, steps=4)[-1]
        value = copy.deepcopy(value)
        if name == "solver_p":
            value.set_timesteps(10)
        setattr(scheduler, name, value)
        found, error = outcome(lambda s=scheduler, x=before: run(s, x, 2))
        results.append((found, scheduler.timestep_list, error))
    (expected, timesteps, error), (got, fast_timesteps, fast_error) = results
    if error is not None:
        return same_error(error, fast_error)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    assert timesteps == fast_timesteps
    return None


@sweep(
    original_config=st.sampled_from(ALL_SOLVERS),
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    of_sample=kinds_of_tensors,
    of_output=kinds_of_tensors,
    of_last_output=kinds_of_tensors,
    shape=shapes,
)
def test_layouts_and_dtypes_are_the_originals(
    defaults, original_config, prediction_type, of_sample, of_output, of_last_output, shape
):
    original, config = original_config
    config = config | {"prediction_type": prediction_type}
    kinds = of_sample, of_output, of_last_output
    sample, output, last_output = (draw(i, shape, kind) for i, kind in enumerate(kinds))
    found = []
    for kind in (original, PAIRS[original]):
        scheduler, results = ready(kind, config), []
        torch.manual_seed(5)
        # What is left to an original is subject to the default device, as the original is.
        outside = kind is original or (original is EDM and torch.float64 in {dtype for _, dtype in kinds})
        with nullcontext() if outside else defaults.device_mode():
            for m, t in zip((last_output, output, output), scheduler.timesteps[3:], strict=False):
                results.append(outcome(lambda s=scheduler, m=m, t=t: s.step(m, t, sample, return_dict=False)))
                results.append(([v for v in scheduler.model_outputs if isinstance(v, torch.Tensor)], None))
        found.append((results, torch.get_rng_state().double()))
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if original is UNIPC and defaults.dtype is torch.float64 and "linalg.solve" in str(error):
            break  # the original solves for its coefficients in two dtypes, and fails under this default
        if error is not None:
            same_error(error, fast_error)
        else:
            assert_laid_out_alike(got, expected, *kinds, of_size_1=original is not UNIPC)
    assert torch.equal(found[0][1], found[1][1])


ODD = {
    "an integer": {"timestep": 3},
    "an unknown timestep": {"timestep": 7.5},
    "no timestep": {"timestep": None},
    "no sample": {"sample": None},
    "another shape": {"model_output": X[:1]},
    "an expanded sample": {"sample": X[:1]},
    "twice the channels": {"model_output": torch.cat([X, X], dim=1)},
    "integers": {"model_output": X.long()},
    "no elements": {"sample": X[:0], "model_output": X[:0]},
    "generators of another number": {"generator": [torch.Generator()] * 2},
    "noise of another shape": {"variance_noise": X[:1]},
    "no noise": {"variance_noise": 3},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("original", "config"), [(DPM, {"algorithm_type": "sde-dpmsolver++"}), (DPM, {}), (EDM, {})])
def test_what_it_cannot_do_faster_is_left_to_the_original(original, config, odd):
    call = ODD[odd]
    if set(call) - set(inspect.signature(original.step).parameters):
        return
    found = []
    for kind in (original, PAIRS[original]):
        scheduler, results = ready(kind, config), []
        torch.manual_seed(0)
        arguments = {"model_output": X.sin(), "timestep": scheduler.timesteps[2], "sample": X, **call}
        for _ in range(3):
            results.append(outcome(lambda s=scheduler, a=arguments: s.step(**a).prev_sample))
            results.append(([v for v in scheduler.model_outputs if isinstance(v, torch.Tensor)], None))
        found.append((results, scheduler.step_index, scheduler.lower_order_nums))
    assert found[0][1:] == found[1][1:]
    for (expected, error), (got, fast_error) in zip(found[0][0], found[1][0], strict=True):
        if error is not None:
            same_error(error, fast_error)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_run_begins_with_set_timesteps_and_ends_at_its_last_step(original):
    errors = []
    for kind in (original, PAIRS[original]):
        scheduler = kind()
        errors.append([outcome(lambda s=scheduler: s.step(X, 3, X))[1]])
        scheduler.set_timesteps(3)
        run(scheduler)
        errors[-1].append(outcome(lambda s=scheduler: s.step(X, s.timesteps[-1], X))[1])
    for expected, got in zip(*errors, strict=True):
        assert expected is not None
        same_error(expected, got)


@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_it_is_saved_copied_and_configured_as_the_original(original, config, tmp_path):
    kind = PAIRS[original]
    fast = ready(kind, config)
    run(fast, steps=3)
    expected = run(copy.deepcopy(fast), steps=3)
    for twin in twins(fast):
        assert torch.equal(run(twin, steps=3)[-1], expected[-1])
        twin.set_timesteps(8)  # a copy sees what changes in itself
        torch.testing.assert_close(run(twin), run(ready(kind, config, 8)), rtol=0, atol=0)
    assert torch.equal(run(fast, steps=3)[-1], expected[-1])
    fast.save_pretrained(tmp_path)
    for other in (
        original.from_pretrained(tmp_path),
        kind.from_pretrained(tmp_path),
        original.from_config(fast.config),
        kind.from_config(original(**config).config),
    ):
        of_other, ours = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (other, fast))
        assert of_other == ours
    assert type(drop_ins.fast_scheduler(original(**config))) is kind
    for method in ("step", "set_timesteps", "__init__", "add_noise", "scale_model_input"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(k, method)).parameters.values()]
            for k in (kind, original)
        )
        assert ours == [*theirs, ("solver", None)] if method == "__init__" else ours == theirs


@pytest.mark.parametrize("original", ORIGINALS)
def test_image_to_image_begins_in_the_middle(original):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, {"solver_order": 3}, 20)
        scheduler.set_begin_index(12)
        x = scheduler.add_noise(X, X.cos(), scheduler.timesteps[[12, 12, 12]])
        x = scheduler.scale_model_input(x, scheduler.timesteps[12])
        results.append([x, *run(scheduler, x)])
        results[-1].append(scheduler.add_noise(X, X.cos(), scheduler.timesteps[[12, 12, 12]]))
    assert len(results[1]) == 10
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


# --- On a GPU, transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("original", ORIGINALS)
def test_what_moves_to_a_device_is_known_on_the_host(original):
    """The device meta has no values to read."""
    fast, expected = PAIRS[original](), original()
    fast.set_timesteps(5, device="meta")
    expected.set_timesteps(5)
    assert fast.timesteps.device.type == "meta"
    assert fast.sigmas.device.type == "cpu"
    assert fast._values_on_host("timesteps") == expected.timesteps.tolist()
    assert fast._index_of_view(fast.timesteps[3]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_on_a_device_no_step_waits(original, config, dtype):
    fast = ready(PAIRS[original], config, 6)
    values = fast.timesteps.tolist()
    run(fast)
    # Of UniPC: in float32, or with three predictions, what the corrector recalls is a pass of its own.
    more = {1: 10, 2: 10, 3: 10} if dtype == torch.float32 else {1: 5, 2: 5, 3: 7}
    launches = 6 + (more[config["solver_order"]] if original is UNIPC else 0)
    with fake_cuda() as device:
        moved = fast.timesteps.to("cuda")
        fast.timesteps = moved
        fast._host_copies = {"timesteps": HostCopy.of(moved, values)}
        x, m = (torch.empty(2, 4, 8, 8, dtype=dtype, device="cuda") for _ in range(2))

        def sample():
            fast._step_index, fast.lower_order_nums = None, 0
            fast.model_outputs[:] = [None] * len(fast.model_outputs)
            for t in fast.timesteps:
                fast.step(m, t, x)

        sample()  # the rows are copied to the device once
        with device.steady_state() as steady:
            sample()
    assert steady.region().own_launches["ddim_fast::ddim_step_kernel"] == launches
    assert (steady.syncs, steady.copies) == ([], [])


@pytest.mark.parametrize(("original", "config"), ALL_SOLVERS)
def test_the_derivative_of_a_run(original, config):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, config)
        before = run(scheduler, steps=3)[-1]

        def steps(m, x=before, scheduler=scheduler):
            twin = copy.deepcopy(scheduler)
            torch.manual_seed(0)
            for t in twin.timesteps[3:6]:
                x = twin.step(m * x, t, x, return_dict=False)[0]
            return x

        m = X.sin().requires_grad_()
        (gradient,) = torch.autograd.grad(steps(m).square().sum(), m)
        results.append([gradient, torch.func.grad(lambda m: steps(m).square().sum())(X.sin())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("original", "config"), [(kind, SOLVERS[kind][1]) for kind in ORIGINALS])
def test_a_compiled_step(original, config):
    results = []
    for kind in (original, PAIRS[original]):
        scheduler = ready(kind, config)
        x = run(scheduler, steps=3)[-1]
        step = torch.compile(
            lambda m, s=scheduler, x=x: s.step(m, s.timesteps[3], x, return_dict=False)[0], backend="eager"
        )
        torch.manual_seed(0)
        results.append(step(X.sin()))
        assert scheduler.step_index == 4
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
