"""The workflows of GitHub Actions and the documents of a project: well-formed, with commands that exist, and of one version."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from page_commands import check_commands, commands

import ddim_fast as df

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
JOBS = [(workflow, name) for workflow, content in WORKFLOWS.items() for name in content["jobs"]]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def variants(job):
    """Each combination of a job's matrix, by the names of its variables."""
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    included = matrix.pop("include", None)
    return included or [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def run_lines(job):
    """What the steps of a job run, for each combination of its matrix."""
    for variant in variants(job):
        for step in job["steps"]:
            filled = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found, v=variant: v[found[1]], step.get("run", ""))
            assert "${{" not in filled, filled
            yield filled


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_a_job_has_the_shape_of_one(workflow, name):
    job = WORKFLOWS[workflow]["jobs"][name]
    assert set(job) <= {"if", "needs", "runs-on", "timeout-minutes", "strategy", "steps", "environment", "permissions"}
    assert job["timeout-minutes"] <= 90
    needed = job.get("needs", [])
    needed = [needed] if isinstance(needed, str) else needed
    assert {*needed} <= set(WORKFLOWS[workflow]["jobs"])
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "uses", "with", "run", "if", "env"}
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step.get("uses", "actions/x@v1"))


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_its_commands_exist(workflow, name):
    for text in run_lines(WORKFLOWS[workflow]["jobs"][name]):
        check_commands(text)
        for program, *words in commands(text):
            if program == "make":  # as far as a dry run: what it would do
                done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                assert done.stdout.strip()


def test_tests_run_on_the_versions_that_are_claimed():
    job = WORKFLOWS["ci"]["jobs"]["test"]
    of = {variant["target"]: variant["python"] for variant in variants(job)}
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    named = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
    assert of["test-oldest"] == oldest
    assert of["test-newest"] == max(named, key=lambda version: int(version.split(".")[1]))
    assert of["test"] in named


def test_only_publishing_may_write_and_it_needs_everything():
    for workflow, content in WORKFLOWS.items():
        assert content["permissions"] == {"contents": "read"}
        for name, job in content["jobs"].items():
            assert job.get("permissions", {}) == ({"id-token": "write"} if name == "publish" else {}), (workflow, name)
    publish = WORKFLOWS["release"]["jobs"]["publish"]
    assert {*publish["needs"]} == {"wheels", "source"}
    assert publish["if"] == "github.event_name == 'push'"
    assert WORKFLOWS["release"][True]["push"] == {"tags": ["v*"]}  # YAML 1.1 reads the key "on" as true


def test_a_wheel_is_used_before_it_is_published():
    section = PYPROJECT.split("[tool.cibuildwheel]")[1].split("\n[tool.ruff]")[0]
    (command,) = re.findall(r'^test-command = "(.*)"$', section, re.M)
    check_commands(command)
    assert section.count("DDIM_FAST_REQUIRE_EXTENSION") == 2
    (build,) = re.findall(r'^build = "cp(\d)(\d+)-\*"', section, re.M)
    assert ".".join(build) == re.findall(r'requires-python = ">=([\d.]+)"', PYPROJECT)[0]


# --- Issues, citation, releases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_what_is_needed(path):
    form = yaml.safe_load(path.read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
    for part in form["body"]:
        assert part["type"] in ("textarea", "input")
        assert part["attributes"]["label"]
        assert part["validations"] == {"required": True}


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == df.__version__
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["preferred-citation"]["url"].endswith("2010.02502")


@pytest.fixture
def release(tmp_path):
    """A copy of what a release is checked by, made right."""
    (tmp_path / "ddim_fast").mkdir()
    for name in ("ddim_fast/_version.py", "CITATION.cff", "CHANGELOG.md"):
        text = (ROOT / name).read_text().replace("## Unreleased", f"## {df.__version__} (2027-01-31)")
        (tmp_path / name).write_text(text)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/release_check.py").write_text((ROOT / "tools/release_check.py").read_text())
    return tmp_path


def checked(folder, *arguments):
    command = [sys.executable, "tools/release_check.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_release_that_agrees_passes(release):
    done = checked(release, f"v{df.__version__}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("CITATION.cff", f"version: {df.__version__}", "version: 9.9", "CITATION.cff must name version"),
        ("CHANGELOG.md", "(2027-01-31)", "", "must have a heading"),
        ("CHANGELOG.md", "# Changelog", "# Changelog\n\n## Unreleased", "must have no heading"),
        ("ddim_fast/_version.py", df.__version__, "9.9", "the tag must be v9.9"),
    ],
)
def test_a_release_that_disagrees_is_refused(release, file, old, new, said):
    text = (release / file).read_text()
    assert old in text
    (release / file).write_text(text.replace(old, new, 1))
    done = checked(release, f"v{df.__version__}")
    assert done.returncode == 1
    assert said in done.stderr


def test_a_release_needs_a_tag(release):
    assert "one tag is needed, got 0" in checked(release).stderr
