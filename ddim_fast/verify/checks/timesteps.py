"""The timesteps: which are visited, where each step goes, and that all results are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from ..truth import oracle
from ..truth.cases import CLEAN, Level, Observed, Setting, StepCase, StepResult
from .base import CheckFailedError, Context, check
from .judge import Verdict, code_of, judge, judge_observed, verdict
from .levels import negative_variance
from .update import TOLERANCE, random_model

TOTAL, SMALL_TOTAL = 1000, 30
# Divisors of 1000 and 999 and other numbers, their neighbours, powers of 2, and the usual counts.
FEWEST_COUNTS = (1, 2, 3, 7, 13, 50)
RUN_COUNTS = (1, 2, 3, 7, 13, 50, 99, 333)
FEW_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 28, 50, 75, 99, 112, 333, 501, 999)
_MORE_COUNTS = (5, 8, 9, 11, 12, 15, 16, 20, 25, 30, 33, 38, 40, 64, 100, 125, 128, 250, 334, 499, 500, 667, 998, 1000)
COUNTS = tuple(sorted({*FEW_COUNTS, *_MORE_COUNTS}))
ALL_COUNTS = tuple(range(1, TOTAL + 1))
SPREAD_COUNTS = tuple(sorted({*COUNTS, *range(1, 200), *range(200, TOTAL, 7)}))


def settings_of_timesteps(context: Context, quick: tuple[int, ...], full: tuple[int, ...]) -> Iterator[Setting]:
    """Yield every spacing with these counts, and with all counts of a short schedule."""
    totals = {TOTAL: full if context.full else quick}
    if context.offers("num_train_timesteps") and not context.few:
        totals[SMALL_TOTAL] = tuple(range(1, SMALL_TOTAL + 1))
    for total, counts in totals.items():
        for spacing in context.subject.spacings or ("leading",):
            for count in counts:
                yield context.setting(num_inference_steps=count, timestep_spacing=spacing, num_train_timesteps=total)


def _settings_of_steps(context: Context) -> Iterator[Setting]:
    """Yield the settings in which steps are made: fewer, since that takes longer."""
    quick = FEW_COUNTS if context.offers("step") else RUN_COUNTS
    return settings_of_timesteps(
        context, FEWEST_COUNTS if context.few else quick, COUNTS if context.subject.slow else SPREAD_COUNTS
    )


def _described(context: Context, setting: Setting) -> str:
    if setting.path is not None:
        return f"num_inference_steps = {setting.num_inference_steps} on the path {setting.schedule}"
    spacing = f'timestep_spacing = "{setting.timestep_spacing}", ' if context.subject.spacings else ""
    return f"{spacing}num_inference_steps = {setting.num_inference_steps} of {setting.num_train_timesteps}"


def _run(context: Context, setting: Setting) -> list[Observed]:
    return context.observe(setting, random_model(context), context.start(setting, 1, 3))


# --- Which timesteps --------------------------------------------------------------------------------------------------


@check(
    "timesteps",
    proves="The timesteps are as many as asked for, strictly decreasing, integers in [0, T), and those of the published table; in "
    "continuous time they start at the noisiest and are those of the path's spacing.",
    source="table 2 of arXiv 2305.08891 (leading, linspace, trailing), where the count divides the timesteps; arXiv 2403.03206, "
    "equation 23 (the shift of flow matching); arXiv 2206.00364, equation 5 (EDM)",
    tolerance="none where they are integers, otherwise float32's",
    any_order=True,
    needs="timesteps",
)
def timesteps(context: Context) -> None:
    wrong: dict[str, list[str]] = {}
    settings = [*settings_of_timesteps(context, COUNTS if context.offers("step") else FEW_COUNTS, ALL_COUNTS)]
    for setting in settings + _on_other_paths(context, COUNTS if context.full else FEW_COUNTS):
        levels = context.levels(setting) if context.offers("step") else [one.level for one in _run(context, setting)]
        fault = _fault(context, setting, [level.t for level in levels])
        context.measured(0.0 if fault is None else math.inf)
        if fault is not None:
            wrong.setdefault(_described(context, setting.but(num_inference_steps=0)), []).append(
                f"{_described(context, setting)}: {fault}"
            )
    if wrong:
        faults = [fault for of_spacing in wrong.values() for fault in of_spacing]
        shown = "\n  ".join(fault for of_spacing in wrong.values() for fault in of_spacing[:3])
        raise CheckFailedError(f"timesteps are wrong in {len(faults)} of {context.cases} cases, among them\n  {shown}")


def _fault(context: Context, setting: Setting, found: list[float]) -> str | None:
    """Return what is wrong with these timesteps, in words, or None."""
    count, total = setting.num_inference_steps, setting.num_train_timesteps
    if len(found) != count:
        return f"{count} must be visited, got {len(found)}: {_shown(found)}"
    if setting.path is not None or setting.divided:
        return _fault_of_times(context, setting, found)
    for t in found:
        if not float(t).is_integer() or not 0 <= t < total:
            return f"a timestep must be an integer in [0, {total - 1}], got {t:g}"
    for before, after in pairwise(found):
        if after >= before:
            return f"timesteps must decrease, got {before:g} followed by {after:g}"
    spacing = setting.timestep_spacing
    if spacing not in context.subject.spacings:
        return None
    table = _table(setting, context.subject.steps_offset)
    if table is not None and list(found) != table:
        return f"the published table has {_shown(table)}, got {_shown(found)}"
    if spacing != "leading" and count > 1 and found[0] != total - 1:
        return f"{spacing} starts at t = {total - 1}, got {found[0]:g}"
    if spacing == "linspace" and found[-1] != 0:
        return f"linspace ends at t = 0, got {found[-1]:g}"
    return None


def _fault_of_times(context: Context, setting: Setting, found: list[float]) -> str | None:
    """The same in continuous time."""
    first: float = setting.num_train_timesteps - 1
    if setting.path is not None:
        first = setting.path.first
    if any(after >= before for before, after in pairwise(found)) or not found[-1] >= (0 if setting.divided else 1e-300):
        return f"times must decrease, to one above clean data, got {_shown(found)}"
    only_cleanest = setting.divided and len(found) == 1  # as "linspace" has it with one step
    if abs(found[0] - first) > 1e-6 * first and not only_cleanest:
        return f"a run must start at the noisiest time, {first:g}, got {found[0]:g}"
    if setting.path is None or not context.subject.spacings:
        return None
    exact = setting.path.times(setting.num_inference_steps)
    if not np.allclose(found, exact, rtol=1e-6, atol=0):
        return f"the path {setting.schedule} has {_shown(exact)}, got {_shown(found)}"
    return None


def _on_other_paths(context: Context, counts: Sequence[int]) -> list[Setting]:
    return [one.but(num_inference_steps=count) for one in context.settings()[1:] for count in counts]


def _table(setting: Setting, steps_offset: int) -> list[int] | None:
    try:
        found = oracle.timesteps(setting.timestep_spacing, setting.num_inference_steps, setting.num_train_timesteps)
    except ValueError:  # the count does not divide the timesteps: implementations round in different ways
        return None
    if setting.timestep_spacing == "leading":
        found = [t + steps_offset for t in found]
    return found if found[0] < setting.num_train_timesteps else None


def _shown(values: Sequence[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", *texts[-3:]])


# --- Where each step goes ---------------------------------------------------------------------------------------------


@check(
    "previous-timestep",
    proves="Each step goes to the noise level of the next timestep visited, and the last to clean data.",
    source="section 4.2 of arXiv 2010.02502: steps along a sub-sequence tau of the timesteps, from tau_i to tau_(i-1)",
    tolerance=TOLERANCE,
    needs="timesteps",
)
def previous_timestep(context: Context) -> None:
    explain = partial(_where_it_went, context)
    for setting in [*_settings_of_steps(context), *_on_other_paths(context, FEWEST_COUNTS)]:
        if context.offers("step"):
            for index in _chosen(context, context.levels(setting)):
                judge(context, StepCase(setting, index, *_samples(context)), explain)
        else:
            seen = _run(context, setting)
            for index in _chosen(context, [one.level for one in seen]):
                where = f"{_described(context, setting)}: {_where_observed(context, setting, index, seen[index])}"
                judge_observed(context, setting, index, seen[index], where=where)


def _samples(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an x_t and a model output that reveal every wrong noise level."""
    x_t = torch.tensor([[1.0, 0.0, 0.7]], dtype=torch.float32, device=context.device)
    output = torch.tensor([[0.0, 1.0, -0.6]], dtype=torch.float32, device=context.device)
    return x_t, output


def _chosen(context: Context, levels: list[Level] | tuple[Level, ...]) -> list[int]:
    """Return the first and last two steps, and one of each distance to the next timestep, where a
    wrong rule for t_prev shows."""
    count = len(levels)
    chosen = {0, 1, count - 2, count - 1} & set(range(count))
    by_distance: dict[float, list[int]] = {}
    for index, level in enumerate(levels):
        by_distance.setdefault(level.t - level.t_prev, []).append(index)
    chosen |= {int(context.rng.choice(indices)) for indices in by_distance.values()}
    # The check "timesteps" judges timesteps that do not exist.
    return [i for i in sorted(chosen) if math.isfinite(levels[i].alpha_bar_t + levels[i].alpha_bar_prev)]


def _where_it_went(context: Context, case: StepCase, found: Verdict) -> str:
    """Return the timestep whose noise level explains the result, in words."""
    if case.setting.path is not None or case.setting.divided:
        return ""
    subject, setting = context.subject, case.setting
    level = subject.levels(setting)[case.index]
    result = subject.step(case.copied())
    every = subject.levels(setting.but(num_inference_steps=setting.num_train_timesteps))
    bars = {int(one.t): one.alpha_bar_t for one in every if math.isfinite(one.alpha_bar_t)}
    went = _went(setting, level, bars, lambda to: verdict(subject, case, to, case, result).share <= 1)
    return f"{_described(context, setting)}: {went}"


def _where_observed(context: Context, setting: Setting, index: int, one: Observed) -> str:
    case = StepCase(setting, index, one.x_t, one.model_output)
    if verdict(context.subject, case, one.level, case, _result(one)).share <= 1:
        return ""
    if setting.path is not None or setting.divided:
        return ""
    bars = dict(enumerate(setting.alphas_cumprod().tolist()))

    def fits(to: Level) -> bool:
        return verdict(context.subject, case, to, case, _result(one)).share <= 1

    return _went(setting, one.level, bars, fits)


def _result(one: Observed) -> StepResult:
    return StepResult(one.x_prev, one.x0)


def _went(setting: Setting, level: Level, bars: dict[int, float], fits: Callable[[Level], bool]) -> str:
    t, stride = int(level.t), setting.num_train_timesteps // setting.num_inference_steps
    by_stride = t - stride
    candidates = sorted([*bars, CLEAN], key=lambda s: abs(s - max(by_stride, CLEAN)))
    should = "clean data" if level.t_prev == CLEAN else f"t = {level.t_prev:g}, the next timestep visited"
    about = f"the step from t = {t} must go to {should}"
    for s in candidates:
        if s != level.t_prev and fits(level._replace(t_prev=s, level_prev=bars.get(s, 1.0))):
            rule = f" = t - T // N = {t} - {stride}" if s == by_stride else ""
            rule = rule or (f", as t - T // N = {by_stride} is negative" if s == CLEAN and by_stride < 0 else "")
            went = "clean data" if s == CLEAN else f"t = {s}"
            return f"{about}; it goes to {went}{rule} (N = {setting.num_inference_steps}, T = {setting.num_train_timesteps})."
    return f"{about}; it goes to the noise level of no timestep."


# --- Finite results ---------------------------------------------------------------------------------------------------


@check(
    "finite",
    proves="No step gives NaN or infinity from ordinary samples, at eta = 0 and eta = 1, for any count, spacing and schedule.",
    source="1 - alpha_bar_prev - std_dev_t**2 of equation 12 is never negative for eta at most 1",
    tolerance="none",
    needs="timesteps",
)
def finite(context: Context) -> None:
    for setting in _settings_of_finite(context):
        if context.offers("step"):
            _finite_steps(context, setting)
        else:
            _finite_run(context, setting)


def _settings_of_finite(context: Context) -> Iterator[Setting]:
    etas = context.etas(0.0, 1.0)
    for plain in _settings_of_steps(context):
        yield from (plain.but(eta=eta) for eta in etas)
    for plain in _on_other_paths(context, FEWEST_COUNTS):
        yield from (plain.but(eta=eta) for eta in etas)
    for schedule in context.subject.schedules:
        if schedule != "linear":  # the cosine schedule ends nearest to pure noise
            for spacing in context.subject.spacings or ("leading",):
                for count in FEW_COUNTS[:6] if context.few else FEW_COUNTS[:10]:
                    yield context.setting(
                        num_inference_steps=count, timestep_spacing=spacing, schedule=schedule, eta=etas[-1]
                    )


def _finite_steps(context: Context, setting: Setting) -> None:
    levels = context.levels(setting.but(eta=0.0))
    for index in _riskiest(levels, context.few):
        noise = context.normal(1, 3) if setting.eta and context.offers("given_noise") else None
        source = context.source(1) if setting.eta and noise is None else None
        case = StepCase(setting, index, *_samples(context), noise, source)
        result = context.step(case.copied())
        good = bool(torch.isfinite(result.x_prev).all())
        context.measured(0.0 if good else math.inf)
        if not good:
            level = levels[index]
            found = verdict(context.subject, case, level, case, result)
            raise CheckFailedError(_not_finite(context, setting, level), code_of(context.subject, case, found))


def _riskiest(levels: tuple[Level, ...], few: bool) -> list[int]:
    """Return the first, last and middle steps, and the one that removes the largest share of the
    noise.

    At eta = 1 the squared coefficient of eps, 1 - alpha_bar_prev - std_dev_t**2, is (1 -
    alpha_bar_prev) SNR_t / SNR_prev.
    """
    known = [i for i, level in enumerate(levels) if math.isfinite(level.alpha_bar_t + level.alpha_bar_prev)]

    def room(i: int) -> float:
        level = levels[i]
        if level.alpha_bar_prev >= 1 or level.alpha_bar_t >= 1:
            return math.inf
        snr = [bar / (1 - bar) for bar in (level.alpha_bar_t, level.alpha_bar_prev)]
        return snr[0] / snr[1] if snr[1] else math.inf

    if not known:
        return []
    middle = known[len(known) // 2]
    return sorted({known[0], known[-1], min(known, key=room), *([] if few else [known[-2:][0], middle])})


def _finite_run(context: Context, setting: Setting) -> None:
    for one in _run(context, setting):
        good = bool(torch.isfinite(one.x_prev).all())
        context.measured(0.0 if good else math.inf)
        if not good:
            raise CheckFailedError(_not_finite(context, setting, one.level))


def _not_finite(context: Context, setting: Setting, level: Level) -> str:
    to = "clean data" if level.t_prev == CLEAN else f"t = {level.t_prev:g}"
    std_dev = oracle.std_dev(level.level_t, level.level_prev, setting.eta)
    room = oracle.alpha_sigma(level.level_prev).sigma ** 2 - std_dev**2
    hint = negative_variance(setting) if np.abs(room) < 1e-4 else ""
    return (
        f"x_prev must be finite, got NaN or infinity in the step from t = {level.t:g} to {to} at eta = {setting.eta} "
        f"({_described(context, setting)}; 1 - alpha_bar_prev - std_dev_t**2 = {room:.3g}). {hint}"
    )
