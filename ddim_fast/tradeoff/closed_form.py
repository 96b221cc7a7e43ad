"""A data distribution with a closed-form optimal model and a closed-form distance to samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..plans.schedules import NoiseSchedule


class ClosedForm(nn.Module):
    """A 1-D Gaussian mixture, as a model that predicts eps exactly.

    A batch is ``(B, 1)``: B independent samples. x_t is also a mixture, with means
    sqrt(alpha_bar_t) mean_k and variances alpha_bar_t variance_k + 1 - alpha_bar_t. So E[x0 | x_t]
    is a weighted sum over the components, and eps follows from it (equation 9 of the DDIM paper).

    Args:
        weights, means, std_devs: of the components.
    """

    prediction_type = "epsilon"
    clip_sample_range = None
    sample_shape = (1,)
    alphas_cumprod: Tensor
    weights: Tensor
    means: Tensor
    std_devs: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        weights: tuple[float, ...] = (0.3, 0.7),
        means: tuple[float, ...] = (-1.0, 0.6),
        std_devs: tuple[float, ...] = (0.15, 0.3),
    ):
        super().__init__()
        self.schedule = NoiseSchedule.linear() if schedule is None else schedule
        self.register_buffer(
            "alphas_cumprod", torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float64, device="cpu")
        )
        for name, values in {"weights": weights, "means": means, "std_devs": std_devs}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64, device="cpu"))
        self.weights /= self.weights.sum()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return eps ``(B, 1)`` for ``x`` ``(B, 1)``, computed in float64."""
        alpha_bar = self.alphas_cumprod[t].view(-1, 1)
        x_t, signal = x.double(), alpha_bar.sqrt()
        variances = alpha_bar * self.std_devs**2 + 1 - alpha_bar
        centred = x_t - signal * self.means
        log_p = self.weights.log() - variances.log() / 2 - centred**2 / (2 * variances)
        of_x0 = self.means + signal * self.std_devs**2 / variances * centred
        x0 = (log_p.softmax(1) * of_x0).sum(1, keepdim=True)
        return ((x_t - signal * x0) / (1 - alpha_bar).sqrt()).to(x.dtype)

    def quantile(self, p: Tensor) -> Tensor:
        """Return the data's quantiles at ``p`` ``(N,)`` in (0, 1), float64.

        Bisection finds them to about the last bit.
        """
        reach = 40 * self.std_devs.max().item()
        low = torch.full_like(p, self.means.min().item() - reach)
        high = torch.full_like(p, self.means.max().item() + reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cumulative(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def cumulative(self, x: Tensor) -> Tensor:
        """Return the data's cumulative distribution function at ``x`` ``(N,)``, float64."""
        z = (x[:, None] - self.means) / (self.std_devs * math.sqrt(2))
        return (self.weights * torch.erfc(-z) / 2).sum(1)

    def wasserstein(self, samples: Tensor) -> float:
        """Return the exact 2-Wasserstein distance between samples ``(N, 1)`` and the data.

        In 1-D the optimal transport moves the i-th smallest sample to the i-th slice of mass 1 / N.
        N independent samples of the data are at a distance of about 1 / sqrt(N), N of its quantiles
        at a much smaller one.
        """
        ordered = samples.double().flatten().sort().values
        count = len(ordered)
        edges = self.quantile(torch.arange(1, count, dtype=torch.float64, device="cpu") / count)
        first, second = self._moments(edges)
        return (ordered.square() / count - 2 * ordered * first + second).sum().clamp(min=0).sqrt().item()

    def _moments(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integrals of x and x^2 times the density over each slice, ``(N,)`` each.

        Slices lie between neighbouring edges; the first and the last are unbounded.
        """
        z = (edges[:, None] - self.means) / self.std_devs
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        def slices(values: Tensor, at_infinity: float) -> Tensor:
            ends = torch.zeros(1, values.shape[1], dtype=values.dtype, device=values.device)
            return torch.cat([ends, values, ends + at_infinity]).diff(dim=0)

        mass, of_density, of_z = slices(torch.special.ndtr(z), 1.0), slices(density, 0.0), slices(z * density, 0.0)
        m, s = self.means, self.std_devs
        first = (self.weights * (m * mass - s * of_density)).sum(1)
        second = (self.weights * ((m * m + s * s) * mass - 2 * m * s * of_density - s * s * of_z)).sum(1)
        return first, second

    @staticmethod
    def noise(count: int) -> Tensor:
        """Return x_T as quantiles of a standard normal, ``(count, 1)`` float32.

        Quantiles carry no sampling noise, so that the distance measures the sampler's error.
        """
        p = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        return torch.special.ndtri(p)[:, None].float()
