"""The checks of whole runs: they pass right samplers and detect wrong ones."""

import math

import numpy as np
import pytest
import torch
from verify.right_subjects import INSTALLED, in_float32, sampler, step

from ddim_fast.verify import Outcome, verify
from ddim_fast.verify.checks.runs import GaussianModel
from ddim_fast.verify.subjects.backends import Backend
from ddim_fast.verify.truth.cases import Setting

CHECKS = ("whole-run", "composition", "inversion", "convergence")


def run(model, x_t, alphas_cumprod, timesteps, pair=lambda i, steps: (steps[i], [*steps, -1][i + 1]), step=step):
    bars = [*alphas_cumprod.tolist(), 1.0]
    for i, t in enumerate(timesteps):
        origin, target = pair(i, timesteps)
        x_t = step(x_t, model(x_t, torch.full((len(x_t),), t)), bars[origin], bars[target])
    return x_t


RIGHT = INSTALLED | {"step": step, "sampler": sampler, "sampler in float32": in_float32}


@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass(name):
    assert_passes(RIGHT[name], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass_with_other_seeds(name):
    for seed in (1, 2):
        assert_passes(RIGHT[name], seed=seed, full=seed == 2 and name == "cpu")


def assert_passes(subject, **options):
    report = verify(subject, checks=CHECKS, required=(), **options)
    assert report.passed, [(r.name, r.message) for r in report.results if r.message]


@pytest.mark.parametrize(
    ("backend", "schedule"),
    [*(("cpu", path) for path in ("flow?shift=3", "edm", "ve", "vp")), ("triton", "flow?shift=3")],
)
def test_our_own_runs_pass_on_every_path(backend, schedule):
    assert_passes(backend, seed=0, schedule=schedule)


# --- Runs that break one thing ----------------------------------------------------------------------------------------


def one_timestep_on(i, steps):
    """As if every timestep of the training were visited: order 0."""
    return steps[i], steps[i] - 1 if steps[i] else -1


def from_one_timestep_on(i, steps):
    return steps[i] + 1, [*steps, -1][i + 1]


def never_to_clean_data(i, steps):
    return steps[i], [*steps, 0][i + 1]


def paired(pair):
    return lambda model, x_T, alphas_cumprod, timesteps: run(model, x_T, alphas_cumprod, timesteps, pair=pair)


def skips_the_first_step(model, x_T, alphas_cumprod, timesteps):
    return run(model, x_T, alphas_cumprod, timesteps[1:])


def skips_the_last_step(model, x_T, alphas_cumprod, timesteps):
    return run(model, x_T, alphas_cumprod, timesteps[:-1] or timesteps)


def repeats_its_last_output(model, x_T, alphas_cumprod, timesteps):
    """Every other step has the output of the step before."""
    outputs = []

    def lazy(x_t, t):
        outputs.append(outputs[-1] if len(outputs) % 2 else model(x_t, t))
        return outputs[-1]

    return run(lazy, x_T, alphas_cumprod, timesteps)


def stops_the_noise(model, x_T, alphas_cumprod, timesteps):
    """The direction pointing to x_t is left out: order 0."""

    def without(x_t, m, alpha_bar_t, alpha_bar_prev):
        return step(x_t, m, alpha_bar_t, alpha_bar_prev) - 0.1 * math.sqrt(1 - alpha_bar_prev) * m

    return run(model, x_T, alphas_cumprod, timesteps, step=without)


def off_by_a_few_roundings(model, x_T, alphas_cumprod, timesteps):
    return run(model, x_T, alphas_cumprod, timesteps) * (1 + 3e-5)


BROKEN_RUNS = {
    "order 0": ("convergence", paired(one_timestep_on)),
    "no direction": ("convergence", stops_the_noise),
    "the first step left out": ("whole-run", skips_the_first_step),
    "one timestep on": ("whole-run", paired(one_timestep_on)),
    "from one timestep on": ("whole-run", paired(from_one_timestep_on)),
    "never to clean data": ("whole-run", paired(never_to_clean_data)),
    "the last step left out": ("whole-run", skips_the_last_step),
    "an output used twice": ("whole-run", repeats_its_last_output),
    "3e-5 off": ("whole-run", off_by_a_few_roundings),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_a_broken_run_is_caught(name):
    check, broken = BROKEN_RUNS[name]
    found = verify(broken, checks=[check]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert "must" in found.message


def test_a_model_asked_at_another_timestep_is_told_of():
    def late(model, x_T, alphas_cumprod, timesteps):
        return run(lambda x_t, t: model(x_t, t + 1), x_T, alphas_cumprod, timesteps)

    found = verify(late, checks=["whole-run"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "the model must be called at the timesteps of the run" in found.message


def test_steps_that_do_not_compose_are_caught():
    def churns(x_t, model_output, alpha_bar_t, alpha_bar_prev):
        return step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 1e-3 * math.sqrt(1 - alpha_bar_prev) * x_t

    def eps_of_the_step_length(x_t, model_output, alpha_bar_t, alpha_bar_prev):
        return step(x_t, model_output * (1 + 1e-4 * (alpha_bar_prev - alpha_bar_t)), alpha_bar_t, alpha_bar_prev)

    for broken in (churns, eps_of_the_step_length):
        found = verify(broken, checks=["composition"]).results[0]
        assert found.outcome is Outcome.FAILED, found


class Inverts(Backend):
    """The CPU backend with another inversion."""

    def __init__(self, invert, change=lambda case, result: result):
        super().__init__("cpu")
        self._invert, self._change = invert, change

    def invert(self, setting, model, x0):
        return self._invert(self, setting, model, x0)

    def step(self, case):
        return self._change(case, super().step(case))


def plainly(self, setting, model, x0):
    """One iteration: the model's output at x_prev for that at x_t."""
    return self._sampler(setting).invert(model, x0, iterations=1, backend=self.backend)


def with_one_step_left_out(self, setting, model, x0):
    x = x0
    for level in self.levels(setting)[:0:-1]:
        x = step(x, model(x, torch.full((len(x),), level.t)), level.alpha_bar_prev, level.alpha_bar_t)
    return x


@pytest.mark.parametrize("invert", [plainly, with_one_step_left_out, lambda self, setting, model, x0: x0])
def test_a_broken_inversion_is_caught(invert):
    assert verify(Inverts(Backend.invert), checks=["inversion"]).passed
    assert verify(Inverts(invert), checks=["inversion"]).results[0].outcome is Outcome.FAILED


def test_a_step_that_cannot_be_taken_back_is_caught():
    def change(case, result):
        level = case.setting.levels()[case.index] if case.setting.alpha_bars else None
        towards_noise = level is not None and level.alpha_bar_prev < level.alpha_bar_t
        return result._replace(x_prev=result.x_prev * (1 + 1e-5)) if towards_noise else result

    found = verify(Inverts(Backend.invert, change), checks=["inversion"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "back" in found.message


# --- The model whose answer is known ----------------------------------------------------------------------------------


def test_the_models_eps_is_the_conditional_mean():
    levels = Setting().levels()
    model, bar = GaussianModel(Setting(), levels, mean=0.3, std_dev=0.5), levels[5].alpha_bar_t
    rng = np.random.default_rng(0)
    x0, eps = 0.3 + 0.5 * rng.standard_normal(10**6), rng.standard_normal(10**6)
    x_t = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * eps
    slope, offset = np.polyfit(x_t, eps, 1)
    np.testing.assert_allclose(model.line(bar), (slope, offset), atol=6e-3)


def test_the_models_flow_keeps_standard_scores():
    model = GaussianModel(Setting(), Setting().levels())
    z, bar, shift = torch.linspace(-2, 2, 5, dtype=torch.float64), 0.3, 1e-6
    slope, offset = model.line(bar)
    x_t = model.x_t(z, bar)
    moved = step(x_t, slope * x_t + offset, bar, bar + shift)
    torch.testing.assert_close((moved - x_t) / shift, (model.x_t(z, bar + shift) - x_t) / shift, rtol=1e-4, atol=1e-4)


def test_the_order_is_reported():
    details = verify("cpu", checks=["convergence"]).results[0].details
    assert details["linear"]["steps"] == [10, 20, 40]
    assert 0.9 < details["linear"]["order"] < 1
    assert all(details[f"edm, order {order}"]["order"] > order - 0.2 for order in (2, 3))
