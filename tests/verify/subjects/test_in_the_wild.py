"""The findings on other libraries: diffusers' are reproduced, and the document shows the data."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from diffusers_rounding import rounds_below_zero

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.run import run_check
from ddim_fast.verify.subjects import in_the_wild
from ddim_fast.verify.subjects.adapters import subject_of

ROOT = Path(__file__).resolve().parents[3]
SPEC = importlib.util.spec_from_file_location("findings", ROOT / "tools" / "findings.py")
findings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(findings)
FOUND = json.loads(findings.JSON_FILE.read_text())
HERE = [one for one in FOUND["subjects"] if one["package"] in ("diffusers", "ddim-fast") and not one["full"]]
EVERY_FAILURE = [(one, check) for one in HERE for check in one["checks"] if check["outcome"] == "failed"]
FAILED = list(
    {
        (check["name"], findings.MEANINGS[one["label"], check["name"]]): (one, check) for one, check in EVERY_FAILURE
    }.values()
)
"""One of each meaning."""
CASES = {check["code"]: (one, check) for one, check in EVERY_FAILURE if check["code"].startswith("import torch")}


def is_found_here(one, check):
    """Whether a finding is one of this processor, too."""
    of_rounding = "float32 makes it slightly negative" in findings.MEANINGS[one["label"], check["name"]][1]
    return rounds_below_zero() or not of_rounding


@pytest.mark.parametrize(("one", "check"), FAILED, ids=[f"{one['label']}-{check['name']}" for one, check in FAILED])
def test_a_finding_on_diffusers_is_found_again(one, check):
    found = run_check(CHECKS[check["name"]], subject_of(one["subject"]), False, 0, torch.device("cpu"))
    if is_found_here(one, check):
        assert found.outcome.value == "failed"
        assert bool(found.code) == bool(check.get("code"))
    else:
        assert found.outcome.value == "passed"


@pytest.mark.parametrize("one", HERE, ids=lambda one: one["label"])
def test_what_passed_there_passes_still(one):
    for name in ("update-with-noise", "alphas-cumprod", "deterministic", "inputs-untouched"):
        before = next(check["outcome"] for check in one["checks"] if check["name"] == name)
        assert (
            run_check(CHECKS[name], subject_of(one["subject"]), False, 0, torch.device("cpu")).outcome.value == before
        )


@pytest.mark.parametrize("code", sorted(CASES), ids=range(len(CASES)))
def test_the_smallest_case_of_a_finding_runs_and_fails(code):
    if is_found_here(*CASES[code]):
        with pytest.raises(AssertionError, match="x_prev is"):
            exec(code, {})
    else:
        exec(code, {})


def test_every_failure_is_explained_and_every_explanation_used():
    assert not findings.unexplained(FOUND)
    failed = {(one["label"], c["name"]) for one in FOUND["subjects"] for c in one["checks"] if c["outcome"] == "failed"}
    assert {findings.MEANINGS[key] for key in failed} == set(findings.MEANINGS.values())
    assert not [c for one in FOUND["subjects"] for c in one["checks"] if c["outcome"] == "error"]


def test_the_document_says_what_the_data_say():
    document = findings.DOCUMENT.read_text()
    assert findings.with_findings(document, FOUND) == document


def test_the_tables_on_timesteps_are_found_again():
    assert findings.spacing_sweep() == FOUND["spacings"]
    assert findings.samples_by_spacing() == FOUND["samples"]


@pytest.mark.parametrize("package", [p for p in in_the_wild.SUBJECTS if p != "diffusers"])
def test_a_library_that_is_missing_is_named(package, monkeypatch):
    modules = {
        "azula": "azula",
        "k-diffusion": "k_diffusion",
        "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
    }
    monkeypatch.setitem(__import__("sys").modules, modules[package], None)
    for kind in in_the_wild.SUBJECTS[package]:
        with pytest.raises(ImportError, match=f"pip install {package}"):
            kind()


def test_only_the_first_draw_is_replaced():
    x_T = torch.ones(2)
    with in_the_wild.StartFrom(x_T):
        first, second = torch.randn(2), torch.randn(2)
    assert first is x_T
    assert not torch.equal(second, x_T)
