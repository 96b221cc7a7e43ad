"""Group normalization followed by SiLU as one layer, and layers that compute them by
``kernels.normalization``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import normalization
from .kernel_inputs import suits_kernel


class GroupNormSiLU(nn.GroupNorm):
    """Group normalization, scaled and shifted by a conditioning where there is one, then SiLU."""

    def forward(self, x: Tensor, scale_and_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalize pictures.

        Args:
            x: ``(B, C, H, W)``.
            scale_and_shift: ``(B, C)`` each, or None: what is normalized is multiplied by one plus
                the scale, and the shift is added.
        """
        h = super().forward(x)
        if scale_and_shift is not None:
            scale, shift = (tensor[:, :, None, None] for tensor in scale_and_shift)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h)


class FastGroupNorm(nn.GroupNorm):
    """An ``nn.GroupNorm`` by a kernel of ours for inputs that support it, and by torch for others.

    Args:
        norm: one without ``kernels.normalization.unsupported_reasons``. Its parameters are shared.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        _share(self, norm)

    def forward(self, x: Tensor, then_silu: bool = False) -> Tensor:
        weight, bias = self.weight, self.bias
        if _takes(x, weight, bias):
            return normalization.group_norm(x, self.num_groups, weight, bias, self.eps, silu=then_silu)
        h = super().forward(x)
        return F.silu(h) if then_silu else h


class FastGroupNormSiLU(GroupNormSiLU):
    """A ``GroupNormSiLU``, likewise, in one kernel."""

    def __init__(self, norm: GroupNormSiLU):
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        _share(self, norm)

    def forward(self, x: Tensor, scale_and_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        scale, shift = (None, None) if scale_and_shift is None else scale_and_shift
        weight, bias = self.weight, self.bias
        if not _takes(x, weight, bias, scale, shift):
            return super().forward(x, scale_and_shift)
        return normalization.group_norm(x, self.num_groups, weight, bias, self.eps, scale=scale, shift=shift, silu=True)


class FastSiLU(nn.SiLU):
    """An ``nn.SiLU`` by a kernel of ours for inputs that support it, and by torch for others."""

    def __init__(self, silu: nn.SiLU):
        super().__init__()
        self.train(silu.training)

    def forward(self, input: Tensor) -> Tensor:
        return normalization.silu(input) if suits_kernel(input) else super().forward(input)


class FusingSequential(nn.Sequential):
    """An ``nn.Sequential`` that computes a ``FastGroupNorm`` and the ``FastSiLU`` after it together.

    They stay layers of their own: a model may call them one by one.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        for index, layer in enumerate(layers):
            if _is_pair(layers, index):
                input = layer(input, then_silu=True)
            elif not _is_pair(layers, index - 1):
                input = layer(input)
        return input


def fusing(sequential: nn.Sequential) -> nn.Sequential:
    """Make a sequence of layers one that computes pairs together, in place."""
    sequential.__class__ = FusingSequential
    return sequential


def fusing_reasons(sequential: nn.Sequential) -> list[str]:
    """Return why ``fusing`` would not help; empty if it does."""
    layers = list(sequential)
    if not any(_is_pair(layers, index) for index in range(len(layers))):
        return ["it holds no FastGroupNorm with a FastSiLU after it"]
    return []


def _is_pair(layers: list[nn.Module], index: int) -> bool:
    pair = layers[max(index, 0) : index + 2]
    return [type(layer) for layer in pair] == [FastGroupNorm, FastSiLU]


def _share(layer: nn.GroupNorm, norm: nn.GroupNorm) -> None:
    layer.weight, layer.bias = norm.weight, norm.bias
    layer.train(norm.training)


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    return suits_kernel(x, *others) and x.is_contiguous(memory_format=torch.channels_last)
