"""Whole runs at eta = 0: their end, composition and inversion of steps, and the order of
convergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from ..truth import oracle
from ..truth.cases import Setting, StepCase
from ..truth.paths import Path
from ..truth.tolerances import to_numpy, worst_share
from .base import CheckFailedError, Context, check
from .judge import truth
from .runs import GaussianModel, float64_run
from .update import some_levels

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
)
def whole_run(context: Context) -> None:
    counts = (1, 2, 10, *([50, 200] if context.full else []))
    for setting in (one for steps in counts for one in context.settings(num_inference_steps=steps)):
        levels = context.levels(setting)
        model = GaussianModel(setting, levels)
        x_T = context.start(setting, *SHAPE)
        end = context.sample(setting, model, x_T.clone())
        true = float64_run(context.subject, setting, levels, model, x_T)
        _hold(
            context,
            f"the end of a run of {len(levels)} steps at eta = 0 (schedule {setting.schedule})",
            end,
            true.x_0,
            true.allowed,
        )


@check(
    "composition",
    proves="With the same model output, a step from t to s followed by one from s to r is the step from t to r.",
    source="equation 12 of arXiv 2010.02502 at eta = 0: eps stays the same, and so does x0",
    tolerance="the errors that each of the steps may make",
    needs="step levels",
)
def composition(context: Context) -> None:
    for setting, (t, s, r) in _each(context, 3, 4):
        setting = setting.but(alpha_bars=((t, s), (s, r), (t, r)))
        x_t, m = context.normal(*SHAPE), context.normal(*SHAPE)
        x_s, off_s = _stepped(context, StepCase(setting, 0, x_t, m))
        x_r, off_r = _stepped(context, StepCase(setting, 1, x_s, m))
        direct, off_direct = _stepped(context, StepCase(setting, 2, x_t, m))
        allowed = _slope(setting, s, r) * off_s + off_r + off_direct
        what = f"a step from {t} to {s} and on to {r}, with one output of the model,"
        _hold(context, what, x_r, to_numpy(direct), allowed)


def _each(context: Context, count: int, every: int) -> Iterator[tuple[Setting, tuple[oracle.AnyLevel, ...]]]:
    """Yield a setting of each path with decreasing levels; in the quick set, one choice in some.

    The models predict what does not depend on the level, for the same x0 and eps.
    """
    for path in context.settings():
        kinds = (path.prediction_type, "epsilon", "sample", "flow")
        kind = next((one for one in kinds if context.offers(one) and one in kinds[1:]), None)
        if kind is None:
            continue
        setting = path.but(prediction_type=kind)
        levels = some_levels(setting)[::-1][: 6 if count == 3 else 5]  # there is no way back from clean data
        for chosen in list(itertools.combinations(levels, count))[:: 1 if context.full else every]:
            yield setting, chosen


def _slope(setting: Setting, level: oracle.AnyLevel, level_prev: oracle.AnyLevel) -> float:
    """Return how an error of x_t grows in a deterministic step with one output of the model."""
    row = oracle.textbook_row(setting.prediction_type, level, level_prev, sigma_data=setting.sigma_data)
    return abs(oracle.fold(row)[0])


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
    needs="invert",
)
def inversion(context: Context) -> None:
    chosen = [
        one
        for steps in (10, *([20, 50] if context.full else []))
        for one in context.settings(num_inference_steps=steps)
    ]
    for setting in chosen:
        levels = context.levels(setting)
        model = GaussianModel(setting, levels)
        x0 = 0.3 + 0.5 * context.normal(*SHAPE)
        x_T = context.invert(setting, model, x0.clone())
        back = context.sample(setting, model, x_T.clone())
        true = float64_run(context.subject, setting, levels, model, x_T)
        _hold(
            context,
            f"the samples of a run of {len(levels)} steps (schedule {setting.schedule}), inverted and sampled again,",
            back,
            to_numpy(x0),
            8 * true.allowed,
        )
    if context.offers("step", "levels"):
        _there_and_back(context)


def _there_and_back(context: Context) -> None:
    for setting, (t, s) in _each(context, 2, 3):
        setting = setting.but(alpha_bars=((t, s), (s, t)))
        x_t, m = context.normal(*SHAPE), context.normal(*SHAPE)
        x_s, off_s = _stepped(context, StepCase(setting, 0, x_t, m))
        back, off_back = _stepped(context, StepCase(setting, 1, x_s, m))
        what = f"a step from {t} to {s} and back, with one output of the model,"
        _hold(context, what, back, to_numpy(x_t), _slope(setting, s, t) * off_s + off_back)


COUNTS, MORE_COUNTS, HIGH_ORDER_COUNTS = (10, 20, 40), (20, 40, 50, 100, 125, 200, 250, 500), (40, 80, 160)
ORDERS = {1: (0.8, 1.3), 2: (1.5, 2.6), 3: (2.4, 5.5)}
"""By the order of a solver: the measured orders that are right. Terms of higher order change them at
these step counts: the third order's error changes its sign there."""
LOG_SNRS = (-2.5, 3.5)
"""log(alpha / sigma) of the first and the last time of runs of order 2 and 3, where times can be
chosen: evenly in it, as these solvers integrate."""


@check(
    "convergence",
    proves="With the exact model of normal data, the error of a run at eta = 0 falls with the size of its steps as the solver's "
    "order says: in proportion for DDIM, with the square and the cube for its multistep forms.",
    source="section 4.3 of arXiv 2010.02502: equation 13 is Euler's method for an ordinary differential equation, equation 14; "
    "arXiv 2211.01095 for orders 2 and 3",
    tolerance="a measured order "
    + ", ".join(f"from {low} to {high} for order {order}" for order, (low, high) in ORDERS.items()),
    any_order=True,
)
def convergence(context: Context) -> None:
    normals = context.normal(2, 64)
    for order in (1, 2, 3) if context.offers("orders") else (context.subject.order,):
        for setting in context.settings(order=order):
            if order == context.subject.order or setting.path is not None:  # integer timesteps are too uneven
                _converges(context, setting, normals)


def _converges(context: Context, setting: Setting, normals: torch.Tensor) -> None:
    counts = MORE_COUNTS if context.full and setting.order == 1 else COUNTS
    if setting.order > 1 and not context.offers("explicit_timesteps"):
        counts = HIGH_ORDER_COUNTS
    errors = [_error_of(context, setting.but(num_inference_steps=count), normals) for count in counts]
    slope, _ = np.polyfit(np.log(counts), np.log(np.maximum(errors, 1e-300)), 1)
    order, (lowest, highest) = -float(slope), ORDERS[setting.order]
    name = setting.schedule if setting.order == 1 else f"{setting.schedule}, order {setting.order}"
    context.details[name] = {"steps": list(counts), "errors": errors, "order": order}
    context.measured(
        max((setting.order - order) / (setting.order - lowest), (order - setting.order) / (highest - setting.order))
    )
    if not lowest <= order <= highest:  # NaN fails, too
        table = ", ".join(f"{error:.3g} after {count}" for count, error in zip(counts, errors, strict=True))
        raise CheckFailedError(
            f"the error must fall with the number of steps in an order from {lowest} to {highest}, got order {order:.3g} on the "
            f"path {name}: root mean squared errors {table} steps, against the exact flow of data N(0.3, 0.5^2): wrongly paired "
            "timesteps or a missing step have this effect"
        )


def _error_of(context: Context, setting: Setting, normals: torch.Tensor) -> float:
    """Return the root mean squared error against the exact flow, which keeps each sample's standard
    score: at the end, or in order 2 and 3 before the last step, which is of order 1."""
    at_end = setting.order == 1 or not context.offers("explicit_timesteps")
    if not at_end:
        assert setting.path is not None
        even = np.linspace(*LOG_SNRS, setting.num_inference_steps + 1)
        setting = setting.but(timesteps=tuple(_time_of_log_snr(setting.path, value) for value in even.tolist()))
    levels = context.levels(setting)
    model = GaussianModel(setting, levels)
    x_T = model.x_t(normals, levels[0].level_t)
    if at_end:
        found, exact = context.sample(setting, model, x_T), model.x_t(normals, 1.0)
    else:
        found, exact = context.observe(setting, model, x_T)[-1].x_t, model.x_t(normals, levels[-1].level_t)
    return float(np.sqrt(np.mean((to_numpy(found) - to_numpy(exact)) ** 2)))


def _time_of_log_snr(path: Path, value: float) -> float:
    """Return the time at which log(alpha / sigma) has this value, by bisection."""
    low, high = 0.0, path.first
    for _ in range(60):
        middle = (low + high) / 2
        alpha, sigma = path.level(middle)
        low, high = (middle, high) if alpha > sigma * math.exp(value) else (low, middle)
    return (low + high) / 2
