"""Log-probabilities: of the x_prev that a step draws and of one that is given, with their gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..truth import oracle
from ..truth.cases import Setting, StepCase
from ..truth.density import flat, slopes
from ..truth.tolerances import density_gradient_error, spread_of_result, to_numpy, worst_share
from .base import CheckFailedError, Context, NotApplicableError, SubjectRaisedError, check
from .compare import same_bits
from .densities import (
    HALF,
    UNROUNDED,
    Density,
    density_of,
    described,
    drawn_by_hand,
    hold,
    hold_form,
    stochastic_etas,
    stochastic_settings,
    stochastic_step,
    stochastic_steps,
)
from .judge import column_errors, row_of
from .update import SIZES, some_steps

PAPERS = "arXiv 2305.13301, section 4.3; arXiv 2409.00588, section 4; arXiv 2505.05470, section 4.2"
TOLERANCE = "4 eps of the terms of the mean, over the standard deviation, and 16 roundings of the sum; and the errors of float32 "
TOLERANCE += "coefficients where the subject uses them"
SHAPE = (2, 3, 43)


def _with_sizes(context: Context) -> Iterator[tuple[Setting, tuple[int, ...]]]:
    """Yield each setting with one size in turn, the first with every size; in the full set, all."""
    sizes = SIZES[::3] if context.few else SIZES
    for number, setting in enumerate(stochastic_settings(context, 1.0, 0.5)):
        every = context.full or number == 0
        yield from ((setting, size) for size in (sizes if every else sizes[number % len(sizes) :][:1]))


def _density(context: Context, case: StepCase) -> Density:
    found = density_of(context, case)
    assert found is not None, "stochastic_steps yields steps that have a density"
    return found


@check(
    "log-prob",
    proves="The log-probability of x_prev is that of the Gaussian that the step draws from, for the x_prev that it draws and for "
    "a given one.",
    source=f"equation 12 of arXiv 2010.02502: x_prev ~ N(mean, std_dev_t^2); {PAPERS}",
    tolerance=TOLERANCE,
    needs="step log_prob",
)
def log_prob(context: Context) -> None:
    for setting, shape in _with_sizes(context):
        for index in stochastic_steps(context, setting):
            _hold_drawn_and_given(context, stochastic_step(context, setting, index, shape))


def _hold_drawn_and_given(context: Context, case: StepCase) -> None:
    """Check the log-probability of the x_prev that the subject draws, and of a given one."""
    density = _density(context, case)
    hold(context, density, *context.step_with_log_prob(case.copied()))
    if context.offers("given_x_prev"):
        x_prev = drawn_by_hand(context, density)
        hold(context, density, x_prev, context.log_prob(case, x_prev), "Of a given x_prev,")


# --- What needs no formula --------------------------------------------------------------------------------------------

HALF_WIDTH, POINTS, SUMMED = 8.0, 257, 1e-5


@check(
    "log-prob-integral",
    proves="In one dimension the integral of exp(log-probability) over x_prev is 1: no constant of the density is missing.",
    source="the definition of a density; the trapezoidal rule, whose error for a Gaussian falls faster than any power of the grid",
    tolerance=f"what each log-probability may be off, and {SUMMED} for the grid, which is rounded to float32",
    needs="step log_prob given_x_prev",
)
def integral(context: Context) -> None:
    for setting in context.settings(eta=stochastic_etas(context, 1.0)[0]):
        for index in stochastic_steps(context, setting):
            one = stochastic_step(context, setting, index, (1, 1))
            exact = _density(context, one).exact
            grid = exact.mean[0, 0] + exact.std * np.linspace(-HALF_WIDTH, HALF_WIDTH, POINTS)
            x_prev = torch.from_numpy(grid).float().reshape(-1, 1).to(context.device)
            noise = None if one.noise is None else one.noise.expand(POINTS, 1).contiguous()
            x_t, output = (a.expand(POINTS, 1).contiguous() for a in (one.x_t, one.model_output))
            case = one.but(x_t=x_t, model_output=output, noise=noise)
            got = context.log_prob(case, x_prev)
            hold_form(case, got)
            _hold_integral(context, _density(context, case), to_numpy(x_prev), to_numpy(got))


def _hold_integral(context: Context, density: Density, x_prev: np.ndarray, got: np.ndarray) -> None:
    points = x_prev[:, 0]
    total = _integral(np.exp(got), points)
    each = np.exp(density.exact.log_prob(x_prev, "sum"))
    allowed = SUMMED + _integral(each * np.expm1(np.minimum(density.allowed(x_prev), 700)), points)
    share = abs(total - 1) / allowed
    context.measured(share if math.isfinite(share) else math.inf)
    if not share <= 1:
        std = density.exact.std
        known = {
            "sqrt(2 pi): log(2 pi) / 2 is missing": math.sqrt(2 * math.pi),
            "std_dev_t: log(std_dev_t) is missing": std,
            "std_dev_t sqrt(2 pi): both constants are missing, log(std_dev_t) and log(2 pi) / 2": std
            * math.sqrt(2 * math.pi),
            "sqrt(pi): it is -(x_prev - mean)^2 alone": math.sqrt(math.pi),
            "1 / sqrt(std_dev_t): the square is divided by twice the standard deviation, not by twice the variance": std
            ** -0.5,
        }
        fitting = [f" = {text}" for text, value in known.items() if abs(total - value) <= 1e-3 * value + allowed]
        raise CheckFailedError(
            f"the integral of exp(log-probability) over an x_prev of one element must be 1 within {allowed:.3g}, got "
            f"{total:.6g}{''.join(fitting[:1])}; from {described(density)}"
        )


def _integral(values: np.ndarray, points: np.ndarray) -> float:
    """Return the integral by the trapezoidal rule."""
    return float((0.5 * (values[1:] + values[:-1]) * np.diff(points)).sum())


@check(
    "log-prob-reduction",
    proves="The log-probability is the reduction that it is named after: the mean over a sample's elements, or their sum.",
    source="the joint density of independent elements is the product of theirs; DDPO, DPPO and Flow-GRPO take the mean",
    tolerance=TOLERANCE,
    needs="step log_prob given_x_prev",
)
def reduction(context: Context) -> None:
    for setting in stochastic_settings(context, 1.0):
        index = stochastic_steps(context, setting)[-1]
        case = stochastic_step(context, setting, index, (3, 43))
        density = _density(context, case)
        x_prev = drawn_by_hand(context, density)
        _repeated(context, density, x_prev)
        if context.offers("log_prob_reduction"):
            _both(context, case, x_prev)


def _repeated(context: Context, density: Density, x_prev: Tensor) -> None:
    """Check the log-probability of a sample with each element three times."""
    case, copies = density.case, 3
    noise = None if case.noise is None else case.noise.repeat(1, copies)
    thrice = case.but(x_t=case.x_t.repeat(1, copies), model_output=case.model_output.repeat(1, copies), noise=noise)
    once, again = context.log_prob(case, x_prev), context.log_prob(thrice, x_prev.repeat(1, copies))
    hold_form(case, once)
    hold_form(thrice, again)
    declared = density.reduction
    factor = copies if declared == "sum" else 1
    allowed = 2 * factor * density.allowed(flat(to_numpy(x_prev)))
    share, (i,) = worst_share(np.abs(to_numpy(again) - factor * to_numpy(once)), allowed)
    context.measured(share)
    if not share <= 1:
        got, of_one = float(again[i]), float(once[i])
        other = {"mean": "sum", "sum": "mean"}[declared]
        is_other = abs(got - (copies if declared == "mean" else 1) * of_one) <= 1e-3 * abs(got)
        said = f'It is the {other}. If that is meant, declare it: log_prob_reduction = "{other}".' if is_other else ""
        raise CheckFailedError(
            f"the {declared} over a sample's elements, each of which is there three times, must be {factor} times that of the "
            f"sample, {factor * of_one!r}, within {allowed[i]:.3g}, got {got!r} = {got / of_one:.4g} times {of_one!r}; from "
            f"{described(density)}. {said}".strip()
        )


def _both(context: Context, case: StepCase, x_prev: Tensor) -> None:
    """Check that the sum is n times the mean."""
    found = {}
    for name in ("mean", "sum"):
        asked = case.but(more={"log_prob_reduction": name})
        found[name] = to_numpy(context.log_prob(asked, x_prev))
        hold(
            context,
            _density(context, asked),
            x_prev,
            torch.from_numpy(found[name]),
            f'As log_prob_reduction = "{name}",',
        )
    n = case.x_t[0].numel()
    off = np.abs(found["sum"] - n * found["mean"])
    bound = 2 * torch.finfo(torch.float32).eps * np.abs(found["sum"])
    share, (i,) = worst_share(off, bound + np.finfo(np.float64).tiny)
    context.measured(share)
    if not share <= 1:
        raise CheckFailedError(
            f"the sum over the {n} elements of a sample must be {n} times their mean, {n * found['mean'][i]!r}, within "
            f"{bound[i]:.3g}, got {found['sum'][i]!r}"
        )


@check(
    "log-prob-ratio",
    proves="The log-probability of the x_prev that a step has returned is the one returned with it, and stays so: a ratio is "
    "exactly 1 as long as nothing is trained.",
    source="section 4.3 of arXiv 2305.13301: the importance ratio of the parameters that drew the samples is 1",
    tolerance="none: every bit, in half precision, too",
    needs="step log_prob given_x_prev",
)
def ratio(context: Context) -> None:
    dtypes = (torch.float32, *(HALF if context.offers("half") else ()))
    for dtype in dtypes:
        for setting in stochastic_settings(context, 1.0):
            for index in stochastic_steps(context, setting):
                case = stochastic_step(context, setting, index, SHAPE, dtype)
                x_prev, log_prob = context.step_with_log_prob(case.copied())
                old = log_prob.detach().clone()
                first, again = (context.log_prob(case, x_prev.detach()) for _ in range(2))
                same_bits(context, "the same evaluation must give the same bits: a log-probability", again, first)
                if not torch.equal(first, old):
                    raise CheckFailedError(_no_ratio_of_one(context, case, old, first))
                context.measured(0.0)


def _no_ratio_of_one(context: Context, case: StepCase, old: Tensor, new: Tensor) -> str:
    density = _density(context, case)
    ratios = np.exp(to_numpy(new) - to_numpy(old))
    worst = float(ratios[np.argmax(np.abs(ratios - 1))])
    said = ""
    if case.noise is not None:
        z = flat(to_numpy(case.noise))
        unrounded = density.exact.mean + density.exact.std * z
        near = np.abs(to_numpy(old) - density.exact.log_prob(unrounded, density.reduction))
        said = UNROUNDED if (near <= density.allowed(unrounded)).all() else ""
    return (
        f"the ratio exp(new - old) of a log-probability evaluated again, with nothing changed, must be exactly 1, got {worst!r}; "
        f"from {described(density)}. {said}".strip()
    )


# --- The gradient -----------------------------------------------------------------------------------------------------


@check(
    "log-prob-gradient",
    proves="The gradient of the log-probability of a given x_prev by the model's output is that of the Gaussian's density, and "
    "there is none by x_prev.",
    source=f"finite differences of the density in float64; {PAPERS}",
    tolerance=f"{TOLERANCE}; elements whose x0 is within 0.001 of its bound are left out",
    needs="step log_prob given_x_prev log_prob_gradient",
)
def gradient(context: Context) -> None:
    for setting in stochastic_settings(context, 1.0, 0.5):
        for index in stochastic_steps(context, setting):
            case = _trained(stochastic_step(context, setting, index, SHAPE))
            density = _density(context, case)
            x_prev = drawn_by_hand(context, density)
            _hold_gradient(context, density, x_prev, context.log_prob(case, x_prev))
            _hold_constant(context, case, x_prev)


@check(
    "log-prob-constant",
    proves="In the log-probability that a step returns, the x_prev that it has drawn is a constant: its gradient is the "
    "density's, not 0.",
    source="the policy gradient, section 4.3 of arXiv 2305.13301: the gradient of log p(x_prev | x_t) at the x_prev that was drawn",
    tolerance=f"{TOLERANCE}; elements whose x0 is within 0.001 of its bound are left out",
    needs="step log_prob log_prob_gradient",
)
def constant(context: Context) -> None:
    for setting in stochastic_settings(context, 1.0):
        for index in stochastic_steps(context, setting):
            case = _trained(stochastic_step(context, setting, index, SHAPE))
            x_prev, log_prob = context.step_with_log_prob(case)
            _hold_gradient(context, _density(context, case), x_prev, log_prob, "With the x_prev that a step draws,")


def _trained(case: StepCase) -> StepCase:
    return case.but(model_output=case.model_output.detach().clone().requires_grad_())


def _hold_gradient(context: Context, density: Density, x_prev: Tensor, got: Tensor, rule: str = "") -> None:
    case, values = density.case, flat(to_numpy(x_prev))
    hold_form(case, got)
    found = None
    weights = np.linspace(0.5, 2, len(case.x_t))
    if got.requires_grad:
        (found,) = torch.autograd.grad(got, case.model_output, torch.from_numpy(weights).to(got), allow_unused=True)
    if found is None:
        raise CheckFailedError(f"{rule} the log-probability must have a gradient by model_output, got none".strip())
    x_t, output = to_numpy(case.x_t), to_numpy(case.model_output)
    row = row_of(context.subject, case.setting, density.level)
    of_density, slope, clear = slopes(row, x_t, output, values, context.subject.min_std)
    share_of_each = weights[:, None] / (values.shape[1] if density.reduction == "mean" else 1)
    exact, factor = share_of_each * of_density, share_of_each * slope / density.exact.std**2
    allowed = density_gradient_error(
        density.computed_in, values - density.exact.mean, density.mean_error, factor, density.std_error,
        _slope_error(context, density, slope),
    )  # fmt: skip
    error = np.where(clear, np.abs(flat(to_numpy(found)) - exact), 0.0)
    share, place = worst_share(error, allowed + np.finfo(np.float32).tiny)
    context.measured(share)
    if not share <= 1:
        raise CheckFailedError(
            _wrong_gradient(rule, density, flat(to_numpy(found)), exact, place, float(allowed[place]))
        )


def _slope_error(context: Context, density: Density, slope: np.ndarray) -> float:
    """Return the relative error of the slope of the mean, where coefficients are float32."""
    if context.subject.arithmetic == "exact":
        return 0.0
    subject, setting = context.subject, density.case.setting
    row, errors = row_of(subject, setting, density.level), column_errors(subject, setting, density.level)
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    of_one = spread_of_result(row, errors, zero, one, zero, oracle.row_step(row, zero, one))
    return float(of_one[0, 0] / max(np.abs(slope).min(where=slope != 0, initial=np.inf), 1e-30))


def _wrong_gradient(
    rule: str, density: Density, found: np.ndarray, exact: np.ndarray, place: tuple[int, ...], allowed: float
) -> str:
    std = density.exact.std
    size = np.abs(exact).max()
    known = {
        "It is 0: x_prev must be a constant, x_prev.detach(), since it was sampled; what moves the mean moves it, too.": 0.0,
        "It is std_dev_t times that: the square is divided by the standard deviation, not by the variance.": std,
        "It is 2 std_dev_t^2 times that: the square is not divided by it.": 2 * std**2,
        "It has another sign.": -1.0,
        "It is that of the sum over the elements.": float(found.shape[1]),
        "It is that of the mean over the elements.": 1 / found.shape[1],
    }
    fitting = [
        text for text, factor in known.items() if np.abs(found - factor * exact).max() <= 1e-3 * size * max(factor, 0.1)
    ]
    return (
        f"{rule} the gradient of the log-probability by model_output must be that of the density within {allowed:.3g}, got "
        f"{float(found[place])!r} where it is {float(exact[place])!r}, from {described(density)}. {' '.join(fitting[:1])}"
    ).strip()


def _hold_constant(context: Context, case: StepCase, x_prev: Tensor) -> None:
    """Check that a given x_prev which requires a gradient is refused, or gets none."""
    leaf = x_prev.detach().clone().requires_grad_()
    try:
        got = context.log_prob(case, leaf)
    except SubjectRaisedError:
        return
    (found,) = torch.autograd.grad(got.sum(), leaf, allow_unused=True) if got.requires_grad else (None,)
    if found is not None and bool((found != 0).any()):
        raise CheckFailedError(
            "a given x_prev must be a constant, since it was sampled, got a gradient by it "
            f"(as large as {float(found.abs().max()):.3g}): use x_prev.detach()"
        )


# --- Half precision, and no noise -------------------------------------------------------------------------------------


@check(
    "log-prob-half",
    proves="Of float16 and bfloat16 samples, the log-probability is that of the x_prev that is stored, computed in float32.",
    source="docs/LOG_PROB.md: training loads the x_prev that was stored; a ratio is clipped at 1e-4 to 0.2",
    tolerance=f"{TOLERANCE}: no allowance for half precision",
    needs="step log_prob half",
)
def half_precision(context: Context) -> None:
    for dtype in HALF:
        for setting in stochastic_settings(context, 1.0):
            for index in stochastic_steps(context, setting):
                shape = (3, 129) if context.few else (3, 2100)
                _hold_drawn_and_given(context, stochastic_step(context, setting, index, shape, dtype))


@check(
    "log-prob-no-noise",
    proves="A step that adds no noise has no density, at eta = 0 and where it ends at clean data: its log-probability is refused, "
    "not infinite, NaN or a number.",
    source="equation 16 of arXiv 2010.02502: std_dev_t = 0 at eta = 0 and at alpha_bar_prev = 1",
    tolerance="none",
    needs="step log_prob",
)
def no_noise(context: Context) -> None:
    if context.subject.min_std:
        raise NotApplicableError(
            f"the subject takes its densities with a standard deviation of {context.subject.min_std} at least"
        )
    for eta in context.etas(0.0, 1.0):
        setting = context.setting(eta=eta)
        for index in some_steps(context, setting):
            case = stochastic_step(context, setting, index, (2, 3, 5))
            if density_of(context, case) is None:
                _hold_refused(context, setting, index, case)


def _hold_refused(context: Context, setting: Setting, index: int, case: StepCase) -> None:
    context.measured(0.0)
    try:
        _, got = context.step_with_log_prob(case.copied())
    except SubjectRaisedError:
        return
    level = context.levels(setting)[index]
    raise CheckFailedError(
        "a step that adds no noise has no density: its log-probability must be refused with an error, or taken with a least "
        f"standard deviation that is declared (min_std), got {to_numpy(got).tolist()} at eta = {setting.eta}, in step {index} "
        f"from t = {level.t:g} to t = {level.t_prev:g}, from {level}"
    )
