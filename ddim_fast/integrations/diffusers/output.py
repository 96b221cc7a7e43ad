"""The dataclass that a step returns, without the checks of its constructor."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_set_item = OrderedDict.__setitem__


def step_output(kind: type, found: tuple[Tensor, Tensor]) -> Any:
    """Return ``kind(prev_sample=..., pred_original_sample=...)``.

    Its constructor takes longer than a small step.
    """
    if _is_dynamo_compiling():
        return kind(*found)
    prev_sample, pred_original_sample = found
    output: Any = OrderedDict.__new__(kind)
    _set_item(output, "prev_sample", prev_sample)
    _set_item(output, "pred_original_sample", pred_original_sample)
    attributes = output.__dict__
    attributes["prev_sample"], attributes["pred_original_sample"] = prev_sample, pred_original_sample
    return output
