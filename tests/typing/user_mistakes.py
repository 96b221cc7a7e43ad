# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a type checker must refuse: each line needs its comment, or it is an error that the comment is there. Never run."""

import torch
from torch import Tensor

import ddim_fast as df

x0 = torch.zeros(1, 1, 8, 8)


def of_one(x: Tensor) -> Tensor:
    return x


def eps(x: Tensor, t: Tensor) -> Tensor:
    return x


sampler = df.DDIMSampler(df.NoiseSchedule.linear(), 4)
df.DDIMSampler(df.NoiseSchedule.linear(), timestep_spacing="leadng")  # type: ignore[arg-type]
df.DDIMSampler(df.NoiseSchedule.linear(), prediction_type="eps")  # type: ignore[arg-type]
df.DDIMSampler(df.NoiseSchedule.linear(), eta_scales="std")  # type: ignore[arg-type]
unknown = df.no_such_name  # type: ignore[attr-defined]
df.make_schedule("linaer")  # type: ignore[arg-type]
df.select_timesteps(10, 1000, "ddim")  # type: ignore[arg-type]
sampler.sample(of_one, (1, 1, 8, 8))  # type: ignore[call-overload]
sampler.sample(eps, (1, 1, 8, 8), sed=0)  # type: ignore[call-overload]
sampler.sample(eps, (1, 1, 8, 8), capture="graph")  # type: ignore[call-overload]
sampler.img2img(eps, x0, 0.5, shape=(1, 1, 8, 8))  # type: ignore[call-overload]
sampler.inpaint(eps, x0, x0, known_x0=x0)  # type: ignore[call-overload]
sampler.interpolate(eps, x0, x0, [0.5], dtype=torch.float16)  # type: ignore[call-overload]
sampler.invert(eps, x0, seed=0)  # type: ignore[call-overload]
samples: Tensor = sampler.sample(eps, (1, 1, 8, 8), return_trajectory=True)  # type: ignore[assignment]
trajectory: df.Trajectory = sampler.img2img(eps, x0, 0.5)  # type: ignore[assignment]
