"""The interface of subjects: old names of features, and the public names of the package."""

import subprocess
import sys

import pytest

from ddim_fast.verify import Outcome, Subject, verify
from ddim_fast.verify.subjects.adapters import subject_of
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import StepResult


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
