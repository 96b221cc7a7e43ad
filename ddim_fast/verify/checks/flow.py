"""Whole runs at eta = 0: their end, composition and inversion of steps, and the order of
convergence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from ..truth.cases import Setting, StepCase
from ..truth.tolerances import to_numpy, worst_share
from .base import CheckFailedError, Context, check
from .judge import truth
from .runs import GaussianModel, float64_run

SHAPE = (2, 3, 5, 7)


def _hold(context: Context, what: str, got: torch.Tensor, exact: np.ndarray, allowed: np.ndarray) -> None:
    """Raise CheckFailedError unless a result is within ``allowed`` of the exact one."""
    if tuple(got.shape) != exact.shape:
        raise CheckFailedError(
            f"{what} must have the shape of what it starts from, {exact.shape}, got {tuple(got.shape)}"
        )
    share, place = worst_share(np.abs(to_numpy(got) - exact), allowed)
    context.measured(share)
    if share > 1:
        raise CheckFailedError(
            f"{what} must be {float(exact[place])!r} within {allowed[place]:.3g} at {place}, got {float(to_numpy(got)[place])!r} "
            f"({share:.3g} times what is allowed)"
        )


@check(
    "whole-run",
    proves="A run at eta = 0 ends where equation 12 ends in float64, applied step by step over the sampler's timesteps.",
    source="equation 12 of arXiv 2010.02502",
    tolerance="the errors that each step may make, and the rounding of samples and model outputs, propagated through the later steps",
    needs="epsilon",
)
def whole_run(context: Context) -> None:
    for steps in (1, 2, 10, *([50, 200] if context.full else [])):
        setting = Setting(num_inference_steps=steps)
        levels = context.levels(setting)
        model = GaussianModel(levels)
        x_T = context.normal(*SHAPE)
        end = context.sample(setting, model, x_T.clone())
        true = float64_run(context.subject, setting, levels, model, x_T)
        _hold(context, f"the end of a run of {len(levels)} steps at eta = 0", end, true.x_0, true.allowed)


ALPHA_BARS = (0.004, 0.05, 0.4, 0.9, 0.9999, 1.0)


@check(
    "composition",
    proves="With the same model output, a step from t to s followed by one from s to r is the step from t to r.",
    source="equation 12 of arXiv 2010.02502 at eta = 0: eps stays the same, and so does x0",
    tolerance="the errors that each of the steps may make",
    needs="step levels epsilon",
)
def composition(context: Context) -> None:
    for t, s, r in list(itertools.combinations(ALPHA_BARS, 3))[:: 1 if context.full else 4]:
        setting = Setting(alpha_bars=((t, s), (s, r), (t, r)))
        x_t, m = context.normal(*SHAPE), context.normal(*SHAPE)
        x_s, off_s = _stepped(context, StepCase(setting, 0, x_t, m))
        x_r, off_r = _stepped(context, StepCase(setting, 1, x_s, m))
        direct, off_direct = _stepped(context, StepCase(setting, 2, x_t, m))
        allowed = math.sqrt(r / s) * off_s + off_r + off_direct
        what = f"a step from alpha_bar {t} to {s} and on to {r}, with one output of the model,"
        _hold(context, what, x_r, to_numpy(direct), allowed)


def _stepped(context: Context, case: StepCase) -> tuple[torch.Tensor, np.ndarray]:
    """Return x_prev of a step, and how far it may be off."""
    level = context.levels(case.setting)[case.index]
    x_prev = context.step(case.copied()).x_prev
    true = truth(context.subject, case, level)
    return x_prev, true.allowed + torch.finfo(case.dtype).eps * np.abs(true.exact.x_prev)


@check(
    "inversion",
    proves="Clean samples that are inverted and sampled again with the same steps come back, and so do those of a single step.",
    source="equation 14 of arXiv 2010.02502; table 2 there",
    tolerance="8 times the errors that the run's steps may make: an inversion stops at a residual, and x_T is rounded, too",
    needs="invert epsilon",
)
def inversion(context: Context) -> None:
    for steps in (10, *([20, 50] if context.full else [])):
        setting = Setting(num_inference_steps=steps)
        levels = context.levels(setting)
        model = GaussianModel(levels)
        x0 = 0.3 + 0.5 * context.normal(*SHAPE)
        x_T = context.invert(setting, model, x0.clone())
        back = context.sample(setting, model, x_T.clone())
        true = float64_run(context.subject, setting, levels, model, x_T)
        _hold(
            context,
            f"the samples of a run of {steps} steps, inverted and sampled again,",
            back,
            to_numpy(x0),
            8 * true.allowed,
        )
    if context.offers("step", "levels"):
        _there_and_back(context)


def _there_and_back(context: Context) -> None:
    for t, s in list(itertools.combinations(ALPHA_BARS[:-1], 2))[:: 1 if context.full else 3]:
        setting = Setting(alpha_bars=((t, s), (s, t)))
        x_t, m = context.normal(*SHAPE), context.normal(*SHAPE)
        x_s, off_s = _stepped(context, StepCase(setting, 0, x_t, m))
        back, off_back = _stepped(context, StepCase(setting, 1, x_s, m))
        what = f"a step from alpha_bar {t} to {s} and back, with one output of the model,"
        _hold(context, what, back, to_numpy(x_t), math.sqrt(t / s) * off_s + off_back)


COUNTS, MORE_COUNTS = (10, 20, 40), (20, 40, 50, 100, 125, 200, 250, 500)
LOWEST_ORDER, HIGHEST_ORDER = 0.8, 1.3


@check(
    "first-order",
    proves="With the exact model of normal data, the error of a run at eta = 0 is proportional to the size of its steps.",
    source="section 4.3 of arXiv 2010.02502: equation 13 is Euler's method for an ordinary differential equation, equation 14",
    tolerance=f"a measured order from {LOWEST_ORDER} to {HIGHEST_ORDER}: 1, changed by terms of higher order at these step counts",
    needs="epsilon",
)
def first_order(context: Context) -> None:
    counts = MORE_COUNTS if context.full else COUNTS
    normals = context.normal(2, 64)
    errors = [_error_of(context, count, normals) for count in counts]
    slope, _ = np.polyfit(np.log(counts), np.log(np.maximum(errors, 1e-300)), 1)
    order = -float(slope)
    context.details |= {"steps": list(counts), "errors": errors, "order": order}
    context.measured(max((1 - order) / (1 - LOWEST_ORDER), (order - 1) / (HIGHEST_ORDER - 1)))
    if not LOWEST_ORDER <= order <= HIGHEST_ORDER:  # NaN fails, too
        table = ", ".join(f"{error:.3g} after {count}" for count, error in zip(counts, errors, strict=True))
        raise CheckFailedError(
            "the error of deterministic DDIM must fall in proportion to its number of steps, an order from "
            f"{LOWEST_ORDER} to {HIGHEST_ORDER}, got order {order:.3g}: root mean squared errors {table} steps, against the exact "
            "flow of data N(0.3, 0.5^2): wrongly paired timesteps or a missing step have this effect"
        )


def _error_of(context: Context, count: int, normals: torch.Tensor) -> float:
    """Return the root mean squared error against the exact flow, which keeps each sample's standard
    score."""
    setting = Setting(num_inference_steps=count)
    levels = context.levels(setting)
    model = GaussianModel(levels)
    end = context.sample(setting, model, model.x_t(normals, levels[0].alpha_bar_t))
    return float(np.sqrt(np.mean((to_numpy(end) - to_numpy(model.x_t(normals, 1.0))) ** 2)))
