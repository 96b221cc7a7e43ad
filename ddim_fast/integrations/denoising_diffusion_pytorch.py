"""denoising-diffusion-pytorch (lucidrains, version 2): its DDIM loop with one fused step per timestep.

from ddim_fast.integrations.denoising_diffusion_pytorch import use_fast_ddim

use_fast_ddim(diffusion)  # from here on, diffusion.sample(...) computes its steps with ddim_fast

Works on the original object, which it does not import: ``GaussianDiffusion`` and ``GaussianDiffusion1D``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from types import MappingProxyType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels.contract import StepCoefficients
from ..kernels.dispatch import ddim_step
from ..plans.coefficients import ddim_coefficients, variance_with_room

PREDICTION_TYPES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
"""The original's objectives by the names of ``update.PREDICTION_TYPES``."""


@torch.no_grad()
def ddim_sample(
    diffusion: Any, shape: Sequence[int], return_all_timesteps: bool = False, *, progress: bool = True
) -> Tensor:
    """``GaussianDiffusion.ddim_sample``: x0 is clipped to [-1, 1], and eps derived again from it.

    Args:
        diffusion: a ``GaussianDiffusion``. Its ``sampling_timesteps`` and ``ddim_sampling_eta`` are read in each call.
        shape: ``(B, C, H, W)``.
        return_all_timesteps: return the noisy samples of every step, too.
        progress: show the original's progress bar.

    Returns:
        Samples ``shape`` in torch's default dtype, in [0, 1] (in [-1, 1] where ``auto_normalize`` is off); with
        ``return_all_timesteps`` ``(B, S + 1, C, H, W)``, noise first. The generator is left as the original leaves it.

    Raises:
        TypeError, ValueError: the object is no such diffusion, or one of its settings is out of range.
    """
    _check_variant(diffusion, ddim_sample)

    def call(x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        return diffusion.model(x, t, x_self_cond)

    states = _states(diffusion, shape, call, clip=True, rederives_eps=True, progress=progress)
    return diffusion.unnormalize(torch.stack(list(states), dim=1) if return_all_timesteps else _last(states))


@torch.no_grad()
def ddim_sample_1d(
    diffusion: Any,
    shape: Sequence[int],
    clip_denoised: bool = True,
    model_forward_kwargs: Mapping[str, Any] = MappingProxyType({}),
    return_noise: bool = False,
    *,
    progress: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """``GaussianDiffusion1D.ddim_sample``: as ``ddim_sample``, but with objective ``pred_noise`` eps stays the model's where x0 is clipped.

    Args:
        diffusion: a ``GaussianDiffusion1D``.
        shape: ``(B, C, L)``, or ``(B, L, C)`` where ``channel_first`` is off.
        clip_denoised: clip x0 to [-1, 1].
        model_forward_kwargs: passed to the model by name.
        return_noise: return the noise that sampling started from, too.

    Returns:
        Samples ``shape``, in [0, 1] with ``auto_normalize``; or (samples, noise).

    Raises:
        TypeError, ValueError: as ``ddim_sample``.
    """
    _check_variant(diffusion, ddim_sample_1d)

    def call(x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        conditioning = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return diffusion.model(x, t, **{**model_forward_kwargs, **conditioning})

    rederives = diffusion.objective != "pred_noise"
    states = _states(diffusion, shape, call, clip=clip_denoised, rederives_eps=rederives, progress=progress)
    noise = next(states)
    samples = diffusion.unnormalize(_last(states))
    return (samples, noise) if return_noise else samples


def use_fast_ddim(diffusion: Any) -> Any:
    """Make ``diffusion.sample(...)`` compute its steps with ddim_fast: the object's ``ddim_sample`` is replaced, for this object alone.

    Copies of the object, such as ``Trainer``'s moving average, are fast with weights of their own. Its ``state_dict`` is as before.

    Args:
        diffusion: a ``GaussianDiffusion`` or ``GaussianDiffusion1D``, made with ``sampling_timesteps`` below ``timesteps``.

    Returns:
        The object itself.

    Raises:
        TypeError: it is something else, or a subclass with a step of its own.
        ValueError: its ``sample`` would not use ``ddim_sample``.
    """
    replacement = _replacement(diffusion)
    if not diffusion.is_ddim_sampling:
        raise ValueError(
            "diffusion.sample uses DDIM only where sampling_timesteps is less than timesteps, got "
            f"{diffusion.sampling_timesteps} and {diffusion.num_timesteps}: make the diffusion with fewer sampling_timesteps"
        )
    if "gt" in inspect.signature(type(diffusion).sample).parameters:
        raise TypeError(
            f"the sample of {type(diffusion).__module__} never uses ddim_sample, got an object of it: call ddim_sample(diffusion, shape)"
        )
    # A method of the object, not a closure over it: a deep copy's method is then bound to the copy.
    diffusion.ddim_sample = MethodType(replacement, diffusion)
    return diffusion


def use_original_ddim(diffusion: Any) -> Any:
    """Undo ``use_fast_ddim``. Returns the object itself."""
    vars(diffusion).pop("ddim_sample", None)
    return diffusion


# --- The loop ---------------------------------------------------------------------------------------------------------


def _states(
    diffusion: Any,
    shape: Sequence[int],
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    clip: bool,
    rederives_eps: bool,
    progress: bool,
) -> Iterator[Tensor]:
    """The noise, and the result of each step. Noise is drawn where the original draws it."""
    steps = _steps(diffusion, clip, rederives_eps)
    batch, device = shape[0], diffusion.betas.device
    x_t = torch.randn(shape, device=device)
    yield x_t
    x0 = None
    for t, t_next, row in tqdm(steps, desc="sampling loop time step", disable=not progress):
        time = torch.full((batch,), t, device=device, dtype=torch.long)
        model_output = call(x_t, time, x0 if diffusion.self_condition else None)
        # Also where the row adds none: the generator is to be left as the original leaves it.
        noise = torch.randn_like(x_t) if t_next >= 0 else None
        x0 = torch.empty_like(x_t) if diffusion.self_condition else None
        x_t = ddim_step(x_t, model_output, row, noise=noise, out=_next_state(diffusion, x_t, model_output), x0_out=x0)
        yield x_t


def _last(states: Iterator[Tensor]) -> Tensor:
    for state in states:  # each is let go before the next but one
        last = state
    return last


def _next_state(diffusion: Any, x_t: Tensor, model_output: Tensor) -> Tensor:
    """Memory for x_prev, laid out as the original's: as x0 is, which with ``pred_x0`` is as the model returns it.

    The next step's noise is drawn in the order of the samples' memory, so a model in channels_last gives other samples otherwise.
    """
    like = model_output if diffusion.objective == "pred_x0" and model_output.shape == x_t.shape else x_t
    return torch.empty_like(like, dtype=x_t.dtype)


def _steps(diffusion: Any, clip: bool, rederives_eps: bool) -> list[tuple[int, int, StepCoefficients]]:
    """(t, t_next, row) of every step; the last t_next is -1, clean data."""
    eta, prediction_type = _check_settings(diffusion)
    alpha_bars = [*_alpha_bars(diffusion).tolist(), 1.0]  # [-1] is clean data
    rows = []
    for t, t_next in _time_pairs(diffusion.num_timesteps, diffusion.sampling_timesteps):
        alpha_bar_t, alpha_bar_next = alpha_bars[t], alpha_bars[t_next]
        variance = variance_with_room(
            alpha_bar_t, alpha_bar_next, eta, f"in the step from {t} to {t_next} (ddim_sampling_eta)"
        )
        row = ddim_coefficients(
            alpha_bar_t,
            alpha_bar_next,
            prediction_type,
            variance=variance,
            clip_sample_range=1.0 if clip else None,
            use_clipped_model_output=clip and rederives_eps,
        )
        rows.append((t, t_next, row))
    return rows


def _time_pairs(num_timesteps: int, sampling_timesteps: int) -> list[tuple[int, int]]:
    """The original's: T times from T - 1 to -1 at equal distances, in torch's default precision, cut off to integers."""
    times = torch.linspace(-1, num_timesteps - 1, steps=sampling_timesteps + 1).int().tolist()
    return list(pairwise(reversed(times)))


def _alpha_bars(diffusion: Any) -> np.ndarray:
    """alpha_bar_t in float64, ``(T,)``, as it was before the diffusion rounded it to float32.

    The buffers hold it and sqrt(1 - alpha_bar_t), each rounded: the larger of the two noise levels is taken from its own buffer, so that
    neither it nor its complement is off by more than some float32 eps of itself.
    """
    alpha_bar = diffusion.alphas_cumprod.double().cpu().numpy()
    noise_level = diffusion.sqrt_one_minus_alphas_cumprod.double().cpu().numpy()
    return np.where(alpha_bar < 0.5, alpha_bar, 1 - noise_level**2)


# --- Checks -----------------------------------------------------------------------------------------------------------

_PARAMETERS = {
    ("shape", "return_all_timesteps"): ddim_sample,
    ("shape", "clip_denoised", "model_forward_kwargs", "return_noise"): ddim_sample_1d,
}
"""Which loop stands in for an original ``ddim_sample`` with these parameters."""
_USED = ("model_predictions", "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start")


def _replacement(diffusion: Any) -> Callable[..., Any]:
    """The function that computes what the class's ``ddim_sample`` does."""
    kind = type(diffusion)
    name = f"{kind.__module__}.{kind.__qualname__}"
    original = getattr(kind, "ddim_sample", None)
    if original is None or not hasattr(kind, "model_predictions"):
        raise TypeError(
            f"diffusion must be a GaussianDiffusion or GaussianDiffusion1D of denoising-diffusion-pytorch, got {name}"
        )
    parameters = tuple(inspect.signature(original).parameters)[1:]
    rederives = "rederive_pred_noise" in inspect.signature(kind.model_predictions).parameters
    if parameters not in _PARAMETERS or not rederives:
        raise TypeError(
            f"ddim_sample must be that of GaussianDiffusion or GaussianDiffusion1D (version 2), got {name} with "
            f"ddim_sample({', '.join(parameters)}): use its own"
        )
    owner = _owner(kind, "ddim_sample")
    if changed := [method for method in _USED if _owner(kind, method) is not owner]:
        raise TypeError(
            f"the step of {name} must be that of {owner.__name__}, got a {changed[0]} of its own: use its own ddim_sample"
        )
    return _PARAMETERS[parameters]


def _owner(kind: type, method: str) -> type | None:
    return next((base for base in kind.__mro__ if method in vars(base)), None)


def _check_variant(diffusion: Any, wanted: Callable[..., Any]) -> None:
    found = _replacement(diffusion)
    if found is not wanted:
        raise TypeError(f"{wanted.__name__} got a {type(diffusion).__name__}: use {found.__name__}")


def _check_settings(diffusion: Any) -> tuple[float, str]:
    """(eta, prediction type)"""
    eta, objective, count = diffusion.ddim_sampling_eta, diffusion.objective, diffusion.sampling_timesteps
    if not isinstance(eta, Real) or not 0 <= eta < math.inf:
        raise ValueError(f"ddim_sampling_eta must be a finite number, 0 (deterministic) or more, got {eta!r}")
    if objective not in PREDICTION_TYPES:
        raise ValueError(f"objective must be one of {', '.join(PREDICTION_TYPES)}, got {objective!r}")
    if not 1 <= count <= diffusion.num_timesteps:
        raise ValueError(f"sampling_timesteps must be 1 to {diffusion.num_timesteps}, got {count}")
    if diffusion.alphas_cumprod.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"alphas_cumprod must be float32 or float64, got {diffusion.alphas_cumprod.dtype}, which is too coarse for a schedule: "
            "convert diffusion.model alone, not the diffusion"
        )
    return float(eta), PREDICTION_TYPES[objective]
