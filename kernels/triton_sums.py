"""Sums of squares on a GPU in the order of ``docs/LOG_PROB.md``, bit by bit those of C++.

A program sums one block. A sum over an axis of two elements is one addition, so the order is written
as a sequence of such axes, whatever the layout of the threads is. A sample of one block is done
then. Otherwise a second launch adds the sums of its blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import ROW_WIDTH, Column, StepTable
from .gaussian import BLOCK, COLUMNS

LOG_PROB_SCALE = tl.constexpr(int(Column.LOG_PROB_SCALE))
LOG_PROB_OFFSET = tl.constexpr(int(Column.LOG_PROB_OFFSET))


@triton.jit
def _by_halves(x, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Add the upper half of ``SIZE`` = 2**LEVELS numbers to the lower one, until one is left."""
    for level in tl.static_range(LEVELS - 1):
        x = tl.sum(x.reshape(2, SIZE // 2 >> level), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def block_sum(deviation, weight, offsets, block, n_elements, MASKED: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the sum of the squares of a block's deviations, and how many elements count: those of
    the sample; if ``MASKED`` those whose weight is 0, which is 1 beyond the sample."""
    if MASKED:
        inside = weight == 0
        count = tl.sum(inside.to(tl.int32), axis=0)
    else:
        inside = offsets < n_elements
        count = tl.minimum(n_elements - block.to(tl.int64) * BLOCK_SIZE, BLOCK_SIZE).to(tl.int32)
    deviation = tl.where(inside, deviation, 0.0)
    squares = (deviation * deviation).reshape(BLOCK_SIZE // 4, 2, 2)
    quads = tl.sum(tl.sum(squares, axis=1), axis=1)
    LEVELS: tl.constexpr = 9 if BLOCK_SIZE == 2048 else 7
    return _by_halves(quads, BLOCK_SIZE // 4, LEVELS), count


@triton.jit
def _reduced(squares, count, row_ptr, MEAN: tl.constexpr, DIVERGENCE: tl.constexpr):
    """Return a sample's result from its sum of squares and its count, both float64."""
    total = tl.load(row_ptr + LOG_PROB_SCALE).to(tl.float64) * squares
    if not DIVERGENCE:
        total = -(total + tl.load(row_ptr + LOG_PROB_OFFSET).to(tl.float64) * count)
    if MEAN:
        total = total / tl.where(count == 0, 1.0, count)
    return tl.where(count == 0, 0.0, total).to(tl.float32)


@triton.jit
def finish_block(
    results_ptr,  # (B,) float32
    counts_ptr,  # (B,) float32, or None
    block_sums_ptr,  # (2, B, blocks) float32: sums and counts; or None: a sample is one block
    squares,
    count,
    row_ptr,
    sample,
    block,
    samples,
    blocks,
    MEAN: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Store what a block contributes, or the result of the sample that it is all of."""
    if block_sums_ptr is None:
        result = _reduced(squares.to(tl.float64), count.to(tl.float64), row_ptr, MEAN, DIVERGENCE)
        tl.store(results_ptr + sample, result)
        if counts_ptr is not None:
            tl.store(counts_ptr + sample, count.to(tl.float32))
    else:
        at = sample * blocks + block
        tl.store(block_sums_ptr + at, squares)
        tl.store(block_sums_ptr + samples.to(tl.int64) * blocks + at, count.to(tl.float32))


@triton.jit
def add_blocks_kernel(
    results_ptr,  # (B,) float32
    counts_ptr,  # (B,) float32, or None
    block_sums_ptr,  # (2, B, blocks) float32: sums and counts
    rows_ptr,  # (S, ROW_WIDTH) float32
    index_ptr,  # int64: the row, one number or (B,); or None for row 0
    blocks,  # of a sample
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,  # 2**LEVELS columns
    MEAN: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    ROW_PER_SAMPLE: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + (sample if ROW_PER_SAMPLE else 0)) if index_ptr is not None else 0
    columns = tl.arange(0, COLUMNS)
    squares = tl.zeros((COLUMNS,), tl.float64)
    count = tl.zeros((COLUMNS,), tl.float64)
    of_counts = tl.num_programs(0).to(tl.int64) * blocks
    for begin in range(0, blocks, COLUMNS):
        at = sample * blocks + begin + columns
        inside = begin + columns < blocks
        squares += tl.load(block_sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
        count += tl.load(block_sums_ptr + of_counts + at, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(count, axis=0)  # whole numbers: exact in any order
    result = _reduced(_by_halves(squares, COLUMNS, LEVELS), total, rows_ptr + index * ROW_WIDTH, MEAN, DIVERGENCE)
    tl.store(results_ptr + sample, result)
    if counts_ptr is not None:
        tl.store(counts_ptr + sample, total.to(tl.float32))


def tile_of(n_elements: int) -> tuple[int, int]:
    """Return (elements of a program, warps of a program) for samples of so many elements.

    What a block lacks counts as zeros, so small samples have the bits of a whole block, too.
    """
    return (BLOCK, 4) if n_elements > 512 else (512, 2)


def add_blocks(
    results: Tensor,
    counts: Tensor | None,
    block_sums: Tensor,
    table: StepTable,
    index: Tensor | None,
    *,
    mean: bool,
    divergence: bool,
) -> None:
    """Launch the sum of each sample's blocks, ``block_sums`` ``(2, B, blocks)`` float32."""
    _, samples, blocks = block_sums.shape
    add_blocks_kernel[(samples,)](
        results_ptr=results,
        counts_ptr=counts,
        block_sums_ptr=block_sums,
        rows_ptr=table.rows,
        index_ptr=index,
        blocks=blocks,
        COLUMNS=COLUMNS,
        LEVELS=COLUMNS.bit_length() - 1,
        MEAN=mean,
        DIVERGENCE=divergence,
        ROW_PER_SAMPLE=index is not None and index.numel() != 1,
        ROW_WIDTH=ROW_WIDTH,
        num_warps=1,
        enable_fp_fusion=False,
    )
