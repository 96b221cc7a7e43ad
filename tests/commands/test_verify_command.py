"""``ddim-fast verify``: its exit codes, what it says, and that what cannot work is refused before
anything runs."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from verify.example_reports import EVERY_OUTCOME, RIGHT

from ddim_fast.cli import main
from ddim_fast.commands import verify as command
from ddim_fast.utils.html import plain_text
from ddim_fast.verify import isolate
from ddim_fast.verify.checks import CHECKS
from ddim_fast.verify.isolate import SubjectRefusedError
from ddim_fast.verify.reports import show, write

PROGRAM = str(Path(sys.executable).with_name("ddim-fast"))
SUBJECTS = """
import os, sys, time
from pathlib import Path

def right(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    x0 = (x_t - (1 - alpha_bar_t) ** 0.5 * model_output) / alpha_bar_t**0.5
    return alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * model_output

def broken(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return right(x_t, model_output, alpha_bar_t * 1.001, alpha_bar_prev)

def dying(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    "A crash, an end and a call that never returns, in turn; then it is right."
    count = len(list(Path().glob("died-*")))
    Path(f"died-{count}").touch()
    [os.abort, lambda: os._exit(0), lambda: time.sleep(1000), lambda: None][min(count, 3)]()
    return right(x_t, model_output, alpha_bar_t, alpha_bar_prev)

def slow(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    "Never returns in any check but update."
    frame = sys._getframe()
    while frame and frame.f_code.co_name != "update":
        frame = frame.f_back
    if frame is None:
        Path("pid").write_text(str(os.getpid()))
        time.sleep(1000)
    return right(x_t, model_output, alpha_bar_t, alpha_bar_prev)

number = 42
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    return tmp_path


def verify(*arguments, code):
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def program(*arguments, code):
    done = subprocess.run([PROGRAM, "verify", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def applicable(count):
    """Names of quick checks that apply to a step function without options, "update" first."""
    offered = {"step", "epsilon", "levels"}
    names = [one.name for one in CHECKS.values() if one.needs <= offered and not one.full_only and one.name != "update"]
    return ["update", *names[: count - 1]]


def only(*names):
    return [word for name in names for word in ("--check", name)]


def read(path):
    data = json.loads(path.read_text())
    jsonschema.validate(data, write.schema())
    return data


# --- Right, wrong, and not to the end ---------------------------------------------------------------------------------


def test_right_subject(folder):
    said = program("cpu", *only("update"), *["--json", "r.json", "--junit", "r.xml", "--html", "r.html"], code=0)
    assert re.search(r"passed +update +\d+ cases, worst 0\.\d\d of what is allowed", said)
    assert "cpu is right: 1 check passed" in said
    assert "Written: r.xml, r.json, r.html" in said
    assert "\x1b" not in said
    data = read(folder / "r.json")
    assert (data["exit_code"], data["complete"], data["required"]) == (0, True, ["update"])
    assert (folder / "r.xml").read_text().startswith("<?xml")
    assert "cpu is right" in (folder / "r.html").read_text()
    assert not list(folder.glob(".*"))


def test_broken_subject_is_shown_with_python_that_fails_beside_one_that_is_right(folder):
    said = program("subjects:broken", "--against", "reference", *only("update"), "--json", "r.json", code=1)
    assert "subjects:broken is wrong: 1 of 1 check failed" in said
    assert "reference is right" in said
    assert "ddim-fast verify subjects:broken --check update" in said
    data = read(folder / "r.json")
    assert (data["exit_code"], data["against"]["exit_code"]) == (1, 0)
    code = data["results"][0]["code"]
    assert "\n".join(f"  {line}".rstrip() for line in code.splitlines()) in said
    sys.path.insert(0, str(folder))
    try:
        with pytest.raises(AssertionError, match="x_prev is"):
            exec(code, {})
        with pytest.raises(AssertionError, match="x_prev is"):
            exec(code.replace("broken", "right").replace("<=", ">"), {})
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("subjects", None)


def test_a_crash_an_end_and_a_hanging_call_cost_a_check_each(folder):
    names = applicable(4)
    said = program("subjects:dying", *only(*names), "--timeout", 2, "--json", "r.json", code=2)
    for word in ("SIGABRT", "status 0", "within 2 s", "3 of 4 checks did not finish"):
        assert word in said
    outcomes = [r["outcome"] for r in read(folder / "r.json")["results"]]
    assert outcomes == ["error", "error", "error", "passed"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_ctrl_c_ends_everything_with_the_reports_written(folder, sent):
    names = applicable(3)
    started = subprocess.Popen(
        [
            "env",
            "--default-signal=INT",
            PROGRAM,
            "verify",
            "subjects:slow",
            *only(*names),
            "--json",
            "r.json",
            "--junit",
            "r.xml",
        ],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in range(600):
        if (folder / "pid").exists() and (folder / "pid").read_text():
            break
        assert started.poll() is None, started.stdout.read()
        time.sleep(0.2)
    os.killpg(started.pid, sent)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 130, said
    name = "Ctrl-C" if sent is signal.SIGINT else "SIGTERM"
    assert f"was not verified to the end: {name}" in said
    assert "stopped: what was found so far is in r.xml and r.json; the same command again begins anew" in said
    assert "Traceback" not in said
    data = read(folder / "r.json")
    assert (data["complete"], data["ended_by"], data["exit_code"]) == (False, name, 2)
    assert [(r["name"], r["outcome"]) for r in data["results"]] == [("update", "passed")]
    assert 'errors="1"' in (folder / "r.xml").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_required_check_that_does_not_apply(folder):
    offered = {"step", "epsilon", "levels", "torch", "half"}
    name = next(one.name for one in CHECKS.values() if not one.needs <= offered and not one.full_only)
    said = verify("subjects:right", *only("update", name), "--require", name, code=3)
    assert f"not applicable: {name}, which is required" in said
    assert f"required checks did not run ({name})" in said


# --- What is refused --------------------------------------------------------------------------------------------------


def test_missing_module_is_told_and_leaves_no_report_of_an_earlier_run(folder):
    (folder / "r.json").write_text("an earlier run's")
    said = program("no_such_module:step", "--json", "r.json", "--html", "r.html", code=2)
    assert "No module named 'no_such_module'" in said
    assert "Traceback" not in said
    data = read(folder / "r.json")
    assert (data["exit_code"], data["complete"], data["results"]) == (2, False, [])
    assert "no_such_module" in data["ended_by"]
    assert "not verified" in (folder / "r.html").read_text()


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        ("subjects:nothing", ["no attribute 'nothing'"]),
        ("subjects:number", ["42", "set_timesteps", "alpha_bar_prev"]),
        ("raising:step", ["ZeroDivisionError", "division by zero"]),
    ],
    ids=["attribute", "form", "import"],
)
def test_a_subject_that_cannot_be_had(folder, subject, words):
    (folder / "raising.py").write_text("1 / 0")
    said = verify(subject, *only("update"), code=2)
    for word in words:
        assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check", "nonsense"], ["update", "'nonsense'"]),
        (["--require", "nonsense"], ["update", "'nonsense'"]),
        (["--check", "golden", "--require", "update"], ["update is required but would not run"]),
        (["--golden", "--check", "update"], ["--golden", "leave out one"]),
        (["--json", "none/r.json"], ["none", "must exist"]),
        (["--junit", "."], ["must be a file"]),
        (["--html", "/proc/r.html"], ["must be writable, got /proc/r.html"]),
        (["--html", "r", "--json", "./r"], ["got one name twice"]),
        (["--device", "abacus"], ["abacus", "cuda"]),
        (["--device", "cuda:77"], ["cuda"]),
        (["--timeout", "0"], ["--timeout"]),
        (["--seed", "-1"], ["--seed"]),
        (["--eta-scales", "sigma"], ["std_dev"]),
        (["--eta-scales", "cps"], ["std_dev"]),
        (["a", "b"], ["unexpected extra argument"]),
    ],
    ids=lambda value: "-".join(value[:2]).strip("-") if isinstance(value, list) else None,
)
def test_wrong_options_are_refused_before_anything_starts(folder, monkeypatch, arguments, words):
    monkeypatch.setattr(isolate.subprocess, "Popen", None)
    if arguments[-1] == "cuda:77":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = verify(*arguments, code=2)
    for word in words:
        assert word in said
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["subjects.py"]


def test_missing_libraries_are_named_with_the_command_that_installs_them(folder, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    said = verify("cpu", code=2)
    assert "rich" in said
    assert 'needs rich, not installed: pip install ".[verify]"' in said


# --- Its own errors ---------------------------------------------------------------------------------------------------


class Stub:
    """Stands for ``IsolatedSubject``, without a process."""

    report_of = EVERY_OUTCOME

    def __init__(self, name, **options):
        self.options, self.name = options, name

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def run(self, one):
        return next(r for r in self.report_of.results if r.name == "update")

    def report(self, results, **more):
        return isolate.replace(self.report_of, results=tuple(results), **more)


@pytest.fixture
def stub(folder, monkeypatch):
    monkeypatch.setattr(isolate, "IsolatedSubject", Stub)
    return lambda report: monkeypatch.setattr(Stub, "report_of", report)


@pytest.mark.parametrize(("report", "code"), [(EVERY_OUTCOME, 1), (RIGHT, 0)], ids=["wrong", "right"])
def test_quiet_says_only_what_is_wrong(stub, report, code):
    stub(report)
    said = verify("cpu", *only("update"), "--quiet", code=code)
    if code == 0:
        assert said == ""
    else:
        assert "document.title" in said
        assert "is wrong" in said


def test_a_report_that_cannot_be_written_after_all_is_no_verdict(stub, monkeypatch):
    def full_disk(path, text):
        raise OSError("no space left")

    stub(RIGHT)
    monkeypatch.setattr(write, "write_text", full_disk)
    assert "no space left" in verify("cpu", *only("update"), "--json", "r.json", code=2)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (RuntimeError("a mistake of ours"), ["itself raised an error", "a mistake of ours"]),
        (ValueError("another"), ["itself raised an error", "another"]),
        (KeyboardInterrupt(), ["stopped: what was found so far is in r.json"]),
        (SubjectRefusedError("no such thing"), ["no such thing"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_goes_wrong_in_the_command_is_not_taken_for_a_wrong_subject(stub, monkeypatch, raised, words):
    def fail(self):
        raise raised

    monkeypatch.setattr(Stub, "__enter__", fail)
    said = verify("cpu", "--json", "r.json", code=130 if isinstance(raised, KeyboardInterrupt) else 2)
    for word in words:
        assert word in said
    if isinstance(raised, (KeyboardInterrupt, SubjectRefusedError)):
        assert read(Path("r.json"))["complete"] is False


def test_an_interruption_without_reports_says_that_nothing_was_written(stub, monkeypatch):
    def interrupted(self, one):
        raise KeyboardInterrupt("SIGTERM")

    monkeypatch.setattr(Stub, "run", interrupted)
    said = verify("cpu", *only("update"), code=130)
    assert "was not verified to the end: SIGTERM" in said
    assert "stopped: nothing was written; the same command again begins anew" in said
    assert "Traceback" not in said


def test_options_reach_the_subject_and_the_report(stub, monkeypatch, folder):
    made = []
    monkeypatch.setattr(Stub, "__enter__", lambda self: made.append(self) or self)
    stub(RIGHT)
    options = "--full --seed 9 --timeout 5 --eta-scales variance --arithmetic exact --device cpu --against mine:x"
    options += " --schedule flow?shift=3 --prediction-type sample"
    verify(*options.split(), *only("update"), "--json", "r.json", code=0)
    assert [one.name for one in made] == ["cpu", "mine:x"]
    for one in made:
        assert one.options == dict(
            full=True,
            seed=9,
            device="cpu",
            eta_scales="variance",
            arithmetic="exact",
            schedule="flow?shift=3",
            prediction_type="sample",
            timeout=5.0,
        )
    assert read(folder / "r.json")["against"]["required"] == ["update"]


# --- What it says -----------------------------------------------------------------------------------------------------


def test_list_and_help_teach(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = " ".join(verify("--list", code=0).split())
    for one in CHECKS.values():
        for text in (one.name, one.proves, one.tolerance, one.source):
            assert " ".join(text.split()) in said
    said = verify("--help", code=0)
    for word in ("diffusers:DDIMScheduler", "--against", "Exit codes", "--junit report.xml"):
        assert word in said
    assert max(map(len, said.splitlines())) <= 80


def test_golden_runs_only_that_check(stub, monkeypatch):
    ran = []
    monkeypatch.setattr(Stub, "run", lambda self, one: ran.append(one.name) or RIGHT.results[0])
    stub(RIGHT)
    verify("--golden", "--require", "golden", "--quiet", code=3)  # the stub's result is that of update
    assert ran == ["golden"]


@pytest.mark.parametrize("reports", [[EVERY_OUTCOME], [EVERY_OUTCOME, RIGHT]], ids=["one", "two"])
def test_terminal_of_80_columns(reports, monkeypatch):
    long = "batch-independence"
    reports = [
        isolate.replace(r, results=(*r.results, isolate.replace(r.results[1], name=long, seconds=1234.5)))
        for r in reports
    ]
    checks = [SimpleNamespace(name=r.name) for r in reports[0].results]
    console = Console(width=80, height=30, force_terminal=True, record=True, highlight=False, _environ={})
    names = ["my_own_package.samplers:StepWithALongName", "reference"][: len(reports)]
    with show.Terminal(console, names, checks, "7 checks, quick", quiet=False) as terminal:
        for i, report in enumerate(reports):
            for one, result in zip(checks, report.results, strict=True):
                terminal.started(i, one)
                console.print(terminal._now())
                terminal.finished(i, result)
    terminal.ended(reports, names, ["r.html"])
    said = console.export_text()
    assert (
        max(
            len(line)
            for line in said.splitlines()
            if "model_output" not in line and "ddim-fast verify my_own" not in line
        )
        <= 80
    )
    for result in reports[0].results:
        assert re.search(rf"^{result.name} ", said, re.MULTILINE)
    for word in (
        "20:34 min",
        "5.4e+05",
        "failed: update",
        "which is required",
        "the subject does not offer timesteps",
    ):
        assert word in said
    assert "\x1b[31m" not in said
    # The code is whole, so that it can be copied.
    assert all(line.rstrip() in said for line in plain_text(reports[0].results[0].code).splitlines())


def test_a_real_terminal_has_colours_and_progress(folder):
    here, there = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"}
    started = subprocess.Popen([PROGRAM, "verify", "cpu", *only("update")], stdout=there, stderr=there, env=environment)
    os.close(there)
    said = b""
    while chunk := _read(here):
        said += chunk
    os.close(here)
    assert started.wait(60) == 0
    text = said.decode()
    assert "\x1b[?25l" in text  # the cursor is hidden while the display moves
    assert text.count("\x1b[?25h") == 1
    assert re.search(r"\b[01]/1\b", text)  # a fast machine is done before the first picture
    assert "\x1b[1;32m✓ cpu is right: 1 check passed" in text


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""
