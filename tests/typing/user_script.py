"""What a user writes, for a type checker: `make lint` checks it against the package. It also runs."""

from typing import Any

import torch
from torch import Tensor

import ddim_fast as df


def model(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
    """Predict no noise at all."""
    return torch.zeros_like(x)


schedule: df.NoiseSchedule = df.NoiseSchedule.linear()
sampler: df.DDIMSampler = df.DDIMSampler(schedule, num_inference_steps=4, eta=0.0)
samples: Tensor = sampler.sample(model, shape=(2, 1, 28, 28), seed=0)
edited: Tensor | df.Trajectory = sampler.img2img(model, samples, strength=0.5, seed=1)
trajectory: df.Trajectory = sampler.sample(model, samples.shape, seed=0, return_trajectory=True)

window: df.DDIMSampler = sampler.replace(eta=(0.0, 0.5, 0.5, 0.0))
rollout: df.Rollout = window.rollout(model, shape=(2, 1, 28, 28), seed=0, min_std=0.1)
ratio: Tensor = torch.exp(rollout.log_prob(model, 0) - rollout.log_probs[0])

plan: df.SamplingPlan = sampler.plan(model)
x_t = torch.randn(2, 1, 28, 28)
for step in plan.steps:
    x_t = df.ddim_step(x_t, model(x_t, torch.full((2,), step.t)), step.coefficients)

shipped = df.load_model("fashion")
pictures: Tensor = sampler.sample(shipped, shape=(1, 1, 28, 28), seeds=[3])
