"""azula's ``DDIMSampler`` with one fused step per time.

    from ddim_fast.integrations.azula import FastDDIMSampler

    sampler = FastDDIMSampler(denoiser, eta=0.5, steps=64)  # was: azula.sample.DDIMSampler

Works with azula's denoisers and schedules without importing azula: a denoiser is called as
``denoiser(x_t, t, **kwargs).mean`` and has ``schedule(t) -> (alpha_t, sigma_t)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import check_eta, mean_coefficients
from ..utils.checks import check_integer, check_number, check_samples, refuse
from .original_results import HALF_PRECISION, kinds_of_results, step_of_kind
from .outputs import check_output


class FastDDIMSampler:
    """``azula.sample.DDIMSampler`` with fused steps, for any schedule x_t = alpha_t x + sigma_t z.

    The schedule need not be variance preserving.

    Args:
        denoiser: azula's, or anything with its interface. It predicts the mean of x given x_t.
        eta: 0 is deterministic; 1 adds as much noise as DDPM. It scales the variance (azula's
            convention); eta tau is clipped to [0, 1].
        start, stop: the first and the last time.
        steps: S, the number of steps; times are evenly spaced.
        silent: show no progress bar.
        dtype, device: of the times. The schedule is computed in this dtype, float32 at least; by
            default in torch's default dtype, as azula does.

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
        self.denoiser = denoiser
        self.eta = eta
        self.start = _time("start", start)
        self.stop = _time("stop", stop)
        self.steps = check_integer("steps", steps, at_least=1)
        self.silent = silent
        self.dtype = dtype
        self.device = device

    def __repr__(self) -> str:
        times = f"start={self.start}, stop={self.stop}, steps={self.steps}"
        return f"{type(self).__name__}({type(self.denoiser).__name__}, eta={self.eta}, {times})"

    @property
    def timesteps(self) -> Tensor:
        """The times ``(S + 1,)``, from ``start`` to ``stop``."""
        return self._times(self.device)

    def _times(self, device: torch.device | str | None) -> Tensor:
        return torch.linspace(self.start, self.stop, self.steps + 1, dtype=self.dtype, device=device)

    @torch.no_grad()
    def init(
        self, shape: Sequence[int], mean: float | Tensor = 0.0, var: float | Tensor = 1.0, **kwargs: Any
    ) -> Tensor:
        """Draw the noisy samples to start from.

        N(alpha mean, alpha^2 var + sigma^2) at the first time.

        Args:
            shape: of the samples.
            mean, var: of x; numbers, or tensors that expand to ``shape``.
            kwargs: passed to ``Tensor.to``, for instance ``device="cuda"``.

        Returns:
            x_t ``shape``.
        """
        alpha, sigma = (scale.to(**kwargs) for scale in self.denoiser.schedule(self.timesteps[0]))
        std_dev = torch.sqrt(alpha**2 * var + sigma**2)
        mean_t = (alpha * mean).expand(shape)
        return mean_t + std_dev.expand(shape) * torch.randn_like(mean_t)

    @torch.no_grad()
    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Take all steps, from the first time to the last.

        The schedule is evaluated at all times before the first step, so that no step waits for the
        device. If a subclass overrides ``step``, its ``step`` is called.

        Args:
            x: noisy samples at the first time, as ``init`` returns them; not changed.
            kwargs: passed to the denoiser.

        Returns:
            Samples at the last time, in the shape of ``x``; their dtype is that of ``x`` or of the
            denoiser's mean, whichever is wider.

        Raises:
            TypeError, ValueError: a step is impossible; nothing has been computed.
        """
        check_samples("x", x)
        if x.is_meta:
            refuse("x must have values", x.device, "move it to the device of the denoiser")
        made = self.timesteps
        if made.is_meta and not x.is_meta:  # where torch's default device is "meta", they have no values
            made = self._times("cpu")
        times = made.to(device=x.device).unbind()
        rows = _rows(self.denoiser.schedule, times, self.eta)
        own_step = type(self).step is not FastDDIMSampler.step
        for (t, s), row in self.progress_bar(list(zip(pairwise(times), rows, strict=True))):
            x = self.step(x, t, s, **kwargs) if own_step else self._step(x, t, row, kwargs)
        return x

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, **kwargs: Any) -> Tensor:
        """Take one step, from time ``t`` to time ``s``.

        Reads the values of the schedule, and on a GPU waits for them.

        Args:
            x_t: the noisy samples at ``t``; not changed.
            t, s: one number each, on the device of ``x_t``.
            kwargs: passed to the denoiser.

        Returns:
            x_s ``(B, ...)``, in the dtype that ``__call__`` returns. Differentiable.

        Raises:
            TypeError, ValueError: as ``ddim_step``; a time is not one number; there is no such
                step; the mean has another shape.
        """
        check_samples("x_t", x_t)
        for name, time in {"t": t, "s": s}.items():
            if not isinstance(time, Tensor) or time.ndim:
                refuse(
                    f"{name} must be a tensor without dimensions",
                    time,
                    "take samples that are at different times in separate steps",
                )
        (row,) = _rows(self.denoiser.schedule, (t, s), self.eta)
        return self._step(x_t, t, row, kwargs)

    def _step(self, x_t: Tensor, t: Tensor, row: StepCoefficients, kwargs: dict[str, Any]) -> Tensor:
        mean = check_output("denoiser(x_t, t).mean", self.denoiser(x_t, t, **kwargs).mean, x_t, remedy="expand it")
        # Drawn even where the row adds none, so that the generator advances as in azula.
        noise = torch.randn_like(x_t)
        (kind,) = kinds_of_results(_originals_result, x_t, mean, noise)
        return step_of_kind(kind, x_t, mean, row, noise=noise)

    def progress_bar(self, it: Iterable[Any]) -> Iterable[Any]:
        """Return ``it`` with azula's progress bar, unless ``silent``."""
        it = it.unbind() if isinstance(it, Tensor) else it
        return it if self.silent else tqdm(it, miniters=1, unit="step", ncols=79, ascii=True)


def _originals_result(x_t: Tensor, mean: Tensor, noise: Tensor) -> tuple[Tensor]:
    """Run the operations of azula's step. Its coefficients have no dimensions."""
    k = torch.empty((), dtype=torch.get_default_dtype(), device=x_t.device)
    return (k * mean + k * (x_t - k * mean) + k * noise,)


def _time(name: str, value: Any) -> Any:
    """Return ``value``, a number or a tensor without dimensions, as ``torch.linspace`` takes it."""
    return value if isinstance(value, Tensor) and value.ndim == 0 else check_number(name, value)


def _float32_at_least(time: Tensor) -> Tensor:
    return time.float() if time.dtype in HALF_PRECISION else time


def _rows(
    schedule: Callable[[Tensor], tuple[Tensor, Tensor]], times: Sequence[Tensor], eta: float
) -> list[StepCoefficients]:
    """Return the row of each step, from each of ``times`` to the next."""
    check_eta(eta)
    # One time per call, as in azula: a call for several may differ in the last digit. At times in
    # half precision the schedule would lose 1 - alpha^2.
    scales = [scale.detach().reshape(()) for time in times for scale in schedule(_float32_at_least(time))]
    for scale in scales:
        if scale.dtype in HALF_PRECISION:
            raise TypeError(
                f"denoiser.schedule must compute alpha_t and sigma_t in float32 or float64, got {scale.dtype}: "
                "convert the backbone alone (denoiser.backbone.half()), not the schedule"
            )
    numbers = torch.stack(scales).tolist()  # the only wait for the device
    levels = zip(numbers[::2], numbers[1::2], strict=True)
    return [mean_coefficients(*at_t, *at_s, eta) for at_t, at_s in pairwise(levels)]
