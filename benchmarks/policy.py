"""A robot's policy: 16 actions of 7 numbers from a small 1-D U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim_fast.models.unet import timestep_embedding

HORIZON, ACTIONS, OBSERVED = 16, 7, 20


class Block(nn.Module):
    """Two convolutions with a scale and shift from the conditioning in between (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, conditions: int):
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels_out, 5, padding=2)
        self.norm = nn.GroupNorm(8, channels_out)
        self.film = nn.Linear(conditions, 2 * channels_out)
        self.second = nn.Conv1d(channels_out, channels_out, 5, padding=2)
        self.skip = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[..., None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm(self.first(x)), 1 + scale)
        return self.skip(x) + self.second(F.silu(h))


class PolicyUNet(nn.Module):
    """A small U-Net after Diffusion Policy (arXiv 2303.04137).

    It maps noisy actions ``(B, 16, 7)``, a timestep and an observation ``(B, 20)`` to noise. Its
    convolutions need channels first: ``layout`` is how input and output are transposed,
    "contiguous" (copied) or "transposed" (a view).
    """

    def __init__(self, layout: str = "contiguous", width: int = 32, conditions: int = 64):
        super().__init__()
        self.layout, self.width = layout, width
        self.condition = nn.Sequential(nn.Linear(width + OBSERVED, conditions), nn.SiLU())
        self.down = Block(ACTIONS, width, conditions)
        self.downsample = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.middle = Block(width, 2 * width, conditions)
        self.upsample = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.up = Block(2 * width, width, conditions)
        self.out = nn.Conv1d(width, ACTIONS, 1)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        embedded = timestep_embedding(t.expand(len(x)), self.width).to(x.dtype)
        condition = self.condition(torch.cat([embedded, observation], dim=1))
        high = self.down(self.turned(x), condition)
        low = self.middle(self.downsample(high), condition)
        noise = self.out(self.up(torch.cat([self.upsample(low), high], dim=1), condition))
        return self.turned(noise)

    def turned(self, x: Tensor) -> Tensor:
        """Swap channels and time, as a copy, or as a view, which the policies of that paper use."""
        x = x.transpose(1, 2)
        return x.contiguous() if self.layout == "contiguous" else x
