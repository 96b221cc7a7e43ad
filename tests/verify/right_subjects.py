"""Right samplers for tests of the checks: small ones in plain torch, and installed ones."""

import math

import torch


def step(x_t, model_output, alpha_bar_t, alpha_bar_prev):
    """Equation 12 at eta = 0, its coefficients in float64."""
    x0 = (x_t - math.sqrt(1 - alpha_bar_t) * model_output) / math.sqrt(alpha_bar_t)
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * model_output


def sampler(model, x_T, alphas_cumprod, timesteps, step=step):
    x_t, bars = x_T, [*alphas_cumprod.tolist(), 1.0]
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x_t = step(x_t, model(x_t, torch.full((len(x_t),), t)), bars[t], bars[t_prev])
    return x_t


def in_float32(model, x_T, alphas_cumprod, timesteps):
    """The same, its coefficients in float32, too."""
    bars = torch.cat([alphas_cumprod.float(), torch.ones(1)])
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        m = model(x_T, torch.full((len(x_T),), t))
        x0 = (x_T - (1 - bars[t]).sqrt() * m) / bars[t].sqrt()
        x_T = bars[t_prev].sqrt() * x0 + (1 - bars[t_prev]).sqrt() * m
    return x_T


INSTALLED = {
    "cpu": "cpu",
    "reference": "reference",
    "diffusers": "diffusers:DDIMScheduler",
    "drop-in": "ddim_fast.integrations.diffusers:FastDDIMScheduler",
}
