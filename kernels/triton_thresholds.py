"""Dynamic thresholding on a GPU (Imagen, arXiv 2205.11487, section 2.3): each sample's exact
quantile of |x0|.

This is a radix select. The bits of non-negative floats sort as integers, so the order statistic is
found eight bits at a time, by a histogram of the elements that agree with the bits found so far.
Four passes over a sample find it, and the last of them also the next in order, for the
interpolation. It is exact for samples of any size (``torch.quantile`` stops at 2**24 elements).

A sample of one block has one program, and one launch does everything. A larger one has several
programs, which add their histograms up in memory by atomics, each pass a launch. Counts are
integers, so neither the number of programs nor their order changes a bit of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import ROW_WIDTH, StepTable
from .layout import Rows
from .triton_step import GUIDANCE_SCALE, X0_BOUND, X0_M, X0_X, guide, linear, load

_BINS = tl.constexpr(256)
_NONE = tl.constexpr(0x7FFFFFFF)  # no element: larger than the bits of every number
# The workspace of a sample, in int64: what is known before each pass (the bits found, the rank among
# the elements that have them), the next larger element as _NONE minus its bits, the histograms.
_LARGER = tl.constexpr(8)
_HISTOGRAMS = tl.constexpr(16)
_WIDTH = tl.constexpr(16 + 4 * 256)

_LARGEST_INT32 = 2**31 - 1
_BLOCK_SIZE = 4096
MOST_PROGRAMS = 512
"""Of all samples: some for each multiprocessor. More would only add atomics."""


@triton.jit
def _load_magnitudes(x_t_ptr, model_output_ptr, uncond_ptr, row_ptr, sample, strides, offsets, n):
    """Return |x0| as int32 bits, which sort as the numbers do; a NaN is larger than every number."""
    x = load(x_t_ptr, sample, strides[0], offsets, n)
    m = load(model_output_ptr, sample, strides[1], offsets, n)
    if uncond_ptr is not None:
        m = guide(m, load(uncond_ptr, sample, strides[2], offsets, n), tl.load(row_ptr + GUIDANCE_SCALE))
    return linear(tl.load(row_ptr + X0_X), x, tl.load(row_ptr + X0_M), m).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _count(pointers, row_ptr, sample, strides, begin, end, n, found, DIGIT: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Count the elements from ``begin`` to ``end`` that have the bits found, by their next digit.

    Returns:
        The histogram, and in the last pass the smallest of the elements that are larger by their
        upper bits; ``_NONE`` if there is none.
    """
    shift: tl.constexpr = 24 - 8 * DIGIT
    histogram = tl.zeros((_BINS,), tl.int64)
    larger = tl.full((), _NONE, tl.int32)
    for start in range(begin, end, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        bits = _load_magnitudes(pointers[0], pointers[1], pointers[2], row_ptr, sample, strides, offsets, n)
        upper = bits.to(tl.int64) >> (shift + 8)
        wanted = found >> (shift + 8)
        histogram += tl.histogram((bits >> shift) & 255, _BINS, mask=(upper == wanted) & (offsets < n)).to(tl.int64)
        if DIGIT == 3:
            larger = min(larger, tl.min(tl.where((upper > wanted) & (offsets < n), bits, _NONE), 0))
    return histogram, larger


@triton.jit
def _select(histogram, found, rank, DIGIT: tl.constexpr):
    """Return the bits found with the digit of element ``rank``, its rank among those that have them,
    and the counts' digit."""
    bins = tl.arange(0, _BINS)
    digit = tl.sum((tl.cumsum(histogram, 0) <= rank).to(tl.int32), 0)
    below = tl.sum(tl.where(bins < digit, histogram, 0), 0)
    return found | (digit.to(tl.int64) << (24 - 8 * DIGIT)), rank - below, digit


@triton.jit
def _finish(histogram, larger, found, rank, weight, bound, maximum):
    """Return the threshold from the last histogram and what was known before it."""
    bins = tl.arange(0, _BINS)
    upper = found
    found, rank, digit = _select(histogram, found, rank, 3)
    same = tl.sum(tl.where(bins == digit, histogram, 0), 0)
    # The next in order: the same number again, the next digit that occurs, or the smallest with
    # larger upper bits (the same number, if there is none).
    following = tl.min(tl.where((bins > digit) & (histogram > 0), bins, _BINS), 0)
    above = tl.where(following < _BINS, upper + following, larger.to(tl.int64))
    above = tl.where((rank + 1 < same) | (above == _NONE), found, above)
    low, high = found.to(tl.int32).to(tl.float32, bitcast=True), above.to(tl.int32).to(tl.float32, bitcast=True)
    threshold = low
    if weight != 0:  # else an infinite difference would give NaN
        threshold = tl.fma(weight, high - low, low)
    return tl.clamp(threshold, bound, tl.maximum(maximum, bound), propagate_nan=tl.PropagateNan.ALL)


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
    """Find the threshold of a sample by one program."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr) if index_ptr is not None else 0
    row_ptr = rows_ptr + index * ROW_WIDTH
    strides = (x_t_stride, model_output_stride, model_output_uncond_stride)
    pointers = (x_t_ptr, model_output_ptr, model_output_uncond_ptr)
    n = n_elements.to(tl.int64) if WIDE_INDEX else n_elements
    rank = rank.to(tl.int64)
    found = tl.zeros_like(rank)  # the upper bits found so far, in their positions
    for digit in tl.static_range(3):
        histogram, _ = _count(pointers, row_ptr, sample, strides, 0, n, n, found, digit, BLOCK_SIZE)
        found, rank, _ = _select(histogram, found, rank, digit)
    histogram, larger = _count(pointers, row_ptr, sample, strides, 0, n, n, found, 3, BLOCK_SIZE)
    threshold = _finish(histogram, larger, found, rank, weight, tl.load(row_ptr + X0_BOUND), maximum)
    tl.store(thresholds_ptr + sample, threshold)


@triton.jit
def _known(workspace_ptr, rank, DIGIT: tl.constexpr):
    """Return what is known before a pass, from the pass before."""
    found = tl.zeros_like(rank)
    if DIGIT > 0:
        if DIGIT > 1:
            found = tl.load(workspace_ptr + 2 * (DIGIT - 1))
            rank = tl.load(workspace_ptr + 2 * (DIGIT - 1) + 1)
        histogram = tl.load(workspace_ptr + _HISTOGRAMS + (DIGIT - 1) * _BINS + tl.arange(0, _BINS))
        found, rank, _ = _select(histogram, found, rank, DIGIT - 1)
    return found, rank


@triton.jit(do_not_specialize=["rank", "blocks"])
def count_digits_kernel(
    x_t_ptr,  # as of thresholds_kernel
    model_output_ptr,
    model_output_uncond_ptr,
    workspace_ptr,  # (B, _WIDTH) int64: zeros before the first pass
    rows_ptr,
    index_ptr,
    n_elements,
    x_t_stride,
    model_output_stride,
    model_output_uncond_stride,
    rank,
    blocks,  # of each program
    DIGIT: tl.constexpr,  # which pass, from 0
    BLOCK_SIZE: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,  # of the workspace
):
    """Add the histogram of one digit over some blocks of a sample to the workspace."""
    sample = tl.program_id(1).to(tl.int64)
    workspace_ptr += sample * WIDTH
    index = tl.load(index_ptr) if index_ptr is not None else 0
    row_ptr = rows_ptr + index * ROW_WIDTH
    strides = (x_t_stride, model_output_stride, model_output_uncond_stride)
    pointers = (x_t_ptr, model_output_ptr, model_output_uncond_ptr)
    found, rank = _known(workspace_ptr, rank.to(tl.int64), DIGIT)
    if DIGIT > 0 and tl.program_id(0) == 0:
        tl.store(workspace_ptr + 2 * DIGIT, found)
        tl.store(workspace_ptr + 2 * DIGIT + 1, rank)
    program = tl.program_id(0).to(tl.int64) if WIDE_INDEX else tl.program_id(0)
    n = n_elements.to(tl.int64) if WIDE_INDEX else n_elements
    begin = program * blocks * BLOCK_SIZE
    end = min(begin + blocks * BLOCK_SIZE, n)
    histogram, larger = _count(pointers, row_ptr, sample, strides, begin, end, n, found, DIGIT, BLOCK_SIZE)
    at = workspace_ptr + _HISTOGRAMS + DIGIT * _BINS + tl.arange(0, _BINS)
    tl.atomic_add(at, histogram, mask=histogram > 0, sem="relaxed")
    if DIGIT == 3:
        tl.atomic_max(workspace_ptr + _LARGER, (tl.full((), _NONE, tl.int32) - larger).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["rank", "weight", "maximum"])
def select_thresholds_kernel(
    thresholds_ptr,  # as of thresholds_kernel
    workspace_ptr,  # after the four passes
    rows_ptr,
    index_ptr,
    rank,
    weight,
    maximum,
    ROW_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Find the threshold of a sample from its histograms."""
    sample = tl.program_id(0).to(tl.int64)
    workspace_ptr += sample * WIDTH
    index = tl.load(index_ptr) if index_ptr is not None else 0
    row_ptr = rows_ptr + index * ROW_WIDTH
    found, rank = tl.load(workspace_ptr + 6), tl.load(workspace_ptr + 7)
    histogram = tl.load(workspace_ptr + _HISTOGRAMS + 3 * _BINS + tl.arange(0, _BINS))
    larger = tl.full((), _NONE, tl.int64) - tl.load(workspace_ptr + _LARGER)
    threshold = _finish(histogram, larger, found, rank, weight, tl.load(row_ptr + X0_BOUND), maximum)
    tl.store(thresholds_ptr + sample, threshold)


def programs(n_samples: int, n_elements: int) -> tuple[int, int]:
    """Return how many programs a sample has, and how many blocks each of them reads."""
    blocks = triton.cdiv(n_elements, _BLOCK_SIZE)
    each = triton.cdiv(blocks, max(1, MOST_PROGRAMS // max(1, n_samples)))
    return triton.cdiv(blocks, each), each


def workspace_size(n_samples: int, n_elements: int) -> int:
    """Return how many int64 numbers a launch works on beside its tensors; 0 if none."""
    return 0 if programs(n_samples, n_elements)[0] <= 1 else n_samples * _WIDTH.value


def launch(
    rows: Rows,
    table: StepTable,
    index: Tensor | None,
    thresholds: Tensor,
    workspace: Tensor | None = None,
    *,
    ratio: float,
    maximum: float,
) -> None:
    """Fill ``thresholds`` ``(B,)`` float32 with each sample's ``ratio`` quantile of |x0|.

    Each is at least the row's bound and at most ``maximum``. ``rows``, ``table`` and ``index`` are
    those of ``triton_step.launch``; samples must not be joined into one row. ``workspace`` holds
    ``workspace_size`` int64 numbers; None: it is allocated.
    """
    t, n = rows.tensors, rows.n_elements
    position = ratio * (n - 1)
    rank = int(position)
    count, blocks = programs(rows.n_samples, n)
    block_size = min(_BLOCK_SIZE, triton.next_power_of_2(n))
    read = dict(
        x_t_ptr=t["x_t"],
        model_output_ptr=t["model_output"],
        model_output_uncond_ptr=t.get("model_output_uncond"),
        n_elements=n,
        x_t_stride=rows.strides["x_t"],
        model_output_stride=rows.strides["model_output"],
        model_output_uncond_stride=rows.strides.get("model_output_uncond", 0),
        BLOCK_SIZE=block_size,
        WIDE_INDEX=n + 2 * blocks * block_size > _LARGEST_INT32,
        num_warps=8 if block_size >= 2048 else 4,
    )
    of_row = dict(rows_ptr=table.rows, index_ptr=index, rank=rank, ROW_WIDTH=ROW_WIDTH, enable_fp_fusion=False)
    result = dict(thresholds_ptr=thresholds, weight=position - rank, maximum=float(maximum))
    if count == 1:
        thresholds_kernel[(rows.n_samples,)](**read, **of_row, **result)
        return
    if workspace is None:
        size = workspace_size(rows.n_samples, n)
        workspace = torch.empty(size, dtype=torch.int64, device=thresholds.device)
    width = _WIDTH.value
    workspace.zero_()
    for digit in range(4):
        count_digits_kernel[(count, rows.n_samples)](
            **read, **of_row, workspace_ptr=workspace, blocks=blocks, DIGIT=digit, WIDTH=width
        )
    select_thresholds_kernel[(rows.n_samples,)](**of_row, **result, workspace_ptr=workspace, WIDTH=width)
