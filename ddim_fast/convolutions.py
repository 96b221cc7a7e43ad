"""A model whose convolutions are computed with fewer products, by ``kernels.convolution``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.convolution import convolve, transformed_weights, unsupported_reasons


class WinogradConv2d(nn.Module):
    """An ``nn.Conv2d`` by Winograd's minimal filtering, where nothing speaks against it; otherwise itself.

    Args:
        convolution: one that ``kernels.convolution.unsupported_reasons`` has nothing against. Its weights are read once.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.register_buffer("weights", transformed_weights(convolution.weight), persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask a convolution for its weight's dtype, and the like
            return getattr(super().__getattr__("convolution"), name)

    def forward(self, x: Tensor) -> Tensor:
        floats = x.dtype == self.weights.dtype == torch.float32 and x.device.type == self.weights.device.type == "cpu"
        plain = floats and x.ndim == 4 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return convolve(x, self.weights, self.convolution.bias) if plain else self.convolution(x)


def channels_last(model: nn.Module) -> nn.Module:
    """A copy of a model, its weights of two-dimensional convolutions channels last."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # ``Module.to`` refuses a model that has weights of five dimensions, too
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def with_winograd(model: nn.Module) -> nn.Module | None:
    """A copy of a model, channels last, with every convolution exchanged that can be; None if there is none."""
    model = channels_last(model)
    modules = list(model.modules())
    exchanged = {module: WinogradConv2d(module) for module in modules if not unsupported_reasons(module)}
    for module in modules:
        for name, child in module._modules.items():  # named_children would give a shared one by its first name only
            if child in exchanged:
                setattr(module, name, exchanged[child])
    return exchanged.get(model, model) if exchanged else None
