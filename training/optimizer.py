"""Muon for the weights of hidden layers, AdamW for all other parameters.

Muon (K. Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks") replaces
each momentum matrix by the nearest semi-orthogonal matrix, approximated with a few Newton-Schulz
steps. ``torch.optim.Muon`` takes matrices only; this one also takes a convolution's weight, as the
matrix (out_channels, in_channels * height * width).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The quintic of Jordan et al. is chosen for speed: it brings singular values to about [0.7, 1.2],
# not to 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate ``U V^T`` of the singular value decomposition ``U S V^T`` of ``matrix``."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module, adamw_modules: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters for Muon and those for AdamW.

    Muon gets matrices and convolution weights, except in the top-level modules ``adamw_modules``.
    """
    muon, adamw = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim >= 2 and name.split(".")[0] not in adamw_modules
        (muon if hidden else adamw).append(parameter)
    return muon, adamw
