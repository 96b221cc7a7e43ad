"""The recorded runs: the same bytes everywhere; right samplers agree, and wrong ones do not."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_fast.verify import verify
from ddim_fast.verify.checks import golden as golden_check
from ddim_fast.verify.subjects.adapters import StepFunction, subject_of
from ddim_fast.verify.subjects.backends import Backend
from ddim_fast.verify.truth import golden
from ddim_fast.verify.truth.cases import StepResult

ROOT = Path(__file__).parents[3]


def held(subject, full=True):
    (result,) = verify(subject, checks=["golden"], full=full).results
    return result


def tool():
    spec = importlib.util.spec_from_file_location("golden_trajectories", ROOT / "tools" / "golden_trajectories.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- The record -------------------------------------------------------------------------------------------------------


def test_the_tool_writes_the_recorded_bytes():
    assert tool().text().encode() == golden.PATH.read_bytes()


def test_the_tool_sees_a_change_of_the_oracle(monkeypatch):
    made = tool()
    monkeypatch.setattr(made.oracle, "std_dev", lambda *args: 0.0)
    assert made.text().encode() != golden.PATH.read_bytes()


def test_the_record_is_small_and_says_all():
    runs = golden.golden_runs()
    assert golden.PATH.stat().st_size < 200_000
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        steps = len(run.setting.timesteps)
        assert run.states.shape == run.noise.shape == run.model_outputs.shape == (steps, *run.x_T.shape)
        assert run.alpha_bars.shape == (steps + 1,)
        for given in (run.x_T, run.model_outputs, run.noise):  # so that no subject rounds what it is given
            assert np.array_equal(torch.from_numpy(given).bfloat16().double().numpy(), given)
    assert {run.setting.eta for run in runs} == {0.0, 0.5, 1.0}
    assert {run.eta_scales for run in runs} == {"std_dev", "variance"}
    of_quick = {feature for run in runs if run.quick for feature in golden_check._needed(run)}
    assert of_quick == {feature for run in runs for feature in golden_check._needed(run)} - {"num_train_timesteps"}


@pytest.mark.parametrize("version", [0, 2, None])
def test_the_version_is_checked(version):
    data = json.loads(golden.PATH.read_text()) | {"version": version}
    with pytest.raises(ValueError, match=f"must be of version 1, got {version}"):
        golden.runs_of(data)


def test_a_record_of_another_version_is_an_error_not_a_pass(monkeypatch, tmp_path):
    other = tmp_path / "golden_trajectories.json"
    other.write_text(golden.PATH.read_text().replace('"version": 1', '"version": 2'))
    monkeypatch.setattr(golden, "PATH", other)
    golden.golden_runs.cache_clear()
    try:
        result = held("cpu")
    finally:
        golden.golden_runs.cache_clear()
    assert result.outcome.value == "error"
    assert "must be of version 1, got 2" in result.message


# --- Right samplers ---------------------------------------------------------------------------------------------------


def textbook_step(x_t, model_output, alpha_bar_t, alpha_bar_prev, eta=0.0, noise=None):
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    std_dev = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
    x_prev = math.sqrt(alpha_bar_prev) * x0
    x_prev = x_prev + math.sqrt(max(1 - alpha_bar_prev - std_dev**2, 0)) * model_output
    return x_prev if std_dev == 0 else x_prev + std_dev * noise


def textbook_sampler(model, x_T, alphas_cumprod, timesteps):
    bars = [*alphas_cumprod[list(timesteps)].tolist(), 1.0]
    x_t = x_T
    for t, alpha_bar_t, alpha_bar_prev in zip(timesteps, bars, bars[1:], strict=False):
        x_t = textbook_step(x_t, model(x_t, torch.full((len(x_t),), t)), alpha_bar_t, alpha_bar_prev)
    return x_t


@pytest.mark.parametrize(
    ("subject", "runs", "quick"),
    [("cpu", 45, 15), ("reference", 45, 15), (textbook_step, 15, 5), (textbook_sampler, 10, 2)],
    ids=["cpu", "reference", "step", "sampler"],
)
def test_right_samplers_agree(subject, runs, quick):
    for full, count in ((True, runs), (False, quick)):
        result = held(subject, full)
        assert (result.outcome.value, result.message) == ("passed", "")
        assert result.details["runs"] == count
        assert result.worst < 0.5


def test_a_sampler_whose_eta_scales_the_variance():
    subject = Backend("cpu")
    subject.eta_scales = "variance"
    assert held(subject).outcome.value == "passed"


def test_diffusers_differs_where_it_pairs_linspace_otherwise():
    result = held("diffusers:DDIMScheduler")
    assert result.details["changed"] == [
        "timestep_spacing = linspace, eta = 0.0",
        "timestep_spacing = linspace, eta = 1.0",
    ]
    assert "from timestep 999 to 666" in result.message


# --- Other results ----------------------------------------------------------------------------------------------------


class Changed(Backend):
    """The C++ backend, one thing changed."""

    def __init__(self, change):
        super().__init__("cpu")
        self.change = change

    def step(self, case):
        return StepResult(self.change(case, super().step))

    sample = StepFunction.sample  # step by step


def on(attribute, value, **changes):
    """Act as if a setting were another."""

    def change(case, step):
        setting = case.setting
        return step(case.but(setting=setting.but(**changes)) if getattr(setting, attribute) == value else case).x_prev

    return change


def last(case):
    return case.index == case.setting.steps - 1


CHANGES = {
    "a thousandth of a percent": (lambda case, step: step(case).x_prev * 1.00001, None),
    "the noise": (
        lambda case, step: step(case.but(noise=None if case.noise is None else -case.noise)).x_prev,
        "eta = (0.5|1.0)",
    ),
    "eta is ignored": (on("eta", 0.5, eta=0.0), "eta = 0.5"),
    "clipping is ignored": (
        on("clip_sample_range", 1.0, clip_sample_range=None, use_clipped_model_output=False),
        "clip_sample_range = 1.0",
    ),
    "the range is ignored": (on("clip_sample_range", 0.25, clip_sample_range=1.0), "clip_sample_range = 0.25"),
    "eps is not derived again": (
        on("use_clipped_model_output", True, use_clipped_model_output=False),
        "use_clipped_model_output = True",
    ),
    "v for x0": (on("prediction_type", "sample", prediction_type="v_prediction"), "prediction_type = sample"),
    "x0 for v": (on("prediction_type", "v_prediction", prediction_type="sample"), "prediction_type = v_prediction"),
    "the schedule": (on("schedule", "scaled_linear", schedule="linear"), "schedule = scaled_linear"),
    "one element": (lambda case, step: step(case).x_prev + torch.tensor([[0, 0, 0], [0, 1e-3, 0]]), None),
    "NaN": (lambda case, step: step(case).x_prev * math.nan, None),
    "a late step alone": (lambda case, step: step(case).x_prev + (case.index == 4) * 1e-3, None),
    "the last of fifty steps": (
        lambda case, step: step(case).x_prev + (case.index == 49) * 1e-3,
        "num_inference_steps = 50",
    ),
    "a type at the end": (lambda case, step: step(case).x_prev.to(torch.float64 if last(case) else case.dtype), None),
    "a shape at the end": (lambda case, step: step(case).x_prev[: 1 if last(case) else None], None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_result_is_found(change):
    function, named = CHANGES[change]
    subject = Changed(function)
    if change == "eta is ignored":  # a step without noise is given none
        subject = Changed(
            lambda case, step: function(case.but(noise=None), step) if case.setting.eta == 0.5 else step(case)[0]
        )
    result = held(subject)
    assert result.outcome.value == "failed", result
    assert "version 1" in result.message
    if named:
        assert all(re.search(named, name) for name in result.details["changed"]), result.details["changed"]


def test_every_run_holds_a_sampler_to_a_thousandth_of_a_percent():
    result = held(Changed(CHANGES["a thousandth of a percent"][0]))
    assert len(result.details["changed"]) == result.details["runs"] == 45


def test_the_message_names_the_run_the_step_and_the_element():
    def change(case, step):
        return step(case).x_prev + (case.index == 3) * torch.tensor([[0, 0, 0], [0, 0, 0.5]])

    result = held(Changed(change))
    run = golden.golden_runs()[0]
    assert (
        f"the run on record with {run.name}, in float32, differs in step 3, from timestep 200 to 0: at (1, 2)"
        in result.message
    )
    assert f"recorded as {float(run.states[3, 1, 2])!r}, allowed from" in result.message
    assert "verify(" in result.code


def one_step_more(model, x_T, alphas_cumprod, timesteps):
    return textbook_sampler(model, x_T, alphas_cumprod, [*timesteps, timesteps[-1]])


def other_timesteps(model, x_T, alphas_cumprod, timesteps):
    return textbook_sampler(model, x_T, alphas_cumprod, [max(t - 1, 0) for t in timesteps])


@pytest.mark.parametrize("sampler", [one_step_more, other_timesteps])
def test_other_timesteps_are_found(sampler):
    result = held(sampler)
    assert result.outcome.value == "failed"
    assert "visits the timesteps [800, 600, 400, 200, 0]; the subject makes" in result.message


def test_another_record_is_found(monkeypatch):
    """The comparison is with the record, not with the oracle's formulas of today."""
    runs = golden.golden_runs()
    states = runs[7].states.copy()
    states[2, 0, 1] *= 1.00001
    monkeypatch.setattr(golden_check, "golden_runs", lambda: (*runs[:7], replace(runs[7], states=states), *runs[8:]))
    assert held("cpu").details["changed"] == [runs[7].name]


def test_alpha_bars_may_be_off_by_rounding_alone():
    subject, run = subject_of(textbook_step), golden.golden_runs()[0]
    pair = golden_check._pairs(run)[2]
    (level,) = run.setting.but(alpha_bars=(pair,), timesteps=None).levels()
    near, far = (level._replace(level_t=level.alpha_bar_t * off) for off in (1.0001, 1.001))
    assert golden_check._rounded_only(near, *pair, subject, run) == near
    assert golden_check._rounded_only(far, *pair, subject, run) == level
