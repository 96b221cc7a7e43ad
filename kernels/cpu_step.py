"""The step in SIMD C++ (csrc/), as a backend, and the noise standard at the same speed."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contract import StepCoefficients, StepInputs
from .layout import as_rows, plain_memory_reasons
from .noise import standard_normals

try:
    from . import _cpu_step as extension
except ImportError as error:
    extension = None
    missing_reason = (
        f"the C++ extension is not there ({error}): install a C++ compiler and reinstall ddim_fast "
        "(pip install --force-reinstall --no-deps . in its folder)"
    )

name = "cpu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/step.h

if extension is not None and (wanted := os.environ.get("DDIM_FAST_INSTRUCTION_SET")):
    extension.select(wanted)


def _no_step(
    x_t: Any,
    model_output: Any,
    rows: dict[int, StepCoefficients],
    t: Any,
    values: tuple[tuple[dict[str, Any], str, Any], ...],
    writes: tuple[tuple[Tensor, int], ...],
) -> tuple[Tensor, Tensor] | None:
    """``ddim_step`` without noise, guidance or thresholds, outside of ``torch.compile``, for callers that count microseconds.

    In C++ all of it is one call: the row is looked up and both results get their memory without torch, whose new tensors cost six of
    the twenty microseconds that a small step would take.

    Args:
        rows: rows that add no noise, by number.
        t: the number of the row, or an int64 tensor with it.
        values, writes: what the rows were made of: each dictionary must still have that very value for its key, and each tensor have
            counted that many writes (``_version``).

    Returns:
        ``(x_prev, x0)`` in new tensors, or None where these are not plain CPU tensors that fit together, or there is no such row, or
        not any more: then nothing was done, and there is no error. The tensors own their memory as those from ``torch.from_dlpack``
        do: ``resize_`` cannot enlarge them.
    """


plain_step = _no_step if extension is None else extension.step_to_new


def unsupported_reasons(inputs: StepInputs) -> list[str]:
    """Why this backend cannot run these (valid) inputs; empty if it can."""
    reasons = []
    if extension is None:
        reasons.append(missing_reason)
    if inputs.x_t.device.type != "cpu":
        reasons.append(f"tensors are on {inputs.x_t.device}, it runs on cpu")
    return reasons + plain_memory_reasons(inputs)


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs. Samples may have any stride between them; other layouts than contiguous samples are copied first."""
    x_t = inputs.x_t
    result = inputs.x_prev if inputs.x_prev is not None else torch.empty_like(x_t)
    if x_t.numel() == 0:
        return result
    rows = as_rows(inputs, result)
    keep = []  # copies stay alive until the kernel has run

    def describe(name: str, wanted: bool = True) -> tuple[int, int, int]:
        tensor = rows.tensors.get(name)
        if tensor is None or not wanted:
            return (0, 0, 0)
        return (tensor.data_ptr(), rows.strides[name], DTYPES[tensor.dtype])

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        keep.append(tensor.contiguous())
        return keep[-1].data_ptr()

    extension.run(
        rows.n_samples,
        rows.n_elements,
        (
            describe("x_t"),
            describe("model_output"),
            describe("model_output_uncond"),
            describe("noise", inputs.adds_noise),
            describe("x_prev"),
            describe("x0"),
            describe("mask"),
            describe("known_x0"),
            describe("known_noise", inputs.adds_known_noise),
            describe("history"),
        ),
        inputs.guidance_scale or 0.0,
        inputs.coefficients.packed,
        address(inputs.thresholds),
        address(inputs.seeds if inputs.adds_noise and inputs.noise is None else None),
        address(inputs.seeds if inputs.adds_known_noise and inputs.known_noise is None else None),
        inputs.noise_step,
        inputs.noise_stream,
        torch.get_num_threads(),
    )
    rows.copy_back()
    return result


def normals(seeds: Tensor, shape: tuple[int, ...], step: int, stream: int) -> Tensor:
    """Normals of the noise standard: ``(len(seeds), *shape)`` float32 on the CPU; by NumPy where the extension is missing."""
    n_elements = math.prod(shape)
    if extension is None:
        return torch.from_numpy(standard_normals(np.asarray(seeds), n_elements, step, stream)).view(-1, *shape)
    seeds = seeds.contiguous()
    z = torch.empty((len(seeds), *shape), dtype=torch.float32)
    extension.normals(seeds.data_ptr(), len(seeds), n_elements, step, stream, z.data_ptr(), torch.get_num_threads())
    return z
