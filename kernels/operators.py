"""The step as torch operators, for torch.compile, make_fx and torch.export: one node in a graph, with what it writes declared.

``dispatch.ddim_step`` and ``ddim_step_from_table`` call these by themselves where they are traced; elsewhere they call a backend
directly, which costs no dispatcher. Both operators write ``x_prev`` and, where they are given, ``x0`` and ``history``. ``x_t`` may be
left out: then ``x_prev`` holds it, and is updated in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .contract import StepCoefficients, StepInputs, StepTable


@torch.library.custom_op("ddim_fast::step_", mutates_args=("x_prev", "x0", "history"))
def step_(
    x_prev: Tensor,
    x0: Tensor | None,
    x_t: Tensor | None,
    model_output: Tensor,
    coefficients: list[float],
    model_output_uncond: Tensor | None,
    guidance_scale: float | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    noise_step: int,
    noise_stream: int,
    thresholds: Tensor | None,
    mask: Tensor | None,
    known_x0: Tensor | None,
    known_noise: Tensor | None,
    normals: str,
    history: Tensor | None = None,
) -> None:
    """``ddim_step`` with the fields of ``StepCoefficients``, in order, as ``coefficients``."""
    inputs = StepInputs(
        x_prev if x_t is None else x_t,
        model_output,
        StepCoefficients(*coefficients),
        None,
        model_output_uncond,
        guidance_scale,
        noise,
        seeds,
        noise_step,
        noise_stream,
        thresholds,
        mask,
        known_x0,
        known_noise,
        x_prev,
        x0,
        normals,
        history,
    )
    dispatch.run(inputs)


@torch.library.custom_op("ddim_fast::step_from_table_", mutates_args=("x_prev", "x0", "history"))
def step_from_table_(
    x_prev: Tensor,
    x0: Tensor | None,
    x_t: Tensor | None,
    model_output: Tensor,
    rows: Tensor,
    clipped: bool,
    adds_noise: bool,
    adds_known_noise: bool,
    guided: bool,
    index: Tensor,
    model_output_uncond: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    noise_step: int,
    noise_stream: int,
    thresholds: Tensor | None,
    mask: Tensor | None,
    known_x0: Tensor | None,
    known_noise: Tensor | None,
    normals: str,
    history: Tensor | None = None,
    reads_history: bool = False,
) -> None:
    """``ddim_step_from_table`` with the fields of its ``StepTable``."""
    inputs = StepInputs(
        x_prev if x_t is None else x_t,
        model_output,
        StepTable(rows, clipped, adds_noise, adds_known_noise, guided, reads_history),
        index,
        model_output_uncond,
        None,
        noise,
        seeds,
        noise_step,
        noise_stream,
        thresholds,
        mask,
        known_x0,
        known_noise,
        x_prev,
        x0,
        normals,
        history,
    )
    dispatch.run_from_table(inputs)


@step_.register_fake
def _(x_prev, x0, x_t, model_output, coefficients, *others):
    return None


@step_from_table_.register_fake
def _(x_prev, x0, x_t, model_output, rows, *others):
    return None
