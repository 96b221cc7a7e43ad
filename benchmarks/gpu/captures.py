"""Sections about captured loops: what they cost, and that they can be trusted."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor, nn

import ddim_fast as df
from ddim_fast.models.unet import SmallUNet
from ddim_fast.sampling.cuda_graphs import CaptureError

from .machine import Machine
from .results import Row


def _network(machine: Machine) -> tuple[SmallUNet, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = SmallUNet(**machine.networks[0]).to(machine.device).eval().requires_grad_(False)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)  # the output of an untrained one is zero
    return network, {"class_labels": torch.zeros(2, dtype=torch.int64, device=machine.device)}


def _sample(sampler: df.DDIMSampler, machine: Machine, model: object, labels: dict[str, Tensor], mode: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "auto" says what it does not capture
        return sampler.sample(
            model, (2, *machine.image), seed=0, device=machine.device, conditioning=labels, capture=mode
        )


def costs(machine: Machine) -> list[Row]:
    """Measure the first captured call, the later ones, and the memory that a graph keeps."""
    network, labels = _network(machine)
    rows: list[Row] = []
    for mode in ("step", "loop"):
        sampler = df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, graphs=machine.graphs())
        before, started = machine.memory(), time.perf_counter()
        _sample(sampler, machine, network, labels, mode)
        machine.synchronize()
        first = time.perf_counter() - started
        call = {"": lambda mode=mode, sampler=sampler: _sample(sampler, machine, network, labels, mode)}
        rows.append(
            {
                "capture": mode,
                "first call, ms": first * 1e3,
                "later calls, ms": machine.seconds(call, 1)[""] * 1e3,
                "host, later calls, ms": machine.host_seconds(call, 1)[""] * 1e3,
                "memory kept, bytes": machine.memory() - before,
            }
        )
    return rows


class _Waits(nn.Module):
    """A model that reads a value on the host, which no graph can hold."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * float(x.mean())


def recovery(machine: Machine) -> list[Row]:
    """Fail a capture, and use the generator, the allocator and another capture after it."""
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, graphs=machine.graphs())
    waits = _Waits().to(machine.device)
    try:
        sampler.sample(waits, (2, *machine.image), seed=0, device=machine.device, capture="step")
        refused = "nothing"
    except CaptureError as error:
        refused = str(error)
    first = torch.randn(8, device=machine.device)
    torch.manual_seed(0)
    again = torch.randn(8, device=machine.device)
    uncaptured = _sample(sampler, machine, waits, {}, "auto")
    if not (torch.isfinite(first).all() and torch.isfinite(again).all() and torch.isfinite(uncaptured).all()):
        raise RuntimeError("after a failed capture torch.randn must give numbers, and does not")
    network, labels = _network(machine)
    _check(
        _sample(sampler, machine, network, labels, "off"), _sample(sampler, machine, network, labels, "step"), "step"
    )
    return [{"refused": refused, "torch.randn after it": "works", "a capture after it": "right"}]


def streams(machine: Machine) -> list[Row]:
    """Sample on two streams in turns, with a cache of graphs each, and compare with one stream."""
    network, labels = _network(machine)
    samplers = [df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, graphs=machine.graphs()) for _ in range(2)]
    expected = _sample(samplers[0], machine, network, labels, "off")
    machine.synchronize()
    found = []
    for _ in range(3):
        for sampler in samplers:
            with machine.on_a_stream():
                found.append(_sample(sampler, machine, network, labels, "step"))
    machine.synchronize()
    for result in found:
        _check(expected, result, "a stream of its own")
    return [{"runs on two streams": len(found), "result": "right"}]


class _LowRank(nn.Module):
    """A linear layer with adapters by name, kept in a dictionary and switched by a list, as peft's are."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self._active = base, ["a"]
        width = base.in_features
        self.adapters = nn.ModuleDict({name: nn.Linear(width, base.out_features, bias=False) for name in ("a", "b")})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name in self._active:
            y = y + self.adapters[name](x)
        return y


def adapters(machine: Machine) -> list[Row]:
    """Switch adapters, change weights and evict graphs between captured calls."""
    network, labels = _network(machine)
    layers = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()
              if isinstance(child, nn.Linear)]  # fmt: skip
    parent, name, child = layers[0]
    layer = _LowRank(child).to(machine.device)
    setattr(parent, name, layer)
    network.requires_grad_(False)
    cache = machine.graphs()
    cache.maxsize = 2
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, graphs=cache)

    def switch(*names: str) -> None:
        layer._active = list(names)

    changes = {
        "adapter a": lambda: switch("a"),
        "adapter b": lambda: switch("b"),
        "both": lambda: switch("a", "b"),
        "none": lambda: switch(),
        "weights in place": lambda: child.weight.add_(0.01),
        "adapter a again": lambda: switch("a"),
    }
    rows: list[Row] = []
    for what, change in changes.items():
        with torch.no_grad():
            change()
        expected = _sample(sampler, machine, network, labels, "off")
        error = (_sample(sampler, machine, network, labels, "auto") - expected).abs().max().item()
        rows.append({"after": what, "largest difference to uncaptured": error})
    if wrong := [row["after"] for row in rows if not row["largest difference to uncaptured"] < 1e-3]:
        raise RuntimeError(f"captured calls must follow every change, and are stale after: {', '.join(wrong)}: {rows}")
    return rows


def _check(expected: Tensor, result: Tensor, what: str) -> None:
    difference = (expected - result).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"{what} must give the samples of an uncaptured run, and differs by {difference}")
