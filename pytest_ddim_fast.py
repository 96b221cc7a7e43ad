"""The pytest plugin of ddim_fast: the checks of ``ddim-fast verify`` as tests, and fixtures for
tests of your own.

pytest --ddim-subject diffusers:DDIMScheduler

It is outside the package because pytest imports it in every run wherever ddim_fast is installed. It
imports nothing of ddim_fast before an option or a fixture needs it. PYTEST_DONT_REWRITE
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
"""The beginning of the checks' node ids: ``ddim-fast::update``."""

CONVENTIONS = ("eta-scales", "arithmetic", "schedule", "prediction-type")
HOW = ("--ddim-check", "--ddim-require", "--ddim-full", *(f"--ddim-{name}" for name in CONVENTIONS))
"""Options that need --ddim-subject."""

MARKERS = {
    "ddim_slow": "a check of ddim_fast that only the full set has (--ddim-full)",
    "ddim_gpu": "a check of ddim_fast on a GPU (--ddim-device cuda)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddim_fast", "verify a DDIM sampler against the paper (ddim_fast)")
    group.addoption(
        "--ddim-subject",
        metavar="SUBJECT",
        help="verify this sampler, one test for each check: module:attribute, or cpu, reference, triton",
    )
    group.addoption("--ddim-eta-scales", metavar="WHAT", help="what its eta multiplies: std_dev or variance")
    group.addoption("--ddim-arithmetic", metavar="CLAIM", help="how exact it must be: exact or float32")
    group.addoption(
        "--ddim-schedule", metavar="NAME", help='the noise path it is verified on: "flow?shift=3", edm, ...'
    )
    group.addoption("--ddim-prediction-type", metavar="TYPE", help="what models predict there")
    group.addoption("--ddim-full", action="store_true", help="run the full set of checks instead of the quick one")
    group.addoption(
        "--ddim-seed", type=int, default=0, metavar="N", help="the seed of all random numbers in the checks"
    )
    group.addoption("--ddim-device", default="cpu", metavar="DEVICE", help="the device of the tensors: cpu, cuda")
    group.addoption("--ddim-check", action="append", metavar="NAME", help="run only this check; may be repeated")
    group.addoption(
        "--ddim-require",
        action="append",
        default=[],
        metavar="NAME",
        help="fail if this check would be skipped; may be repeated",
    )


class Verification(NamedTuple):
    """The verification that the options ask for."""

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
        raise pytest.UsageError(f"{given[0]} needs --ddim-subject: give both, or neither")


def _asked_for(config: pytest.Config) -> Verification:
    if importlib.util.find_spec("scipy") is None:
        from ddim_fast.utils.extras import missing

        raise pytest.UsageError(missing("ddim_fast: --ddim-subject", ["scipy"], "verify"))
    from ddim_fast.utils.checks import check_integer
    from ddim_fast.verify.run import choose_checks, prepared_subject

    full, device = config.getoption("ddim_full"), config.getoption("ddim_device")
    required, seed = config.getoption("ddim_require"), config.getoption("ddim_seed")
    try:
        check_integer("--ddim-seed", seed, at_least=0)
        _check_device(device)
        chosen = choose_checks(config.getoption("ddim_check"), full)
        if left_out := sorted(set(required) - {one.name for one in chosen}):
            choose_checks(left_out, full)
            raise ValueError(f"--ddim-require {left_out[0]}: the other options leave that check out")
        conventions = (config.getoption(f"ddim_{name.replace('-', '_')}") for name in CONVENTIONS)
        subject = prepared_subject(config.getoption("ddim_subject"), device, *conventions)
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
    """Add the checks to the collected tests, before -k, -m and --deselect select from them."""
    asked_for = config.stash.get(_ASKED_FOR, None)
    if asked_for is not None:
        collector = Verified.from_parent(session, name=COLLECTOR, nodeid=COLLECTOR)
        items += [CheckItem.of(collector, one, asked_for) for one in asked_for.checks]


class Verified(pytest.Collector):
    """The parent of the checks; it belongs to no file."""

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
            warnings.simplefilter("default")  # filters that turn warnings into errors are for the project's own tests
            result = run_check(
                self.check, asked_for.subject, asked_for.full, asked_for.seed, torch.device(asked_for.device)
            )
        self.user_properties += _measured(result)
        if result.outcome in (Outcome.NOT_APPLICABLE, Outcome.SKIPPED):
            if self.name in asked_for.required:
                raise AssertionError(f"{self.name} is required and did not run: {result.message}")
            pytest.skip(result.message)
        if result.outcome is not Outcome.PASSED:
            raise AssertionError(_explained(result))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the check's message, or the traceback of any other error."""
        return (
            excinfo.getrepr(style="value") if excinfo.errisinstance(AssertionError) else super().repr_failure(excinfo)
        )

    def reportinfo(self) -> tuple[str, None, str]:
        return (COLLECTOR, None, self.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Name a skipped check by its node id, where pytest would name a line of this file."""
    report = yield
    if isinstance(item, CheckItem) and report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = (str(item.config.rootpath / item.nodeid), None, report.longrepr[2])
    return report


def _measured(result: CheckResult) -> list[tuple[str, object]]:
    """Return the properties of a result for XML reports."""
    worst = [] if math.isnan(result.worst) else [("worst_share_of_allowed", f"{result.worst:.6g}")]
    return [("proves", result.proves), ("source", result.source), ("cases", result.cases), *worst]


def _explained(result: CheckResult) -> str:
    lines = [result.message, "", f"What {result.name} proves: {result.proves}", f"Source: {result.source}"]
    if result.code:
        lines += ["", "This code fails while the sampler is wrong:", "", result.code]
    return "\n".join(lines)


# --- Fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ddim_subject(request: pytest.FixtureRequest) -> Subject:
    """The sampler of --ddim-subject, as a ``ddim_fast.verify.Subject``."""
    asked_for = request.config.stash.get(_ASKED_FOR, None)
    if asked_for is None:
        pytest.fail("the fixture ddim_subject needs the option --ddim-subject", pytrace=False)
    return asked_for.subject


@pytest.fixture(scope="session")
def ddim_seed(request: pytest.FixtureRequest) -> int:
    """The seed of --ddim-seed."""
    return request.config.getoption("ddim_seed")


@pytest.fixture(scope="session")
def ddim_oracle() -> ModuleType:
    """The DDIM step in float64 NumPy, written from the papers alone: the module
    ``ddim_fast.verify.truth.oracle``."""
    from ddim_fast.verify.truth import oracle

    return oracle


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that is never written cannot pass."""
    from ddim_fast.testing import nan_memory

    with nan_memory():
        yield
