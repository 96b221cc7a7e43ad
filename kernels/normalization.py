"""Group normalization of channels-last pictures and SiLU on the CPU, in one pass where one follows
the other, in SIMD C++ (csrc/normalization.inl).

Like ``convolution``, they are no part of a DDIM step. PyTorch's group normalization takes five times
as long with channels last as without, and a U-Net that runs fast has its channels last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import cpu_step
from .layers import is_recorded, layer_reasons, plain_normalization

CHANNEL_GRAIN = 16
"""The number of channels must be a multiple of this: ``kNormalizedGrain`` of
csrc/normalization.h."""


def unsupported_reasons(norm: nn.Module, kind: type[nn.GroupNorm] = nn.GroupNorm) -> list[str]:
    """Return why this kernel cannot replace a group normalization; empty if it can."""
    return layer_reasons(norm, kind, _channel_reasons)


def unsupported_silu_reasons(silu: nn.Module) -> list[str]:
    """Return why this kernel cannot replace an ``nn.SiLU``; empty if it can."""
    return layer_reasons(silu, nn.SiLU, lambda silu: ["it works in place"] if silu.inplace else [])


def _channel_reasons(norm: nn.GroupNorm) -> list[str]:
    channels = norm.num_channels
    return [f"num_channels is {channels}, not a multiple of {CHANNEL_GRAIN}"] if channels % CHANNEL_GRAIN else []


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Normalize groups of channels of each sample, by a torch operator that has no gradient.

    The result is ``y * (1 + scale) + shift`` with ``y = (x - mean) / sqrt(variance + eps) * weight +
    bias``, and SiLU of that where it is wanted. A sample's bits depend on nothing but its own numbers.

    Args:
        x: ``(B, C, H, W)`` float32 on the CPU, C a multiple of 16; copied unless it is channels last.
        groups: a divisor of C.
        weight, bias: ``(C,)`` float32, or None.
        eps: added to the variance, at least 0.
        scale, shift: ``(B, C)`` float32, or None.

    Returns:
        ``(B, C, H, W)``, channels last. Mean and variance are computed in two passes whose sums are
        corrected, and folded with the weights in float64: a mean that is large beside the deviations
        costs no precision, unlike in PyTorch.

    Raises:
        ValueError: an argument breaks a rule.
    """
    arguments = x, groups, weight, bias, eps, scale, shift, silu
    result = None if is_recorded() else plain_normalization(*arguments)
    return torch.ops.ddim_fast.group_norm(*arguments) if result is None else result


def silu(x: Tensor) -> Tensor:
    """Compute ``x / (1 + exp(-x))`` of each element, by a torch operator that has no gradient.

    Args:
        x: float32 on the CPU, of any shape and layout.

    Returns:
        A new tensor, within 3 units in the last place of the exact result, for subnormal results, too;
        0 for minus infinity.

    Raises:
        ValueError: ``x`` is not float32.
    """
    return torch.ops.ddim_fast.silu(x)


_library = torch.library.Library("ddim_fast", "FRAGMENT")
_library.define(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift, bool silu) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("silu(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _check(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    shape = x.shape
    if x.dtype != torch.float32 or len(shape) != 4 or not shape[1] or shape[1] % CHANNEL_GRAIN:
        raise ValueError(
            f"x must be float32 (B, C, H, W) with C a multiple of {CHANNEL_GRAIN}, got {x.dtype} {tuple(shape)}: "
            "use torch.nn.functional.group_norm for others"
        )
    batch, channels = shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a divisor of the {channels} channels, got {groups}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number, at least 0, got {eps}")
    for name, tensor, wanted in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != wanted):
            raise ValueError(f"{name} must be float32 {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")


def _floats(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor whose last dimension lies closely together."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


@torch.library.impl(_library, "group_norm", "CPU")
def _(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    if cpu_step.extension is None:
        raise RuntimeError(cpu_step.missing_reason)
    _check(x, groups, weight, bias, eps, scale, shift)
    x = x.contiguous(memory_format=torch.channels_last)
    result = torch.empty_like(x, memory_format=torch.channels_last)
    if result.numel() == 0:
        return result
    weight, bias, scale, shift = _floats(weight), _floats(bias), _floats(scale), _floats(shift)
    batch, channels, height, width = x.shape
    cpu_step.extension.normalize(
        x.data_ptr(), _address(weight), _address(bias), *_row(scale), *_row(shift), result.data_ptr(),
        batch, height * width, channels, groups, eps, silu, torch.get_num_threads(),
    )  # fmt: skip
    return result


@torch.library.register_fake("ddim_fast::group_norm", lib=_library)
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.impl(_library, "silu", "CPU")
def _(x: Tensor) -> Tensor:
    if cpu_step.extension is None:
        raise RuntimeError(cpu_step.missing_reason)
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {x.dtype}: use torch.nn.functional.silu for others")
    result = torch.empty_like(x)
    if result.numel() == 0:
        return result
    if result.stride() != x.stride():  # x has gaps, or elements that are there twice
        x = result.copy_(x)
    cpu_step.extension.silu(x.data_ptr(), result.data_ptr(), x.numel(), torch.get_num_threads())
    return result


@torch.library.register_fake("ddim_fast::silu", lib=_library)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
