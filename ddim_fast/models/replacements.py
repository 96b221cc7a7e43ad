"""Models whose layers are replaced by faster ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import convolution, normalization
from .convolutions import WinogradConv2d
from .normalizations import (
    FastGroupNorm,
    FastGroupNormSiLU,
    FastSiLU,
    GroupNormSiLU,
    fusing,
    fusing_reasons,
)


@dataclass(frozen=True)
class Replacement:
    """How layers of one class are replaced.

    Args:
        replaced: the class, without its subclasses.
        unsupported_reasons: why a layer cannot be replaced, given that what it holds has been.
        made_from: the layer that takes its place; it shares the parameters.
    """

    replaced: type[nn.Module]
    unsupported_reasons: Callable[[Any], list[str]]
    made_from: Callable[[Any], nn.Module]


REPLACEMENTS: dict[str, tuple[Replacement, ...]] = {
    "convolutions by Winograd's minimal filtering": (
        Replacement(nn.Conv2d, convolution.unsupported_reasons, WinogradConv2d),
    ),
    "group normalization and SiLU in one pass": (
        Replacement(nn.GroupNorm, normalization.unsupported_reasons, FastGroupNorm),
        Replacement(
            GroupNormSiLU, lambda norm: normalization.unsupported_reasons(norm, GroupNormSiLU), FastGroupNormSiLU
        ),
        Replacement(nn.SiLU, normalization.unsupported_silu_reasons, FastSiLU),
        Replacement(nn.Sequential, fusing_reasons, fusing),
    ),
}
"""What can be done to a model on the CPU, in words, and the layers that it replaces."""


def channels_last(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the weights of its two-dimensional convolutions in
    channels-last layout."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # ``Module.to`` refuses a model that also has weights of five dimensions
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def with_replacements(model: nn.Module, replacements: Sequence[Replacement]) -> nn.Module | None:
    """Return a channels-last copy of a model with every supported layer replaced; None if there is
    none."""
    model = channels_last(model)
    by_class = {replacement.replaced: replacement for replacement in replacements}
    made: dict[nn.Module, nn.Module] = {}
    # What a layer holds comes before it. A shared layer has several names, and is replaced under
    # each.
    for name, layer in reversed(list(model.named_modules(remove_duplicate=False))):
        if layer not in made:
            replacement = by_class.get(type(layer))
            if replacement is None or replacement.unsupported_reasons(layer):
                continue
            made[layer] = replacement.made_from(layer)
        if name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[layer])
    return made.get(model, model) if made else None
