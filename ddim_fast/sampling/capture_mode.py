"""Whether and how the steps of a run are captured."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.layout import DTYPES_OF_KERNELS
from ..models.protocol import Model
from ..utils.checks import check_choice
from ..utils.devices import type_of
from .capture import GraphCache

MODES = ("auto", "loop", "step", "off")
"""One graph for the whole loop, one for a step that is replayed for each, or none; "auto": "step"
where it can be."""


def choose_mode(
    capture: str,
    cache: GraphCache,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    between_steps: str | None,
    model: Model,
    not_captured: str | None = None,
) -> str:
    """Choose the mode to sample in: "loop", "step" or "off".

    Args:
        between_steps: what the host has to do between two steps, in words; None for nothing.
        not_captured: why no step of this call can be captured; None if it can.

    Raises:
        ValueError: the mode asked for is unknown or impossible; the message has the reason.
    """
    check_choice("capture", capture, MODES)
    can_be_there = type_of(device) in cache.device_types
    if capture == "off" or (capture == "auto" and not can_be_there):
        return "off"  # to say why takes as long as several small steps
    reason: str | None
    if not can_be_there:
        reason = f"it needs a CUDA device, and the samples are on {device}"
    elif dtype not in DTYPES_OF_KERNELS:
        reason = f"its kernel takes float32, float16 and bfloat16, and the samples are {dtype}"
    elif backend not in (None, "triton"):
        reason = f"it is the Triton kernel that is captured, and backend={backend!r} was asked for"
    else:
        reason = not_captured
    if capture in ("loop", "step") and reason is not None:
        raise ValueError(f"capture={capture!r} cannot be used: {reason}; use capture='off', or 'auto'")
    if capture == "loop" and between_steps is not None:
        raise ValueError(
            f"capture='loop' runs all steps as one launch, so the host cannot come between them, got {between_steps}: "
            "use capture='step'"
        )
    if reason is not None:
        return "off"
    if capture == "auto":
        # What a function holds is invisible, and so are changes to it after the capture.
        return "step" if isinstance(model, nn.Module) else "off"
    return capture
