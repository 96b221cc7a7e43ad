"""The dataclass that a step returns, without the checks of its constructor."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_set_item = OrderedDict.__setitem__


def step_output(kind: type, found: tuple[Tensor | None, ...], second: str = "pred_original_sample") -> Any:
    """Return ``kind(prev_sample=..., pred_original_sample=...)``, or without the second.

    Its constructor takes longer than a small step.

    Args:
        second: the name of the second field.
    """
    if _is_dynamo_compiling():
        return kind(*found)
    output: Any = OrderedDict.__new__(kind)
    attributes, prev_sample = output.__dict__, found[0]
    _set_item(output, "prev_sample", prev_sample)
    attributes["prev_sample"] = prev_sample
    if len(found) == 2:
        _set_item(output, second, found[1])
        attributes[second] = found[1]
    return output
