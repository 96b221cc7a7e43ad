"""A subject in a process of its own: a crash or hang loses one check, and is reported."""

import os
import time
from multiprocessing import active_children

import pytest

from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.isolate import IsolatedSubject, SubjectRefusedError
from ddim_fast.verify.reports.report import Outcome
from ddim_fast.verify.run import verify

SUBJECT = """
import os, sys, subprocess, time
from pathlib import Path

def step(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    "Does what the first line of the file says, and removes that line; it is right when there is none."
    todo = Path("todo").read_text().splitlines()
    Path("todo").write_text("\\n".join(todo[1:]))
    Path("pid").write_text(str(os.getpid()))
    print("before it happened", flush=True)
    exec(todo[0] if todo else "")
    x0 = (x_t - (1 - alpha_bar_t) ** 0.5 * model_output) / alpha_bar_t**0.5
    return alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * model_output
"""
HANG = "subprocess.Popen(['sleep', '1000']); print('x' * 40); time.sleep(1000)"


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dying.py").write_text(SUBJECT)
    (tmp_path / "todo").write_text("")
    return tmp_path


def test_each_way_to_die_is_told_and_the_next_check_goes_on(folder, capfd):
    update = CHECKS["update"]
    with IsolatedSubject("dying:step") as subject:
        for todo, words in {
            "os.abort()": ["SIGABRT", "Fatal Python error", "in step", "before it happened"],
            "print('bye'); os._exit(0)": ["ended itself with status 0", "bye"],
            "os.closerange(3, 256); time.sleep(1000)": ["closed the pipe"],
        }.items():
            (folder / "todo").write_text(todo)
            result = subject.run(update)
            assert (result.name, result.outcome) == ("update", Outcome.ERROR)
            assert result.proves == update.proves
            for word in words:
                assert word in result.message
            assert "verify('dying:step', checks=['update']" in result.code
        # The process has just been ended; its successor runs into a call that never returns.
        (folder / "todo").write_text("")
        assert subject.run(update).outcome is Outcome.PASSED
        (folder / "todo").write_text(HANG)
        subject.timeout = 1.0
        result = subject.run(update)
        assert result.outcome is Outcome.ERROR
        assert 1.0 <= result.seconds < 10
        for word in ("within 1 s", "in step", "x" * 40):
            assert word in result.message
        assert not alive(int((folder / "pid").read_text()))
    assert capfd.readouterr() == ("", "")  # the subject's own output is kept from the terminal
    assert active_children() == []


def test_results_are_those_of_the_same_process(folder):
    with IsolatedSubject("dying:step", seed=3, arithmetic="exact") as subject:
        results = [subject.run(CHECKS["update"])]
    here = verify("dying:step", checks=["update"], seed=3, arithmetic="exact")
    for one, other in zip(results, here.results, strict=True):
        assert (one.outcome, one.cases, one.message) == (other.outcome, other.cases, other.message)
        assert one.worst == other.worst or (one.worst != one.worst and other.worst != other.worst)


def test_report_knows_the_subject_and_leaving_ends_the_process(folder):
    with IsolatedSubject("reference", eta_scales="variance", seed=5, full=True) as subject:
        pid = subject._process.pid
        report = subject.report((), required=("update",), complete=False, ended_by="Ctrl-C")
    assert not alive(pid)
    here = verify("reference", checks=["update"], eta_scales="variance")
    assert (report.subject, report.features) == (here.subject, here.features)
    assert report.conventions == here.conventions
    assert report.conventions["eta scales"] == "variance"
    assert (report.seed, report.full, report.exit_code) == (5, True, 2)


@pytest.mark.parametrize(("options", "words"), [({"seed": -1}, "seed must"), ({"timeout": 0}, "timeout must")])
def test_a_wrong_argument_is_refused_before_anything_starts(monkeypatch, options, words):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ValueError, match=words):
        IsolatedSubject("cpu", **options)


def test_a_subject_that_ends_its_import_is_refused_with_its_last_words(folder):
    (folder / "leaving.py").write_text("import os; print('no licence', flush=True); os._exit(9)")
    began = time.monotonic()
    with (
        pytest.raises(SubjectRefusedError, match=r"'leaving:step' ended itself with status 9[^$]*no licence"),
        IsolatedSubject("leaving:step"),
    ):
        pass
    assert time.monotonic() - began < 60
