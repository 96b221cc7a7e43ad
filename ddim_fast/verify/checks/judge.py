"""Judgement of a step: its distance from equation 12 in float64, and the smallest case that fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..subjects.subject import Subject
from ..truth import oracle
from ..truth.cases import Level, Observed, Setting, StepCase, StepResult
from ..truth.tolerances import (
    allowed_error,
    allowed_error_in_type,
    coefficient_spread,
    spread_of_result,
    to_numpy,
    worst_share,
)
from .base import CheckFailedError, Context

_MOST_TRIES = 60  # to make a failing case smaller
_SIMPLE = (0.0, 1.0, 0.5)


@dataclass
class Verdict:
    """How far a step's result is from the exact one.

    Attributes:
        share: the largest error, as a share of what is allowed there; infinity for NaN.
        place: its index.
        what: "x_prev" or "x0".
        got, exact, allowed: the values there.
    """

    share: float
    place: tuple[int, ...]
    what: str
    got: float
    exact: float
    allowed: float


def verdict(
    subject: Subject, case: StepCase, level: Level, before: StepCase, result: StepResult, rounded: float = 0.0
) -> Verdict:
    """Compare x_prev, and x0 where it is given, with equation 12 in float64.

    Args:
        before: the case as it was before the step, which may have written over its samples.
        rounded: the relative error of x_t and x_prev, see ``Observed``.
    """
    true = truth(subject, before, level)
    if rounded:
        more = rounded * (true.exact.terms + np.abs(true.exact.x_prev))
        true = true._replace(allowed=true.allowed + more, allowed_x0=true.allowed_x0 + rounded * true.exact.x0_terms)
    verdicts = [_compare("x_prev", result.x_prev, true.exact.x_prev, true.allowed, case.dtype)]
    if result.x0 is not None:
        verdicts.append(_compare("x0", result.x0, true.exact.x0, true.allowed_x0, case.dtype))
    return max(verdicts, key=lambda v: v.share)


class Truth(NamedTuple):
    """The exact result of a step, and how far x_prev and x0 may be off before rounding to the type
    of the samples."""

    exact: oracle.Result
    allowed: np.ndarray
    allowed_x0: np.ndarray


def truth(subject: Subject, before: StepCase, level: Level) -> Truth:
    """Return equation 12 in float64, and how far a subject of this arithmetic may be off."""
    setting, x, m = before.setting, to_numpy(before.x_t), to_numpy(before.model_output)
    row = row_of(subject, setting, level)
    names = {"model_output_uncond": "uncond", "guidance_scale": "guidance"}
    more: dict[str, Any] = {
        names.get(k, k): to_numpy(v) if isinstance(v, torch.Tensor) else v for k, v in before.more.items()
    }
    z = np.zeros_like(x) if before.noise is None else to_numpy(before.noise)
    exact = oracle.row_step(row, x, m, noise=z, **more)
    if "uncond" in more:
        m = np.abs(more["uncond"]) + abs(more["guidance"]) * (np.abs(m) + np.abs(more["uncond"]))
    dtype = before.dtype
    if subject.arithmetic == "exact":
        return Truth(exact, allowed_error(dtype, exact.terms), allowed_error(dtype, exact.x0_terms))
    spread = column_errors(subject, before.setting, level)
    off = spread_of_result(row, spread, x, m, z, exact)
    terms = exact.long_terms
    if isinstance(level.level_t, oracle.NoiseLevel):  # Euler's form, x_t + (s - t) dx/dt, rounds at the scale of x_t
        terms = terms + np.abs(x) + exact.x0_terms
    off_x0 = spread["x0_x"] * np.abs(x) + spread["x0_m"] * np.abs(m)
    return Truth(
        exact,
        np.where(np.isfinite(off), off, np.inf) + allowed_error_in_type(dtype, terms),
        off_x0 + allowed_error_in_type(dtype, exact.x0_terms),
    )


def row_of(subject: Subject, setting: Setting, level: Level, eta_scales: str | None = None) -> dict[str, float]:
    """Return the row of a step, in the subject's convention of eta, or in another."""
    return oracle.textbook_row(
        setting.prediction_type,
        level.level_t,
        level.level_prev,
        eta=setting.eta,
        eta_scales=eta_scales or subject.eta_scales,
        sigma_data=setting.sigma_data,
        clip=math.inf if setting.clip_sample_range is None else setting.clip_sample_range,
        use_clipped_model_output=setting.use_clipped_model_output,
    )


def paper_eta(subject: Subject, setting: Setting) -> float:
    """Return the paper's eta, which scales the standard deviation, for the subject's."""
    return setting.eta if subject.eta_scales == "std_dev" else math.sqrt(setting.eta)


def column_errors(subject: Subject, setting: Setting, level: Level) -> dict[str, float]:
    """Return how far each column of a row may be off in float32, see ``coefficient_spread``; of noise
    that is not that of equation 16, eight roundings of its columns."""
    eps = torch.finfo(torch.float32).eps
    levels = level.level_t, level.level_prev
    off = _level_eps(subject, level.t, level.level_t), _level_eps(subject, level.t_prev, level.level_prev)
    other = subject.eta_scales in oracle.OTHER_NOISE
    found = coefficient_spread(
        setting.prediction_type,
        *levels,
        0.0 if other else paper_eta(subject, setting),
        setting.use_clipped_model_output,
        eps,
        off,
        setting.sigma_data,
    )
    if other:
        row = row_of(subject, setting, level)
        found |= {"prev_noise": 8 * eps * row["prev_noise"]}
        found["prev_eps"] += 8 * eps * (abs(row["prev_eps"]) + oracle.alpha_sigma(level.level_prev).sigma)
    return found


def _level_eps(subject: Subject, t: float, level: oracle.AnyLevel) -> float:
    """Return the relative error that a level may have in float32: rounded once, or as alpha_bar the
    product of t + 1 rounded factors."""
    if isinstance(level, oracle.NoiseLevel):
        return torch.finfo(torch.float32).eps
    if subject.own_alphas_cumprod:
        return 2 * (t + 1) * torch.finfo(torch.float32).eps
    return 0.0 if float(np.float32(level)) == level else torch.finfo(torch.float32).eps


def _compare(what: str, got: torch.Tensor, exact: np.ndarray, allowed: np.ndarray, dtype: torch.dtype) -> Verdict:
    if tuple(got.shape) != exact.shape or got.dtype != dtype:
        found = f"{what} must have the shape and dtype of x_t, {exact.shape} and {dtype}, got {tuple(got.shape)} and {got.dtype}"
        raise CheckFailedError(found)
    if exact.size == 0:
        return Verdict(0.0, (), what, 0.0, 0.0, 0.0)
    values = to_numpy(got)
    rounding = torch.finfo(dtype).eps / 2 * np.abs(exact) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = allowed + rounding
    share, place = worst_share(np.abs(values - exact), allowed)
    return Verdict(share, place, what, float(values[place]), float(exact[place]), float(allowed[place]))


Explain = Callable[[StepCase, Verdict], str]
"""Given a failing case, returns what a check knows of the reason: sentences, or nothing."""


def judge(context: Context, case: StepCase, explain: Explain = lambda case, found: "") -> StepResult:
    """Make a step and compare it with equation 12.

    Args:
        explain: called with the smallest failing case; the message begins with its answer.

    Raises:
        CheckFailedError: the result is too far off, with the smallest failing case.
    """
    level = context.levels(case.setting)[case.index]
    before = case.copied()
    result = context.step(case)
    found = verdict(context.subject, case, level, before, result)
    context.measured(found.share)
    if not found.share <= 1:
        raise _failure(context, before, found, explain)
    return result


def judge_observed(
    context: Context, setting: Setting, index: int, seen: Observed, noise: torch.Tensor | None = None, where: str = ""
) -> None:
    """Compare one step of an observed run with equation 12.

    Args:
        where: the beginning of the message.

    Raises:
        CheckFailedError: the result is too far off.
    """
    case = StepCase(setting, index, seen.x_t, seen.model_output, noise)
    found = verdict(context.subject, case, seen.level, case, StepResult(seen.x_prev, seen.x0), seen.rounded)
    context.measured(found.share)
    if not found.share <= 1:
        raise CheckFailedError(f"{where}step {index} of a run: {_message(case, seen.level, found)}")


def _failure(context: Context, case: StepCase, found: Verdict, explain: Explain) -> CheckFailedError:
    case, found = _smallest(context, case, found)
    level = context.subject.levels(case.setting)[case.index]
    message = " ".join(filter(None, (explain(case, found), _message(case, level, found))))
    return CheckFailedError(message, code_of(context.subject, case, found))


def _message(case: StepCase, level: Level, found: Verdict) -> str:
    return (
        f"{found.what} must be that of equation 12 within {found.allowed:.3g}, got {found.got!r} where it is {found.exact!r} "
        f"({found.share:.3g} times what is allowed), from {level} with {_described(case)}"
    )


def _described(case: StepCase) -> str:
    setting = case.setting
    named = {
        "prediction_type": setting.prediction_type,
        "eta": setting.eta,
        "clip_sample_range": setting.clip_sample_range,
        "use_clipped_model_output": setting.use_clipped_model_output or None,
        "in_place": case.in_place or None,
        "dtype": case.dtype,
        "shape": tuple(case.x_t.shape),
    }
    return ", ".join(f"{name} = {value}" for name, value in named.items() if value is not None)


def _smallest(context: Context, case: StepCase, found: Verdict) -> tuple[StepCase, Verdict]:
    """Return a simpler case that still fails: a simplification is kept if the result fails."""
    tries = 0
    progress = True
    while progress and tries < _MOST_TRIES:
        progress = False
        for simpler in _simpler(case, found):
            tries += 1
            verdict_of_simpler = _try(context.subject, simpler)
            if verdict_of_simpler is not None and not verdict_of_simpler.share <= 1:
                case, found, progress = simpler, verdict_of_simpler, True
                break
            if tries >= _MOST_TRIES:
                break
    return case, found


def _try(subject: Subject, case: StepCase) -> Verdict | None:
    try:
        level = subject.levels(case.setting)[case.index]
        return verdict(subject, case, level, case, subject.step(case.copied()))
    except Exception:  # the subject does not take this simplification
        return None


def _simpler(case: StepCase, found: Verdict) -> Iterator[StepCase]:
    """Yield cases that are simpler in one respect each."""
    setting = case.setting
    if case.x_t.numel() > 1 and not case.more:
        one = tuple(slice(i, i + 1) for i in found.place)

        def only(tensor):
            return None if tensor is None else tensor[one].reshape(1, 1).clone()

        yield case.but(x_t=only(case.x_t), model_output=only(case.model_output), noise=only(case.noise))
    if setting.eta and case.noise is None and case.source is None:
        yield case.but(setting=setting.but(eta=0.0), noise=None)
    if setting.use_clipped_model_output:
        yield case.but(setting=setting.but(use_clipped_model_output=False))
    if setting.clip_sample_range is not None:
        yield case.but(setting=setting.but(clip_sample_range=None, use_clipped_model_output=False))
    if setting.alpha_bars is None and setting.timesteps is None:
        for count in (1, 2, 3, 5, 10, setting.num_inference_steps // 2, setting.num_inference_steps - 1):
            if 0 < count < setting.num_inference_steps:
                for index in {0, count // 2, count - 1}:
                    yield case.but(setting=setting.but(num_inference_steps=count), index=index)
    if setting.alpha_bars is not None and len(setting.alpha_bars) > 1:
        yield case.but(setting=setting.but(alpha_bars=(setting.alpha_bars[case.index],)), index=0)
    for name in ("x_t", "model_output", "noise"):
        tensor = getattr(case, name)
        if tensor is not None and tensor.numel() == 1 and float(tensor) not in _SIMPLE:
            for value in _SIMPLE:
                yield case.but(**{name: torch.full_like(tensor, value)})


def code_of(subject: Subject, case: StepCase, found: Verdict) -> str:
    """Return the case as Python that raises AssertionError while the subject is wrong; empty where
    there is none."""
    if found.what == "x0":  # the code keeps only x_prev
        return ""
    tensors = [f"{name} = {_literal(getattr(case, name))}" for name in ("x_t", "model_output", "noise")]
    more = "more = {" + ", ".join(f"{k!r}: {_literal(v)}" for k, v in case.more.items()) + "}"
    try:
        call = subject.code(case)
    except NotImplementedError:
        return ""
    place = ", ".join(map(str, found.place))
    return "\n".join(
        [
            "import torch",
            "",
            *tensors,
            more,
            call,
            f"got, exact = float(x_prev[{place}]), {found.exact!r}  # equation 12 of arXiv 2010.02502 in float64",
            f"assert abs(got - exact) <= {found.allowed!r}, f'x_prev is {{got!r}}, should be {{exact!r}}'",
        ]
    )


def _literal(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"torch.tensor({value.double().tolist()!r}, dtype={value.dtype})"
