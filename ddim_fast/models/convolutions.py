"""A convolution with fewer multiplications, by ``kernels.convolution``."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.convolution import convolve, transformed_weights
from .kernel_inputs import suits_kernel


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
        points = self.points
        return convolve(x, points, self.bias) if suits_kernel(x, points) else super().forward(x)
