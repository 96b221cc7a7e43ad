"""Count what dynamic thresholds cost on a GPU that is not there: instructions and bytes of the
kernels of ``kernels/triton_thresholds.py``, executed by the emulator on a few blocks, and from them
a prediction for pictures of any size.

    python tools/count_thresholds.py --target sm_90

Counts grow with the blocks that a program reads, in a straight line, so two sizes are executed. The
prediction is that of ``ddim_fast.gpu_lab.machine_code``: the longer of the time to issue the
instructions of the busiest multiprocessor and the time to move the bytes. Latency is not in it, and
launches are only counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import click
import torch

from ddim_fast.gpu_lab.emulated_gpu import TARGETS, emulated_gpu
from ddim_fast.gpu_lab.machine_code import DEVICES
from ddim_fast.kernels import triton_backend, triton_thresholds
from ddim_fast.kernels.contract import StepCoefficients, StepInputs

SHAPES = ((1, 4 * 64 * 64), (1, 3 * 256 * 256), (1, 3 * 1024 * 1024), (16, 3 * 256 * 256), (4, 3 * 1024 * 1024))
BLOCK = 4096
ROW = StepCoefficients(1.5, -0.5, 0, 1, 0, 0.75, 0.5, 0, clip=1.0)


def executed(target: str, programs: int, blocks: int) -> list[tuple[int, int]]:
    """Return the thread instructions and bytes of each launch for one sample of so many programs,
    which read so many blocks each."""
    torch.manual_seed(0)
    x, m = torch.randn(2, 1, programs * blocks * BLOCK)
    before = triton_thresholds.MOST_PROGRAMS
    triton_thresholds.MOST_PROGRAMS = programs
    try:
        with emulated_gpu(target) as gpu:
            triton_backend.dynamic_thresholds(StepInputs(x, m, ROW), 0.995, 100.0)
    finally:
        triton_thresholds.MOST_PROGRAMS = before
    runs = [launch.execution for launch in gpu.launches]
    return [(run.thread_instructions.total(), run.bytes_read + run.bytes_written) for run in runs if run is not None]


def rows(target: str) -> Iterator[dict[str, str]]:
    """Yield what each shape costs with one program a sample, and with as many as are launched."""
    device = DEVICES[target]
    counts = {p: [executed(target, p, b) for b in (1, 2)] for p in (1, 2)}

    def seconds(samples: int, programs: int, blocks: int) -> tuple[float, int]:
        one, two = counts[min(programs, 2)]
        total = 0.0
        for (i1, b1), (i2, b2) in zip(one, two, strict=True):
            ran = min(programs, 2)
            instructions = (i1 + (i2 - i1) * (blocks - 1)) / ran  # of a program
            moved = (b1 + (b2 - b1) * (blocks - 1)) / ran * programs * samples
            issued = instructions * ceil(samples * programs / device.processors)
            total += max(issued / (device.lanes * device.clock), moved / device.bandwidth)
        return total, len(one)

    for samples, n in SHAPES:
        programs, blocks = triton_thresholds.programs(samples, n)
        (single, _), (several, launches) = seconds(samples, 1, ceil(n / BLOCK)), seconds(samples, programs, blocks)
        yield {
            "samples x elements": f"{samples} x {n}",
            "one program, us": f"{single * 1e6:.0f}",
            "programs": str(programs),
            "us": f"{several * 1e6:.1f}",
            "launches": str(launches),
        }


@click.command(help=__doc__.split("\n\n")[0].replace("``", ""))  # type: ignore[union-attr]
@click.option("--target", type=click.Choice(sorted(set(TARGETS) & set(DEVICES))), default="sm_90", show_default=True)
def main(target: str) -> None:
    click.echo(f"{target} ({DEVICES[target].name}): predicted, not measured")
    for number, row in enumerate(rows(target)):
        if not number:
            click.echo("".join(f"{name:>22}" for name in row))
        click.echo("".join(f"{value:>22}" for value in row.values()))


if __name__ == "__main__":
    main()
