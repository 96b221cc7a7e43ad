"""Judgement of a log-probability: its distance from the Gaussian in float64, and what is wrong where
that can be told. The checks of ``log_prob`` share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..subjects.subject import Subject
from ..truth.cases import Level, Setting, StepCase
from ..truth.density import HALF_LOG_2_PI, REDUCTIONS, Gaussian, flat, gaussian
from ..truth.tolerances import density_error, to_numpy, worst_share
from .base import CheckFailedError, Context, NotApplicableError
from .judge import column_errors, row_of, truth
from .update import random_step, settings_of

HALF = (torch.bfloat16, torch.float16)
"""The shorter one first: its errors are larger, and its numbers near 1 are those of the other, too."""


@dataclass(frozen=True, eq=False)
class Density:
    """The exact distribution of a step's x_prev, and how far the subject may be off from it.

    Attributes:
        case: the step.
        subject: whose conventions hold.
        level: of the step.
        exact: the distribution.
        mean_error: how far the mean may be off, ``(B, n)``: computed in float32 at least, for
            samples in half precision, too.
        std_error: the relative error of the standard deviation.
    """

    case: StepCase
    subject: Subject
    level: Level
    exact: Gaussian
    mean_error: np.ndarray
    std_error: float

    @property
    def computed_in(self) -> torch.dtype:
        return torch.promote_types(self.case.dtype, torch.float32)

    @property
    def reduction(self) -> str:
        return self.case.more.get("log_prob_reduction", self.subject.log_prob_reduction)

    @property
    def offset(self) -> float:
        """The magnitude of a log-density's constants: in a subject with float32 arithmetic each is
        a term of its own."""
        log_std = float(np.log(self.exact.std))
        if self.subject.arithmetic == "exact":
            return abs(log_std + HALF_LOG_2_PI)
        return abs(log_std) + HALF_LOG_2_PI

    def allowed(self, x_prev: np.ndarray) -> np.ndarray:
        """Return how far a log-probability of x_prev ``(B, n)`` may be off, ``(B,)``."""
        scale = 0.5 / self.exact.std**2
        deviation = x_prev - self.exact.mean
        of_sum = density_error(self.computed_in, deviation, self.mean_error, scale, self.offset, self.std_error)
        return of_sum / (max(deviation.shape[1], 1) if self.reduction == "mean" else 1.0)


def density_of(context: Context, case: StepCase) -> Density | None:
    """Return the distribution of a step's x_prev; None where it has no density."""
    subject, setting = context.subject, case.setting
    level = context.levels(setting)[case.index]
    row = row_of(subject, setting, level)
    exact = gaussian(row, to_numpy(case.x_t), to_numpy(case.model_output), subject.min_std)
    if exact is None:
        return None
    dtype = torch.promote_types(case.dtype, torch.float32)
    wide = case.but(x_t=case.x_t.to(dtype), model_output=case.model_output.detach().to(dtype), noise=None, more={})
    std_error = 0.0
    if subject.arithmetic != "exact" and row["prev_noise"] >= subject.min_std:
        std_error = column_errors(subject, setting, level)["prev_noise"] / exact.std
    return Density(case, subject, level, exact, flat(truth(subject, wide, level).allowed), std_error)


def stochastic_etas(context: Context, *etas: float) -> list[float]:
    """Return those of these etas at which the subject adds noise, or the ones that it takes.

    Raises:
        NotApplicableError: it adds none.
    """
    wanted = [eta for eta in context.etas(*etas) if eta > 0] or [eta for eta in context.subject.etas if eta > 0]
    if not wanted:
        raise NotApplicableError("the subject takes no eta")
    return wanted[:1] if context.few else wanted


def stochastic_settings(context: Context, *etas: float) -> Iterator[Setting]:
    """Yield the settings of ``settings_of`` with noise: at these etas, see ``stochastic_etas``."""
    for eta in stochastic_etas(context, *etas):
        settings = list(settings_of(context, eta))
        yield from (settings[0], settings[-1]) if context.few else settings


def stochastic_steps(context: Context, setting: Setting) -> list[int]:
    """Return the first, the middle and the last of the steps that have a density, all of them in the
    full set, and the last where few cases are made."""
    levels, subject = context.levels(setting), context.subject
    found = [i for i, level in enumerate(levels) if subject.min_std or row_of(subject, setting, level)["prev_noise"]]
    if context.few:
        return found[-1:]
    return found if context.full else sorted({found[0], found[len(found) // 2], found[-1]})


def stochastic_step(
    context: Context, setting: Setting, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> StepCase:
    """Return a step with noise, given or drawn."""
    case = random_step(context, setting, index, shape, dtype)
    return case if case.noise is not None else case.but(source=context.source(shape[0]))


def drawn_by_hand(context: Context, density: Density) -> Tensor:
    """Draw an x_prev from the distribution of a step, a little wider."""
    case = density.case
    values = density.exact.mean + 1.5 * density.exact.std * context.rng.standard_normal(density.exact.mean.shape)
    return torch.from_numpy(values.reshape(case.x_t.shape)).to(case.dtype).to(case.x_t.device)


# --- Judgement --------------------------------------------------------------------------------------------------------


def hold(context: Context, density: Density, x_prev: Tensor, got: Tensor, rule: str = "") -> None:
    """Compare the log-probabilities of an x_prev with the exact ones.

    Args:
        rule: the beginning of the message.

    Raises:
        CheckFailedError: they are of another shape or type, or too far off; the message says what
            they are instead, where that is known.
    """
    hold_form(density.case, got)
    values = flat(to_numpy(x_prev))
    exact, allowed = density.exact.log_prob(values, density.reduction), density.allowed(values)
    found = to_numpy(got)
    if not exact.size or not values.size:
        context.measured(0.0)
        return
    share, (i,) = worst_share(np.abs(found - exact), allowed)
    context.measured(share)
    if not share <= 1:
        raise CheckFailedError(
            " ".join(
                filter(
                    None,
                    (
                        rule,
                        f"the log-probability of x_prev must be log N(x_prev; mean, std_dev_t^2), its {density.reduction} over the "
                        f"elements of a sample, within {allowed[i]:.3g}, got {float(found[i])!r} where it is "
                        f"{float(exact[i])!r} ({share:.3g} times what is allowed), from {described(density)}.",
                        told(context, density, values, found),
                    ),
                )
            )
        )


def hold_form(case: StepCase, got: Tensor) -> None:
    """Raise CheckFailedError unless log-probabilities are one float32 or float64 number for each
    sample."""
    if tuple(got.shape) != (len(case.x_t),):
        raise CheckFailedError(
            f"log-probabilities must be one for each sample, {(len(case.x_t),)}, got the shape {tuple(got.shape)} for samples "
            f"{tuple(case.x_t.shape)}"
        )
    if got.dtype not in (torch.float32, torch.float64):
        raise CheckFailedError(
            f"log-probabilities must be float32 or float64, got {got.dtype}: neighbouring numbers near 2 are "
            f"{2 * torch.finfo(got.dtype).eps:.2g} apart in it, more than the clip range of a ratio"
        )


def described(density: Density) -> str:
    """Return the step of a density in words."""
    case = density.case
    named = {
        "prediction_type": case.setting.prediction_type,
        "eta": case.setting.eta,
        "clip_sample_range": case.setting.clip_sample_range,
        "std_dev_t": f"{density.exact.std:.6g}",
        "dtype": case.dtype,
        "shape": tuple(case.x_t.shape),
    }
    shown = ", ".join(f"{name} = {value}" for name, value in named.items() if value is not None)
    return f"{density.level} with {shown}"


# --- What is wrong ----------------------------------------------------------------------------------------------------


def told(context: Context, density: Density, x_prev: np.ndarray, got: np.ndarray) -> str:
    """Return what wrong log-probabilities are instead, as a sentence; empty where it is not known."""
    exact, allowed = density.exact.log_prob(x_prev, density.reduction), density.allowed(x_prev)
    fitting = []
    for text, values in _mistakes(context, density, x_prev):
        if not (np.abs(values - exact) > 2 * allowed).any():
            continue  # it makes no difference here
        bound = 4 * allowed + 1e-4 * np.abs(values)
        off = np.abs(got - values) / bound
        if (off <= 1).all():
            fitting.append((float(off.max()), text))
    if fitting:
        return min(fitting)[1]
    return _half_precision(density, got)


def _mistakes(context: Context, density: Density, x_prev: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what log-probabilities may be by mistake, and their values then."""
    yield from _of_the_formula(density, x_prev)
    yield from _of_the_reduction(density, x_prev)
    yield from _of_the_row(context, density, x_prev)
    if density.case.noise is not None:
        z = flat(to_numpy(density.case.noise))
        values = density.exact.log_prob(density.exact.mean + density.exact.std * z, density.reduction)
        yield UNROUNDED, values


UNROUNDED = (
    "It is that of mean + std_dev_t z: of the noise that was drawn, or of x_prev before it is rounded to the type of the "
    "samples. Training loads the x_prev that is stored."
)


def _of_the_formula(density: Density, x_prev: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    exact = density.exact
    std, reduced = exact.std, REDUCTIONS[density.reduction]
    log_std, squares = float(np.log(std)), (x_prev - exact.mean) ** 2
    halves = squares / (2 * std**2)
    for text, each in {
        "log(std_dev_t) is missing: it differs from step to step.": -halves - HALF_LOG_2_PI,
        "log(2 pi) / 2 is missing.": -halves - log_std,
        "Its constants are missing: log(std_dev_t) and log(2 pi) / 2.": -halves,
        "It is -(x_prev - mean)^2: the division by 2 std_dev_t^2 and the constants are missing, so that a ratio is none "
        "of probabilities, and each step has another scale.": -squares,
        "The square is divided by 2 std_dev_t, the standard deviation, where twice its square, the variance, belongs.": -squares
        / (2 * std)
        - log_std
        - HALF_LOG_2_PI,
        "The square is divided by std_dev_t^2, not by twice that.": -2 * halves - log_std - HALF_LOG_2_PI,
        "The standard deviation is taken for the variance.": exact.with_std(std**0.5).log_density(x_prev),
        "The variance is taken for the standard deviation.": exact.with_std(std**2).log_density(x_prev),
        "It has another sign.": -exact.log_density(x_prev),
    }.items():
        yield text, reduced(each)


def _of_the_reduction(density: Density, x_prev: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for other in REDUCTIONS:
        if other != density.reduction:
            text = f'It is the {other} over the elements. If that is meant, declare it: log_prob_reduction = "{other}".'
            yield text, density.exact.log_prob(x_prev, other)


def _of_the_row(context: Context, density: Density, x_prev: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the log-probabilities under rows of other steps, and by the other convention of eta."""
    subject, case = density.subject, density.case
    levels = context.levels(case.setting)
    x_t, output = to_numpy(case.x_t), to_numpy(case.model_output)

    def values(row: dict[str, float]) -> np.ndarray | None:
        found = gaussian(row, x_t, output, subject.min_std)
        return None if found is None else found.log_prob(x_prev, density.reduction)

    other = "variance" if subject.eta_scales == "std_dev" else "std_dev"
    convention = row_of(subject, case.setting, density.level, eta_scales=other)
    found = {
        f'It is that of the other convention of eta. If that is meant, declare it: eta_scales = "{other}".': convention,
        "x0 is not clipped in it.": row_of(subject, case.setting.but(clip_sample_range=None), density.level),
    }
    for way, name in ((-1, "previous"), (1, "next")):
        if 0 <= case.index + way < len(levels):
            text = (
                f"It is that of the {name} step's row, from {levels[case.index + way]}: a row of another step is used."
            )
            found[text] = row_of(subject, case.setting, levels[case.index + way])
    for text, row in found.items():
        if (result := values(row)) is not None:
            yield text, result


def _half_precision(density: Density, got: np.ndarray) -> str:
    """Return whether log-probabilities have the digits of half precision alone."""
    for dtype in HALF:
        rounded = torch.from_numpy(got).to(dtype).double().numpy()
        if np.array_equal(rounded, got) and density.allowed(density.exact.mean).max() < torch.finfo(dtype).eps:
            return f"All of them are numbers of {dtype}: they are added in it, or rounded to it. Add in float32."
    return ""
