"""``ddim-fast search --coefficients``, and the commands that take its file."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.cli import main
from ddim_fast.commands import search as command
from ddim_fast.plans.files import TimestepList, read_timesteps
from ddim_fast.plans.rows import rows_of_plan

LINEAR = NoiseSchedule.linear()


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output + str(result.exception or "")


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setitem(command.EFFORTS, "quick", (16, 48, 48, 3))


SEARCH = ("search", "--model", "ddim_fast.tradeoff:ClosedForm", "--steps", 4, "--effort", "quick")


def test_a_solver_is_fitted_written_and_said_to_be_nearer(tmp_path, little):
    out = tmp_path / "four.json"
    said = run(*SEARCH, "--coefficients", "--out", out)
    assert "nearer than order 2 on held-out noise" in said
    assert "fitted coefficients" in said
    assert read_timesteps(out).coefficients is not None
    assert [path.name for path in tmp_path.iterdir()] == ["four.json"]
    assert DDIMSampler(LINEAR, timesteps=out).history_weights is not None


def test_coefficients_need_order_2(tmp_path, little):
    said = run(*SEARCH, "--coefficients", "--order", 1, "--out", tmp_path / "four.json", code=1)
    assert "they need order=2 and eta=0, got order=1" in said
    assert not list(tmp_path.iterdir())


def test_another_searchs_partial_file_is_not_resumed_from(tmp_path, little):
    (tmp_path / "four.json.partial").write_text("{}")
    said = run(*SEARCH, "--coefficients", "--out", tmp_path / "four.json", code=1)
    assert "four.json.partial must be of this search" in said


@pytest.fixture
def solver(tmp_path):
    weights = ((0, 0), (-0.3, 0.0))
    plan = DDIMSampler(LINEAR, timesteps=(999, 400), history_weights=weights, prediction_type="v_prediction").plan()
    path = tmp_path / "two.json"
    TimestepList(
        (999, 400), 1000, LINEAR.digest, 2, coefficients=rows_of_plan(plan), prediction_type="v_prediction"
    ).write(path)
    return path


def test_sample_takes_the_file(tmp_path, solver):
    run("sample", "--timesteps", solver, "-n", 2, "--out", tmp_path / "fitted.png")
    run("sample", "--timesteps", solver, "-n", 2, "--order", 2, "--out", tmp_path / "order2.png")
    with Image.open(tmp_path / "fitted.png") as one, Image.open(tmp_path / "order2.png") as other:
        assert one.tobytes() != other.tobytes()


def test_generate_takes_the_file_and_writes_it_into_the_settings(tmp_path, solver):
    run("generate", "--timesteps", solver, "-n", 4, "--out", tmp_path / "set", "--quiet")
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "set").glob("*.json")]
    assert "history_weights" in json.dumps(manifests)
    run("generate", "--timesteps", solver, "-n", 4, "--out", tmp_path / "set", "--resume", "--quiet")


def test_tradeoff_measures_the_file(tmp_path, solver):
    run("tradeoff", "--timesteps", solver, "--steps", 2, "--etas", "0", "--orders", "2", "--spacings", "trailing",
        "-n", 4, "--out", tmp_path / "study", "--quiet")  # fmt: skip
    cells = [json.loads(path.read_text())["cell"] for path in (tmp_path / "study" / "cells").glob("*.json")]
    assert [cell["timestep_spacing"] for cell in cells if cell["history_weights"]] == ["two"]
    assert "fitted coefficients" in (tmp_path / "study" / "report.html").read_text()
