"""A model whose convolutions use fewer multiplications, by ``kernels.convolution``."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels.convolution import convolve, transformed_weights, unsupported_reasons


class WinogradConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that uses Winograd's minimal filtering for inputs that support it, and torch
    for others.

    Args:
        convolution: one without ``kernels.convolution.unsupported_reasons``. Its parameters are
            shared; its weights are transformed once.
    """

    def __init__(self, convolution: nn.Conv2d):
        bias = convolution.bias is not None
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, bias=bias, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.points: Tensor
        self.register_buffer("points", transformed_weights(convolution.weight), persistent=False)
        self.train(convolution.training)

    def forward(self, x: Tensor) -> Tensor:
        floats = x.dtype == self.points.dtype == torch.float32 and x.device.type == self.points.device.type == "cpu"
        plain = floats and x.ndim == 4 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        return convolve(x, self.points, self.bias) if plain else super().forward(x)


def channels_last(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the weights of its two-dimensional convolutions in
    channels-last layout."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 4:  # ``Module.to`` refuses a model that also has weights of five dimensions
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def with_winograd(model: nn.Module) -> nn.Module | None:
    """Return a channels-last copy of a model with every supported convolution replaced; None if
    there is none."""
    model = channels_last(model)
    # A shared module has several names, and is replaced under each.
    named = list(model.named_modules(remove_duplicate=False))
    replaced: dict[nn.Module, nn.Module] = {
        module: WinogradConv2d(module)
        for _, module in named
        if isinstance(module, nn.Conv2d) and not unsupported_reasons(module)
    }
    for name, module in named:
        if name and module in replaced:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, replaced[module])
    return replaced.get(model, model) if replaced else None
