"""Every subject that is wrong on purpose fails the checks named for it; right ones pass all."""

import json

import pytest
import torch
from verify.broken_log_probs import gaussian_step
from verify.broken_paths import TextbookPath
from verify.broken_subjects import BROKEN
from verify.broken_subjects import RIGHT as OTHERS

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import choose_checks, run_check
from ddim_fast.verify.subjects.adapters import StepFunction

RIGHT = OTHERS | {"on every path": TextbookPath, "with log-probabilities": lambda: StepFunction(gaussian_step)}
QUICK = [one.name for one in choose_checks(None, full=False)]
PAIRS = [(one, name) for one in BROKEN for name in one.caught_by]


def result_of(subject, name, seed=0):
    return run_check(CHECKS[name], subject, False, seed, torch.device("cpu"))


@pytest.mark.parametrize(("one", "name"), PAIRS, ids=[f"{one.name}-{name}" for one, name in PAIRS])
def test_a_broken_subject_fails_the_check_meant_for_it(one, name):
    result = result_of(one.make(), name)
    assert result.outcome is Outcome.FAILED, f"{one.what}: {name} {result.outcome.value} {result.message}"
    assert result.message
    assert result.code


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("form", RIGHT)
def test_a_right_subject_passes(form, name):
    result = result_of(RIGHT[form](), name)
    assert result.outcome in (Outcome.PASSED, Outcome.NOT_APPLICABLE), f"{result.outcome.value}: {result.message}"


def test_the_subject_with_every_feature_leaves_few_checks_out():
    offered = RIGHT["every feature"]().features
    assert {name for name in QUICK if not CHECKS[name].needs <= offered} <= NOT_BROKEN_HERE


def test_every_check_finds_something():
    meant = {name for one in BROKEN for name in one.caught_by}
    assert meant <= set(CHECKS)
    assert set(QUICK) - meant <= NOT_BROKEN_HERE


NOT_BROKEN_HERE = {"no-waiting", "no-allocation"}
"""Checks whose own tests break subjects for them."""


@pytest.mark.slow
def test_which_checks_find_what(tmp_path):
    """The whole table, as JSON: what each broken subject is caught by."""
    table = []
    for one in BROKEN:
        results = {name: result_of(one.make(), name).outcome for name in QUICK}
        failed = [name for name, outcome in results.items() if outcome is Outcome.FAILED]
        table.append({"subject": one.name, "what": one.what, "meant for": one.caught_by, "caught by": failed})
        assert set(one.caught_by) <= set(failed), table[-1]
        assert Outcome.ERROR not in results.values(), one.name
    (tmp_path / "caught.json").write_text(json.dumps(table, indent=1) + "\n")
