"""The whole DDIM update as one Triton kernel: functions on loaded values, one kernel that loads and
stores, one launcher.

The arithmetic is the C++ kernel's, operation by operation, so that both give the same bits: float32
in registers, with a fused multiply-add only where ``tl.fma`` is written (the kernel is compiled
with ``enable_fp_fusion=False``). Nothing here depends on a schedule: a step is a row of a table in
device memory, and the index of the row is in device memory, too. So a captured step replays for
every step.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from . import noise as standard
from .coefficients import LARGEST_SCALE, ROW_WIDTH, Column, StepTable
from .fields import PER_ELEMENT
from .layout import Rows
from .triton_internals import Launches, is_amd
from .triton_sums import add_blocks, block_sum, finish_block, tile_of

# ---- the noise standard: kernels/noise.py is its definition --------------------------------------------------------------------

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_LOG = tl.constexpr(standard.MINUS_TWO_LOG)
_SINE = tl.constexpr(standard.SINE)
_COSINE = tl.constexpr(standard.COSINE)
_LOG_OF_2 = tl.constexpr(standard.MINUS_TWO_LOG_OF_2 * 2.0**-23)
_MINUS_TWO_LOG_OF_2 = tl.constexpr(standard.MINUS_TWO_LOG_OF_2)
_PI_OVER_2_31 = tl.constexpr(math.pi * 2.0**-31)


@triton.jit
def philox4x32(c0, c1, c2, c3, key_0, key_1):
    """Compute Philox4x32-10 (Salmon et al. 2011) elementwise: four counter words and two key words
    -> four words, uint32."""
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 bit multiplication gives both halves of each product.
        product_0 = c0.to(tl.uint64) * _M0
        product_1 = c2.to(tl.uint64) * _M1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c3 = product_0.to(tl.uint32)
        key_0 = key_0 + _W0
        key_1 = key_1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _horner(coefficients: tl.constexpr, degree: tl.constexpr, x):
    """Evaluate a polynomial, lowest order first, by fused multiply-adds."""
    total = tl.full(x.shape, coefficients[degree], tl.float32)
    for i in tl.static_range(degree):
        total = tl.fma(total, x, tl.full(x.shape, coefficients[degree - 1 - i], tl.float32))
    return total


@triton.jit
def normals_exact(a, b):
    """Turn two words into two normals by the formula of the noise standard: the bits of NumPy and
    C++."""
    magnitude = (a & 0x7FFFFFFF).to(tl.int32)
    u = tl.fma(magnitude.to(tl.float32), 2.0**-31, 2.0**-32)
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) & -0x800000  # u = 2^k (1 + f), k in the exponent's place
    f = (bits - k).to(tl.float32, bitcast=True) - 1.0
    radius = tl.sqrt_rn(tl.fma(_horner(_LOG, 7, f), f, k.to(tl.float32) * _LOG_OF_2))
    t = b.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    y = t * t
    sine = _horner(_SINE, 4, y) * t
    sign = a & 0x80000000
    cosine = (_horner(_COSINE, 4, y).to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def normals_fast(a, b):
    """Turn two words into two normals (Box and Muller 1958) by NVIDIA hardware's approximations.

    The words are those of the noise standard. The bits of the normals are not, and may differ
    between GPUs.
    """
    u = tl.fma(a.to(tl.float32), 2.0**-32, 2.0**-33)
    angle = (
        b.to(tl.int32, bitcast=True).to(tl.float32) * _PI_OVER_2_31
    )  # in [-pi, pi], where the approximations are best
    log2_u, sine, cosine = libdevice.fast_log2f(u), libdevice.fast_sinf(angle), libdevice.fast_cosf(angle)
    radius = tl.sqrt(log2_u * _MINUS_TWO_LOG_OF_2)
    return radius * cosine, radius * sine


@triton.jit
def _normals_of_counters(counters, seed, step, stream, NORMALS: tl.constexpr):
    """Return four normals for each counter."""
    zero = tl.zeros_like(counters)
    key_0, key_1 = seed.to(tl.uint32), (seed.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(counters, zero + step, zero + stream, zero, key_0, key_1)
    if NORMALS == "exact":
        z0, z1 = normals_exact(w0, w1)
        z2, z3 = normals_exact(w2, w3)
    else:
        z0, z1 = normals_fast(w0, w1)
        z2, z3 = normals_fast(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def standard_normals(
    first_counter, seed, step, stream, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, NORMALS: tl.constexpr
):
    """Return normals of ``BLOCK_SIZE`` consecutive elements of one sample, from element ``4 *
    first_counter`` on.

    A thread gets ``VECTOR`` (4 or 8) consecutive ones, as many as it loads at once: otherwise they
    would have to move between threads through shared memory.
    """
    COUNTERS: tl.constexpr = VECTOR // 4
    counters = first_counter + (tl.arange(0, BLOCK_SIZE // VECTOR) * COUNTERS).to(tl.uint32)
    z0, z1, z2, z3 = _normals_of_counters(counters, seed, step, stream, NORMALS)
    if COUNTERS == 2:
        y0, y1, y2, y3 = _normals_of_counters(counters + 1, seed, step, stream, NORMALS)
        z0, z1, z2, z3 = tl.join(z0, y0), tl.join(z1, y1), tl.join(z2, y2), tl.join(z3, y3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK_SIZE)  # each counter's (z0, z1, z2, z3), in order


# ---- columns of a row: Triton reads globals only as constants of its own ----------------------------------------------------------

FOLD_X = tl.constexpr(int(Column.FOLD_X))
FOLD_M = tl.constexpr(int(Column.FOLD_M))
NOISE = tl.constexpr(int(Column.NOISE))
CLIP_X = tl.constexpr(int(Column.CLIP_X))
CLIP_M = tl.constexpr(int(Column.CLIP_M))
CLIP_BOUND = tl.constexpr(int(Column.CLIP_BOUND))
REST_X = tl.constexpr(int(Column.REST_X))
REST_M = tl.constexpr(int(Column.REST_M))
X0_X = tl.constexpr(int(Column.X0_X))
X0_M = tl.constexpr(int(Column.X0_M))
X0_BOUND = tl.constexpr(int(Column.X0_BOUND))
KNOWN_X0 = tl.constexpr(int(Column.KNOWN_X0))
KNOWN_NOISE = tl.constexpr(int(Column.KNOWN_NOISE))
HISTORY = tl.constexpr(int(Column.HISTORY))
GUIDANCE_SCALE = tl.constexpr(int(Column.GUIDANCE_SCALE))
HISTORY_2 = tl.constexpr(int(Column.HISTORY_2))
INPUT_SCALE = tl.constexpr(int(Column.INPUT_SCALE))
_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)

# ---- the step on loaded values ---------------------------------------------------------------------------------------------------


@triton.jit
def guide(m, uncond, guidance_scale):
    """Apply classifier-free guidance (arXiv 2207.12598)."""
    return tl.fma(tl.zeros_like(m) + guidance_scale, m - uncond, uncond)


@triton.jit
def linear(a, x, b, y):
    """Return a x + b y for scalars a and b, by one multiplication and one fused multiply-add."""
    return tl.fma(tl.zeros_like(x) + a, x, b * y)


@triton.jit
def _plus(a, x, total):
    """Return total + a x for a scalar a.

    If a is zero, there is no such term, even where x is an infinity or NaN. All threads take the
    same branch.
    """
    if a != 0:
        total = tl.fma(tl.zeros_like(x) + a, x, total)
    return total


@triton.jit
def clip(x, bound):
    """Clamp x to [-bound, bound]; a NaN stays one."""
    return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def predict(row_ptr, x, m, scale, CLIPPED: tl.constexpr):
    """Return what x_t and the model's output make of x_prev; ``scale`` multiplies x0 before it is
    clipped."""
    if CLIPPED:
        x_prev = clip(
            linear(tl.load(row_ptr + CLIP_X) * scale, x, tl.load(row_ptr + CLIP_M) * scale, m),
            tl.load(row_ptr + CLIP_BOUND),
        )
        x_prev = _plus(tl.load(row_ptr + REST_X), x, x_prev)
        x_prev = _plus(tl.load(row_ptr + REST_M), m, x_prev)
    else:
        x_prev = linear(tl.load(row_ptr + FOLD_X), x, tl.load(row_ptr + FOLD_M), m)
    return x_prev


# ---- the kernel -------------------------------------------------------------------------------------------------------------------


@triton.jit
def load(ptr, sample, stride, offsets, n_elements):
    return tl.load(ptr + sample * stride + offsets, mask=offsets < n_elements).to(tl.float32)


@triton.jit
def load_or(ptr, sample, stride, offsets, n_elements, other: tl.constexpr):
    return tl.load(ptr + sample * stride + offsets, mask=offsets < n_elements, other=other).to(tl.float32)


@triton.jit
def store(ptr, sample, stride, offsets, n_elements, value):
    tl.store(ptr + sample * stride + offsets, value.to(ptr.dtype.element_ty), mask=offsets < n_elements)


_UNSPECIALIZED = ("noise_step_offset", "noise_stream")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def ddim_step_kernel(
    x_t_ptr,  # (B, n) float32, float16 or bfloat16: noisy samples
    model_output_ptr,  # (B, n), the type of x_t or a half type
    model_output_uncond_ptr,  # (B, n) like model_output, or None: no guidance
    noise_ptr,  # (B, n) like x_t, or None
    seeds_ptr,  # (B,) int64, or None: normals of the noise standard are generated in registers
    thresholds_ptr,  # (B,) float32, or None: dynamic thresholding
    mask_ptr,  # (B, n) like x_t, or None: 1 where the image is known
    known_x0_ptr,  # (B, n) like x_t: the known image, clean
    known_noise_ptr,  # (B, n) like x_t, or None: the known image's noise comes from the seeds
    x_prev_ptr,  # (B, n) like x_t: the result; may be x_t_ptr
    x0_ptr,  # (B, n) like x_t, or None: receives the predicted x0
    history_ptr,  # (B, n) like x_t, or None: holds the x0 of the previous step, and receives this one's
    history_2_ptr,  # (B, n) like x_t, or None: holds the x0 before that, and receives what history held
    model_input_out_ptr,  # (B, n) of any of these types, or None: receives input_scale * x_prev
    log_prob_out_ptr,  # (B,) float32, or None: receives each sample's log-probability
    block_sums_ptr,  # (2, B, blocks) float32: receives what each block adds to it; None for a sample of one block
    rows_ptr,  # (S, ROW_WIDTH) float32: the table, one row per step
    index_ptr,  # int64: the row of this step, one number or (B,); or None for row 0
    n_elements,  # n, elements of a sample
    x_t_stride,  # elements from one sample to the next, of each tensor
    model_output_stride,
    model_output_uncond_stride,
    noise_stride,
    mask_stride,
    known_x0_stride,
    known_noise_stride,
    x_prev_stride,
    x0_stride,
    noise_step_offset,  # int32 bits: the noise's step is this plus the row's index
    noise_stream,  # int32 bits
    history_stride,  # after the two numbers, so that they stay adjacent: one load for both
    history_2_stride,
    model_input_out_stride,
    BLOCK_SIZE: tl.constexpr,  # elements that one program computes
    VECTOR: tl.constexpr,  # elements that a thread loads at once: 16 bytes of x_t
    CLIPPED: tl.constexpr,  # whether the rows clip x0
    NORMALS: tl.constexpr,  # "exact" (the noise standard) or "fast"
    KNOWN_REGION: tl.constexpr,  # the noise standard's stream of a known image's noise
    WIDE_INDEX: tl.constexpr,  # whether n needs 64-bit offsets
    ROW_PER_SAMPLE: tl.constexpr,  # whether each sample has its own row
    SAMPLE_AXIS: tl.constexpr,  # grid axis of the samples; the other counts blocks of a sample
    MEAN: tl.constexpr,  # whether log-probabilities are means over the elements
    ROW_WIDTH: tl.constexpr,
):
    sample = tl.program_id(SAMPLE_AXIS).to(tl.int64)
    block = tl.program_id(1 - SAMPLE_AXIS)
    offsets = tl.arange(0, BLOCK_SIZE) + (block.to(tl.int64) if WIDE_INDEX else block) * BLOCK_SIZE
    x = load(x_t_ptr, sample, x_t_stride, offsets, n_elements)
    m = load(model_output_ptr, sample, model_output_stride, offsets, n_elements)
    index = tl.load(index_ptr + (sample if ROW_PER_SAMPLE else 0)) if index_ptr is not None else 0
    row_ptr = rows_ptr + index * ROW_WIDTH
    noise_step = (index + noise_step_offset).to(tl.uint32)
    first_counter = (block * (BLOCK_SIZE // 4)).to(tl.uint32)
    if model_output_uncond_ptr is not None:
        uncond = load(model_output_uncond_ptr, sample, model_output_uncond_stride, offsets, n_elements)
        m = guide(m, uncond, tl.load(row_ptr + GUIDANCE_SCALE))
    scale = 1.0
    if CLIPPED and thresholds_ptr is not None:
        # Imagen, arXiv 2205.11487: x0 = clamp(x0, -s, s) / s * bound, with the division folded into
        # the coefficients.
        scale = tl.div_rn(tl.load(row_ptr + X0_BOUND), tl.load(thresholds_ptr + sample))
        scale = tl.minimum(scale, _LARGEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    x_prev = predict(row_ptr, x, m, scale, CLIPPED)
    if history_ptr is not None:
        of_history = tl.load(row_ptr + HISTORY)
        if history_2_ptr is not None:
            last_x0 = load(history_ptr, sample, history_stride, offsets, n_elements)
            x_prev = _plus(of_history, last_x0, x_prev)
            of_history_2 = tl.load(row_ptr + HISTORY_2)
            if of_history_2 != 0:
                last_x0_2 = load(history_2_ptr, sample, history_2_stride, offsets, n_elements)
                x_prev = tl.fma(tl.zeros_like(x) + of_history_2, last_x0_2, x_prev)
            store(history_2_ptr, sample, history_2_stride, offsets, n_elements, last_x0)
        elif of_history != 0:
            last_x0 = load(history_ptr, sample, history_stride, offsets, n_elements)
            x_prev = tl.fma(tl.zeros_like(x) + of_history, last_x0, x_prev)
    if x0_ptr is not None or history_ptr is not None:
        if CLIPPED:
            x0 = clip(
                linear(tl.load(row_ptr + X0_X) * scale, x, tl.load(row_ptr + X0_M) * scale, m),
                tl.load(row_ptr + X0_BOUND),
            )
        else:
            x0 = linear(tl.load(row_ptr + X0_X), x, tl.load(row_ptr + X0_M), m)
        if x0_ptr is not None:
            store(x0_ptr, sample, x0_stride, offsets, n_elements, x0)
        if history_ptr is not None:
            store(history_ptr, sample, history_stride, offsets, n_elements, x0)
    mean = x_prev
    std_dev = tl.load(row_ptr + NOISE)
    if noise_ptr is not None:
        if std_dev != 0:
            z = load(noise_ptr, sample, noise_stride, offsets, n_elements)
            x_prev = tl.fma(tl.zeros_like(z) + std_dev, z, x_prev)
    elif seeds_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled, the inner branch when it runs)
        if std_dev != 0:
            seed = tl.load(seeds_ptr + sample)
            stream = noise_stream.to(tl.uint32)
            z = standard_normals(first_counter, seed, noise_step, stream, BLOCK_SIZE, VECTOR, NORMALS)
            x_prev = tl.fma(tl.zeros_like(z) + std_dev, z, x_prev)
    if mask_ptr is not None:
        # The known image, brought to the noise level of x_prev (equation 4 of the DDIM paper),
        # where the mask is 1.
        known = tl.load(row_ptr + KNOWN_X0) * load(known_x0_ptr, sample, known_x0_stride, offsets, n_elements)
        known_std = tl.load(row_ptr + KNOWN_NOISE)
        if known_std != 0:
            if known_noise_ptr is not None:
                z = load(known_noise_ptr, sample, known_noise_stride, offsets, n_elements)
            else:
                z = standard_normals(
                    first_counter, tl.load(seeds_ptr + sample), noise_step, KNOWN_REGION, BLOCK_SIZE, VECTOR, NORMALS
                )
            known = tl.fma(tl.zeros_like(z) + known_std, z, known)
        if log_prob_out_ptr is None:
            weight = load(mask_ptr, sample, mask_stride, offsets, n_elements)
        else:
            weight = load_or(mask_ptr, sample, mask_stride, offsets, n_elements, 1.0)  # no element that counts
        x_prev = tl.fma(weight, known, (1.0 - weight) * x_prev)
    store(x_prev_ptr, sample, x_prev_stride, offsets, n_elements, x_prev)
    # What follows is of x_prev as it is stored: the bits of a pass of its own.
    stored = x_prev.to(x_prev_ptr.dtype.element_ty).to(tl.float32)
    if log_prob_out_ptr is not None:
        masked_by = weight if mask_ptr is not None else mean
        squares, count = block_sum(
            stored - mean, masked_by, offsets, block, n_elements, mask_ptr is not None, BLOCK_SIZE
        )
        samples, blocks = tl.num_programs(SAMPLE_AXIS), tl.num_programs(1 - SAMPLE_AXIS)
        finish_block(
            log_prob_out_ptr, None, block_sums_ptr, squares, count, row_ptr, sample, block, samples, blocks, MEAN, False
        )
    if model_input_out_ptr is not None:
        model_input = stored * tl.load(row_ptr + INPUT_SCALE)
        store(model_input_out_ptr, sample, model_input_out_stride, offsets, n_elements, model_input)


# ---- the launcher ----------------------------------------------------------------------------------------------------------------

# (least number of elements of all samples; elements per program; warps per program). A thread has
# eight or sixteen elements: one or two accesses of 16 bytes in half precision. The larger tile
# needs fewer instructions per element; the smaller one fills a GPU with less work.
_TILES = ((1 << 20, 2048, 4), (0, 512, 2))
_MOST_BLOCKS_Y = 65535  # CUDA's limit on the second axis of a grid
_LARGEST_INT32 = 2**31 - 1
POINTERS = tuple(
    name.removesuffix("_ptr") for name in inspect.signature(ddim_step_kernel.fn).parameters if name.endswith("_ptr")
)
"""The tensors of a launch, in order; the index is the last."""


def launch(
    rows: Rows,
    table: StepTable,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    thresholds: Tensor | None = None,
    noise_step: int = 0,
    noise_stream: int = 0,
    normals: str = "exact",
    log_prob: Tensor | None = None,
    log_prob_reduction: str = "mean",
) -> None:
    """Launch the whole update once; and once more to add the blocks of log-probabilities, where
    samples have several.

    Args:
        rows: the tensors that are given.
        table: the steps' coefficients.
        index: the row of this step in the table, int64 in device memory, one number or ``(B,)``. If
            None, row 0.
        seeds, thresholds: ``(B,)``, see ``dispatch.ddim_step``.
        noise_step: added to the row's index, it is the noise's step.
        normals: one of ``contract.NORMALS``.
        log_prob: ``(B,)`` float32, receives the log-probabilities.
    """
    n_samples, n = rows.n_samples, rows.n_elements
    block_sums = None
    if log_prob is not None:
        blocks = triton.cdiv(n, _tile(n_samples, n, log_prob)[0])
        if blocks > 1:
            block_sums = torch.empty((2, n_samples, blocks), dtype=torch.float32, device=log_prob.device)
    given = {
        **rows.tensors,
        "seeds": seeds,
        "thresholds": thresholds,
        "log_prob_out": log_prob,
        "block_sums": block_sums,
        "rows": table.rows,
        "index": index,
    }
    strides = tuple(rows.strides.get(name, 0) for name in PER_ELEMENT)
    pointers = tuple(map(given.get, POINTERS))
    mean = log_prob_reduction == "mean"
    launch_pointers(pointers, n_samples, n, strides, table.clipped, noise_step, noise_stream, normals, mean)
    if log_prob is not None and block_sums is not None:
        add_blocks(log_prob, None, block_sums, table, index, mean=mean, divergence=False)


def launch_pointers(
    pointers: tuple[Tensor | None, ...],
    n_samples: int,
    n_elements: int,
    strides: tuple[int, ...] | None,
    clipped: bool,
    noise_step: int,
    noise_stream: int,
    normals: str,
    mean: bool = True,
) -> None:
    """Do ``launch`` for tensors in the order of ``POINTERS``, without adding blocks.

    Args:
        strides: in the order of ``PER_ELEMENT``; None: each sample follows the one before.
        mean: whether log-probabilities are means over the elements.
    """
    index = pointers[-1]
    row_per_sample = index is not None and index.numel() != 1
    key = n_samples, n_elements, strides, clipped, normals, row_per_sample, mean
    _launches(pointers, (_as_int32(noise_step), _as_int32(noise_stream)), key)


def _tile(n_samples: int, n: int, log_prob: Tensor | None) -> tuple[int, int]:
    """Return (elements of a program, warps of a program)."""
    if log_prob is not None:
        return tile_of(n)
    return next(tile[1:] for tile in _TILES if n_samples * n >= tile[0])


def _describe(
    pointers: tuple[Tensor | None, ...],
    n_samples: int,
    n: int,
    strides: tuple[int, ...] | None,
    clipped: bool,
    normals: str,
    row_per_sample: bool,
    mean: bool,
) -> tuple[tuple[int, int], dict[str, Any], int]:
    """Return the grid of a launch, its values by name, and the number of warps."""
    given = dict(zip(POINTERS, pointers, strict=True))
    block_size, num_warps = _tile(n_samples, n, given["log_prob_out"])
    blocks = triton.cdiv(n, block_size)
    sample_axis = 1 if n_samples <= _MOST_BLOCKS_Y else 0
    x_t = given["x_t"]
    assert x_t is not None, "every step has samples"
    if strides is None:
        strides = tuple(0 if given[name] is None else n for name in PER_ELEMENT)
    values = {f"{name}_stride": stride for name, stride in zip(PER_ELEMENT, strides, strict=True)} | dict(
        n_elements=n,
        BLOCK_SIZE=block_size,
        VECTOR=16 // x_t.element_size(),
        CLIPPED=clipped,
        # On AMD, library functions take three times the instructions of the exact formula.
        NORMALS="exact" if normals == "fast" and is_amd() else normals,
        KNOWN_REGION=int(standard.NoiseStream.KNOWN_REGION),
        WIDE_INDEX=n + block_size > _LARGEST_INT32,
        ROW_PER_SAMPLE=row_per_sample,
        SAMPLE_AXIS=sample_axis,
        MEAN=mean,
        ROW_WIDTH=ROW_WIDTH,
    )
    return (blocks, n_samples) if sample_axis == 1 else (n_samples, blocks), values, num_warps


_launches = Launches(ddim_step_kernel, _describe, _UNSPECIALIZED, enable_fp_fusion=False)


def _as_int32(value: int) -> int:
    """Return the same 32 bits as a signed number: one type for all values, so that Triton compiles
    once."""
    value = int(value)
    return value - (1 << 32) if value >= 1 << 31 else value
