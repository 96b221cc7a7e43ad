"""NaN and infinity in samples: found at the end of a run by one pass over them, and followed to the
step that they come from by a second run, which only a bad first one costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import cpu_step
from ..utils.warn import warn_caller

_is_compiling = torch.compiler.is_compiling
Look = Callable[[int, Any, Tensor, Tensor], bool]
"""``look(step, t, x_t, x0)`` is shown a step, as a callback, and returns True to stop there."""


def is_finite(x: Tensor) -> bool:
    """Return whether no element is NaN or infinite. (The host waits for the device.)"""
    known = cpu_step.is_finite(x)
    if known is not None:
        return known
    # A sum takes a tenth of the time of isfinite(); one that overflows says nothing.
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


def is_bad(samples: Tensor, asked: bool | None) -> bool:
    """Return whether samples have NaN or infinity, and the caller who asked so wants to know.

    Unasked, the host waits for no device, and a tensor of a subclass is left alone: a fake one has
    no numbers.
    """
    looked_at = (type(samples) is Tensor and samples.is_cpu) if asked is None else asked
    return looked_at and not _is_compiling() and not is_finite(samples)


def warn_of_bad(samples: Tensor, run_again: Callable[[Look], Tensor] | None, steps: int) -> None:
    """Warn of samples ``(B, ...)`` that are bad, and of the step that NaN or infinity comes from.

    Args:
        run_again: runs once more from the same noise, shows each step, and returns the result; None
            where that cannot be done.
        steps: the number of steps.
    """
    bad = int((~samples.isfinite()).flatten(1).any(1).sum())
    where = "" if run_again is None else _first_place(run_again, steps)
    warn_caller(
        f"samples must be finite, got NaN or infinity in {bad} of {len(samples)}{where}: look at what the model returns there, or "
        "compute in a dtype with more range; check_finite=False leaves this out"
    )


def _first_place(run_again: Callable[[Look], Tensor], steps: int) -> str:
    """Run again, and return in words where the first NaN or infinity is."""
    place = ""

    def look(step: int, t: Any, x_t: Tensor, x0: Tensor) -> bool:
        nonlocal place
        if not is_finite(x_t):
            place = "in what goes into"
        elif not is_finite(x0):
            place = "in the x0 predicted in"
        if place:
            place = f", first {place} step {step} of 0 to {steps - 1} (t = {t:g})"
        return bool(place)

    try:
        result = run_again(look)
    except Exception as error:  # it is a hint: a model that fails in its second run must not take the samples
        return f", from a step that is not known, since a second run failed ({type(error).__name__})"
    if place:
        return place
    return (
        ", but not in a second run from the same noise"
        if is_finite(result)
        else ", first in the result of the last step"
    )
