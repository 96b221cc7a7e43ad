"""The update: single steps compared with equation 12."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..truth import oracle
from ..truth.cases import PREDICTION_TYPES, Level, Model, Setting, StepCase
from .base import CheckFailedError, Context, check
from .judge import Verdict, judge, judge_observed

SIZES = ((1, 1), (2, 1, 3, 5), (1, 127), (3, 128), (2, 129), (0, 4), (1, 3, 33, 31))
EXTREMES = (0.0, -0.0, 1.0, -1.0, 1e-6, 30.0, -30.0, 1e-30)
TOLERANCE = (
    "4 eps of the sum of the terms' magnitudes, and the errors of float32 coefficients where the subject uses them"
)
SHAPE = (3, 2, 5, 7)
CLEAN_DATA = oracle.NoiseLevel(1.0, 0.0)


def settings_of(context: Context, eta: float = 0.0) -> Iterator[Setting]:
    """Yield settings that together use all paths, prediction types and clipping that the subject
    offers."""
    first, *others = context.settings(eta=eta)
    for base in [*of_kinds(context, first), *others]:
        yield base
        if context.offers("clip"):
            yield base.but(clip_sample_range=1.0)
        if context.offers("clip", "use_clipped_model_output"):
            bound = 0.8 if context.offers("clip_range") else 1.0
            yield base.but(clip_sample_range=bound, use_clipped_model_output=True)


def of_kinds(context: Context, setting: Setting) -> list[Setting]:
    """Return the setting with every prediction type that the subject takes there, its own first."""
    every = sorted(PREDICTION_TYPES, key=lambda kind: kind != setting.prediction_type)
    kinds = (kind for kind in every if context.offers(kind) and _is_defined(setting, kind))
    return [setting.but(prediction_type=kind) for kind in kinds]


def _is_defined(setting: Setting, prediction_type: str) -> bool:
    """Return whether a prediction is one on this path: the score and EDM's network belong to paths
    in continuous time, and where a path starts at pure noise, eps says nothing about x0."""
    if setting.path is None:
        return prediction_type in ("epsilon", "sample", "v_prediction")
    return prediction_type not in ("epsilon", "score") or setting.path.level(setting.path.first).alpha > 0


def random_step(
    context: Context, setting: Setting, index: int, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float32
) -> StepCase:
    """Return a step from normal samples and model output, with noise where the step adds it and the
    subject takes it."""
    noise = context.normal(*shape, dtype=dtype) if setting.eta and context.offers("given_noise") else None
    return StepCase(setting, index, context.normal(*shape, dtype=dtype), context.normal(*shape, dtype=dtype), noise)


@check(
    "update",
    proves="A deterministic step is equation 12 for every prediction type, with and without clipping, at every size.",
    source="equations 9 and 12 of arXiv 2010.02502; v: arXiv 2202.00512, section 2.4",
    tolerance=TOLERANCE,
    needs="step",
)
def update(context: Context) -> None:
    for setting, shape in with_sizes(context, settings_of(context), SIZES):
        for index in some_steps(context, setting):
            judge(context, random_step(context, setting, index, shape))
    for setting in settings_of(context):
        pairs = list(itertools.product(EXTREMES, EXTREMES))
        x_t, output = torch.tensor(pairs, dtype=torch.float32, device=context.device).T.unsqueeze(1)
        for index in some_steps(context, setting):
            judge(context, StepCase(setting, index, x_t, output))


def with_sizes(
    context: Context, settings: Iterable[Setting], sizes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Setting, tuple[int, ...]]]:
    """Yield each setting with every size. Where few cases are made, only the first has every size,
    the others one in turn."""
    for number, setting in enumerate(settings):
        in_turn = (sizes[number % len(sizes)],)
        yield from ((setting, size) for size in (in_turn if context.few and number else sizes))


def some_steps(context: Context, setting: Setting) -> list[int]:
    """Return the first, middle and last steps; all in the full set."""
    count = len(context.levels(setting))
    return list(range(count)) if context.full else sorted({0, count // 2, count - 1})


@check(
    "observed-update",
    proves="Each step of a whole run, seen through the calls of its model, is equation 12 between the step's noise levels.",
    source="equation 12 of arXiv 2010.02502",
    tolerance=TOLERANCE,
)
def observed_update(context: Context) -> None:
    for setting in runs_of(context):
        seen = context.observe(setting, random_model(context), context.start(setting, 2, 3, 5))
        if len(seen) != setting.steps:
            found = f"{setting.steps} steps are asked for, and the model is called {len(seen)} times: {setting}"
            raise CheckFailedError(found)
        visited = [one.level.t for one in seen]
        if setting.timesteps and not np.allclose(visited, setting.timesteps, rtol=1e-6, atol=0):
            raise CheckFailedError(f"the timesteps asked for are {list(setting.timesteps)}, got {visited}")
        for index, one in enumerate(seen):
            judge_observed(context, setting, index, one)


def runs_of(context: Context) -> Iterator[Setting]:
    """Yield deterministic runs: few and many steps, every prediction type, and irregular timesteps."""
    for setting in settings_of(context):
        yield setting.but(num_inference_steps=4) if context.few else setting
    for count in (1, 2) if context.few else (1, 2, 50):
        yield context.setting(num_inference_steps=count)
    if context.offers("explicit_timesteps"):
        yield from _explicit_times(context)
    if context.offers("explicit_timesteps") and context.paths[0].path is None:
        for count in (1, 3) if context.few else (1, 2, 3, 7, 20):
            chosen = context.rng.choice(1000, count, replace=False)
            yield context.setting(timesteps=tuple(sorted((int(t) for t in chosen), reverse=True)))
        yield context.setting(timesteps=(999, 998, 997, 2, 1, 0))


def _explicit_times(context: Context) -> Iterator[Setting]:
    """Yield irregular times in continuous time; the first may be below the path's."""
    for setting in context.settings():
        if setting.path is not None:
            times = np.sort(setting.path.first * context.rng.uniform(0.01, 0.99, 5))[::-1]
            yield setting.but(timesteps=tuple(times.tolist()))


def random_model(context: Context) -> Model:
    """Return a model that gives new random output at each call."""
    return lambda x_t, t: context.normal(*x_t.shape).to(x_t)


# --- Where a step starts and ends -------------------------------------------------------------------------------------


@check(
    "endpoints",
    proves="A step to alpha_bar_prev = 1 gives the predicted x0 and adds no noise at any eta, and so does the last step of a run; "
    "a step to its own noise level changes nothing.",
    source="equations 12 and 16 of arXiv 2010.02502 at alpha_bar_prev = 1 (std_dev_t = 0) and alpha_bar_prev = alpha_bar_t",
    tolerance=TOLERANCE,
)
def endpoints(context: Context) -> None:
    for eta in context.etas(0.0, 0.5, 1.0):
        for setting in settings_of(context, eta):
            if context.offers("step"):
                _last_steps(context, setting)
        for count in (1, 4):
            for setting in context.settings(num_inference_steps=count, eta=eta):
                _last_of_run(context, setting)
    if context.offers("step", "levels"):
        for setting in settings_of(context):
            if setting.clip_sample_range is None:  # clipping changes x0, and so x_t
                for level in some_levels(setting)[1::2]:
                    at = setting.but(alpha_bars=((level, level),))
                    judge(context, random_step(context, at, 0, (2, 3, 5)), _changed)


ALPHA_BARS = (1.0, 0.9999, 0.9, 0.4, 0.05, 0.004)


def some_levels(setting: Setting) -> list[oracle.AnyLevel]:
    """Return six levels of a setting's path, from clean data to much noise."""
    if setting.path is None:
        pairs = [oracle.NoiseLevel(1.0, math.sqrt((1 - bar) / bar)) for bar in ALPHA_BARS]
        return list(pairs if setting.divided else ALPHA_BARS)
    first = setting.path.first
    return [CLEAN_DATA, *(setting.path.level(share * first) for share in (0.003, 0.1, 0.4, 0.8, 0.98))]


def _last_steps(context: Context, setting: Setting) -> None:
    some = some_levels(setting)
    to_clean = [setting.but(alpha_bars=((level, some[0]),)) for level in some[1::2]] if context.offers("levels") else []
    for to in [setting, *to_clean]:
        last = len(context.levels(to)) - 1
        if context.levels(to)[last].alpha_bar_prev == 1:
            source = context.source(2) if context.offers("draws_noise") and not context.offers("given_noise") else None
            judge(context, random_step(context, to, last, (2, 3, 5)).but(source=source), _not_x0)


def _last_of_run(context: Context, setting: Setting) -> None:
    if setting.eta and not context.offers("draws_noise"):
        return
    seen = context.observe(setting, random_model(context), context.start(setting, 2, 3, 5))
    if seen and seen[-1].level.alpha_bar_prev != 1 and context.subject.ends_clean:
        raise CheckFailedError(_noise_left(seen[-1].level))
    if seen and (context.subject.ends_clean or not setting.eta):
        rule = "the last step must give the predicted x0: " if context.subject.ends_clean else "the last step: "
        judge_observed(context, setting, len(seen) - 1, seen[-1], where=rule)


def _noise_left(level: Level) -> str:
    return (
        f"the last step must go to clean data, alpha_bar_prev = 1, got {level} from t = {level.t:g}: "
        f"noise of standard deviation {oracle.alpha_sigma(level.level_prev).sigma:.3g} is left where the paper defines alpha_0 = 1. "
        "A subject that means to (set_alpha_to_one=False) declares it by ends_clean = False"
    )


def _not_x0(case: StepCase, found: Verdict) -> str:
    return (
        f"A step to alpha_bar_prev = 1 must give the predicted x0 and add no noise, at eta = {case.setting.eta}, too."
    )


def _changed(case: StepCase, found: Verdict) -> str:
    return "A step to alpha_bar_prev = alpha_bar_t must give x_t back."
