"""Sections about whole loops: against eager, torch.compile and diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import ddim_fast as df
from ddim_fast.models.unet import SmallUNet

from ..policy import ACTIONS as NUMBERS
from ..policy import HORIZON, OBSERVED, PolicyUNet
from .machine import Machine
from .results import Row


class Nothing(nn.Module):
    """A model that returns a stored tensor, at no cost."""

    prediction_type = "epsilon"

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


def replays(machine: Machine) -> list[Row]:
    """Time a step without the model, for each capture mode of the loop; and the host's part."""
    shape = (1, 4, 64, 64)
    model = Nothing(torch.randn(shape, device=machine.device))
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, 1.0, graphs=machine.graphs())
    x_T = torch.randn(shape, device=machine.device)
    functions = {
        mode: lambda mode=mode: sampler.sample(model, x_T=x_T, seed=0, capture=mode) for mode in ("off", "step", "loop")
    }
    _check_equal({name: function() for name, function in functions.items()}, exactly=True)
    device, host = machine.seconds(functions, 5), machine.host_seconds(functions, 5)
    return [
        {"capture": name, "a step, us": t * 1e6 / machine.steps, "host, a run, us": host[name] * 1e6}
        for name, t in device.items()
    ]


def networks(machine: Machine) -> list[Row]:
    """Time whole loops of U-Nets of three sizes: ours, plain PyTorch, and under torch.compile."""
    rows: list[Row] = []
    for size in machine.networks:
        for batch in (1,) if machine.device == "cpu" else (1, 16):
            torch.manual_seed(0)
            network = SmallUNet(**size).to(machine.device).eval().requires_grad_(False)
            labels = torch.zeros(batch, dtype=torch.int64, device=machine.device)
            x_T = torch.randn(batch, *machine.image, device=machine.device)
            rows += _contenders(
                machine, network, x_T, {"class_labels": labels}, f"U-Net, width {size['width']}, batch {batch}"
            )
    return rows


def robot(machine: Machine) -> list[Row]:
    """Time a robot's policy: one sequence of actions."""
    torch.manual_seed(0)
    network = PolicyUNet().to(machine.device).eval().requires_grad_(False)
    x_T = torch.randn(1, HORIZON, NUMBERS, device=machine.device)
    observation = torch.randn(1, OBSERVED, device=machine.device)
    return _contenders(machine, network, x_T, {"observation": observation}, "robot's policy")


def _contenders(
    machine: Machine, network: nn.Module, x_T: Tensor, conditioning: dict[str, Tensor], name: str
) -> list[Row]:
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), machine.steps, clip_sample=False, graphs=machine.graphs())
    compiled = machine.compiled(network)

    def ours(mode: str) -> Callable[[], Tensor]:
        return lambda: sampler.sample(network, x_T=x_T, seed=0, conditioning=conditioning, capture=mode)

    functions = {
        "eager": lambda: _eager(network, x_T, conditioning, machine.steps),
        "torch.compile": lambda: _eager(compiled, x_T, conditioning, machine.steps),
        "ours, off": ours("off"),
        "ours, step": ours("step"),
        "ours, loop": ours("loop"),
    }
    if (by_diffusers := _diffusers(network, x_T, conditioning, machine.steps)) is not None:
        functions["diffusers"] = by_diffusers
    _check_equal({name: function() for name, function in functions.items()})
    times = machine.seconds(functions, 1)
    return [{"loop": name, "contender": of, "ms": t * 1e3, "times ours, step": t / times["ours, step"]}
            for of, t in times.items()]  # fmt: skip


@torch.no_grad()
def _eager(network: Callable, x: Tensor, conditioning: dict[str, Tensor], steps: int) -> Tensor:
    """Sample by the paper's equation 12 in plain PyTorch, coefficients and timesteps on the device."""
    schedule = df.NoiseSchedule.linear()
    plan = df.DDIMSampler(schedule, steps, clip_sample=False).plan()
    for step in plan.steps:
        a, b = step.alpha_bar_t, step.alpha_bar_prev
        t = torch.full((len(x),), step.t, device=x.device)
        eps = network(x, t, **conditioning).clone()
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = b**0.5 * x0 + (1 - b) ** 0.5 * eps
    return x


def _diffusers(
    network: nn.Module, x_T: Tensor, conditioning: dict[str, Tensor], steps: int
) -> Callable[[], Tensor] | None:
    """Return the loop of diffusers' pipelines, timesteps on the device, if diffusers is there."""
    try:
        from diffusers import DDIMScheduler
    except ImportError:
        return None
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="leading")

    @torch.no_grad()
    def sample() -> Tensor:
        scheduler.set_timesteps(steps, device=x_T.device)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x)), **conditioning), t, x, eta=0.0).prev_sample
        return x

    return sample


def _check_equal(found: dict[str, Tensor], exactly: bool = False) -> None:
    """Raise RuntimeError unless all are the first one, up to what the precision of matrix products
    makes of a loop."""
    (first, reference), *others = found.items()
    for name, result in others:
        if exactly and not torch.equal(result, reference):
            raise RuntimeError(f"{name} must give the samples of {first}, and differs")
        difference = ((result.float() - reference.float()).abs().mean() / reference.float().abs().mean()).item()
        if not difference <= 0.02:
            raise RuntimeError(f"{name} must give about the samples of {first}, and differs by {difference}")
