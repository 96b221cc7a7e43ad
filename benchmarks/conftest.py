"""Options, machine facts for the JSON, and the tables at the end.

Run: ``pytest benchmarks --benchmark-json out.json``.
``--quick`` runs a few cases, ``--threads N`` gives torch and the kernels N threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ddim_fast import __version__
from ddim_fast.kernels import cpu_step

ROWS = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddim_fast")
    group.addoption("--threads", type=int, default=1, help="threads of torch and of the kernels (default 1)")
    group.addoption("--quick", action="store_true", help="a few cases, less than a minute")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    torch.set_num_threads(config.getoption("--threads"))
    torch._inductor.config.compile_threads = 1  # no pool of compiler processes beside what is timed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@dataclass(frozen=True)
class Settings:
    """How long to measure, and on how many threads."""

    threads: int
    quick: bool

    @property
    def timing(self) -> dict[str, float]:
        """Arguments of ``interleaved.compare`` for one comparison."""
        return {"threads": self.threads, "time_limit": 1.0 if self.quick else 8.0, "min_rounds": 10}


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(request.config.getoption("--threads"), request.config.getoption("--quick"))


@pytest.fixture
def show(request: pytest.FixtureRequest):
    """``show(section, column=text, ...)``: a row of the table at the end."""

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
    """What the numbers depend on."""
    machine_info["ddim_fast"] = {
        "version": __version__,
        "cpu_model": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": cpu_step.extension.selected() if cpu_step.extension is not None else None,
        "threads": config.getoption("--threads"),
        "load_average": os.getloadavg(),
    }
