"""Which layers of a model a kernel may take the place of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import cpu_step
from .torch_internals import forward_hooks


def layer_reasons(layer: nn.Module, kind: type[nn.Module], its_own: Callable[[Any], list[str]]) -> list[str]:
    """Return why the C++ extension cannot replace a layer; empty if it can.

    Args:
        kind: what the layer must be, and no subclass, which may do anything.
        its_own: the reasons that only layers of this kind have.
    """
    if cpu_step.extension is None:
        return [cpu_step.missing_reason]
    if type(layer) is not kind:
        return [f"it is a {type(layer).__name__}, not an nn.{kind.__name__}"]
    reasons = its_own(layer)
    for parameter in layer.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            reasons.append(f"its weights are {parameter.dtype} on {parameter.device}, not float32 on cpu")
            break
    if forward_hooks(layer) or "forward" in vars(layer):
        reasons.append("it has hooks, or its own forward, which would not be called")
    return reasons
