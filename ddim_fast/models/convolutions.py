"""A model whose convolutions are computed with fewer products, by ``kernels.convolution``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels.convolution import convolve, transformed_weights, unsupported_reasons


class WinogradConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` by Winograd's minimal filtering, where nothing speaks against it; otherwise as ever.

    Args:
        convolution: one that ``kernels.convolution.unsupported_reasons`` has nothing against. Its parameters are this one's, too; its
            weights are read once.
    """

    def __init__(self, convolution: nn.Conv2d):
        bias = convolution.bias is not None
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, bias=bias, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.register_buffer("points", transformed_weights(convolution.weight), persistent=False)
        self.train(convolution.training)

    def forward(self, x: Tensor) -> Tensor:
        floats = x.dtype == self.points.dtype == torch.float32 and x.device.type == self.points.device.type == "cpu"
        plain = floats and x.ndim == 4 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return convolve(x, self.points, self.bias) if plain else super().forward(x)


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
