"""Comparison with the recorded runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..subjects.subject import Subject
from ..truth import oracle
from ..truth.cases import Level, Setting, StepCase
from ..truth.golden import GOLDEN_VERSION, GoldenRun, golden_runs
from ..truth.tolerances import coefficient_spread, spread_of_result, to_numpy, worst_share
from .base import CheckFailedError, Context, NotApplicableError, check
from .judge import paper_eta, row_of, truth


@check(
    "golden",
    proves="Complete runs give the recorded numbers at every step: a change made for speed has changed no result.",
    source="golden_trajectories.json, written by tools/golden_trajectories.py from equation 12 in float64",
    tolerance="the errors that each step may make, propagated through the later steps, and those of the subject's own alpha_bar",
)
def golden(context: Context) -> None:
    posed_runs = [(run, posed(context.subject, run)) for run in golden_runs() if context.full or run.quick]
    runs = [(run, setting) for run, setting in posed_runs if setting is not None]
    if not runs:
        raise NotApplicableError(
            "this subject can make none of the recorded runs: it takes none of their timesteps, which are integers"
        )
    dtypes = (torch.float32, torch.float64) if context.offers("float64") else (torch.float32,)
    changed = []
    for run, setting in runs:
        for dtype in dtypes:
            found = _difference(context, run, setting, dtype)
            if found:
                changed.append((run.name, found))
                break
    context.details.update(version=GOLDEN_VERSION, runs=len(runs), changed=[name for name, _ in changed])
    if changed:
        names = "".join(f"\n  {name}" for name, _ in changed)
        raise CheckFailedError(
            f"{changed[0][1]}. This is no rounding: the results are not those on record (version {GOLDEN_VERSION}). "
            f"{len(changed)} of {len(runs)} runs differ:{names}"
        )


def posed(subject: Subject, run: GoldenRun) -> Setting | None:
    """Return the run as a setting that the subject takes, or None where there is none."""
    if not _needed(run) <= subject.features or subject.paths[0].path is not None:
        return None
    if 0 < run.setting.eta < 1 and run.eta_scales != subject.eta_scales:
        return None
    of_schedule = run.setting.schedule in subject.schedules
    spacing = run.setting.timestep_spacing
    if of_schedule and not run.irregular and "timesteps" in subject.features and spacing in subject.spacings:
        offset = subject.steps_offset and spacing == "leading"
        return None if offset else run.setting.but(timesteps=None)
    if of_schedule and "explicit_timesteps" in subject.features:
        return run.setting
    if "levels" in subject.features:
        pairs = zip(run.alpha_bars.tolist(), run.alpha_bars[1:].tolist(), strict=False)
        return run.setting.but(alpha_bars=tuple(pairs), timesteps=None)
    return None


def _needed(run: GoldenRun) -> set[str]:
    setting = run.setting
    needed = {setting.prediction_type}
    needed |= {"eta", "given_noise", "step"} if setting.eta else set()
    needed |= {"clip"} if setting.clip_sample_range is not None else set()
    needed |= {"use_clipped_model_output"} if setting.use_clipped_model_output else set()
    needed |= {"zero_terminal_snr"} if setting.zero_terminal_snr else set()
    needed |= {"num_train_timesteps"} if setting.num_train_timesteps != 1000 else set()
    return needed


@dataclass(eq=False)
class Seen:
    """A subject's run: the steps as the subject gives them, and x_prev of each."""

    levels: list[Level]
    states: list[Tensor]


def _difference(context: Context, run: GoldenRun, setting: Setting, dtype: torch.dtype) -> str:
    """Return where a subject's run first differs from the recorded one, in words; empty if nowhere."""
    where = f"the run on record with {run.name}, in {str(dtype).removeprefix('torch.')},"
    seen = _run(context, run, setting, dtype)
    asked = list(run.setting.timesteps or ())
    visited = asked if setting.alpha_bars is not None else [round(level.t) for level in seen.levels]
    if visited != asked or len(seen.states) != len(asked):
        context.measured(np.inf)
        return f"{where} visits the timesteps {asked}; the subject makes {len(seen.states)} steps, at {visited}"
    compared = len(asked)
    if seen.levels[-1].alpha_bar_prev != 1:  # the check "endpoints" judges a subject that ends before clean data
        compared -= 1
    allowed = _allowed(context.subject, run, setting, seen.levels, dtype)
    for i in range(compared):
        at = f"{where} differs in step {i}, from timestep {asked[i]} to {asked[i + 1] if i + 1 < len(asked) else 'clean data'}"
        recorded, got = run.states[i], to_numpy(seen.states[i])
        if got.shape != recorded.shape or seen.states[i].dtype != dtype:
            context.measured(np.inf)
            return f"{at}: it has the shape {got.shape} and is {seen.states[i].dtype}, recorded as {recorded.shape}"
        share, place = worst_share(np.abs(got - recorded), allowed[i])
        context.measured(share)
        if share > 1:
            low, high = recorded[place] - allowed[i][place], recorded[place] + allowed[i][place]
            return (
                f"{at}: at {place} it is {float(got[place])!r}, recorded as {float(recorded[place])!r}, "
                f"allowed from {float(low)!r} to {float(high)!r}"
            )
    return ""


def _run(context: Context, run: GoldenRun, setting: Setting, dtype: torch.dtype) -> Seen:
    """Make the run as a whole where no noise is needed, otherwise step by step."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(dtype).to(context.device)

    if not setting.eta:
        outputs = iter([*run.model_outputs, *([run.model_outputs[-1]] * len(run.model_outputs))])
        steps = context.observe(setting, lambda x_t, t: tensor(next(outputs)), tensor(run.x_T))
        return Seen([step.level for step in steps], [step.x_prev for step in steps])
    levels = list(context.levels(setting))
    x_t, states = tensor(run.x_T), []
    for i in range(min(len(levels), len(run.states))):
        case = StepCase(setting, i, x_t, tensor(run.model_outputs[i]), tensor(run.noise[i]))
        x_t = context.step(case).x_prev
        states.append(x_t.clone())
    return Seen(levels, states)


def _allowed(
    subject: Subject, run: GoldenRun, setting: Setting, levels: list[Level], dtype: torch.dtype
) -> list[np.ndarray]:
    """Return how far each state may be from the recorded one.

    That is the error of each step so far, multiplied by the slopes of the later steps, and the
    difference made by the subject's own alpha_bars where rounding alone explains them (see
    ``_rounded_only``).
    """
    x = own_x = run.x_T
    error, found = np.zeros_like(x), []
    for i, (bars, own) in enumerate(zip(_pairs(run), levels, strict=True)):
        level = own._replace(level_t=bars[0], level_prev=bars[1])
        own = _rounded_only(own, *bars, subject, run)
        m, z = run.model_outputs[i], run.noise[i]
        row = row_of(subject, setting, own)
        x_t, output, noise = (torch.from_numpy(array).to(dtype) for array in (own_x, m, z))
        case = StepCase(setting, i, x_t, output, noise)
        exact = oracle.row_step(row, own_x, m, noise=z)
        off = truth(subject, case, own).allowed + _recorded_off(subject, setting, own, row, own_x, m, z, exact)
        slope = abs(row["prev_x0"] + row["prev_eps"] * row["eps_0"]) * abs(row["x0_x"]) + abs(
            row["prev_eps"] * row["eps_x"]
        )
        x = oracle.row_step(row_of(subject, setting, level), x, m, noise=z).x_prev
        own_x = exact.x_prev
        error = slope * error + off + torch.finfo(dtype).eps / 2 * np.abs(own_x)
        found.append(error + np.abs(own_x - x) + torch.finfo(dtype).smallest_normal)
    return found


def _recorded_off(subject, setting, level, row, x, m, z, exact: oracle.Result) -> np.ndarray:
    """Return how far the record itself may be off: float64 rounds coefficients, too, and at eta = 1
    most of their digits cancel."""
    eta = paper_eta(subject, setting)
    bars, eps = (level.alpha_bar_t, level.alpha_bar_prev), torch.finfo(torch.float64).eps
    spread = coefficient_spread(setting.prediction_type, *bars, eta, setting.use_clipped_model_output, eps)
    off = spread_of_result(row, spread, x, m, z, exact)
    return np.where(np.isfinite(off), off, 0.0)


def _pairs(run: GoldenRun) -> list[tuple[float, float]]:
    return list(zip(run.alpha_bars.tolist(), run.alpha_bars[1:].tolist(), strict=False))


def _rounded_only(level: Level, alpha_bar_t: float, alpha_bar_prev: float, subject: Subject, run: GoldenRun) -> Level:
    """Return the level with the subject's own alpha_bars where they differ from the recorded ones
    by rounding alone."""
    eps = torch.finfo(torch.float64 if subject.arithmetic == "exact" else torch.float32).eps
    most = run.setting.num_train_timesteps * eps

    def near(own: float, recorded: float) -> float:
        # Zero terminal SNR shifts the roots: there their error is absolute.
        off = abs(own**0.5 - recorded**0.5) if run.setting.zero_terminal_snr else abs(own / recorded - 1)
        return own if off <= most else recorded

    return level._replace(
        level_t=near(level.alpha_bar_t, alpha_bar_t), level_prev=near(level.alpha_bar_prev, alpha_bar_prev)
    )
