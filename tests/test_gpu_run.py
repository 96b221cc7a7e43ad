"""benchmarks/gpu: sections that end, fail or are left out, on the rehearsal's machine. ``make gpu-rehearsal`` runs the real ones."""

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


def breaks(machine):
    raise RuntimeError("the device says | no")


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    gpu = importlib.import_module("benchmarks.gpu.__main__")
    sections = {
        "first": lambda machine: [{"size": 1, "us": 2.5}, {"size": 2, "GB/s": 1.0}],
        "breaks": breaks,
        "last": lambda machine: [{"device": machine.device}],
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    return lambda *options: CliRunner().invoke(gpu.main, ["--out", str(tmp_path), *options])


def sections(out):
    return json.loads((out / "gpu.json").read_text())["sections"]


def test_a_section_that_breaks_costs_itself_alone(run, tmp_path):
    done = run("--rehearse")
    assert done.exit_code == 1
    assert "breaks: RuntimeError: the device says | no" in done.output
    assert "2 of 3 sections" in done.output
    found = sections(tmp_path)
    assert found["first"]["rows"] == [{"size": 1, "us": 2.5}, {"size": 2, "GB/s": 1.0}]
    assert found["last"]["rows"] == [{"device": "cpu"}]
    assert "in breaks" in found["breaks"]["traceback"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| size | us | GB/s |" in page
    assert "| 2 |  | 1 |" in page
    assert "**Failed**: RuntimeError: the device says | no" in page


def test_a_later_run_adds_to_what_is_there(run, tmp_path):
    assert run("--rehearse", "--only", "first").exit_code == 0
    assert list(sections(tmp_path)) == ["first"]
    assert run("--rehearse", "--only", "last").exit_code == 0
    assert list(sections(tmp_path)) == ["first", "last"]


def test_what_there_is_no_time_for_is_said(run):
    done = run("--rehearse", "--minutes", "0")
    assert done.exit_code == 1
    assert "last: left out, 0 minutes are over (--only last runs it)" in done.output


def test_wrong_words_and_no_device(run, tmp_path):
    assert "--only takes first, breaks, last, got frist" in run("--only", "frist").output
    assert "a CUDA device is needed, and torch finds none: --rehearse" in run("--only", "first").output
    assert not list(tmp_path.iterdir())
