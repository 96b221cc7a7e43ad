"""The log-density of a step, the divergence of two, and their gradients on a GPU: one pass over the
inputs each, with the bits of C++."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import StepTable
from .layout import Rows
from .triton_step import (
    CLIP_BOUND,
    CLIP_M,
    CLIP_X,
    FOLD_M,
    FOLD_X,
    GUIDANCE_SCALE,
    REST_M,
    REST_X,
    guide,
    linear,
    load,
    load_or,
    predict,
    store,
)
from .triton_sums import add_blocks, block_sum, finish_block, tile_of

_LARGEST_INT32 = 2**31 - 1


@triton.jit
def _guided(model_output_ptr, stride, uncond_ptr, uncond_stride, row_ptr, sample, offsets, n_elements):
    m = load(model_output_ptr, sample, stride, offsets, n_elements)
    if uncond_ptr is not None:
        m = guide(m, load(uncond_ptr, sample, uncond_stride, offsets, n_elements), tl.load(row_ptr + GUIDANCE_SCALE))
    return m


@triton.jit
def density_kernel(
    x_t_ptr,  # (B, n) float32, float16 or bfloat16
    model_output_ptr,  # (B, n), the type of x_t or a half type
    model_output_uncond_ptr,  # (B, n) like model_output, or None: no guidance
    x_prev_ptr,  # (B, n) like x_t: the value; or None: a divergence
    reference_ptr,  # (B, n) like model_output, for a divergence
    reference_uncond_ptr,  # (B, n) like model_output, for a divergence with guidance
    mask_ptr,  # (B, n) like x_t, or None: elements where it is not 0 do not count
    of_x_t_ptr,  # (B, n) like x_t, or None: receives the gradient; the same for the next two
    of_model_output_ptr,  # (B, n) like model_output
    of_model_output_uncond_ptr,  # (B, n) like model_output
    factors_ptr,  # (B,) float32: what x_prev - mean is multiplied by; or None: results are wanted
    results_ptr,  # (B,) float32
    counts_ptr,  # (B,) float32, or None
    block_sums_ptr,  # (2, B, blocks) float32, or None for a sample of one block
    row_ptr,  # (ROW_WIDTH,) float32
    n_elements,  # n, elements of a sample
    x_t_stride,  # elements from one sample to the next, of each tensor
    model_output_stride,
    model_output_uncond_stride,
    x_prev_stride,
    reference_stride,
    reference_uncond_stride,
    mask_stride,
    of_x_t_stride,
    of_model_output_stride,
    of_model_output_uncond_stride,
    BLOCK_SIZE: tl.constexpr,  # elements that one program computes
    CLIPPED: tl.constexpr,  # whether the row clips x0
    MEAN: tl.constexpr,  # whether results are means over the elements
    WIDE_INDEX: tl.constexpr,  # whether n needs 64-bit offsets
    SAMPLE_AXIS: tl.constexpr,  # grid axis of the samples; the other counts blocks of a sample
):
    sample = tl.program_id(SAMPLE_AXIS).to(tl.int64)
    block = tl.program_id(1 - SAMPLE_AXIS)
    offsets = tl.arange(0, BLOCK_SIZE) + (block.to(tl.int64) if WIDE_INDEX else block) * BLOCK_SIZE
    x = load(x_t_ptr, sample, x_t_stride, offsets, n_elements)
    m = _guided(
        model_output_ptr, model_output_stride, model_output_uncond_ptr, model_output_uncond_stride, row_ptr, sample,
        offsets, n_elements,
    )  # fmt: skip
    if x_prev_ptr is not None:
        value = load(x_prev_ptr, sample, x_prev_stride, offsets, n_elements)
    else:
        reference = _guided(
            reference_ptr, reference_stride, reference_uncond_ptr, reference_uncond_stride, row_ptr, sample, offsets,
            n_elements,
        )  # fmt: skip
        value = predict(row_ptr, x, reference, 1.0, CLIPPED)
    deviation = value - predict(row_ptr, x, m, 1.0, CLIPPED)
    weight = deviation
    if mask_ptr is not None:
        weight = load_or(mask_ptr, sample, mask_stride, offsets, n_elements, 1.0)
    if factors_ptr is None:
        squares, count = block_sum(deviation, weight, offsets, block, n_elements, mask_ptr is not None, BLOCK_SIZE)
        samples, blocks = tl.num_programs(SAMPLE_AXIS), tl.num_programs(1 - SAMPLE_AXIS)
        finish_block(
            results_ptr, counts_ptr, block_sums_ptr, squares, count, row_ptr, sample, block, samples, blocks, MEAN,
            x_prev_ptr is None,
        )  # fmt: skip
    else:
        of_mean = tl.load(factors_ptr + sample) * deviation
        if mask_ptr is not None:
            of_mean = tl.where(weight == 0, of_mean, 0.0)
        slope_x, slope_m = tl.load(row_ptr + FOLD_X), tl.load(row_ptr + FOLD_M)
        if CLIPPED:  # as torch.clamp: x0 has a gradient within its bounds, and on them
            clip_x, clip_m = tl.load(row_ptr + CLIP_X), tl.load(row_ptr + CLIP_M)
            inside = tl.abs(linear(clip_x, x, clip_m, m)) <= tl.load(row_ptr + CLIP_BOUND)
            slope_x = tl.load(row_ptr + REST_X) + tl.where(inside, clip_x, 0.0)
            slope_m = tl.load(row_ptr + REST_M) + tl.where(inside, clip_m, 0.0)
        by_m = of_mean * slope_m
        if of_x_t_ptr is not None:
            store(of_x_t_ptr, sample, of_x_t_stride, offsets, n_elements, of_mean * slope_x)
        if model_output_uncond_ptr is None:
            if of_model_output_ptr is not None:
                store(of_model_output_ptr, sample, of_model_output_stride, offsets, n_elements, by_m)
        else:
            guidance = tl.load(row_ptr + GUIDANCE_SCALE)
            if of_model_output_ptr is not None:
                store(of_model_output_ptr, sample, of_model_output_stride, offsets, n_elements, by_m * guidance)
            if of_model_output_uncond_ptr is not None:
                of_uncond = by_m * (1.0 - guidance)
                store(of_model_output_uncond_ptr, sample, of_model_output_uncond_stride, offsets, n_elements, of_uncond)


_TENSORS = (
    "x_t", "model_output", "model_output_uncond", "x_prev", "reference", "reference_uncond", "mask", "of_x_t",
    "of_model_output", "of_model_output_uncond",
)  # fmt: skip
_MOST_BLOCKS_Y = 65535  # CUDA's limit on the second axis of a grid


def launch(
    rows: Rows,
    table: StepTable,
    *,
    mean: bool,
    results: Tensor | None = None,
    counts: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """Fill ``results`` and ``counts``, ``(B,)`` float32, in one launch, or two where a sample has
    several blocks; or with ``factors``, ``(B,)`` float32, the gradients, in one.

    Args:
        rows: the tensors that are given, by the names of ``density_kernel``.
        table: one row.
        mean: whether results are means over the elements.
    """
    t, n = rows.tensors, rows.n_elements
    block_size, num_warps = tile_of(n)
    blocks = triton.cdiv(n, block_size)
    block_sums = None
    if results is not None and blocks > 1:
        block_sums = torch.empty((2, rows.n_samples, blocks), dtype=torch.float32, device=results.device)
    sample_axis = 1 if rows.n_samples <= _MOST_BLOCKS_Y else 0
    density_kernel[(blocks, rows.n_samples) if sample_axis == 1 else (rows.n_samples, blocks)](
        **{f"{name}_ptr": t.get(name) for name in _TENSORS},
        **{f"{name}_stride": rows.strides.get(name, 0) for name in _TENSORS},
        factors_ptr=factors,
        results_ptr=results,
        counts_ptr=counts,
        block_sums_ptr=block_sums,
        row_ptr=table.rows,
        n_elements=n,
        BLOCK_SIZE=block_size,
        CLIPPED=table.clipped,
        MEAN=mean,
        WIDE_INDEX=n + block_size > _LARGEST_INT32,
        SAMPLE_AXIS=sample_axis,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    if results is not None and block_sums is not None:
        add_blocks(results, counts, block_sums, table, None, mean=mean, divergence="x_prev" not in t)
