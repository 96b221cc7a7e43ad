"""3 x 3 convolutions on the CPU with a quarter of the products: Winograd's minimal filtering, in
SIMD C++ (csrc/convolution.inl).

They are no part of a DDIM step. But a sampler spends nearly all of its time in its model, and a
U-Net most of its time in these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import cpu_step
from .layers import is_recorded, layer_reasons, plain_convolution

CHANNEL_GRAIN = 16
"""The number of channels must be a multiple of this: ``kChannelGrain`` of csrc/convolution.h."""

_FILTER_TO_POINTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""G of F(4 x 4, 3 x 3): a filter's values at the points 0, 1, -1, 2, -2 and infinity (Lavin and
Gray, arXiv 1509.09308, section 4.3)."""


def unsupported_reasons(convolution: nn.Module) -> list[str]:
    """Return why this kernel cannot replace a module; empty if it can."""
    return layer_reasons(convolution, nn.Conv2d, _shape_reasons)


def _shape_reasons(convolution: nn.Conv2d) -> list[str]:
    wanted = {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    }
    reasons = [
        f"{name} is {getattr(convolution, name)}, not {value}"
        for name, value in wanted.items()
        if getattr(convolution, name) != value
    ]
    for name in ("in_channels", "out_channels"):
        if getattr(convolution, name) % CHANNEL_GRAIN:
            reasons.append(f"{name} is {getattr(convolution, name)}, not a multiple of {CHANNEL_GRAIN}")
    return reasons


def transformed_weights(weight: Tensor) -> Tensor:
    """Return G g G^T of each filter g, rounded from float64, as the kernel reads it.

    ``(out_channels, in_channels, 3, 3)`` -> ``(36, out_channels / 16, in_channels, 16)`` float32.
    """
    to_points = torch.tensor(_FILTER_TO_POINTS, dtype=torch.float64, device="cpu")
    points = torch.einsum("ia,ocab,jb->ijco", to_points, weight.detach().double(), to_points)
    panels = points.flatten(0, 1).unflatten(2, (-1, CHANNEL_GRAIN)).transpose(1, 2)
    return panels.float().contiguous()


def convolve(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 3 x 3 convolution with zero padding of 1, by a torch operator that has no gradient.

    Args:
        x: ``(B, in_channels, H, W)`` float32 on the CPU; copied unless it is channels last.
        weights: from ``transformed_weights``.
        bias: ``(out_channels,)`` float32, or None.

    Returns:
        ``(B, out_channels, H, W)``, channels last. Its error is larger than that of a direct
        convolution, and grows with the number of channels: 5 times (16 channels) to 27 times (1280)
        the root mean square. Measured for results of about 1, it is at most 8e-6 with 16 channels,
        2e-5 with 64, and 9e-5 with 1280.
    """
    result = None if is_recorded() else plain_convolution(x, weights, bias)
    return torch.ops.ddim_fast.convolve(x, weights, bias) if result is None else result


_library = torch.library.Library("ddim_fast", "FRAGMENT")
_library.define("convolve(Tensor x, Tensor weights, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _like_result(x: Tensor, weights: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    shape = (batch, weights.shape[1] * CHANNEL_GRAIN, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.impl(_library, "convolve", "CPU")
def _(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    if cpu_step.extension is None:
        raise RuntimeError(cpu_step.missing_reason)
    points = len(_FILTER_TO_POINTS) ** 2
    wrong = weights.dtype != torch.float32 or weights.ndim != 4 or len(weights) != points
    if wrong or weights.shape[2] % CHANNEL_GRAIN or weights.shape[3] != CHANNEL_GRAIN:
        raise ValueError(
            f"weights must be float32 ({points}, out_channels / {CHANNEL_GRAIN}, in_channels, {CHANNEL_GRAIN}) with multiples "
            f"of {CHANNEL_GRAIN} channels, got {weights.dtype} {tuple(weights.shape)}: make them with transformed_weights"
        )
    in_channels, out_channels = weights.shape[2], weights.shape[1] * CHANNEL_GRAIN
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (out_channels,)):
        raise ValueError(f"bias must be float32 ({out_channels},), got {bias.dtype} {tuple(bias.shape)}")
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"x must be float32 (B, {in_channels}, H, W) to fit the weights, got {x.dtype} {tuple(x.shape)}"
        )
    result = _like_result(x, weights)
    if result.numel() == 0:
        return result
    # No tensor is a lazy negative here: torch resolves those before operators that do not handle
    # them.
    x = x.contiguous(memory_format=torch.channels_last)
    weights, bias = weights.contiguous(), None if bias is None else bias.contiguous()
    batch, _, height, width = x.shape
    address = 0 if bias is None else bias.data_ptr()
    sizes = batch, height, width, in_channels, out_channels
    cpu_step.extension.convolve(
        x.data_ptr(), weights.data_ptr(), address, result.data_ptr(), *sizes, torch.get_num_threads()
    )
    return result


@torch.library.register_fake("ddim_fast::convolve", lib=_library)
def _(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return _like_result(x, weights)
