"""A model whose convolutions are computed with fewer products, by ``kernels.convolution``."""

from __future__ import annotations

import copy

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

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4 and not torch.is_grad_enabled()
        return convolve(x, self.weights, self.convolution.bias) if plain else self.convolution(x)


def with_winograd(model: nn.Module) -> nn.Module | None:
    """A copy of a model, channels last, with every convolution exchanged that can be; None if there is none."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = [(name, module) for name, module in model.named_modules() if not unsupported_reasons(module)]
    for name, module in found:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, WinogradConv2d(module))
    return model if found else None
