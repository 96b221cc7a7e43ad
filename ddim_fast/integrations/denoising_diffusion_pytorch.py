"""The DDIM loop of lucidrains' denoising-diffusion-pytorch with one fused step per timestep.

    from ddim_fast.integrations.denoising_diffusion_pytorch import use_fast_ddim

    use_fast_ddim(diffusion)  # from now on, diffusion.sample(...) computes its steps with ddim_fast

Works on the objects of version 2, ``GaussianDiffusion`` and ``GaussianDiffusion1D``, without
importing it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.contract import StepCoefficients
from ..plans.coefficients import check_eta, ddim_coefficients, variance_with_room
from ..utils.checks import check_choice, check_integer, refuse
from ..utils.progress import tqdm
from .original_results import kinds_of_results, per_sample_coefficient, step_of_kind, step_with_x0
from .outputs import check_output

PREDICTION_TYPES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
"""The prediction type of each of the original's objectives."""


@torch.no_grad()
def ddim_sample(
    diffusion: Any, shape: Sequence[int], return_all_timesteps: bool = False, *, progress: bool = True
) -> Tensor:
    """Sample as ``GaussianDiffusion.ddim_sample``.

    x0 is clipped to [-1, 1], and eps is recomputed from it.

    Args:
        diffusion: a ``GaussianDiffusion``. Its ``sampling_timesteps`` and ``ddim_sampling_eta`` are
            read at each call.
        shape: ``(B, C, H, W)``.
        return_all_timesteps: also return the noisy samples of every step.
        progress: show the original's progress bar.

    Returns:
        Samples ``shape`` in torch's default dtype, in [0, 1] (in [-1, 1] where ``auto_normalize``
        is off); with ``return_all_timesteps`` ``(B, S + 1, C, H, W)``, the noise first. torch's
        generator ends in the same state as after the original.

    Raises:
        TypeError, ValueError: the object is no such diffusion, or a setting of it is out of range.
    """
    _check_variant(diffusion, ddim_sample)

    def call(x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        return diffusion.model(x, t, x_self_cond)

    states = _states(diffusion, shape, call, clip=True, use_clipped_model_output=True, progress=progress)
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
    """Sample as ``GaussianDiffusion1D.ddim_sample``.

    As ``ddim_sample``, but with objective ``pred_noise`` clipping x0 does not change eps.

    Args:
        diffusion: a ``GaussianDiffusion1D``.
        shape: ``(B, C, L)``, or ``(B, L, C)`` where ``channel_first`` is off.
        clip_denoised: clip x0 to [-1, 1].
        model_forward_kwargs: passed to the model by name.
        return_noise: also return the noise that sampling started from.

    Returns:
        Samples ``shape``, in [0, 1] with ``auto_normalize``; or (samples, noise).

    Raises:
        TypeError, ValueError: as ``ddim_sample``.
    """
    _check_variant(diffusion, ddim_sample_1d)
    if not isinstance(model_forward_kwargs, Mapping):
        refuse("model_forward_kwargs must be a dict", model_forward_kwargs, kind=TypeError)

    def call(x: Tensor, t: Tensor, x_self_cond: Tensor | None) -> Tensor:
        conditioning = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return diffusion.model(x, t, **{**model_forward_kwargs, **conditioning})

    recomputes_eps = diffusion.objective != "pred_noise"
    states = _states(
        diffusion, shape, call, clip=clip_denoised, use_clipped_model_output=recomputes_eps, progress=progress
    )
    noise = next(states)
    samples = diffusion.unnormalize(_last(states))
    return (samples, noise) if return_noise else samples


def use_fast_ddim(diffusion: Any) -> Any:
    """Make ``diffusion.sample(...)`` compute its steps with ddim_fast.

    Replaces the ``ddim_sample`` of this object only. Copies of the object, such as ``Trainer``'s
    moving average, are fast, too, with their own weights. The ``state_dict`` does not change.

    Args:
        diffusion: a ``GaussianDiffusion`` or ``GaussianDiffusion1D`` with ``sampling_timesteps``
            below ``timesteps``.

    Returns:
        The object itself.

    Raises:
        TypeError: it is something else, or a subclass that overrides the step.
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
            f"diffusion.sample must use ddim_sample, got that of {type(diffusion).__module__}, which never uses ddim_sample: "
            "call ddim_sample(diffusion, shape)"
        )
    # In a deep copy of the object, or one loaded from a file, it is bound to the copy. (A closure
    # could not be saved, and a method is loaded by its name: as the original.)
    diffusion.ddim_sample = partial(replacement, diffusion)
    return diffusion


def use_original_ddim(diffusion: Any) -> Any:
    """Undo ``use_fast_ddim``; return the object itself."""
    vars(diffusion).pop("ddim_sample", None)
    return diffusion


# --- The loop ---------------------------------------------------------------------------------------------------------


def _states(
    diffusion: Any,
    shape: Sequence[int],
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    clip: bool,
    use_clipped_model_output: bool,
    progress: bool,
) -> Iterator[Tensor]:
    """Yield the noise, then the result of each step. Noise is drawn where the original draws it."""
    steps = _steps(diffusion, clip, use_clipped_model_output)
    device = diffusion.betas.device
    x_t = torch.randn(shape, device=device)
    batch = x_t.shape[0]
    yield x_t
    x0 = None
    for t, t_next, row in tqdm(steps, desc="sampling loop time step", disable=not progress):
        time = torch.full((batch,), t, device=device, dtype=torch.long)
        output = call(x_t, time, x0 if diffusion.self_condition else None)
        model_output = check_output("the output of diffusion.model", output, x_t)
        # Drawn even where the row adds none, so that the generator advances as in the original.
        noise = torch.randn_like(x_t) if t_next >= 0 else None
        x0_kind, kind = kinds_of_results(
            _originals_results,
            x_t,
            model_output,
            noise,
            levels=diffusion.alphas_cumprod.dtype,
            objective=diffusion.objective,
            clip=bool(clip),
            recomputes_eps=use_clipped_model_output,
        )
        if diffusion.objective == "pred_x0" and not clip:  # the original's x0 is that tensor itself
            x0 = model_output
            x_t = x0 if noise is None else step_of_kind(kind, x_t, model_output, row, noise=noise)
        elif diffusion.self_condition:
            x_t, x0 = step_with_x0(x0_kind, kind, x_t, model_output, row, noise=noise)
        else:
            x_t = step_of_kind(kind, x_t, model_output, row, noise=noise)
        yield x_t


def _last(states: Iterator[Tensor]) -> Tensor:
    for state in states:  # each is released before the next but one is computed
        last = state
    return last


def _originals_results(
    x: Tensor,
    m: Tensor,
    noise: Tensor | None,
    *,
    levels: torch.dtype,
    objective: str,
    clip: bool,
    recomputes_eps: bool,
) -> tuple[Tensor, Tensor]:
    """Run the operations of the originals' step; return x0 and x_prev."""
    k, number = per_sample_coefficient(x, levels), torch.empty((), dtype=levels, device=x.device)
    x0 = m if objective == "pred_x0" else k * x - k * m
    x0 = x0.clamp(-1, 1) if clip else x0
    if noise is None:  # the last step
        return x0, x0
    eps = (k * x - x0) / k if objective != "pred_noise" or recomputes_eps else m
    return x0, x0 * number + number * eps + number * noise


def _steps(diffusion: Any, clip: bool, use_clipped_model_output: bool) -> list[tuple[int, int, StepCoefficients]]:
    """Return (t, t_next, row) of every step; the last t_next is -1, clean data."""
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
            use_clipped_model_output=clip and use_clipped_model_output,
        )
        rows.append((t, t_next, row))
    return rows


def _time_pairs(num_timesteps: int, sampling_timesteps: int) -> list[tuple[int, int]]:
    """Choose the original's pairs of timesteps.

    They are evenly spaced from T - 1 to -1, in torch's default dtype, and truncated to integers. A
    default in half precision may round T - 1 up to T, where the original fails: then in float32.
    """
    for dtype in (torch.get_default_dtype(), torch.float32):
        spaced = torch.linspace(-1, num_timesteps - 1, steps=sampling_timesteps + 1, dtype=dtype, device="cpu")
        times = spaced.int().tolist()
        if times[-1] < num_timesteps:
            break
    return list(pairwise(reversed(times)))


def _alpha_bars(diffusion: Any) -> np.ndarray:
    """Compute alpha_bar_t ``(T,)`` in float64, as exactly as the float32 buffers allow.

    The buffers hold alpha_bar_t and sqrt(1 - alpha_bar_t), both rounded. The smaller of alpha_bar_t
    and 1 - alpha_bar_t is taken from its own buffer, so the relative error of both is a few float32
    eps.
    """
    alpha_bar = diffusion.alphas_cumprod.cpu().double().numpy()
    noise_level = diffusion.sqrt_one_minus_alphas_cumprod.cpu().double().numpy()
    return np.where(alpha_bar < 0.5, alpha_bar, 1 - noise_level**2)


# --- Checks -----------------------------------------------------------------------------------------------------------

_PARAMETERS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("shape", "return_all_timesteps"): ddim_sample,
    ("shape", "clip_denoised", "model_forward_kwargs", "return_noise"): ddim_sample_1d,
}
"""Which loop replaces an original ``ddim_sample`` with these parameters."""
_COMPUTED_HERE = ("model_predictions", "predict_start_from_noise", "predict_start_from_v", "predict_noise_from_start")


def _replacement(diffusion: Any) -> Callable[..., Any]:
    """Return the function that computes the same as the ``ddim_sample`` of the class."""
    kind = type(diffusion)
    name = f"{kind.__module__}.{kind.__qualname__}"
    original = getattr(kind, "ddim_sample", None)
    if original is None or not hasattr(kind, "model_predictions"):
        raise TypeError(
            f"diffusion must be a GaussianDiffusion or GaussianDiffusion1D of denoising-diffusion-pytorch, got {name}"
        )
    parameters = tuple(inspect.signature(original).parameters)[1:]
    is_version_2 = "rederive_pred_noise" in inspect.signature(kind.model_predictions).parameters
    if parameters not in _PARAMETERS or not is_version_2:
        raise TypeError(
            f"ddim_sample must be that of GaussianDiffusion or GaussianDiffusion1D (version 2), got {name} with "
            f"ddim_sample({', '.join(parameters)}): use its own"
        )
    owner = _owner(kind, "ddim_sample")
    assert owner is not None  # it has the method
    if changed := [method for method in _COMPUTED_HERE if _owner(kind, method) is not owner]:
        raise TypeError(
            f"the step of {name} must be that of {owner.__name__}, got a {changed[0]} of its own: use its own ddim_sample"
        )
    return _PARAMETERS[parameters]


def _owner(kind: type, method: str) -> type | None:
    return next((base for base in kind.__mro__ if method in vars(base)), None)


def _check_variant(diffusion: Any, wanted: Callable[..., Any]) -> None:
    found = _replacement(diffusion)
    if found is not wanted:
        kind = "GaussianDiffusion1D" if wanted is ddim_sample_1d else "GaussianDiffusion"
        raise TypeError(f"{wanted.__name__} takes a {kind}, got a {type(diffusion).__name__}: use {found.__name__}")


def _check_settings(diffusion: Any) -> tuple[float, str]:
    """Return (eta, prediction type)."""
    eta, objective, count = diffusion.ddim_sampling_eta, diffusion.objective, diffusion.sampling_timesteps
    check_eta(eta, "ddim_sampling_eta")
    check_choice("objective", objective, PREDICTION_TYPES)
    check_integer("sampling_timesteps", count, at_least=1, at_most=diffusion.num_timesteps)
    if diffusion.alphas_cumprod.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"alphas_cumprod must be float32 or float64, got {diffusion.alphas_cumprod.dtype}: "
            "convert diffusion.model alone, not the diffusion"
        )
    return float(eta), PREDICTION_TYPES[objective]
