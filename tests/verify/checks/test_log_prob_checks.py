"""The checks of log-probabilities: they pass right subjects in each form and convention, and say what is wrong."""

import functools
import math

import pytest
import torch
from verify import broken_log_probs as broken
from verify.broken_log_probs import gaussian_step
from verify.broken_subjects import Textbook

from ddim_fast.verify import verify
from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import run_check
from ddim_fast.verify.subjects.adapters import StepFunction
from ddim_fast.verify.subjects.backends import Backend, EmulatedTriton

NAMES = [name for name in CHECKS if name.startswith("log-prob")]


def result_of(subject, name, full=False, seed=0):
    return run_check(CHECKS[name], subject, full, seed, torch.device("cpu"))


def step_function(**changes):
    subject = StepFunction(gaussian_step)
    for name, value in changes.items():
        setattr(subject, name, value)
    return subject


# --- Right ones pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_our_backends_pass(backend, name):
    result = result_of(Backend(backend), name, seed=1)
    assert result.outcome is Outcome.PASSED, result.message
    assert result.worst < 0.9


@pytest.mark.parametrize("name", ["log-prob-reduction", "log-prob-half"])
def test_the_ptx_of_our_gpu_kernels_passes(name):
    result = result_of(EmulatedTriton(), name)
    assert result.outcome is Outcome.PASSED, result.message


class Summed(Textbook):
    """The sum, as it is declared."""

    log_prob_reduction = "sum"
    features = Textbook.features - {"log_prob_reduction"}

    def reduced(self, each, reduction, dtype):
        return super().reduced(each, "sum", dtype)


class OfTheVariance(Textbook):
    eta_scales = "variance"

    def std_dev(self, eta, a, p):
        return super().std_dev(math.sqrt(eta), a, p)


class WithMinStd(Textbook):
    min_std = 0.3

    def step_with_log_prob(self, case):
        x_prev = self.step(case).x_prev
        return broken.ScoredStep(x_prev, self.log_prob(case, x_prev))

    def log_density(self, deviation, std):
        return super().log_density(deviation, max(std, 0.3))

    def log_prob(self, case, x_prev):
        mean, std = self.distribution(case)
        each = self.log_density(x_prev.detach().double() - mean, std).reshape(len(mean), math.prod(mean.shape[1:]))
        return self.reduced(each, case.more.get("log_prob_reduction", "mean"), case.dtype)


class AloneOnItsSteps(Textbook):
    """It evaluates no x_prev but its own."""

    features = Textbook.features - {"given_x_prev"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [Summed, OfTheVariance, WithMinStd, AloneOnItsSteps])
def test_every_declared_convention_passes(kind, name):
    result = result_of(kind(), name)
    assert result.outcome in (Outcome.PASSED, Outcome.NOT_APPLICABLE), result.message
    applies = {WithMinStd: name != "log-prob-no-noise", AloneOnItsSteps: "given_x_prev" not in CHECKS[name].needs}
    assert (result.outcome is Outcome.PASSED) == applies.get(kind, True)


def test_the_full_set_and_a_function_pass():
    for name in NAMES:
        result = result_of(step_function(), name, full=name != "log-prob")
        assert result.outcome is Outcome.PASSED, (name, result.message)


def test_a_report_says_which_reduction_was_held():
    report = verify(Summed(), checks=["log-prob-reduction"])
    assert report.conventions["log-probability"] == "sum over the elements"
    report = verify(WithMinStd(), checks=["log-prob-integral"])
    assert report.conventions["log-probability"].endswith("at least 0.3")


# --- Wrong ones are told ----------------------------------------------------------------------------------------------

TOLD = [
    (broken.NoLogStd, "log-prob", "log(std_dev_t) is missing"),
    (broken.NoLogStd, "log-prob-integral", "= std_dev_t: log(std_dev_t) is missing"),
    (broken.NoLogPi, "log-prob", "log(2 pi) / 2 is missing"),
    (broken.NoLogPi, "log-prob-integral", "= sqrt(2 pi)"),
    (broken.SquaresAlone, "log-prob", "It is -(x_prev - mean)^2"),
    (broken.SquaresAlone, "log-prob-integral", "= sqrt(pi)"),
    (broken.SquaresAlone, "log-prob-gradient", "2 std_dev_t^2 times that"),
    (broken.DividedByStd, "log-prob", "divided by 2 std_dev_t, the standard deviation"),
    (broken.DividedByStd, "log-prob-integral", "= 1 / sqrt(std_dev_t)"),
    (broken.DividedByStd, "log-prob-gradient", "It is std_dev_t times that"),
    (broken.StdForVariance, "log-prob", "The standard deviation is taken for the variance"),
    (broken.SumForMean, "log-prob", 'declare it: log_prob_reduction = "sum"'),
    (broken.SumForMean, "log-prob-reduction", 'declare it: log_prob_reduction = "sum"'),
    (broken.MeanForSum, "log-prob-reduction", "It is the mean over the elements"),
    (broken.NoiseForDeviation, "log-prob-half", "of the noise that was drawn"),
    (broken.NoiseForDeviation, "log-prob-ratio", "of the noise that was drawn"),
    (broken.GradientThroughXPrev, "log-prob-constant", "x_prev must be a constant, x_prev.detach()"),
    (broken.GradientThroughXPrev, "log-prob-gradient", "a given x_prev must be a constant"),
    (broken.NoGradient, "log-prob-gradient", "got none"),
    (broken.OtherEtaInDensity, "log-prob", 'declare it: eta_scales = "variance"'),
    (broken.AddedInBFloat16, "log-prob-half", "numbers of torch.bfloat16"),
    (broken.ResultInHalfPrecision, "log-prob-half", "must be float32 or float64, got torch.bfloat16"),
    (broken.StaleRow, "log-prob", "that of the previous step's row"),
    (broken.UnclippedDensity, "log-prob", "x0 is not clipped in it"),
    (broken.InfiniteDensity, "log-prob-no-noise", "must be refused with an error"),
    (broken.ForTheBatch, "log-prob", "must be one for each sample, (2,), got the shape (1,)"),
]


@pytest.mark.parametrize(("kind", "name", "phrase"), TOLD, ids=[f"{kind.__name__}-{name}" for kind, name, _ in TOLD])
def test_what_is_wrong_is_told(kind, name, phrase):
    result = result_of(kind(), name)
    assert result.outcome is Outcome.FAILED
    assert phrase in result.message


def test_every_broken_density_is_told_by_a_phrase_or_by_its_numbers():
    kinds = {one for one in vars(broken).values() if isinstance(one, type) and issubclass(one, Textbook)} - {Textbook}
    assert kinds - {kind for kind, _, _ in TOLD} == {broken.UndeclaredMinStd, broken.AnotherOrder}


def test_functions_are_told_too():
    """A function that takes its log-probability before x_prev is rounded."""

    @functools.wraps(gaussian_step)
    def of_the_noise(**given):
        x_prev, log_prob = gaussian_step(**given)
        if "x_prev" not in given and log_prob is not None and given["noise"] is not None:
            wide = {name: value.float() for name, value in given.items() if isinstance(value, torch.Tensor)}
            log_prob = gaussian_step(**{**given, **wide})[1]
        return x_prev, log_prob

    subject = StepFunction(of_the_noise)
    assert result_of(subject, "log-prob").outcome is Outcome.PASSED
    for name in ("log-prob-half", "log-prob-ratio"):
        result = result_of(subject, name)
        assert result.outcome is Outcome.FAILED
        assert "before it is rounded" in result.message
