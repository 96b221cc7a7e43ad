"""The DDIM update as the paper writes it, in plain PyTorch."""

import math

from torch import Tensor


def std_dev_paper(alpha_bar_t: float, alpha_bar_prev: float, eta: float) -> float:
    """sigma_t(eta), equation 16 of arXiv 2010.02502."""
    if alpha_bar_prev == 1:
        return 0.0
    return (
        eta
        * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t))
        * math.sqrt(max(1 - alpha_bar_t / alpha_bar_prev, 0.0))
    )


def ddim_step_paper(
    x_t: Tensor, eps: Tensor, alpha_bar_t: float, alpha_bar_prev: float, eta: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """Equation 12 of arXiv 2010.02502 (whose alpha is the cumulative product, here alpha_bar), in the dtype of its arguments.

    Args:
        x_t: noisy samples, any shape.
        eps: the model's prediction of the noise in ``x_t``, of the same shape.
        alpha_bar_t, alpha_bar_prev: cumulative products at this timestep and at the next one to visit.
        z: standard normal noise, needed where ``eta`` > 0.
    """
    std_dev_t = std_dev_paper(alpha_bar_t, alpha_bar_prev, eta)
    predicted_x0 = (x_t - math.sqrt(1 - alpha_bar_t) * eps) / math.sqrt(alpha_bar_t)
    direction = math.sqrt(max(1 - alpha_bar_prev - std_dev_t**2, 0.0)) * eps
    x_prev = math.sqrt(alpha_bar_prev) * predicted_x0 + direction
    return x_prev if std_dev_t == 0 else x_prev + std_dev_t * z
