"""The dataclass that a step returns, without the checks of its constructor."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_NAMES = ("prev_sample", "pred_original_sample")
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_set_item = OrderedDict.__setitem__


def step_output(kind: type, found: tuple[Tensor, ...]) -> Any:
    """Return ``kind(prev_sample=..., pred_original_sample=...)``, or without the second.

    Its constructor takes longer than a small step.
    """
    if _is_dynamo_compiling():
        return kind(*found)
    output: Any = OrderedDict.__new__(kind)
    attributes = output.__dict__
    for name, value in zip(_NAMES, found):  # noqa: B905 (strict would take longer)
        _set_item(output, name, value)
        attributes[name] = value
    return output
