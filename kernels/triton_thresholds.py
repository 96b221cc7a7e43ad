"""Dynamic thresholding on a GPU (Imagen, arXiv 2205.11487, section 2.3): each sample's exact
quantile of |x0| in one launch.

This is a radix select. The bits of non-negative floats sort as integers, so the order statistic is
found eight bits at a time, by a histogram of the elements that agree with the bits found so far.
Four passes over a sample find it; a fifth finds the next one, for the interpolation. It is exact
for samples of any size (``torch.quantile`` stops at 2**24 elements). Each sample has one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import ROW_WIDTH, StepTable
from .layout import Rows
from .triton_step import GUIDANCE_SCALE, X0_BOUND, X0_M, X0_X, guide, linear, load


@triton.jit
def _load_magnitudes(x_t_ptr, model_output_ptr, uncond_ptr, row_ptr, sample, strides, offsets, n):
    """Return |x0| as int32 bits, which sort as the numbers do; a NaN is larger than every number."""
    x = load(x_t_ptr, sample, strides[0], offsets, n)
    m = load(model_output_ptr, sample, strides[1], offsets, n)
    if uncond_ptr is not None:
        m = guide(m, load(uncond_ptr, sample, strides[2], offsets, n), tl.load(row_ptr + GUIDANCE_SCALE))
    return linear(tl.load(row_ptr + X0_X), x, tl.load(row_ptr + X0_M), m).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _digit_of_rank(histogram, rank, BINS: tl.constexpr):
    """Return the bin of element ``rank`` in sorted order, and the counts of elements below and in
    that bin."""
    bins = tl.arange(0, BINS)
    digit = tl.sum((tl.cumsum(histogram, 0) <= rank).to(tl.int32), 0)
    below = tl.sum(tl.where(bins < digit, histogram, 0), 0)
    return digit, below, tl.sum(tl.where(bins == digit, histogram, 0), 0)


@triton.jit(do_not_specialize=["rank", "weight", "maximum"])
def thresholds_kernel(
    x_t_ptr,  # (B, n) float32, float16 or bfloat16: noisy samples
    model_output_ptr,  # (B, n), the type of x_t or a half type
    model_output_uncond_ptr,  # (B, n) like model_output, or None: no guidance
    thresholds_ptr,  # (B,) float32: the result
    rows_ptr,  # (S, ROW_WIDTH) float32: the table of coefficients
    index_ptr,  # one int64, or None for row 0: which row
    n_elements,  # n, elements of a sample
    x_t_stride,  # elements from one sample to the next
    model_output_stride,
    model_output_uncond_stride,
    rank,  # int64: the quantile lies between this element in sorted order and the next,
    weight,  # float32: this far from the first to the second
    maximum,  # float32: the largest threshold; the least is the clip bound
    BLOCK_SIZE: tl.constexpr,  # elements read at a time
    WIDE_INDEX: tl.constexpr,  # whether n needs 64-bit offsets
    ROW_WIDTH: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr) if index_ptr is not None else 0
    row_ptr = rows_ptr + index * ROW_WIDTH
    strides = (x_t_stride, model_output_stride, model_output_uncond_stride)
    bound = tl.load(row_ptr + X0_BOUND)
    rank = rank.to(tl.int64)
    in_block = tl.arange(0, BLOCK_SIZE)
    n = n_elements.to(tl.int64) if WIDE_INDEX else n_elements
    found = 0  # the upper bits found so far, in their positions
    same = tl.zeros_like(rank)  # how many elements have them
    for digit_index in tl.static_range(4):
        shift = 24 - 8 * digit_index
        histogram = tl.zeros((256,), tl.int64)
        for begin in range(0, n, BLOCK_SIZE):
            offsets = begin + in_block
            bits = _load_magnitudes(
                x_t_ptr, model_output_ptr, model_output_uncond_ptr, row_ptr, sample, strides, offsets, n
            )
            agrees = (bits.to(tl.int64) >> (shift + 8)) == (found.to(tl.int64) >> (shift + 8))  # type: ignore[attr-defined]  # a tensor, in Triton
            histogram += tl.histogram((bits >> shift) & 255, 256, mask=agrees & (offsets < n)).to(tl.int64)
        digit, below, same = _digit_of_rank(histogram, rank, 256)
        rank -= below
        found = found | (digit << shift)
    # The next in order: the same number again, or the smallest of the larger ones (itself, if there
    # is none).
    above = 0x7FFFFFFF
    if rank + 1 >= same:
        for begin in range(0, n, BLOCK_SIZE):
            offsets = begin + in_block
            bits = _load_magnitudes(
                x_t_ptr, model_output_ptr, model_output_uncond_ptr, row_ptr, sample, strides, offsets, n
            )
            above = min(above, tl.min(tl.where((bits > found) & (offsets < n), bits, 0x7FFFFFFF), 0))
    else:
        above = found
    if above == 0x7FFFFFFF:
        above = found
    low, high = found.to(tl.float32, bitcast=True), above.to(tl.float32, bitcast=True)  # type: ignore[attr-defined]  # a tensor, in Triton
    threshold = low
    if weight != 0:  # else an infinite difference would give NaN
        threshold = tl.fma(weight, high - low, low)
    threshold = tl.clamp(threshold, bound, tl.maximum(maximum, bound), propagate_nan=tl.PropagateNan.ALL)
    tl.store(thresholds_ptr + sample, threshold)


def launch(
    rows: Rows, table: StepTable, index: Tensor | None, thresholds: Tensor, *, ratio: float, maximum: float
) -> None:
    """Fill ``thresholds`` ``(B,)`` float32 with each sample's ``ratio`` quantile of |x0|.

    Each is at least the row's bound and at most ``maximum``. ``rows``, ``table`` and ``index`` are
    those of ``triton_step.launch``; samples must not be joined into one row.
    """
    t, n = rows.tensors, rows.n_elements
    position = ratio * (n - 1)
    rank = int(position)
    block_size = min(4096, triton.next_power_of_2(n))
    thresholds_kernel[(rows.n_samples,)](
        x_t_ptr=t["x_t"],
        model_output_ptr=t["model_output"],
        model_output_uncond_ptr=t.get("model_output_uncond"),
        thresholds_ptr=thresholds,
        rows_ptr=table.rows,
        index_ptr=index,
        n_elements=n,
        x_t_stride=rows.strides["x_t"],
        model_output_stride=rows.strides["model_output"],
        model_output_uncond_stride=rows.strides.get("model_output_uncond", 0),
        rank=rank,
        weight=position - rank,
        maximum=float(maximum),
        BLOCK_SIZE=block_size,
        WIDE_INDEX=n + block_size > 2**31 - 1,
        ROW_WIDTH=ROW_WIDTH,
        num_warps=8 if block_size >= 2048 else 4,
        enable_fp_fusion=False,
    )
