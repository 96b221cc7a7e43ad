"""Measure ddim-fast generate: scaling over processes, cost of writing, and peak memory.

    python tools/generation_speed.py scaling        # single-threaded processes on the shipped model
    python tools/generation_speed.py writing        # CPU time with and without files
    python tools/generation_speed.py memory         # peak memory for 1,000 and for 100,000 samples
    python tools/generation_speed.py bandwidth      # encoders, SHA-256, the store

Wall-clock numbers need a quiet machine. CPU time is less sensitive to other load, so it is also
printed.
"""

import hashlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch
import torch.distributed as dist
from torch import nn

import ddim_fast as df
from ddim_fast.generation import EveryClass, generate
from ddim_fast.generation.batches import Samples
from ddim_fast.generation.directory import Slices
from ddim_fast.generation.formats import FORMATS, Shard


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    torch.set_num_threads(1)


@main.command()
@click.option("-n", "--count", default=512, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds of one process, then many.")
def scaling(count: int, steps: int, processes: int, rounds: int) -> None:
    """Measure the throughput of many processes over that of one.

    Both draw the same samples into files of 64.
    """
    ratios, processor_ratios = [], []
    for i in range(rounds):
        one, one_processor = _run(1, count, steps)
        many, many_processor = _run(processes, count, steps)
        ratios.append(many / one)
        processor_ratios.append(processes * one_processor / many_processor)
        click.echo(f"round {i}: {one:.2f} and {many:.2f} samples/s, {many / one:.2f} times")
    click.echo(f"{processes} processes: {median(ratios):.2f} times the throughput of one (median of {rounds} rounds)")
    click.echo(f"by CPU time, as if each had its own core: {median(processor_ratios):.2f} times")


def _run(processes: int, count: int, steps: int) -> tuple[float, float]:
    """Return samples per second, and the CPU seconds of the samples (without start-up)."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--steps", steps, "--shard-size", 64, "--out", f"{folder}/set"]
        words = [sys.executable, "-m"]
        if processes > 1:
            words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        words += ["ddim_fast", "generate", *options]

        def processor_seconds(samples: int) -> tuple[float, str]:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            said = subprocess.run(
                [*map(str, words), "-n", str(samples)], env=environment, check=True, capture_output=True, text=True
            ).stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, said

        # A run of 16 samples measures the cost of start-up.
        starting, _ = processor_seconds(16)
        for path in Path(folder).glob("set/*"):
            path.unlink()
        whole, said = processor_seconds(count)
    return float(re.search(r"\(([\d.]+) samples/s\)", said)[1]), whole - starting


@main.command()
@click.option("-n", "--count", default=128, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def writing(count: int, steps: int, rounds: int) -> None:
    """Measure the CPU time of writing files, relative to drawing samples of the shipped model."""
    model, sampler, rule = df.load_model("fashion"), df.DDIMSampler(df.NoiseSchedule.linear(), steps), EveryClass(10)
    bare = Samples(sampler, model, model.sample_shape, 0, 16, 64, rule, torch.device("cpu"), torch.float32, {})
    for format in FORMATS:
        more, share = [], []
        for i in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                done = generate(model, sampler, count, f"{folder}/set", conditioning=rule, format=format, shard_size=64)
                whole = time.process_time() - started
            started = time.process_time()
            for part in Slices(count, 64):
                bare(part)
            alone = time.process_time() - started
            if i or rounds == 1:
                more.append(whole / alone - 1)
                share.append(done.writing_seconds / whole)
        click.echo(f"{format}: {median(more):+.2%} CPU time in total, the writer thread {median(share):.3%}")


class Tiny(nn.Module):
    """A model so small that 100,000 samples take seconds."""

    sample_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


@main.command()
@click.option("--counts", multiple=True, type=int, default=(1000, 100_000), show_default=True)
@click.option("--format", type=click.Choice(list(FORMATS)), default="safetensors", show_default=True)
@click.option("--only", type=int, hidden=True)
def memory(counts: tuple[int, ...], format: str, only: int | None) -> None:
    """Measure the peak memory of a process."""
    if only is None:
        for count in counts:
            words = [sys.executable, __file__, "memory", "--only", str(count), "--format", format]
            subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), 3)
    with tempfile.TemporaryDirectory() as folder:
        done = generate(Tiny().eval(), sampler, only, f"{folder}/set", format=format, batch_size=256)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    click.echo(f"{only} samples: {peak:.1f} MiB at most, {done.seconds:.1f} s")


@main.command()
def bandwidth() -> None:
    """Measure encoders and SHA-256 on one core, and the store's round trip.

    Encoders are timed on noise (which PNG cannot compress) and on smooth images.
    """
    for size in (64, 256):
        smooth = torch.linspace(-1, 1, size).view(1, 1, 1, -1).expand(32, 3, size, size).contiguous()
        for what, samples in {"smooth": smooth, "noise": torch.rand(32, 3, size, size) * 2 - 1}.items():
            for name, format in FORMATS.items():
                seconds = _seconds(
                    lambda samples=samples, format=format: format.encode(Shard(0, samples)), time.process_time
                )
                bytes_each = len(format.encode(Shard(0, samples))) / 32
                click.echo(
                    f"{name}, 3 x {size} x {size}, {what}: {32 / seconds:.0f} samples/s, {bytes_each / 1e3:.1f} kB each, "
                    f"{bytes_each * 32 / seconds / 1e6:.0f} MB/s"
                )
    content = os.urandom(1 << 26)
    click.echo(
        f"SHA-256: {len(content) / _seconds(lambda: hashlib.sha256(content).digest(), time.process_time) / 1e6:.0f} MB/s"
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    click.echo(
        f"store, one round trip on this machine: {_seconds(lambda: store.add('n', 1), time.perf_counter) * 1e6:.0f} us"
    )


def _seconds(call, clock) -> float:
    """Return the minimum time of a call over one second of repeats."""
    best, end = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < end:
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


if __name__ == "__main__":
    main()
