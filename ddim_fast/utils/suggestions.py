"""Guess which name was meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

OTHER_WORDS = {
    "num_inference_steps": ("steps", "num_steps", "ddim_steps", "sampling_steps", "sampling_timesteps", "n_steps", "S"),
    "timestep_spacing": ("spacing", "schedule_type"),
    "eta": ("ddim_eta",),
    "clip_sample": ("clip", "clip_denoised", "clip_x0", "clip_x_start"),
    "prediction_type": ("parameterization", "objective", "model_type"),
    "guidance_scale": ("cfg", "cfg_scale", "guidance", "unconditional_guidance_scale"),
    "epsilon": ("eps", "noise", "pred_noise", "e"),
    "sample": ("x0", "x_0", "x_start", "pred_x0", "start_x", "data"),
    "v_prediction": ("v", "pred_v", "v-prediction", "vprediction", "v_pred"),
    "flow": ("velocity", "flow_prediction", "flow_matching", "rectified_flow"),
    "karras": ("use_karras_sigmas",),
    "exponential": ("use_exponential_sigmas",),
    "beta": ("use_beta_sigmas",),
    "log_snr": ("use_lu_lambdas", "logsnr", "lu"),
}
"""Names of this package, and what other libraries and papers call the same thing."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of ``names`` that was meant by ``name``; None where none is near."""
    names = list(names)
    for known in names:
        if name.lower().replace("-", "_") == known.lower() or name.lower() in map(
            str.lower, OTHER_WORDS.get(known, ())
        ):
            return known
    return next(iter(difflib.get_close_matches(name, names, 1)), None)


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return ``did you mean NAME?`` for the one of ``names`` that was meant by ``name``; "" where
    none is near."""
    meant = nearest(name, names) if isinstance(name, str) else None
    return "" if meant is None else f"did you mean {meant}?"


def suggests_names(function: _F) -> _F:
    """Name the nearest parameter where a function or method is given a keyword that it lacks.

    The function's signature must have no ``**keywords``.

    Raises:
        TypeError: as Python's own, with what was meant.
    """
    names = [p.name for p in list(inspect.signature(function).parameters.values())[1:]]
    known = frozenset(names)

    @wraps(function)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not known.issuperset(keywords):
            wrong = next(name for name in keywords if name not in known)
            remedy = did_you_mean(wrong, names) or f"it takes {', '.join(names)}"
            raise TypeError(
                f"{type(self).__name__} has no argument {wrong!r}, got {wrong}={keywords[wrong]!r:.60}: {remedy}"
            )
        return function(self, *arguments, **keywords)

    return checked  # type: ignore[return-value]  # it has the same signature
