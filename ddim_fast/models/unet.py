"""A small class-conditional U-Net for 28 x 28 grey-scale pictures: the model that ships with the
package.

It is sized for a CPU. Pictures are folded into 2 x 2 patches first (28 x 28 x 1 becomes 14 x 14 x
4), so that no convolution runs at full resolution, and self-attention is used where the picture is
7 x 7.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normalizations import GroupNormSiLU


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (DDPM, arXiv 2006.11239, after Vaswani et al.): ``(B,)`` ->
    ``(B, dim)`` float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t.float()[:, None] * frequencies[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def _zero(layer: nn.Conv2d) -> None:
    """Let a layer put out zeros until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the conditioning as scale and shift of the second norm."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, groups: int = 8):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        _zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        return self.skip(x) + self.conv2(self.norm2(h, self.condition(embedding).chunk(2, dim=1)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, head_dim: int = 32, groups: int = 8):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.out(h).transpose(1, 2).view(batch, channels, height, width)


class SmallUNet(nn.Module):
    """U-Net with two resolutions.

    Args:
        num_classes: labels are ``0 .. num_classes - 1``; the label ``num_classes`` is the "no
            label" of classifier-free guidance.
        width: channels at 14 x 14; ``width * multiplier`` channels at 7 x 7.
        blocks: residual blocks per resolution on the way down (one more on the way up).
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        multiplier: int = 2,
        blocks: int = 2,
        embedding_dim: int = 128,
        patch: int = 2,
    ):
        super().__init__()
        self.config = dict(in_channels=in_channels, num_classes=num_classes, width=width, multiplier=multiplier,
                           blocks=blocks, embedding_dim=embedding_dim, patch=patch)  # fmt: skip
        self.num_classes = num_classes
        self.patch = patch
        self.width = width
        low = width * multiplier
        self.time_mlp = nn.Sequential(
            nn.Linear(width * 2, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.label_embedding = nn.Embedding(num_classes + 1, embedding_dim)
        self.stem = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.down_high = nn.ModuleList(ResidualBlock(width, width, embedding_dim) for _ in range(blocks))
        self.downsample = nn.Conv2d(width, low, 3, stride=2, padding=1)
        self.down_low = nn.ModuleList(ResidualBlock(low, low, embedding_dim) for _ in range(blocks))
        self.attention_down = SelfAttention(low)
        self.middle = ResidualBlock(low, low, embedding_dim)
        self.up_low = nn.ModuleList(ResidualBlock(2 * low, low, embedding_dim) for _ in range(blocks))
        self.attention_up = SelfAttention(low)
        self.upsample = nn.Conv2d(low, width, 3, padding=1)
        self.up_high = nn.ModuleList(ResidualBlock(2 * width, width, embedding_dim) for _ in range(blocks + 1))
        self.norm_out = GroupNormSiLU(8, width)
        self.conv_out = nn.Conv2d(width, in_channels * patch**2, 3, padding=1)
        _zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Predict ``v`` for noisy pictures ``x``: ``(B, C, H, W)``, timesteps ``t`` scalar or
        ``(B,)``, labels ``(B,)`` or none."""
        batch = x.shape[0]
        if batch == 0:  # pixel_unshuffle refuses an empty batch
            return torch.empty_like(x)
        t = torch.as_tensor(t, device=x.device).expand(batch)
        if class_labels is None:
            class_labels = torch.full((batch,), self.num_classes, device=x.device, dtype=torch.long)
        dtype = self.stem.weight.dtype
        embedding = self.time_mlp(timestep_embedding(t, 2 * self.width).to(dtype)) + self.label_embedding(class_labels)
        embedding = F.silu(embedding)
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for block in self.down_high:
            h = block(h, embedding)
            skips.append(h)
        h = self.downsample(h)
        low_skips = []
        for block in self.down_low:
            h = block(h, embedding)
            low_skips.append(h)
        h = self.middle(self.attention_down(h), embedding)
        for block in self.up_low:
            h = block(torch.cat([h, low_skips.pop()], dim=1), embedding)
        h = self.upsample(F.interpolate(self.attention_up(h), scale_factor=2, mode="nearest"))
        for block in self.up_high:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.conv_out(self.norm_out(h)), self.patch)
