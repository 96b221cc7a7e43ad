"""docs/CI.md and its examples: well-formed files, existing options, commands that work."""

import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ddim_fast.cli import main
from ddim_fast.commands.verify import verify as verify_command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "CI.md").read_text()
WORKFLOW = yaml.safe_load((ROOT / "docs" / "examples" / "ddim-verify.yml").read_text())
HOOKS = yaml.safe_load((ROOT / "docs" / "examples" / "pre-commit-config.yaml").read_text())
SAMPLER = """
def ddim_step(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    x0 = (x_t - (1 - alpha_bar_t) ** 0.5 * model_output) / alpha_bar_t**0.5
    return alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * model_output
"""
WRONG = SAMPLER.replace("return", "return 1.001 *")


def lines_of(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
COMMANDS = [line for step in STEPS for line in lines_of(step.get("run", ""))]
ENTRY = HOOKS["repos"][0]["hooks"][0]["entry"]
OF_DDIM_FAST = [line for line in [*COMMANDS, ENTRY] if line.startswith("ddim-fast")]
OF_PYTEST = [line for line in COMMANDS if line.startswith("pytest")]
QUOTED = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in lines_of(block)]


# --- Shape ------------------------------------------------------------------------------------------------------------


def test_the_workflow_has_the_shape_of_one():
    assert set(WORKFLOW) == {"name", True, "env", "jobs"}  # YAML 1.1 reads the key "on" as true
    assert set(WORKFLOW[True]) == {"push", "pull_request", "schedule"}
    for job in WORKFLOW["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert job["timeout-minutes"] <= 60
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
    for step in STEPS:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "uses", "with", "run", "if"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_the_workflow_keeps_every_report_that_it_writes():
    for job in WORKFLOW["jobs"].values():
        written = re.findall(r"--(?:junit|html|json|junitxml) (\S+)", " ".join(s.get("run", "") for s in job["steps"]))
        (kept,) = (step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
        assert written
        assert written == lines_of(kept)


def test_every_command_of_the_workflow_is_one_of_these():
    assert all(line.split()[0] in ("pip", "ddim-fast", "pytest") for line in COMMANDS)
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in COMMANDS


def test_the_hook_has_the_shape_of_one():
    (repository,) = HOOKS["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local"
    assert set(hook) == {"id", "name", "entry", "language", "files", "pass_filenames"}
    assert (hook["language"], hook["pass_filenames"]) == ("system", False)
    assert re.search(hook["files"], "my_sampler.py")
    assert not re.search(hook["files"], "other.py")


# --- The page ---------------------------------------------------------------------------------------------------------


def options(text):
    return set(re.findall(r"`(--[a-z-]+)", text))


def test_the_page_has_every_option():
    own, of_pytest = PAGE.split("## pytest")
    known = {name for parameter in verify_command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known = {name for name in known if name.startswith("--")} - {"--help"}
    assert options(own) == known
    plugin = (ROOT / "pytest_ddim_fast.py").read_text()
    assert {o for o in options(of_pytest) if o.startswith("--ddim")} == set(
        re.findall(r'^ +"(--ddim-[a-z-]+)"', plugin, re.M)
    ) | set(re.findall(r'addoption\(\s*"(--ddim-[a-z-]+)"', plugin))


def test_the_page_has_every_fixture():
    fixtures = re.findall(r"@pytest.fixture.*\ndef ([a-z_]+)", (ROOT / "pytest_ddim_fast.py").read_text())
    assert {f"| `{name}` |" for name in fixtures} <= set(re.findall(r"^(\| `[a-z_]+` \|)", PAGE, re.M))


@pytest.mark.parametrize("line", [line for line in QUOTED if line.startswith("ddim-fast")])
def test_each_quoted_command_is_one(line):
    verify_command.make_context("verify", shlex.split(line)[2:], resilient_parsing=False)
    assert line.split()[1] == "verify"


def test_the_page_quotes_the_examples():
    heart = PAGE.split("Its main lines:")[1].split("```sh")[1].split("```")[0]
    assert set(lines_of(heart)) <= set(COMMANDS)
    assert ENTRY in QUOTED


# --- The commands, run ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_sampler.py").write_text(SAMPLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_RUN_NUMBER", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p pytest_ddim_fast")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tmp_path


def briefly(line):
    """The same command for one check alone."""
    return line if "--golden" in line else f"{line} {'--ddim-check' if line.startswith('pytest') else '--check'} update"


def in_this_process(line):
    return CliRunner().invoke(main, shlex.split(os.path.expandvars(line))[1:])


def reports_exist(line, folder):
    for option, name in re.findall(r"--(junit|junitxml|html|json) (\S+)", line):
        assert (folder / name).stat().st_size > 0
        if option.startswith("junit"):
            assert list(ET.parse(folder / name).iter("testcase"))


@pytest.mark.parametrize("line", OF_DDIM_FAST)
def test_commands_on_a_right_sampler(line, folder):
    done = in_this_process(briefly(line))
    assert done.exit_code == 0, done.output
    reports_exist(line, folder)


def test_the_hook_on_a_wrong_sampler(folder):
    (folder / "my_sampler.py").write_text(WRONG)
    done = in_this_process(briefly(ENTRY))
    assert done.exit_code == 1, done.output
    assert "equation 12" in done.output


def test_pytest_and_the_pages_test(folder):
    """The page's own example beside the checks, both on a right sampler and on a wrong one."""
    (line,) = OF_PYTEST
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "test_own.py").write_text(example)
    done = subprocess.run(["bash", "-c", briefly(line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    reports_exist(line, folder)
    (folder / "my_sampler.py").write_text(WRONG)
    done = subprocess.run(["bash", "-c", briefly(line)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed" in done.stdout
    assert re.search(r"worst at \(\d, \d, \d, \d\): got .*, exact .*, allowed .* to ", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in [*OF_DDIM_FAST, *OF_PYTEST] if "--full" not in line])
def test_commands_as_they_are(line, folder):
    done = subprocess.run(["bash", "-e", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reports_exist(line, folder)
