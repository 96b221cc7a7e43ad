"""What a user writes, for type checkers: `make types` checks it against the package, by mypy and pyright. It also runs."""

from typing import Any

import torch
from torch import Tensor, nn

import ddim_fast as df
from ddim_fast.search import Search
from ddim_fast.tradeoff import Subject


def eps(x: Tensor, t: Tensor) -> Tensor:
    """Predict no noise at all."""
    return torch.zeros_like(x)


def labelled(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
    return torch.zeros_like(x) + 0 * class_labels.view(-1, 1, 1, 1)


def conditioned(x: Tensor, timestep: Tensor, **conditioning: Any) -> tuple[Tensor]:
    return (torch.zeros_like(x),)


class Net(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


schedule: df.NoiseSchedule = df.NoiseSchedule.linear()
sampler: df.DDIMSampler = df.DDIMSampler(schedule, num_inference_steps=4, eta=0.0, timestep_spacing="trailing")
shape = (2, 1, 28, 28)
samples: Tensor = sampler.sample(eps, shape, seed=0)
labels = {"class_labels": torch.arange(2)}
by_label: Tensor = sampler.sample(labelled, shape, seed=0, conditioning=labels, capture="off")
by_module: Tensor = sampler.sample(Net(), shape, seeds=[1, 2])
by_lambda: Tensor = sampler.sample(lambda x, t: 0 * x, shape, seed=0)
trajectory: df.Trajectory = sampler.sample(conditioned, samples.shape, seed=0, return_trajectory=True)

edited: Tensor = sampler.img2img(eps, samples, strength=0.5, seed=1)
edits: df.Trajectory = sampler.img2img(eps, samples, 0.5, seed=1, return_trajectory=True)
filled: Tensor = sampler.inpaint(eps, samples, torch.ones(28, 28), strength=0.5, seed=1)
fills: df.Trajectory = sampler.inpaint(eps, samples, torch.ones(28, 28), return_trajectory=True, seed=1)
between: Tensor = sampler.interpolate(eps, samples, samples.flip(2), [0.0, 0.5, 1.0])
betweens: df.Trajectory = sampler.interpolate(eps, samples, samples.flip(2), [0.5], return_trajectory=True)
noise: Tensor = sampler.invert(eps, samples, iterations=2)
inversion: df.Trajectory = sampler.invert(eps, samples, return_trajectory=True)
again: Tensor = sampler.reconstruct(eps, samples)
parallel: Tensor = sampler.sample_parallel(eps, shape, seed=0)
solved, statistics = sampler.sample_parallel(eps, shape, seed=0, return_statistics=True)
iterations: int = statistics.iterations
wanted = bool(iterations)
either: Tensor | df.Trajectory = sampler.sample(eps, shape, seed=0, return_trajectory=wanted)

window: df.DDIMSampler = sampler.replace(eta=(0.0, 0.5, 0.5, 0.0))
rollout: df.Rollout = window.rollout(eps, shape=shape, seed=0, min_std=0.1)
ratio: Tensor = torch.exp(rollout.log_prob(eps, 0) - rollout.log_probs[0])

plan: df.SamplingPlan = sampler.plan(eps)
x_t = torch.randn(2, 1, 28, 28)
for step in plan.steps:
    x_t = df.ddim_step(x_t, eps(x_t, torch.full((2,), step.t)), step.coefficients)

shipped = df.load_model("fashion")
search = Search(shipped, schedule, num_inference_steps=5)
by_shape = Search(eps, schedule, (1, 28, 28), num_inference_steps=5)
subjects: list[Subject] = [Subject(shipped, schedule), Subject(eps, schedule, (1, 28, 28))]
pictures: Tensor = sampler.sample(shipped, seeds=[3])
levels = df.to_uint8(pictures)
