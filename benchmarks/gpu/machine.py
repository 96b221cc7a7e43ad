"""Where the sections run: on a CUDA device, or rehearsed on the CPU."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import ddim_fast as df
from ddim_fast.sampling.capture import GraphCache


class Machine:
    """A CUDA device."""

    device = "cuda"
    elements: tuple[int, ...] = (1 << 14, 1 << 20, 1 << 24, 1 << 26)
    """Sizes to measure a kernel at: 1x4x64x64 ... 67 million."""
    networks: tuple[dict[str, int], ...] = ({"width": 32}, {"width": 96}, {"width": 256})
    """Arguments of ``SmallUNet``: the smallest is the model that ships."""
    image = (1, 28, 28)
    steps = 50
    rounds = 9

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Return the median seconds of a call, by CUDA events. The functions take turns."""
        self._warm_up(functions)
        found: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.rounds):
            for name, function in functions.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                for _ in range(repeats):
                    function()
                end.record()
                end.synchronize()
                found[name].append(begin.elapsed_time(end) * 1e-3 / repeats)
        return {name: statistics.median(times) for name, times in found.items()}

    def host_seconds(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        """Return the median seconds until a call returns, whatever the device still does."""
        self._warm_up(functions)
        found: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.rounds):
            for name, function in functions.items():
                self.synchronize()
                started = time.perf_counter()
                for _ in range(repeats):
                    function()
                found[name].append((time.perf_counter() - started) / repeats)
        return {name: statistics.median(times) for name, times in found.items()}

    def _warm_up(self, functions: Mapping[str, Callable[[], Any]]) -> None:
        for function in functions.values():
            for _ in range(3):
                function()
        self.synchronize()

    def replay(self, function: Callable[[], Any], calls: int) -> Callable[[], Any]:
        """Return the replay of a graph of so many calls: the device's time without the launches."""
        function()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return graph.replay

    def launches(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which Triton kernels run."""
        return contextlib.nullcontext()

    def graphs(self) -> GraphCache:
        return GraphCache()

    def compiled(self, model: torch.nn.Module) -> Callable[..., Any]:
        return torch.compile(model, mode="reduce-overhead")

    def memory(self) -> int:
        """Return the bytes that torch's allocator holds on the device."""
        return torch.cuda.memory_reserved()

    @contextlib.contextmanager
    def on_a_stream(self) -> Iterator[None]:
        with torch.cuda.stream(torch.cuda.Stream()):
            yield

    def provenance(self) -> dict[str, Any]:
        """Say what the numbers depend on."""
        import triton

        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        } | _versions()


class Rehearsal(Machine):
    """The CPU in place of a device: the same sections, small, with stand-ins for what is CUDA's.

    Triton's PTX is executed by the emulator, and graphs are recorded and replayed by the stand-in.
    The numbers mean nothing.
    """

    device = "cpu"
    elements = (1 << 9,)
    networks = ({"width": 16, "blocks": 1, "embedding_dim": 16},)
    image = (1, 8, 8)
    steps = 2
    rounds = 1

    def synchronize(self) -> None:
        pass

    def seconds(self, functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
        return self.host_seconds(functions, 1)

    def _warm_up(self, functions: Mapping[str, Callable[[], Any]]) -> None:
        for function in functions.values():
            function()

    def replay(self, function: Callable[[], Any], calls: int) -> Callable[[], Any]:
        return function

    def launches(self) -> contextlib.AbstractContextManager[Any]:
        from ddim_fast.gpu_lab.emulated_gpu import emulated_gpu

        return emulated_gpu("sm_90")

    def graphs(self) -> GraphCache:
        from ddim_fast.gpu_lab.replay import RecordedGraphs

        return GraphCache(backend=lambda device: RecordedGraphs(), device_types=("cpu",))

    def compiled(self, model: torch.nn.Module) -> Callable[..., Any]:
        return torch.compile(model, backend="eager")

    def memory(self) -> int:
        return 0

    @contextlib.contextmanager
    def on_a_stream(self) -> Iterator[None]:
        yield

    def provenance(self) -> dict[str, Any]:
        return {"device": "rehearsed on a CPU: no number means anything"} | _versions()


def _versions() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"torch": torch.__version__, "ddim_fast": df.__version__, "commit": git.stdout.strip() or None}
