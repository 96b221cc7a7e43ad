"""Comparison of two results of a subject: bit for bit, or within what its arithmetic allows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..truth.cases import StepCase, StepResult
from ..truth.tolerances import to_numpy
from .base import CheckFailedError, Context
from .judge import truth

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept(result: StepResult) -> StepResult:
    """Return a copy, which no later step can write to."""
    return StepResult(result.x_prev.clone(), None if result.x0 is None else result.x0.clone())


def bits(tensor: Tensor) -> Tensor:
    """Return the elements' bits as integers."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def difference(got: Tensor, expected: Tensor) -> str:
    """Return how two tensors differ, in words; empty where every bit is the same."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"got {got.dtype} of shape {tuple(got.shape)}, where it is {expected.dtype} of shape {tuple(expected.shape)}"
    changed = bits(got) != bits(expected)
    if not changed.any():
        return ""
    place = tuple(int(i) for i in changed.nonzero()[0])
    count, total = int(changed.sum()), changed.numel()
    return f"got {float(got[place])!r} at {place}, where it is {float(expected[place])!r}; {count} of {total} elements differ"


def same_bits(context: Context, rule: str, got: Tensor, expected: Tensor) -> None:
    """Raise CheckFailedError with this rule unless every bit is the same."""
    found = difference(got, expected)
    context.measured(0.0)
    if found:
        raise CheckFailedError(f"{rule}, {found}")


def same_results(context: Context, rule: str, got: StepResult, expected: StepResult) -> None:
    """Raise CheckFailedError with this rule unless x_prev, and x0 where both have it, are the same
    bits."""
    same_bits(context, f"{rule}: x_prev", got.x_prev, expected.x_prev)
    if got.x0 is not None and expected.x0 is not None:
        same_bits(context, f"{rule}: x0", got.x0, expected.x0)


def same_numbers(context: Context, rule: str, got: Tensor, expected: Tensor, allowed: np.ndarray | float) -> None:
    """Raise CheckFailedError with this rule unless two results are the same.

    Where the subject's arithmetic is exact, every bit must be; otherwise each of the two may be off
    by ``allowed``.
    """
    if context.subject.arithmetic == "exact":
        same_bits(context, rule, got, expected)
        return
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise CheckFailedError(f"{rule}, {difference(got, expected)}")
    a, b = to_numpy(got), to_numpy(expected)
    share = np.abs(a - b) / np.broadcast_to(2 * allowed, a.shape)
    share = np.where(np.isfinite(share) | (np.isnan(a) & np.isnan(b)), share, np.inf)
    share = np.where(bits(got).numpy(force=True) == bits(expected).numpy(force=True), 0.0, share)
    context.measured(float(share.max(initial=0.0)))
    if (share > 1).any():
        place = tuple(int(i) for i in np.unravel_index(np.argmax(share), share.shape))
        raise CheckFailedError(
            f"{rule}, got {float(a[place])!r} at {place}, where it is {float(b[place])!r}: {share[place]:.3g} times the difference "
            "that rounding may make"
        )


def allowed_of(context: Context, case: StepCase) -> np.ndarray:
    """Return how far x_prev of a step may be off, including its own rounding."""
    true = truth(context.subject, case, context.levels(case.setting)[case.index])
    finfo = torch.finfo(case.dtype)
    return true.allowed + finfo.eps * np.abs(true.exact.x_prev) + finfo.smallest_normal


__all__ = ["allowed_of", "bits", "difference", "kept", "same_bits", "same_numbers", "same_results"]
