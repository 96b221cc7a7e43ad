"""What a model's error may come from, in the words of those who called the sampler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.protocol import Model
from ..utils.warn import add_note


def explain(error: Exception, model: Model, x: Tensor, conditioning: Mapping[str, Any]) -> None:
    """Add to the error of a model's call what in its input is unusual: conditioning of a name that
    it does not take, or with another number of rows than ``x`` ``(B, C, ...)``; an ``x`` of another
    dtype than its weights, or of three sizes, which may be one picture.

    A model may want either, so neither is refused before it is called.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return
    taken = _keywords_of(model) if isinstance(error, TypeError) else None
    if taken is not None and (unknown := [name for name in conditioning if name not in taken]):
        add_note(
            error,
            f"conditioning is passed to the model by name, got {', '.join(map(repr, unknown))}: the model takes "
            f"{', '.join(taken) or 'none'}",
        )
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is not None and weight.dtype.is_floating_point and weight.dtype != x.dtype:
        add_note(
            error,
            f"the model was called with x of {x.dtype}, and its weights are {weight.dtype}: pass model_dtype={weight.dtype}",
        )
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


def _keywords_of(model: Model) -> list[str] | None:
    """Return the names after x and t that a model takes; None where it takes any, or does not say."""
    try:
        parameters = list(inspect.signature(getattr(model, "forward", model)).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters[2:] if parameter.kind in named]


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
