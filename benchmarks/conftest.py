"""Pytest options, machine facts for the JSON file, and the tables at the end.

Run: ``pytest benchmarks --benchmark-json=out.json``.
``--quick`` runs a few cases; ``--threads N`` runs torch and the kernels on N threads.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import LONG, Comparison, compare

from ddim_fast import __version__
from ddim_fast.kernels import cpu_step

ROWS = pytest.StashKey[dict]()
LOAD_BEFORE = pytest.StashKey[tuple]()
VERSIONS = ("torch", "diffusers", "numpy")
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "DDIM_FAST_INSTRUCTION_SET")
"""Environment variables that keep torch, its libraries and our kernels from newer instructions."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddim_fast")
    group.addoption("--threads", type=int, default=1, help="threads of torch and the kernels (default 1)")
    group.addoption("--quick", action="store_true", help="run a part of the cases, each briefly, in a few minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.stash[LOAD_BEFORE] = os.getloadavg()
    torch.set_num_threads(config.getoption("--threads"))
    torch._inductor.config.compile_threads = 1  # no compiler processes that would disturb timing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@dataclass(frozen=True)
class Settings:
    """The duration of measurements and their number of threads."""

    threads: int
    quick: bool

    @property
    def timing(self) -> dict[str, float]:
        """Arguments of ``interleaved.compare`` for one comparison."""
        return {"threads": self.threads, "time_limit": 1.0 if self.quick else 2.5, "min_rounds": 10}


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(request.config.getoption("--threads"), request.config.getoption("--quick"))


@pytest.fixture
def measure(settings: Settings, benchmark):
    """Return ``measure(group, contenders, check, baseline=..., ...)``.

    It compares contenders, and stores the result for the JSON file. ``pairs`` are the ratios that
    are quoted and compared between runs: (another contender, one of ours), the seconds of the first
    over those of the second. None: each contender whose name does not begin with "ours", over the
    baseline. Other options are those of ``interleaved.compare``; they default to
    ``settings.timing``.
    """

    def run(
        group: str,
        contenders: Mapping[str, Callable[[], Any]],
        check: Callable[[str, Any], None],
        *,
        baseline: str,
        pairs: Sequence[tuple[str, str]] | None = None,
        **options: Any,
    ) -> Comparison:
        options = {**settings.timing, **options}
        busy_before, started = _busy_seconds_of_others(), time.perf_counter()
        result = compare(contenders, check, baseline=baseline, **options)
        others = max(0.0, _busy_seconds_of_others() - busy_before) / (time.perf_counter() - started)
        if pairs is None:
            pairs = [(name, baseline) for name in contenders if not name.startswith("ours")]
        benchmark.group = group
        benchmark.extra_info.update(
            result.summary(), ratios=_ratios(result, pairs), threads=options["threads"], processors_of_others=others
        )
        with torch.inference_mode():  # again for pytest-benchmark, which omits what it has not timed
            short = result.seconds(baseline) < LONG
            benchmark.pedantic(contenders[baseline], rounds=10 if short else 1, iterations=result.calls[baseline])
        return result

    return run


def _ratios(result: Comparison, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    return {
        f"{other} / {ours}": {"ratio": result.ratio(other, to=ours), "spread": result.ratio_spread(other, to=ours)}
        for other, ours in pairs
    }


def _busy_seconds_of_others() -> float:
    """Return the CPU seconds that other processes and virtual machines have used since boot."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - (own.user + own.system + own.children_user + own.children_system)


@pytest.fixture
def show(request: pytest.FixtureRequest):
    """Return ``show(section, column=text, ...)``, which adds a row to the table at the end."""

    def add(section: str, **cells: str) -> None:
        request.config.stash[ROWS].setdefault(section, []).append(cells)

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    for section, rows in terminalreporter.config.stash[ROWS].items():
        terminalreporter.section(section)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add the facts that the numbers depend on."""
    machine_info["ddim_fast"] = {
        "version": __version__,
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in VERSIONS},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": cpu_step.extension.selected() if cpu_step.extension is not None else None,
        "limited_by": {name: os.environ[name] for name in LIMITS if os.environ.get(name)},
        "threads": config.getoption("--threads"),
        "quick": config.getoption("--quick"),
        "load_average_before": config.stash[LOAD_BEFORE],
        "load_average_after": os.getloadavg(),
    }
