"""azula: its ``DDIMSampler`` with one fused step per time.

from ddim_fast.integrations.azula import FastDDIMSampler

sampler = FastDDIMSampler(denoiser, eta=0.5, steps=64)  # was: azula.sample.DDIMSampler

Works on azula's denoisers and schedules, which it does not import: a denoiser is called as ``denoiser(x_t, t, **kwargs).mean`` and has
``schedule(t) -> (alpha_t, sigma_t)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..plans.coefficients import check_eta, mean_coefficients


class FastDDIMSampler:
    """``azula.sample.DDIMSampler``, for any schedule: x_t = alpha_t x + sigma_t z need not keep the variance.

    Args:
        denoiser: azula's, or anything with its interface. It predicts the mean of x given x_t.
        eta: 0 is deterministic; 1 is DDPM's noise. It scales the variance (azula's convention); eta tau is held within [0, 1].
        start, stop: the first and the last time.
        steps: S, the number of steps; times are at equal distances.
        silent: show no progress bar.
        dtype, device: of the times. In float64, so is the schedule; by default it is rounded to torch's default dtype, as azula's is.

    Raises:
        TypeError, ValueError: the denoiser has no such interface, or an argument is out of range.
    """

    def __init__(
        self,
        denoiser: Any,
        eta: float = 0.0,
        *,
        start: float = 1.0,
        stop: float = 0.0,
        steps: int = 64,
        silent: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if not callable(denoiser) or not callable(getattr(denoiser, "schedule", None)):
            raise TypeError(
                "denoiser must be callable as denoiser(x_t, t).mean and have a schedule(t) -> (alpha_t, sigma_t), "
                f"got {type(denoiser).__name__}: use one of azula.denoise"
            )
        check_eta(eta)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer, 1 or more, got {steps!r}")
        self.denoiser = denoiser
        self.eta = eta
        self.start = start
        self.stop = stop
        self.steps = steps
        self.silent = silent
        self.dtype = dtype
        self.device = device

    @property
    def timesteps(self) -> Tensor:
        """``(S + 1,)``: the times, from ``start`` to ``stop``."""
        return torch.linspace(self.start, self.stop, self.steps + 1, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def init(
        self, shape: Sequence[int], mean: float | Tensor = 0.0, var: float | Tensor = 1.0, **kwargs: Any
    ) -> Tensor:
        """Noise to start from, of x with this mean and variance at the first time: N(alpha mean, alpha^2 var + sigma^2).

        Args:
            shape: of the samples.
            mean, var: numbers, or tensors that expand to ``shape``.
            kwargs: passed to ``Tensor.to``, for instance ``device="cuda"``.

        Returns:
            x_t ``shape``.
        """
        alpha, sigma = (scale.to(**kwargs) for scale in self.denoiser.schedule(self.timesteps[0]))
        mean, std_dev = alpha * mean, torch.sqrt(alpha**2 * var + sigma**2)
        mean, std_dev = mean.expand(shape), std_dev.expand(shape)
        return mean + std_dev * torch.randn_like(mean)

    @torch.no_grad()
    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """All steps, from the first time to the last.

        The schedule is asked for all times before the first step, so that none waits for the device. The ``step`` of a subclass is used
        where it has one.

        Args:
            x: noisy samples at the first time; it is not changed. What ``init`` returns.
            kwargs: passed to the denoiser.

        Returns:
            Samples at the last time, of the shape of ``x``, and its dtype or that of the denoiser's mean, whichever is wider.

        Raises:
            TypeError, ValueError: a step is not possible; nothing has been computed.
        """
        times = self.timesteps.to(device=x.device).unbind()
        rows = _rows(self.denoiser.schedule, times, self.eta)
        own_step = type(self).step is not FastDDIMSampler.step
        for (t, s), row in self.progress_bar(list(zip(pairwise(times), rows, strict=True))):
            x = self.step(x, t, s, **kwargs) if own_step else self._step(x, t, row, kwargs)
        return x

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, **kwargs: Any) -> Tensor:
        """One step, from time ``t`` to time ``s``. Reads the schedule's values, and on a GPU waits for them.

        Args:
            x_t: the noisy samples at ``t``; not changed.
            t, s: one number each, on the device of ``x_t``.
            kwargs: passed to the denoiser.

        Returns:
            x_s ``(B, ...)``; as ``__call__``. Differentiable.

        Raises:
            TypeError, ValueError: as ``ddim_step``; a time is not one number; there is no such step; the mean has another shape.
        """
        for name, time in {"t": t, "s": s}.items():
            if not isinstance(time, Tensor) or time.ndim:
                raise ValueError(
                    f"{name} must be a tensor that holds one number, got {time!r:.80}: step samples at different times apart"
                )
        (row,) = _rows(self.denoiser.schedule, (t, s), self.eta)
        return self._step(x_t, t, row, kwargs)

    def _step(self, x_t: Tensor, t: Tensor, row: StepCoefficients, kwargs: dict[str, Any]) -> Tensor:
        mean = self.denoiser(x_t, t, **kwargs).mean
        if not isinstance(mean, Tensor) or mean.shape != x_t.shape:
            raise ValueError(
                f"the denoiser's mean must be a tensor of the shape of x_t, {tuple(x_t.shape)}, got "
                f"{tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__}: expand it"
            )
        # Also where the row adds none: the generator is to be left as azula leaves it.
        noise = torch.randn_like(x_t)
        dtype = torch.promote_types(x_t.dtype, mean.dtype)
        # Laid out as azula's result: the next noise is drawn in the order of its memory.
        out = torch.empty_like(mean, dtype=dtype)
        return ddim_step(x_t.to(dtype), mean, row, noise=noise.to(dtype), out=out)

    def progress_bar(self, it: Iterable[Any]) -> Iterable[Any]:
        """azula's progress bar over ``it``, unless ``silent``."""
        it = it.unbind() if isinstance(it, Tensor) else it
        return it if self.silent else tqdm(it, miniters=1, unit="step", ncols=79, ascii=True)


def _rows(
    schedule: Callable[[Tensor], tuple[Tensor, Tensor]], times: Sequence[Tensor], eta: float
) -> list[StepCoefficients]:
    """The steps between times that follow one another."""
    check_eta(eta)
    # Each time by itself, as azula asks: for several at once, the last digit may be another.
    scales = [scale.detach().double().reshape(()) for time in times for scale in schedule(time)]
    numbers = torch.stack(scales).tolist()  # the one wait for the device
    levels = zip(numbers[::2], numbers[1::2], strict=True)
    return [mean_coefficients(*at_t, *at_s, eta) for at_t, at_s in pairwise(levels)]
