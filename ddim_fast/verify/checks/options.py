"""Options that few steps have: guidance, a threshold for each sample, a known region."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..truth.cases import Setting, StepCase
from .base import Context, check
from .judge import judge
from .update import TOLERANCE, random_step, settings_of, some_steps

SHAPES = ((2, 3, 5), (3, 129))


def _cases(context: Context, setting: Setting) -> Iterator[StepCase]:
    for shape in SHAPES[: 1 if context.few else None]:
        for index in some_steps(context, setting):
            yield random_step(context, setting, index, shape)


@check(
    "guidance",
    proves="A guided step uses uncond + w (cond - uncond) as the model output, w being guidance_scale.",
    source="equation 6 of arXiv 2207.12598, with w = 1 for no guidance, as in most code",
    tolerance=TOLERANCE,
    needs="step guidance",
)
def guidance(context: Context) -> None:
    for setting in settings_of(context):
        for scale in (0.0, 1.0, 7.5, -1.0) if context.full else (0.0, 7.5):
            for case in _cases(context, setting):
                uncond = context.normal(*case.x_t.shape)
                judge(context, case.but(more={"model_output_uncond": uncond, "guidance_scale": scale}))


@check(
    "thresholds",
    proves="With a threshold s for each sample, the predicted x0 is clipped to [-s, s], then scaled by clip_sample_range / s.",
    source="arXiv 2205.11487, section 2.3 (dynamic thresholding)",
    tolerance=TOLERANCE,
    needs="step clip thresholds",
)
def thresholds(context: Context) -> None:
    for setting in settings_of(context):
        if setting.clip_sample_range is None:
            continue
        for case in _cases(context, setting.but(clip_sample_range=1.5)):
            chosen = torch.from_numpy(context.rng.uniform(0.3, 4, len(case.x_t))).float().to(context.device)
            judge(context, case.but(more={"thresholds": chosen}))


@check(
    "inpainting",
    proves="Where a mask is 1, x_prev is the known x0 at the noise level of x_prev; between 0 and 1, a blend.",
    source="equation 4 of arXiv 2010.02502 at alpha_bar_prev; arXiv 2201.09865, equation 8",
    tolerance=TOLERANCE,
    needs="step inpainting",
)
def inpainting(context: Context) -> None:
    for setting in settings_of(context):
        for case in _cases(context, setting):
            soft = torch.from_numpy(context.rng.uniform(0, 1, case.x_t.shape)).float().to(context.device)
            known = {"known_x0": context.normal(*case.x_t.shape), "known_noise": context.normal(*case.x_t.shape)}
            for mask in ((soft > 0.5).float(), soft) if context.full else (torch.where(soft < 0.3, 0.0, soft),):
                judge(context, case.but(more={"mask": mask, **known}))
