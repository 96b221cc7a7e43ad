"""pytest's plugin of ddim_fast: the checks of ``ddim-fast verify`` as tests, and fixtures for tests of your own.

pytest --ddim-subject diffusers:DDIMScheduler

It lies outside the package because pytest imports it in every run of every project where ddim_fast is installed: importing the
package would cost each of them torch. Nothing of ddim_fast is imported before an option or a fixture asks for it. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from ddim_fast.verify import CheckResult, Subject
    from ddim_fast.verify.checks import Check

COLLECTOR = "ddim-fast"
"""What the checks' node ids begin with: ``ddim-fast::update``."""

HOW = ("--ddim-check", "--ddim-require", "--ddim-full", "--ddim-eta-scales", "--ddim-arithmetic")
"""Options that mean nothing by themselves."""

MARKERS = {
    "ddim_slow": "a check of ddim_fast that only the full set has (--ddim-full)",
    "ddim_gpu": "a check of ddim_fast on a GPU (--ddim-device cuda)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddim_fast", "a DDIM sampler held against the paper (ddim_fast)")
    group.addoption(
        "--ddim-subject",
        metavar="SUBJECT",
        help="verify this sampler, one test for each check: module:attribute, or cpu, reference, triton",
    )
    group.addoption("--ddim-eta-scales", metavar="WHAT", help="what its eta multiplies: std_dev or variance")
    group.addoption("--ddim-arithmetic", metavar="CLAIM", help="how exact it claims to be: exact or float32")
    group.addoption("--ddim-full", action="store_true", help="all checks, thorough; the quick set otherwise")
    group.addoption("--ddim-seed", type=int, default=0, metavar="N", help="of all that is random in the checks")
    group.addoption("--ddim-device", default="cpu", metavar="DEVICE", help="where the tensors are: cpu, cuda")
    group.addoption("--ddim-check", action="append", metavar="NAME", help="only this check; may be given several times")
    group.addoption(
        "--ddim-require",
        action="append",
        default=[],
        metavar="NAME",
        help="a check that must run: it fails where it would be skipped; may be given several times",
    )


class Verification(NamedTuple):
    """What the options ask for."""

    subject: Subject
    checks: list[Check]
    full: bool
    seed: int
    device: str
    required: list[str]


_ASKED_FOR = pytest.StashKey[Verification]()


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("ddim_subject"):
        config.stash[_ASKED_FOR] = _asked_for(config)
    elif given := [name for name in HOW if config.getoption(name.removeprefix("--").replace("-", "_"))]:
        raise pytest.UsageError(f"{given[0]} says how to verify, and --ddim-subject what: give both, or neither")


def _asked_for(config: pytest.Config) -> Verification:
    if importlib.util.find_spec("scipy") is None:
        raise pytest.UsageError("ddim_fast: the checks need scipy, not installed here: pip install 'ddim-fast[verify]'")
    from ddim_fast.verify.run import choose_checks, prepared_subject

    full, device = config.getoption("ddim_full"), config.getoption("ddim_device")
    required, seed = config.getoption("ddim_require"), config.getoption("ddim_seed")
    try:
        _check_device(device)
        chosen = choose_checks(config.getoption("ddim_check"), full)
        if left_out := sorted(set(required) - {one.name for one in chosen}):
            choose_checks(left_out, full)
            raise ValueError(f"--ddim-require {left_out[0]}: these options leave that check out")
        held_to = config.getoption("ddim_eta_scales"), config.getoption("ddim_arithmetic")
        subject = prepared_subject(config.getoption("ddim_subject"), device, *held_to)
    except (ValueError, TypeError) as error:
        raise pytest.UsageError(f"ddim_fast: {error}") from error
    return Verification(subject, chosen, full, seed, device, required)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(f"--ddim-device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def pytest_report_header(config: pytest.Config) -> str | None:
    asked_for = config.stash.get(_ASKED_FOR, None)
    if asked_for is None:
        return None
    how = "full" if asked_for.full else "quick"
    return f"ddim_fast: {asked_for.subject.name} on {asked_for.device}, {how}, seed {asked_for.seed}"


# --- The checks as tests ----------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the checks to whatever was collected, before -k, -m and --deselect choose among all of it."""
    asked_for = config.stash.get(_ASKED_FOR, None)
    if asked_for is not None:
        collector = Verified.from_parent(session, name=COLLECTOR, nodeid=COLLECTOR)
        items += [CheckItem.of(collector, one, asked_for) for one in asked_for.checks]


class Verified(pytest.Collector):
    """The checks' parent: it stands for no file."""

    def collect(self) -> list[pytest.Item]:
        return []


class CheckItem(pytest.Item):
    """One check as a test."""

    check: Check
    asked_for: Verification

    @classmethod
    def of(cls, parent: Verified, check: Check, asked_for: Verification) -> CheckItem:
        item = cls.from_parent(parent, name=check.name)
        item.check, item.asked_for = check, asked_for
        if check.full_only:
            item.add_marker("ddim_slow")
        if not asked_for.device.startswith("cpu"):
            item.add_marker("ddim_gpu")
        return item

    def runtest(self) -> None:
        import torch

        from ddim_fast.verify import Outcome
        from ddim_fast.verify.run import run_check

        asked_for = self.asked_for
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # this project's filters are for its tests: no warning is a wrong result
            result = run_check(
                self.check, asked_for.subject, asked_for.full, asked_for.seed, torch.device(asked_for.device)
            )
        self.user_properties += _measured(result)
        if result.outcome in (Outcome.NOT_APPLICABLE, Outcome.SKIPPED):
            if self.name in asked_for.required:
                raise AssertionError(f"{self.name} is required, and did not run: {result.message}")
            pytest.skip(result.message)
        if result.outcome is not Outcome.PASSED:
            raise AssertionError(_explained(result))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A check's own words. Where something else went wrong, the traceback."""
        return (
            excinfo.getrepr(style="value") if excinfo.errisinstance(AssertionError) else super().repr_failure(excinfo)
        )

    def reportinfo(self) -> tuple[str, None, str]:
        return (COLLECTOR, None, self.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A skipped check is named, where pytest would name the line in this file."""
    report = yield
    if isinstance(item, CheckItem) and report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = (str(item.config.rootpath / item.nodeid), None, report.longrepr[2])
    return report


def _measured(result: CheckResult) -> list[tuple[str, object]]:
    """For reports as XML."""
    worst = [] if math.isnan(result.worst) else [("worst_share_of_allowed", f"{result.worst:.6g}")]
    return [("proves", result.proves), ("source", result.source), ("cases", result.cases), *worst]


def _explained(result: CheckResult) -> str:
    lines = [result.message, "", f"What {result.name} proves: {result.proves}", f"Source: {result.source}"]
    if result.code:
        lines += ["", "This fails for as long as the sampler is wrong:", "", result.code]
    return "\n".join(lines)


# --- Fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ddim_subject(request: pytest.FixtureRequest) -> Subject:
    """The sampler of --ddim-subject, as a ``ddim_fast.verify.Subject``."""
    asked_for = request.config.stash.get(_ASKED_FOR, None)
    if asked_for is None:
        pytest.fail("the fixture ddim_subject is the sampler of --ddim-subject: give that option", pytrace=False)
    return asked_for.subject


@pytest.fixture(scope="session")
def ddim_seed(request: pytest.FixtureRequest) -> int:
    """The number of --ddim-seed."""
    return request.config.getoption("ddim_seed")


@pytest.fixture(scope="session")
def ddim_oracle() -> ModuleType:
    """The DDIM step in float64 NumPy, from the papers alone: the module ``ddim_fast.verify.truth.oracle``."""
    from ddim_fast.verify.truth import oracle

    return oracle


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """New tensors are full of NaN until they are written, so that an output nobody wrote cannot pass."""
    from ddim_fast.testing import nan_memory

    with nan_memory():
        yield
