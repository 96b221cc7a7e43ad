"""CUDA benchmarks: bandwidth by variant and size, overhead of replayed steps, full loops.

    python -m benchmarks.gpu --json out/gpu.json

``make gpu`` runs it. Every number is a median of interleaved rounds, and is written with its
machine, versions and commit. Results are compared before they are timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import ddim_fast as df
from ddim_fast.gpu_lab.machine_code import VARIANTS, Variant, inputs_of
from ddim_fast.kernels.triton_backend import run
from ddim_fast.sampling.capture import GraphCache

SIZES = (1 << 14, 1 << 20, 1 << 24, 1 << 26)  # elements: 1x4x64x64 ... 67 million
ROUNDS = 9


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds per call of each function, by CUDA events; functions take turns."""
    for function in functions.values():
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                function()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e-3 / repeats)
    return {name: statistics.median(times) for name, times in found.items()}


def step_of(variant: Variant, n: int) -> Callable[[], Any]:
    """Return one update of ``n`` elements as a function, launched as in the captured loop."""
    inputs = inputs_of(variant, "cuda", n // 4)
    return lambda: run(inputs)


def bandwidth() -> list[dict[str, Any]]:
    """Measure each variant's bytes per second, and its share of a copy's with as many elements."""
    results = []
    for n in SIZES:
        source = torch.randn(n, device="cuda")
        target = torch.empty_like(source)
        functions = {name: step_of(variant, n) for name, variant in VARIANTS.items()}
        functions["copy"] = lambda source=source, target=target: target.copy_(source)
        # Replay from a graph, to measure GPU time without the host's launches.
        graphs = {}
        for name, function in functions.items():
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    function()
            graphs[name] = graph.replay
        times = {name: t / 20 for name, t in seconds(graphs, max(1, (1 << 26) // n // 20)).items()}
        copied = 8 * n / times["copy"]
        for name, variant in VARIANTS.items():
            rate = variant.bytes * n / times[name]
            results.append(
                dict(
                    variant=name,
                    elements=n,
                    microseconds=times[name] * 1e6,
                    gb_per_s=rate / 1e9,
                    share_of_copy=rate / copied,
                )
            )
            click.echo(
                f"{name:34}{n:10} {times[name] * 1e6:9.2f} us {rate / 1e9:8.0f} GB/s {rate / copied:6.2f} of a copy"
            )
    return results


class Nothing(torch.nn.Module):
    """A model that returns a stored tensor, at no cost."""

    prediction_type = "epsilon"

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.output


def replays() -> dict[str, float]:
    """Measure the microseconds per step without the model, for each capture mode of the loop."""
    shape, steps = (1, 4, 64, 64), 50
    model = Nothing(torch.randn(shape, device="cuda"))
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), steps, 1.0, graphs=GraphCache())
    x_T = torch.randn(shape, device="cuda")
    functions = {
        mode: lambda mode=mode: sampler.sample(model, x_T=x_T, seed=0, capture=mode) for mode in ("off", "step", "loop")
    }
    results = [function() for function in functions.values()]
    if not all(torch.equal(result, results[0]) for result in results):
        raise RuntimeError("capture modes off, step and loop must give the same samples, and differ")
    times = seconds(functions, 5)
    found = {f"{name}_microseconds_a_step": t * 1e6 / steps for name, t in times.items()}
    click.echo(json.dumps(found))
    return found


def loops() -> dict[str, float]:
    """Measure the milliseconds of a full sampling loop of a diffusers U-Net.

    Contenders are ours, diffusers eager, and diffusers with torch.compile(mode="reduce-overhead").
    """
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=2,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=32)  # fmt: skip
    unet = unet.cuda().half().eval()
    x_T, steps = torch.randn(4, 3, 32, 32, device="cuda", dtype=torch.float16), 50
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="leading")

    def by_diffusers(network: Callable) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        x = x_T
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t.cuda()).sample.clone(), t, x, eta=0.0).prev_sample
        return x

    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), steps, graphs=GraphCache())
    compiled = torch.compile(unet, mode="reduce-overhead")
    functions = {
        "diffusers, eager": lambda: by_diffusers(unet),
        "diffusers, torch.compile reduce-overhead": lambda: by_diffusers(compiled),
        "ours, eager": lambda: sampler.sample(unet, x_T=x_T, seed=0, capture="off"),
        "ours, step": lambda: sampler.sample(unet, x_T=x_T, seed=0, capture="step"),
        "ours, loop": lambda: sampler.sample(unet, x_T=x_T, seed=0, capture="loop"),
    }
    reference = functions["diffusers, eager"]().float()
    for name, function in functions.items():
        # The samples of an untrained network grow large, and half precision rounds differently in
        # each contender: compare relative to their size.
        difference = ((function().float() - reference).abs().mean() / reference.abs().mean()).item()
        if difference > 0.02:
            raise RuntimeError(f"all contenders must give about the same samples, and {name} differs by {difference}")
    found = {name: t * 1e3 for name, t in seconds(functions, 1).items()}
    click.echo(json.dumps(found, indent=1))
    return found


def provenance() -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return dict(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton.__version__,
        ddim_fast=df.__version__,
        commit=commit,
    )


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
def main(path: Path | None) -> None:
    if not torch.cuda.is_available():
        click.echo("skipped: no CUDA device found", err=True)
        sys.exit(1 if os.environ.get("DDIM_FAST_REQUIRE_GPU") == "1" else 0)
    results = {"machine": provenance(), "bandwidth": bandwidth(), "replays": replays(), "loops_milliseconds": loops()}
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
