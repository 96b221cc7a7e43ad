"""The checks of half and double precision: they pass right samplers and detect wrong ones."""

import math

import pytest
import torch
from verify.right_subjects import INSTALLED, step

from ddim_fast.verify import Outcome, verify
from ddim_fast.verify.subjects.adapters import StepFunction
from ddim_fast.verify.subjects.backends import Backend
from ddim_fast.verify.truth.tolerances import share_correctly_rounded

CHECKS = ("half-precision", "unbiased-rounding", "float64")


RIGHT = INSTALLED | {"step": step}


PATHS = ["flow", "flow?shift=3", "flow?shift=7", "edm", "ve", "vp"]


def assert_passes(subject, **options):
    report = verify(subject, checks=CHECKS, required=(), **options)
    assert report.passed, [(r.name, r.message) for r in report.results if r.message]


@pytest.mark.parametrize("name", RIGHT)
def test_right_samplers_pass(name):
    assert_passes(RIGHT[name], seed=0)


@pytest.mark.parametrize("schedule", PATHS)
def test_our_own_steps_pass_on_every_path(schedule):
    assert_passes("reference", seed=0, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_right_samplers_pass_with_other_seeds(seed):
    for subject in RIGHT.values():
        assert_passes(subject, seed=seed, full=seed == 2)
    for schedule in PATHS:
        assert_passes("reference", seed=seed, schedule=schedule)


def test_either_neighbour_is_right_half_way_and_neither_elsewhere():
    eps = torch.finfo(torch.float16).eps
    half_way = torch.tensor([1 + eps / 2, 1 + 3 * eps / 2], dtype=torch.float64).numpy()
    for rounding in (1e-16, -1e-16, 0.0):  # what float64 cannot tell
        for got in ([1.0, 1 + eps], [1 + eps, 1 + 2 * eps]):
            share = share_correctly_rounded(torch.tensor(got).half(), half_way + rounding, half_way)
            assert share == 1
    for off, expected in ((1e-13, 0.5), (-1e-13, 0.5)):  # what it can
        assert share_correctly_rounded(torch.tensor([1.0, 1 + 2 * eps]).half(), half_way + off, half_way) == expected


def towards_zero(exact, dtype):
    rounded = exact.to(dtype)
    inwards = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double().abs() > exact.abs(), inwards, rounded)


def truncated(*dtypes):
    def step_that_truncates(x_t, model_output, alpha_bar_t, alpha_bar_prev):
        if x_t.dtype not in dtypes:
            return step(x_t, model_output, alpha_bar_t, alpha_bar_prev)
        exact = step(x_t.double(), model_output.double(), alpha_bar_t, alpha_bar_prev)
        return towards_zero(exact, x_t.dtype)

    return step_that_truncates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_truncation_is_caught_in_each_type(dtype):
    found = verify(StepFunction(truncated(dtype), "truncated"), checks=["unbiased-rounding"]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert str(dtype) in found.message
    assert "truncation" in found.message


class Exactly(Backend):
    """The reference, which claims exact arithmetic, with another way to compute a step."""

    def __init__(self, change):
        super().__init__("reference")
        self.change = change

    def step(self, case):
        level = self.levels(case.setting)[case.index]
        plain = case.setting.prediction_type == "epsilon" and case.setting.clip_sample_range is None
        if not plain or case.setting.eta:
            return super().step(case)
        x_prev = self.change(case.x_t, case.model_output, level.alpha_bar_t, level.alpha_bar_prev)
        return super().step(case)._replace(x_prev=x_prev.to(case.dtype))


def coefficients_in_half(x_t, m, alpha_bar_t, alpha_bar_prev):
    scale = math.sqrt(alpha_bar_prev / alpha_bar_t)
    row = scale, math.sqrt(1 - alpha_bar_prev) - scale * math.sqrt(1 - alpha_bar_t)
    a, b = (float(torch.tensor(c, dtype=x_t.dtype)) for c in row)
    return a * x_t.double() + b * m.double()


def x0_in_half(x_t, m, alpha_bar_t, alpha_bar_prev):
    x0 = (x_t.double() - math.sqrt(1 - alpha_bar_t) * m.double()) / math.sqrt(alpha_bar_t)
    return math.sqrt(alpha_bar_prev) * x0.to(x_t.dtype).double() + math.sqrt(1 - alpha_bar_prev) * m.double()


def slightly_away(x_t, m, alpha_bar_t, alpha_bar_prev):
    """A sixteenth of a unit in the last place too large, before the only rounding."""
    exact = step(x_t.double(), m.double(), alpha_bar_t, alpha_bar_prev)
    return exact * (1 + torch.finfo(x_t.dtype).eps / 16)


def in_double(x_t, m, alpha_bar_t, alpha_bar_prev):
    return step(x_t.double(), m.double(), alpha_bar_t, alpha_bar_prev)


def in_single(x_t, m, alpha_bar_t, alpha_bar_prev):
    return step(x_t.float(), m.float(), alpha_bar_t, alpha_bar_prev)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("half-precision", step),  # all of it in half precision
        ("half-precision", coefficients_in_half),
        ("half-precision", x0_in_half),
        ("half-precision", slightly_away),
        ("unbiased-rounding", slightly_away),
        ("float64", in_single),
    ],
)
def test_a_claim_to_exact_arithmetic_is_held_to_it(check, change):
    assert verify(Exactly(in_double), checks=[check]).passed
    found = verify(Exactly(change), checks=[check]).results[0]
    assert found.outcome is Outcome.FAILED, found
    assert "must" in found.message


def test_a_wrong_path_for_half_precision_is_caught_without_that_claim():
    def wrong_in_float16(x_t, model_output, alpha_bar_t, alpha_bar_prev):
        off = 0.02 if x_t.dtype == torch.float16 else 0.0
        return step(x_t, model_output, alpha_bar_t * (1 - off), alpha_bar_prev)

    found = verify(wrong_in_float16, checks=["half-precision"]).results[0]
    assert found.outcome is Outcome.FAILED
    assert "float16" in found.message


def test_the_half_types_do_not_overflow_unseen():
    def squares(x_t, model_output, alpha_bar_t, alpha_bar_prev):
        return step(x_t * 60000, model_output * 60000, alpha_bar_t, alpha_bar_prev) / 60000

    assert verify(squares, checks=["half-precision"]).results[0].outcome is Outcome.FAILED
