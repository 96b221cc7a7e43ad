"""The update: one step held against equation 12."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..cases import Setting, StepCase
from .base import Context, check
from .judge import judge

SIZES = ((1, 1), (2, 1, 3, 5), (1, 127), (3, 128), (2, 129), (0, 4), (1, 3, 33, 31))
EXTREMES = (0.0, -0.0, 1.0, -1.0, 1e-6, 30.0, -30.0, 1e-30)


def settings_of(context: Context, eta: float = 0.0) -> Iterator[Setting]:
    """Settings that between them use all that the subject offers of predictions and clipping."""
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        if not context.offers(prediction_type):
            continue
        base = Setting(prediction_type=prediction_type, eta=eta)
        yield base
        if context.offers("clip"):
            yield base.but(clip_sample_range=1.0)
        if context.offers("clip", "rederive"):
            yield base.but(clip_sample_range=1.0, use_clipped_model_output=True)


def random_step(
    context: Context, setting: Setting, index: int, shape: tuple[int, ...], dtype=torch.float32
) -> StepCase:
    """A step from normal samples and an output of the model; with noise, where it adds any and the subject takes it."""
    noise = context.normal(*shape, dtype=dtype) if setting.eta and context.offers("given_noise") else None
    return StepCase(setting, index, context.normal(*shape, dtype=dtype), context.normal(*shape, dtype=dtype), noise)


@check(
    "update",
    proves="A deterministic step is equation 12 for every prediction type, with and without clipping, at every size.",
    source="equations 9 and 12 of arXiv 2010.02502; v: arXiv 2202.00512, section 2.4",
    tolerance="4 eps of the sum of the terms' magnitudes, and what float32 coefficients may be off where the subject claims no more",
    needs="step epsilon",
)
def update(context: Context) -> None:
    for setting, shape in itertools.product(settings_of(context), SIZES):
        for index in _some_steps(context, setting):
            judge(context, random_step(context, setting, index, shape))


def _some_steps(context: Context, setting: Setting) -> range | list[int]:
    count = len(context.levels(setting))
    return range(count) if context.full else sorted({0, count // 2, count - 1})
