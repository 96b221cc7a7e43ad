"""What a model's error may come from, in the words of those who called the sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..utils.warn import add_note


def explain(error: Exception, x: Tensor, conditioning: Mapping[str, Any]) -> None:
    """Add to the error of a model's call what in its input is unusual: conditioning with another
    number of rows than ``x`` ``(B, C, ...)``, or an ``x`` of three sizes, which may be one picture.

    A model may want either, so neither is refused before it is called.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    if x.ndim == 3:
        sizes = ", ".join(map(str, x.shape))
        add_note(
            error,
            f"the model was called with x of shape ({sizes}), whose first size is the batch: one picture is (1, {sizes})",
        )
    if others := [f"{name} {tuple(value.shape)}" for name, value in _tensors("", conditioning) if len(value) != len(x)]:
        add_note(
            error,
            f"the model was called with a batch of {len(x)}, and conditioning with a row for each is what most models want, got "
            f"{', '.join(others)}",
        )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor with rows in nested conditioning, with the name of its place."""
    if isinstance(value, Tensor) and value.ndim:
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for n, item in enumerate(value):
            yield from _tensors(f"{name}[{n}]", item)
