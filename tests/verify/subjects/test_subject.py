"""The interface of subjects: old names of features, and the public names of the package."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from ddim_fast.verify import Outcome, Subject, verify
from ddim_fast.verify.subjects.adapters import subject_of
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import Setting, StepResult


class OfVersion01(Subject):
    """Right, as users wrote one for ddim_fast 0.1."""

    features = frozenset({"step", "levels", "epsilon", "clip", "clip_range", "rederive"})
    again = True

    def step(self, case):
        level, setting = self.levels(case.setting)[case.index], case.setting
        x_t, eps = case.x_t.double(), case.model_output.double()
        x0, _ = oracle.split("epsilon", x_t, eps, level.alpha_bar_t)
        if setting.clip_sample_range is not None:
            x0 = x0.clamp(-setting.clip_sample_range, setting.clip_sample_range)
        if setting.use_clipped_model_output and self.again:
            _, eps = oracle.split("sample", x_t, x0, level.alpha_bar_t)
        x_prev = level.alpha_bar_prev**0.5 * x0 + (1 - level.alpha_bar_prev) ** 0.5 * eps
        return StepResult(x_prev.to(case.dtype))


class WithoutAgain(OfVersion01):
    """Wrong where eps must be computed again."""

    again = False


@pytest.mark.parametrize(("subject", "outcome"), [(OfVersion01, Outcome.PASSED), (WithoutAgain, Outcome.FAILED)])
def test_the_old_name_of_a_feature_works_with_a_warning(subject, outcome):
    with pytest.warns(DeprecationWarning, match="'rederive'.*0.3: call it 'use_clipped_model_output'"):
        report = verify(subject, checks=["update"], required=())
    assert report.results[0].outcome is outcome
    assert "use_clipped_model_output" in report.features
    assert "rederive" not in report.features


def test_a_subject_given_as_an_object_stays_as_it_is():
    subject = OfVersion01()
    with pytest.warns(DeprecationWarning, match="rederive"):
        found = subject_of(subject)
    assert "rederive" in subject.features
    assert "rederive" not in found.features
    assert subject_of(found) is found


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed must be an integer, at least 0, got -1"):
        verify("cpu", seed=-1)


def test_importing_the_package_imports_no_check():
    command = "import sys, ddim_fast.verify; print([n for n in sys.modules if n.startswith('ddim_fast.verify.')])"
    found = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


# --- Functions on other paths ------------------------------------------------------------------------------------------


def flow_step(x_t, model_output, t, t_prev):
    return x_t + (t_prev - t) * model_output


def edm_step(x_t, model_output, sigma_t, sigma_prev):
    return x_t + (sigma_prev - sigma_t) * (x_t - model_output) / sigma_t


def flow_loop(model, x_T, timesteps):
    for t, s in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
        x_T = x_T + (s - t) * model(x_T, torch.full((len(x_T),), t))
    return x_T


def sigma_loop(model, x_T, sigmas):
    for t, s in pairwise(sigmas):
        x_T = x_T + (s - t) * (x_T - model(x_T, torch.full((len(x_T),), t))) / t
    return x_T


CHEAP = ("observed-update", "endpoints", "whole-run", "model-input", "convergence", "no-stale-state")


@pytest.mark.parametrize(
    ("function", "path", "options"),
    [
        (flow_step, "flow (flow)", {}),
        (edm_step, "edm?preconditioned=true (sample)", {}),
        (sigma_loop, "edm?preconditioned=true (sample)", {}),
        (flow_loop, "flow?shift=3 (flow)", {"schedule": "flow?shift=3"}),
    ],
)
def test_a_function_belongs_to_the_path_of_its_parameters(function, path, options):
    report = verify(function, checks=CHEAP, **options)
    assert report.passed, [result.message for result in report.results]
    assert report.conventions["paths"] == path


def test_a_flow_step_on_another_path_is_wrong_and_its_code_says_which():
    report = verify(flow_step, checks=["whole-run"], schedule="vp", prediction_type="flow")
    assert not report.passed
    assert "schedule='vp', prediction_type='flow'" in report.results[0].code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "nothing"}, "name must be one of"),
        ({"schedule": "flow?shift=0"}, "shift must be"),
        ({"schedule": "flow?num_train_timesteps=50"}, "a schedule to verify on has the parameters shift, time_scale"),
        ({"prediction_type": "velocity"}, "prediction_type must be one of"),
    ],
)
def test_a_wrong_path_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        verify(flow_step, checks=CHEAP, **options)


def test_a_scheduler_keeps_its_path():
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")
    with pytest.raises(ValueError, match="a scheduler has a path of its own"):
        verify(diffusers.DDIMScheduler, schedule="flow")


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_diffusers_sigma_schedulers_are_right(name):
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")
    report = verify(getattr(diffusers, name), checks=(*CHEAP, "alphas-cumprod", "timesteps"))
    assert report.passed, [result.message for result in report.results]


def test_a_scheduler_object_brings_its_shift():
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are those of diffusers")
    report = verify(diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), checks=("model-input", "whole-run"))
    assert report.passed
    assert report.conventions["paths"] == "flow?shift=7.0&time_scale=1000 (flow)"


def test_a_scheduler_is_configured_by_its_name():
    found = subject_of("diffusers:DDIMScheduler?set_alpha_to_one=false&timestep_spacing=trailing")
    assert not found.ends_clean
    assert found.spacings == ()
    config = found.config(Setting())
    assert (config["set_alpha_to_one"], config["timestep_spacing"]) == (False, "trailing")
    shifted = subject_of("diffusers:FlowMatchEulerDiscreteScheduler?shift=5")
    assert shifted.paths[0].schedule == "flow?shift=5.0&time_scale=1000"
    assert "diffusers:DDIMScheduler takes beta_end, " in _refused("diffusers:DDIMScheduler?eta=1", ValueError)
    assert "must be a class with set_timesteps and step" in _refused("math:sin?a=1", TypeError)


def _refused(name, kind):
    with pytest.raises(kind) as caught:
        subject_of(name)
    return str(caught.value)
