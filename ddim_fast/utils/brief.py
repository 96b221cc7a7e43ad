"""What Python shows of records that hold tensors or long lists: one line that can be read."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any

from torch import Tensor

_SHORT = reprlib.Repr()
_SHORT.maxtuple = _SHORT.maxlist = 6
_SHORT.maxother = _SHORT.maxstring = 120


def brief_fields(record: Any) -> str:
    """Return the ``repr`` of a dataclass: its name, and its fields in brief."""
    shown = (f"{field.name}={_brief(getattr(record, field.name))}" for field in fields(record) if field.repr)
    return f"{type(record).__qualname__}({', '.join(shown)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"<{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}{where}>"
    if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
        return f"[{len(value)} x {_brief(value[0])}]"
    return _SHORT.repr(value)
