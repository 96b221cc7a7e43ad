"""Sections about the kernels alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ddim_fast as df
from ddim_fast.gpu_lab.machine_code import VARIANTS, Variant, inputs_of
from ddim_fast.kernels import triton_backend
from ddim_fast.kernels.dispatch import ddim_step, normals

from .machine import Machine
from .results import Row

ROOT = Path(__file__).resolve().parents[2]
CALLS = 20
"""Calls in a replayed graph."""


def correctness(machine: Machine) -> list[Row]:
    """Run the tests that need a CUDA device: bits, captures, memory."""
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    # No warning of another version of torch may end a test.
    command = [sys.executable, "-m", "pytest", *options, "-W", "default", str(ROOT / "tests" / "test_gpu.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", run.stdout)}
    if run.returncode != 0 or not (counts.get("passed") or machine.device == "cpu"):
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-6000:]}\n{run.stderr[-2000:]}")
    return [counts]


def bandwidth(machine: Machine) -> list[Row]:
    """Measure each variant's bytes per second, and its share of a copy of as many elements."""
    rows: list[Row] = []
    for n in machine.elements:
        source = torch.randn(n, device=machine.device)
        target = torch.empty_like(source)
        with machine.launches():
            functions = {name: _step(machine, variant, n) for name, variant in VARIANTS.items()}
            functions["copy"] = lambda source=source, target=target: target.copy_(source)
            graphs = {name: machine.replay(function, CALLS) for name, function in functions.items()}
            seconds = machine.seconds(graphs, max(1, (1 << 26) // n // CALLS))
        times = {name: t / CALLS for name, t in seconds.items()}
        copied = 8 * n / times["copy"]
        for name, variant in VARIANTS.items():
            rate = variant.bytes * n / times[name]
            rows.append(
                {
                    "variant": name,
                    "elements": n,
                    "microseconds": times[name] * 1e6,
                    "GB/s": rate / 1e9,
                    "share of a copy": rate / copied,
                }
            )
    return rows


def _step(machine: Machine, variant: Variant, n: int) -> Callable[[], Any]:
    """Return one update of ``n`` elements, launched as in the captured loop."""
    inputs = inputs_of(variant, machine.device, n // 4)
    return lambda: triton_backend.run(inputs)


def noise(machine: Machine) -> list[Row]:
    """Time a sample's noise by the noise standard, against torch's."""
    rows: list[Row] = []
    for n in machine.elements:
        seeds = torch.arange(4, device=machine.device)
        x = torch.empty(4, n // 4, device=machine.device)
        functions = {
            "noise standard": lambda seeds=seeds, n=n: normals(seeds, (n // 4,), 0, 0),
            "torch.randn": lambda x=x: torch.randn_like(x),
        }
        times = machine.seconds(functions, 20)
        rows.append({"elements": n, **{f"{name}, us": t * 1e6 for name, t in times.items()}})
    return rows


def thresholds(machine: Machine) -> list[Row]:
    """Time the exact quantile of dynamic thresholding, in several launches for large samples."""
    shapes = [(1, 3, 8, 8)] if machine.device == "cpu" else [(1, 3, 64, 64), (1, 3, 256, 256), (4, 3, 1024, 1024)]
    row = df.DDIMSampler(df.NoiseSchedule.linear(), 10, clip_sample=True).plan().steps[5].coefficients
    rows: list[Row] = []
    for shape in shapes:
        x, m = (torch.randn(shape, device=machine.device) for _ in range(2))
        functions = {
            "ours": lambda x=x, m=m: df.kernels.thresholding.dynamic_thresholds(x, m, row, 0.995, 1.0),
            "torch.quantile by sort": lambda x=x: x.flatten(1).abs().sort(dim=1).values,
        }
        times = machine.seconds(functions, 5)
        rows.append({"shape": str(shape), **{f"{name}, us": t * 1e6 for name, t in times.items()}})
    return rows


def launches(machine: Machine) -> list[Row]:
    """Time the host's part of a step that is not captured, as the drop-ins take it."""
    plan = df.DDIMSampler(df.NoiseSchedule.linear(), 10).plan()
    x, m = (torch.randn(1, 4, 64, 64, device=machine.device) for _ in range(2))
    table, index = plan.table(machine.device), torch.zeros(1, dtype=torch.int64, device=machine.device)
    out = torch.empty_like(x)
    functions = {
        "x.add_(m)": lambda: x.add_(m),
        "ddim_step": lambda: ddim_step(x, m, plan.steps[5].coefficients, out=out),
        "ddim_step_from_table": lambda: df.ddim_step_from_table(x, m, table, index, out=out),
    }
    times = machine.host_seconds(functions, 100)
    return [{"call": name, "host, us": t * 1e6, "times x.add_(m)": t / times["x.add_(m)"]} for name, t in times.items()]


def counters(machine: Machine) -> list[Row]:
    """Read the hardware's counters of the step, where Nsight Compute is there."""
    if shutil.which("ncu") is None or machine.device == "cpu":
        return [{"ncu": "not found"}]
    script = (
        "import torch; from ddim_fast.gpu_lab.machine_code import VARIANTS, inputs_of; "
        "from ddim_fast.kernels.triton_backend import run; "
        "[run(inputs_of(VARIANTS[name], 'cuda', 1 << 22)) for name in "
        "('folded, bfloat16', 'exact noise, bfloat16', 'fast noise, bfloat16', 'guidance, bfloat16')]; "
        "torch.cuda.synchronize()"
    )
    metrics = (
        "dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
        "smsp__inst_executed.sum,gpu__time_duration.sum,launch__registers_per_thread"
    )
    run = subprocess.run(
        [*["ncu", "--csv", "--clock-control", "none", "-k", "regex:ddim_step", "--metrics"], metrics, sys.executable, "-c", script],
        capture_output=True,
        text=True,
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.startswith('"')]
    if run.returncode != 0 or not lines:
        raise RuntimeError(f"ncu ended with {run.returncode}: {run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    names, *rows = ([field.strip('"') for field in re.findall(r'"[^"]*"', line)] for line in lines)
    wanted = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")
    return [{name: value for name, value in zip(names, row, strict=True) if name in wanted} for row in rows]
