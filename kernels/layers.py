"""Which layers of a model a kernel may take the place of, and calls of their kernels that cost
little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import cpu_step
from .torch_internals import forward_hooks

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_tracing = torch.jit.is_tracing


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


def _declines(*arguments: Any) -> Tensor | None:
    """Run a layer's operator in one call of C++, or decline: None, without an error, if the tensors
    are not plain, somebody watches operators or records gradients, or something is wrong.

    Few pictures spend less time in a kernel than in torch's dispatcher and checks in Python. The
    arguments are the operator's, in the order of csrc/layer_calls.cpp. The result owns its memory as
    those from ``torch.from_dlpack`` do: ``resize_`` cannot enlarge it.
    """


plain_convolution = _declines if cpu_step.extension is None else cpu_step.extension.convolve_plain
plain_normalization = _declines if cpu_step.extension is None else cpu_step.extension.normalize_plain


def is_recorded() -> bool:
    """Return whether torch.compile or torch.jit.trace records what is called: an operator, then."""
    return _is_dynamo_compiling() or _is_tracing()
