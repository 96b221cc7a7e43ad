"""NaN and infinity in samples: found at the end of a run by one pass over them, and followed to the
step that they come from by a second run, which only a bad first one costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import refuse
from ..utils.warn import warn_caller

Look = Callable[[int, Any, Tensor, Tensor], bool]
"""``look(step, t, x_t, x0)`` is shown a step, as a callback, and returns True to stop there."""


def is_finite(x: Tensor) -> bool:
    """Return whether no element is NaN or infinite. (The host waits for the device.)"""
    # A sum takes a tenth of the time of isfinite(); one that overflows says nothing.
    wide = torch.promote_types(x.dtype, torch.float32)
    return math.isfinite(x.sum(dtype=wide).item()) or bool(x.isfinite().all())


def check_asked(check_finite: object) -> None:
    """Raise TypeError unless it is one of the values of the option."""
    if check_finite is not None and not isinstance(check_finite, bool):
        refuse("check_finite must be True, False or None", check_finite, kind=TypeError)


def is_looked_at(samples: Tensor, asked: bool | None) -> bool:
    """Return whether a caller who asked so wants to know of NaN and infinity.

    Unasked, a tensor of a subclass is left alone: a fake one has no numbers.
    """
    unasked = asked is None and samples.device.type == "cpu" and type(samples) is Tensor
    return (asked or unasked) and not torch.compiler.is_compiling()


def warn_unless_finite(
    samples: Tensor, asked: bool | None, run_again: Callable[[Look], Tensor] | None, steps: int
) -> None:
    """Warn of samples ``(B, ...)`` with NaN or infinity, and of the step that they come from.

    Args:
        asked: False looks at nothing; None only where the host need not wait for a device.
        run_again: runs once more from the same noise, shows each step, and returns the result; None
            where that cannot be done.
        steps: the number of steps.
    """
    if not is_looked_at(samples, asked) or is_finite(samples):
        return
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
