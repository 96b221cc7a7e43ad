"""IEEE arithmetic of PTX on arrays: one rounding, subnormals flushed only where asked for, one NaN.

Source: PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions" and
"Mixed Precision Floating Point Instructions".

NaN: every operation here returns PTX's canonical NaN (0x7fffffff, 0x7fff for the half types,
0x7ff8000000000000 for f64), whatever the payload of its operands, also where PTX leaves the payload
open.

Half types: float16 is NumPy's. bfloat16 has no NumPy type and is held as the upper half of a
float32's bits, in uint16.

Values of all types are computed in float64, where products of two float32 are exact, rounded *to
odd* (the last bit is set where the result is not exact), and then to the type: together one correct
rounding (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

NAN_BITS = {"f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000, "f16": 0x7FFF, "bf16": 0x7FFF}
_UNSIGNED = {"f32": np.uint32, "f64": np.uint64, "f16": np.uint16, "bf16": np.uint16}
_SMALLEST_NORMAL = {"f32": 2.0**-126, "f64": 2.0**-1022}


def canonical(values: np.ndarray, kind: str) -> np.ndarray:
    """Return ``values`` with every NaN replaced by PTX's canonical one."""
    nan = np.isnan(values)
    if nan.any():
        values = np.array(values)
        values.view(_UNSIGNED[kind])[nan] = NAN_BITS[kind]
    return values


def flush(values: np.ndarray) -> np.ndarray:
    """Replace float32 subnormals by zeros of the same sign: ``.ftz``."""
    small = (np.abs(values) < np.float32(2.0**-126)) & (values != 0)
    if not small.any():
        return values
    return np.where(small, np.copysign(np.float32(0), values), values)


def saturate(values: np.ndarray) -> np.ndarray:
    """Clamp to [+0, 1], NaN to +0: ``.sat``."""
    return np.where(values > 0, np.minimum(values, 1), 0).astype(values.dtype)


# --- bfloat16 and the way to it and to float16 from float64 ---


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; an overflow is infinity."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def f32_to_bf16_toward_zero(values: np.ndarray) -> np.ndarray:
    bits = (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    return canonical(values.astype(np.float16), "f16")


def f32_to_f16_toward_zero(values: np.ndarray) -> np.ndarray:
    near = values.astype(np.float16)
    too_far = np.abs(near.astype(np.float32)) > np.abs(values)  # one unit back, also from infinity
    return canonical((near.view(np.uint16) - too_far).astype(np.uint16).view(np.float16), "f16")


def f64_to_f32_odd(values: np.ndarray) -> np.ndarray:
    """Round to odd, to float32: the step between float64 and a half type.

    The result is infinite where |value| is at least 2^128.
    """
    near = values.astype(np.float32)
    back, bits = near.astype(np.float64), near.view(np.int32)
    inexact = (back != values) & (np.abs(values) < 2.0**128)
    towards_zero = np.where(np.abs(back) > np.abs(values), bits - 1, bits)  # one unit back, also from infinity
    return np.where(inexact, towards_zero | 1, bits).astype(np.int32).view(np.float32)


def f64_to_bf16(values: np.ndarray) -> np.ndarray:
    return f32_to_bf16(f64_to_f32_odd(values))


def f64_to_f16(values: np.ndarray) -> np.ndarray:
    return canonical(values.astype(np.float16), "f16")


# --- fused multiply-add ---


def _sum_rounded_to_odd(product: np.ndarray, c: np.ndarray, total: np.ndarray) -> np.ndarray:
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact: Knuth's two-sum
    bits = total.view(np.int64)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(np.isfinite(total) & (error != 0) & (bits & 1 == 0), odd, bits).view(np.float64)


def _fused_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c rounded to odd in float64, for numbers whose products are exact there."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    product, c = np.broadcast_arrays(product, c)
    return _sum_rounded_to_odd(product, c, product + c)


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once.

    The float64 sum, rounded to nearest, gives the same float32 as the exact sum except where it
    lies halfway between two float32 or is subnormal in float32: only these are computed again,
    through rounding to odd.
    """
    product = a.astype(np.float64) * b
    total = np.asarray(product + c)
    result = total.astype(np.float32)
    halfway = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    halfway |= (np.abs(total) < 2.0**-125) & (total != 0)
    if halfway.any():
        shape = total.shape
        exact, addend = (np.broadcast_to(x, shape)[halfway].astype(np.float64) for x in (product, c))
        result[halfway] = _sum_rounded_to_odd(exact, addend, total[halfway]).astype(np.float32)
    return canonical(result, "f32")


def fma_f16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return f64_to_f16(_fused_f64(a, b, c))


def fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return f64_to_bf16(_fused_f64(*(bf16_to_f32(x) for x in (a, b, c))))


def _nearest_f64(exact: Fraction) -> float:
    try:
        return float(exact)  # Python rounds a quotient of integers once, to nearest even
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a * b + c, rounded once: with exact fractions, so slowly."""
    a, b, c = np.broadcast_arrays(a, b, c)
    result = np.asarray(a * b + c)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for i in np.flatnonzero(finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact != 0:
            result[i] = _nearest_f64(exact)
        elif (a[i] == 0 or b[i] == 0) and c[i] == 0:
            result[i] = a[i] * b[i] + c[i]  # the signs of zeros
        else:
            result[i] = 0.0
    return canonical(result, "f64")


# --- minimum and maximum ---


def minimum_or_maximum(
    a: np.ndarray, b: np.ndarray, *, take_less: bool, kind: str, nan: bool, xorsign: bool
) -> np.ndarray:
    """Return the minimum or maximum for f16, f32 and f64 as in PTX ISA, "min" and "max".

    -0 is less than +0. A single NaN is ignored unless ``nan`` (``.NaN``) is set.

    ``xorsign`` is ``.xorsign.abs``: compare magnitudes, and give the result the sign a xor b.
    """
    sign = np.signbit(a) ^ np.signbit(b)
    if xorsign:
        a, b = np.abs(a), np.abs(b)
    a_is_less = (a < b) | ((a == b) & np.signbit(a))
    result = np.where(a_is_less == take_less, a, b)
    a_nan, b_nan = np.isnan(a), np.isnan(b)
    if a_nan.any() or b_nan.any():
        result = np.where(a_nan, b, np.where(b_nan, a, result))
        if nan:
            result = np.where(a_nan | b_nan, np.nan, result).astype(a.dtype)
    if xorsign:
        result = np.copysign(result, np.where(sign, -1, 1).astype(a.dtype))
    return canonical(result, kind)


# --- approximations of the hardware, taken as exact ---


def correctly_rounded(function: Callable, *operands: np.ndarray) -> np.ndarray:
    """Return the float32 nearest to ``function`` of float32 operands, computed in float64.

    Double rounding can move a result that lies within a float64 error of a midpoint between two
    float32; for the quotient, the reciprocal and the square root, where midpoints matter, NumPy's
    own float32 operations are used instead.
    """
    return canonical(function(*(x.astype(np.float64) for x in operands)).astype(np.float32), "f32")
