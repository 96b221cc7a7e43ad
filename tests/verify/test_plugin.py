"""pytest's plugin, and what is in ddim_fast.testing."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim_fast import testing
from ddim_fast.verify import run
from ddim_fast.verify.checks import CheckFailedError, CheckSkippedError, check
from ddim_fast.verify.truth import oracle
from ddim_fast.verify.truth.cases import Setting

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[2]
SAMPLER = """
import math

def ddim_step(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * model_output

def wrong(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    return ddim_step(x_t, model_output, alpha_bar_t, alpha_bar_prev) + 1
"""


@pytest.fixture
def checks(monkeypatch):
    """Eight checks in place of the real ones: each outcome, and what a check sees."""
    before = dict(run.CHECKS)
    run.CHECKS.clear()
    about = dict(proves="It proves.", source="equation 1", tolerance="none")

    @check("right", **about)
    def right(context):
        context.measured(0.25)

    @check("wrong", **about)
    def wrong(context):
        raise CheckFailedError("x_prev must be 1, got 2\non its second line", "assert 1 == 2, 'the code'")

    @check("inapplicable", needs="eta", **about)
    def inapplicable(context):
        raise AssertionError

    @check("skipped", **about)
    def skipped(context):
        raise CheckSkippedError("there is no compiler here")

    @check("broken", **about)
    def broken(context):
        raise ZeroDivisionError("of its own")

    @check("thorough", full_only=True, **about)
    def thorough(context):
        context.measured(0.5)

    @check("raises", **about)
    def raises(context):
        context.levels(Setting(timestep_spacing="none"))

    @check("warns", **about)
    def warns(context):
        warnings.warn("slow here", DeprecationWarning, stacklevel=1)
        context.measured(float(context.rng.random() * 0 + context.full + (context.device == torch.device("cpu"))) / 2)

    yield run.CHECKS
    run.CHECKS.clear()
    run.CHECKS.update(before)


# Where the plugin is installed, pytest would rewrite the asserts of all of its distribution, which
# this process has imported long since.
_IN_ONE_PROCESS = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"


@pytest.fixture
def pytest_in(pytester):
    """Run pytest in a folder with a sampler of the user's."""
    pytester.makepyfile(mine=SAMPLER)
    pytester.syspathinsert(ROOT)

    def run_it(*arguments, subject="mine:ddim_step"):
        chosen = ("--ddim-subject", subject) if subject else ()
        return pytester.runpytest_inprocess(
            "-p", "pytest_ddim_fast", "-p", "no:cacheprovider", *chosen, *arguments, "-W", _IN_ONE_PROCESS
        )

    return run_it


def names(result):
    return re.findall(r"ddim-fast::([a-z-]+) ", "\n".join(result.outlines))


# --- The checks as tests ----------------------------------------------------------------------------------------------


def test_a_check_is_a_test(checks, pytest_in):
    result = pytest_in("-v", "-rs")
    result.assert_outcomes(passed=2, failed=3, skipped=2, warnings=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "ddim_fast: mine:ddim_step on cpu, quick, seed 0",
            "ddim-fast::right PASSED*",
            "ddim-fast::wrong FAILED*",
            "SKIPPED [[]1[]] ddim-fast::inapplicable: the subject does not offer eta",
            "SKIPPED [[]1[]] ddim-fast::skipped: there is no compiler here",
        ]
    )


def test_a_failure_is_the_checks_words_and_its_code_alone(checks, pytest_in):
    result = pytest_in("--ddim-check", "wrong", "-vv")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "_* ddim-fast::wrong _*",
            "x_prev must be 1, got 2",
            "on its second line",
            "",
            "What wrong proves: It proves.",
            "Source: equation 1",
            "",
            "This code fails while the sampler is wrong:",
            "",
            "assert 1 == 2, 'the code'",
            "=* short test summary info =*",
            "FAILED ddim-fast::wrong - AssertionError: x_prev must be 1, got 2*",
        ],
        consecutive=False,
    )
    result.stdout.no_fnmatch_line("*pytest_ddim_fast.py*")
    result.stdout.no_fnmatch_line("*Traceback*")


def test_what_the_subject_raises_and_what_a_check_gets_wrong(checks, pytest_in):
    result = pytest_in("--ddim-check", "raises", "--ddim-check", "broken")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["the check itself raised an error:*", "*ZeroDivisionError: of its own", "*raised ValueError: none*"]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-k", "right or thorough"], {"right"}),
        (["-k", "ddim-fast and not w"], {"right", "inapplicable", "skipped", "broken", "raises"}),
        (["--ddim-full", "-m", "ddim_slow"], {"thorough"}),
        (["--ddim-full", "-m", "not ddim_slow", "-k", "right or thorough"], {"right"}),
        (["--ddim-full", "--ddim-check", "thorough", "--ddim-check", "right"], {"right", "thorough"}),
        (["--deselect", "ddim-fast::wrong", "-k", "wrong or right"], {"right"}),
        (["-m", "ddim_gpu"], set()),
    ],
)
def test_choosing(checks, pytest_in, arguments, expected):
    result = pytest_in("-v", *arguments)
    assert set(names(result)) == expected
    assert (result.ret == pytest.ExitCode.NO_TESTS_COLLECTED) == (not expected)


def test_beside_tests_of_the_users_own(checks, pytest_in, pytester):
    pytester.makepyfile(test_own="def test_own(): pass")
    result = pytest_in("-v", "--ddim-check", "right")
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["test_own.py::test_own PASSED*", "ddim-fast::right PASSED*"])


def test_warnings_as_errors_are_for_the_users_tests(checks, pytest_in):
    result = pytest_in("-W", "error", "--strict-markers", "--ddim-check", "warns")
    result.assert_outcomes(passed=1, warnings=1)


def test_junit(checks, pytest_in, pytester):
    pytest_in("--junitxml=report.xml")
    cases = {case.get("name"): case for case in ET.parse(pytester.path / "report.xml").iter("testcase")}
    assert set(cases) == {"right", "wrong", "inapplicable", "skipped", "broken", "raises", "warns"}
    assert {case.get("classname") for case in cases.values()} == {"ddim-fast"}
    properties = {p.get("name"): p.get("value") for p in cases["right"].iter("property")}
    assert properties == {
        "proves": "It proves.",
        "source": "equation 1",
        "cases": "1",
        "worst_share_of_allowed": "0.25",
    }
    assert cases["inapplicable"].find("skipped").get("message") == "the subject does not offer eta"
    assert "x_prev must be 1, got 2" in cases["wrong"].find("failure").get("message")
    assert "the code" in cases["wrong"].find("failure").text


def test_required_checks_must_run(checks, pytest_in):
    result = pytest_in("--ddim-require", "inapplicable", "--ddim-require", "right", "-k", "right or inapplicable")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["inapplicable is required and did not run: the subject does not offer eta"])


def test_the_seed_and_the_conventions_reach_the_checks(checks, pytest_in):
    seen = []

    @check("sees", proves="", source="", tolerance="")
    def sees(context):
        path = context.paths[0]
        conventions = context.subject.eta_scales, context.subject.arithmetic, path.schedule, path.prediction_type
        seen.append((context.rng.random(), context.full, *conventions))
        context.measured(0)

    pytest_in("--ddim-check", "sees")
    pytest_in("--ddim-check", "sees", "--ddim-seed", "7", "--ddim-full")
    conventions = "--ddim-eta-scales variance --ddim-arithmetic exact --ddim-schedule vp --ddim-prediction-type sample"
    pytest_in("--ddim-check", "sees", "--ddim-seed", "7", *conventions.split())
    (first, *plain), (second, *full), (third, *held) = seen
    assert first != second == third
    plainly = ["std_dev", "float32", "linear", "epsilon"]
    assert (plain, full) == ([False, *plainly], [True, *plainly])
    assert held == [False, "variance", "exact", "vp", "sample"]


@pytest.mark.parametrize(
    ("arguments", "subject", "message"),
    [
        ([], "mine:absent", "the subject 'mine:absent' cannot be imported"),
        ([], "absent:step", "the subject 'absent:step' cannot be imported"),
        ([], "mine:math", "a subject must be a backend"),
        (["--ddim-check", "absent"], "mine:ddim_step", "a check must be one of right, wrong"),
        (["--ddim-require", "absent"], "mine:ddim_step", "a check must be one of right, wrong"),
        (
            ["--ddim-check", "right", "--ddim-require", "wrong"],
            "mine:ddim_step",
            "wrong: the other options leave that check out",
        ),
        (["--ddim-device", "nowhere"], "mine:ddim_step", "--ddim-device nowhere cannot be used here"),
        (["--ddim-eta-scales", "nothing"], "mine:ddim_step", "eta_scales must be one of"),
        (["--ddim-eta-scales", "cps"], "mine:ddim_step", "got 'cps': the checks hold a sampler against equation 16"),
        (["--ddim-schedule", "nothing"], "mine:ddim_step", "name must be one of"),
        (["--ddim-check", "right"], None, "--ddim-check needs --ddim-subject: give both, or neither"),
        (["--ddim-full"], None, "--ddim-full needs --ddim-subject"),
        (["--ddim-seed", "-1"], "mine:ddim_step", "--ddim-seed must be an integer, at least 0, got -1"),
    ],
)
def test_what_cannot_run_is_a_usage_error(checks, pytest_in, arguments, subject, message):
    result = pytest_in(*arguments, subject=subject)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *{message}*"])


def test_missing_libraries_are_a_usage_error(pytest_in, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "scipy" else find_spec(name, *rest)
    )
    result = pytest_in()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(['ERROR: *needs scipy, not installed: pip install ".[[]verify[]]"*'])


# --- What it costs ----------------------------------------------------------------------------------------------------


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""} | more


def test_without_its_options_nothing_is_imported(tmp_path):
    """Of pytest runs in projects that have ddim_fast installed for something else."""
    (tmp_path / "test_own.py").write_text(
        "import sys\n\ndef test_own(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('pytest_ddim_fast')\n"
        "    assert not {'torch', 'numpy', 'ddim_fast'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "pytest_ddim_fast", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_processes_of_their_own(tmp_path):
    """pytest-xdist: each worker makes the subject and collects the same checks."""
    (tmp_path / "mine.py").write_text(SAMPLER)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "pytest_ddim_fast",
        "--ddim-subject",
        "mine:wrong",
    ]
    inapplicable = next(name for name, one in run.CHECKS.items() if "eta" in one.needs)
    chosen = ["--ddim-check", "update", "--ddim-check", inapplicable]
    done = subprocess.run(
        [*command, *chosen], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED ddim-fast::update - AssertionError: x_prev must be that of equation 12" in done.stdout
    assert "1 failed, 1 skipped" in done.stdout


def test_it_is_an_entry_point():
    """Loaded by itself wherever ddim_fast is installed, under the name that -p takes, so that it is
    not loaded twice."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\npytest_ddim_fast = "pytest_ddim_fast"' in project
    assert 'py_modules=["pytest_ddim_fast"]' in (ROOT / "setup.py").read_text()


# --- Fixtures ---------------------------------------------------------------------------------------------------------


def test_fixtures(pytest_in, pytester):
    pytester.makepyfile(
        test_own="""
        import torch

        from ddim_fast.testing import assert_close
        from ddim_fast.verify.truth.cases import Setting, StepCase

        def test_step(ddim_subject, ddim_oracle, ddim_seed):
            assert ddim_seed == 3
            x_t, eps = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(ddim_seed)).double()
            x_prev = ddim_subject.step(StepCase(Setting(alpha_bars=((0.25, 0.81),)), 0, x_t, eps)).x_prev
            exact, x0 = ddim_oracle.textbook_step("epsilon", x_t.numpy(), eps.numpy(), 0.25, 0.81)
            assert_close(x_prev, exact, terms=3 * abs(x_t) + 3 * abs(eps))

        def test_memory(nan_memory):
            assert torch.empty(3).isnan().all()

        def test_memory_is_put_back():
            assert not torch.are_deterministic_algorithms_enabled()
        """
    )
    result = pytest_in("--ddim-seed", "3", "-k", "test_own")
    result.assert_outcomes(passed=3)


def test_the_subject_is_asked_for(pytest_in, pytester):
    pytester.makepyfile(test_own="def test_own(ddim_subject): pass")
    result = pytest_in(subject=None)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["the fixture ddim_subject needs the option --ddim-subject"])


# --- assert_close -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arithmetic", ["exact", "float32"])
def test_as_far_as_is_allowed_and_no_further(dtype, arithmetic):
    exact = np.linspace(1.01, 1.99, 64).reshape(4, 16)
    eps = torch.finfo(dtype).eps
    testing.assert_close(torch.from_numpy(exact).to(dtype), exact, arithmetic=arithmetic)
    testing.assert_close(torch.from_numpy(exact), torch.from_numpy(exact))
    units = {torch.float64: 8, torch.float32: 4}.get(dtype, 0 if arithmetic == "exact" else 4)
    for factor in (1, 3):
        near, far = (
            torch.from_numpy(exact + off * eps).to(dtype) for off in (0.9 * units * factor, 2.2 * units * factor + 2)
        )
        testing.assert_close(near, exact, factor=factor, arithmetic=arithmetic)
        with pytest.raises(AssertionError, match="too far from float64"):
            testing.assert_close(far, exact, factor=factor, arithmetic=arithmetic)


def test_terms_allow_for_cancellation():
    x = torch.tensor([1000.0]) + torch.tensor([1e-3])
    got, exact = x - 1000.0, np.array([float(np.float32(1000.0)) + float(np.float32(1e-3)) - 1000.0])
    testing.assert_close(got, exact, terms=np.array([2000.0]))
    with pytest.raises(AssertionError):
        testing.assert_close(got, exact)


def test_the_message_has_place_value_truth_and_interval():
    actual = torch.ones(2, 3)
    actual[1, 2], actual[0, 1] = 1.5, 1.25
    with pytest.raises(AssertionError) as error:
        testing.assert_close(actual, np.ones((2, 3)), what="x_prev")
    low, high = 1 - 4 * 2**-23, 1 + 4 * 2**-23
    assert str(error.value) == (
        "x_prev: 2 of 6 elements too far from float64; worst at (1, 2): got 1.5, exact 1.0, "
        f"allowed {low!r} to {high!r}"
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_nothing_wrong_passes(wrong):
    for place in ((), (0,)):
        exact = np.ones((1,) * len(place))
        with pytest.raises(AssertionError, match="1 of 1 elements"):
            testing.assert_close(torch.full(exact.shape, wrong), exact)


def test_empty_tensors_are_right():
    testing.assert_close(torch.empty(0, 3), np.empty((0, 3)))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (AssertionError, r"result: the shape must be \(3,\), got \(3, 1\)", dict(actual=torch.ones(3, 1))),
        (TypeError, "expected must be float64, .* got torch.float32", dict(expected=torch.ones(3))),
        (TypeError, "expected must be float64, .* got list", dict(expected=[1.0, 1.0, 1.0])),
        (
            TypeError,
            "actual must be a tensor of float64, float32, float16, bfloat16, got float64",
            dict(actual=np.ones(3)),
        ),
        (TypeError, "actual must be a tensor .* got torch.int64", dict(actual=torch.ones(3, dtype=torch.int64))),
        (TypeError, "terms must be float64", dict(terms=np.ones(3, np.float32))),
        (ValueError, r"terms must have the shape of expected, \(3,\), got \(2,\)", dict(terms=np.ones(2))),
        (ValueError, "must be finite", dict(expected=np.array([1, 1, np.inf]))),
        (ValueError, "factor must be a finite number, above 0, got 0", dict(factor=0)),
        (ValueError, "arithmetic must be one of exact, float32, got 'loose'", dict(arithmetic="loose")),
    ],
)
def test_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        testing.assert_close(**dict(actual=torch.ones(3), expected=np.ones(3)) | arguments)


def test_nan_memory_puts_back_what_was_set():
    def fail_inside():
        with testing.nan_memory():
            assert torch.empty(3).isnan().all()
            raise ZeroDivisionError

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert testing.oracle is oracle
