"""Integer and bit operations of PTX that NumPy does not have, on arrays.

Source: PTX ISA, "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic
Instructions", "Logic and Shift Instructions" and "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def high_u64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the upper 64 bits of the product of unsigned 64-bit numbers, from four products of
    halves."""
    a0, a1, b0, b1 = a & _LOW, a >> _32, b & _LOW, b >> _32
    middle = a1 * b0 + (a0 * b0 >> _32)
    other = a0 * b1 + (middle & _LOW)
    return a1 * b1 + (middle >> _32) + (other >> _32)


def high_s64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the same for signed numbers: Hacker's Delight, 8-3."""
    high = high_u64(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
    return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Shift left by a uint32 count. Counts of the width or more give 0."""
    width = 8 * a.dtype.itemsize
    return np.where(count < width, a << np.minimum(count, width - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Shift right, with counts clamped to the width: fill with the sign if signed, else with 0."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < width, shifted, 0).astype(a.dtype)


def funnel_shift(a: np.ndarray, b: np.ndarray, count: np.ndarray, *, left: bool, wrap: bool) -> np.ndarray:
    """Shift the 64 bits b:a and keep the upper (left) or lower (right) 32: ``shf``."""
    n = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = b.astype(np.uint64) << _32 | a
    # For a left shift by n, bits 63-n .. 32-n; the shift by 32 - n (0 to 32) stays below 64.
    return (both >> (_32 - n if left else n)).astype(np.uint32)


def extract_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Extract ``length`` bits from ``position``, sign-extended for signed types: ``bfe``.

    Position and length are taken modulo 256.
    """
    width, signed = 8 * a.dtype.itemsize, a.dtype.kind == "i"
    position, length = ((x & np.uint32(255)).astype(np.int64) for x in (position, length))
    unsigned = a.view(np.dtype(f"u{a.dtype.itemsize}")).astype(np.uint64)
    top = np.minimum(position + length - 1, width - 1)
    sign = unsigned >> np.clip(top, 0, 63).astype(np.uint64) & np.uint64(1)
    sign = np.where((length > 0) & signed, sign, np.uint64(0))
    kept = np.clip(np.minimum(length, width - position), 0, width)
    mask = _low_ones(kept)
    field = (
        np.where(position < width, unsigned >> np.minimum(position, width - 1).astype(np.uint64), np.uint64(0)) & mask
    )
    return np.where(sign == 1, field | ~mask, field).astype(np.dtype(f"u{a.dtype.itemsize}")).view(a.dtype)


def insert_field(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Replace ``length`` bits of b from ``position`` by the low bits of a: ``bfi``."""
    width = 8 * a.dtype.itemsize
    position, length = ((x & np.uint32(255)).astype(np.int64) for x in (position, length))
    kept = np.clip(np.minimum(length, width - position), 0, width)
    shift = np.minimum(position, width - 1).astype(np.uint64)
    mask = _low_ones(kept) << shift
    return ((b.astype(np.uint64) & ~mask) | (a.astype(np.uint64) << shift & mask)).astype(a.dtype)


def _low_ones(count: np.ndarray) -> np.ndarray:
    count = count.astype(np.uint64)
    return np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1))


def logic3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Look up each bit in a table: ``lop3``.

    Bit i of ``table`` is the result for the bits (a, b, c) of i.
    """
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def permute_bytes(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """Permute bytes: ``prmt`` in its default mode.

    Each nibble picks one of eight bytes, or, with its top bit set, that byte's sign eight times.
    """
    both = b.astype(np.uint64) << _32 | a
    result = np.zeros(np.broadcast_shapes(both.shape, selectors.shape), np.uint32)
    for i in range(4):
        nibble = selectors >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) << np.uint64(3)) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result


def count_ones(a: np.ndarray) -> np.ndarray:
    """Count the set bits, as uint32: ``popc``."""
    n = a.astype(np.uint64)
    n = n - (n >> np.uint64(1) & np.uint64(0x5555555555555555))
    n = (n & np.uint64(0x3333333333333333)) + (n >> np.uint64(2) & np.uint64(0x3333333333333333))
    n = n + (n >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (n * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.uint32)


def highest_one(a: np.ndarray) -> np.ndarray:
    """Return the position of the highest set bit of an unsigned number, -1 for 0, as int64."""
    n = a.astype(np.uint64)
    for shift in (1, 2, 4, 8, 16, 32):
        n = n | n >> np.uint64(shift)
    return count_ones(n).astype(np.int64) - 1


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """Count the leading zeros, as uint32: ``clz``."""
    return (8 * a.dtype.itemsize - 1 - highest_one(a)).astype(np.uint32)


def find_leading(a: np.ndarray, *, as_shift: bool) -> np.ndarray:
    """Find the highest bit that is not the sign; 0xffffffff where there is none: ``bfind``.

    ``as_shift`` is ``.shiftamt``.
    """
    width = 8 * a.dtype.itemsize
    unsigned = (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).astype(np.dtype(f"u{a.dtype.itemsize}"))
    position = highest_one(unsigned)
    position = np.where(position < 0, -1, width - 1 - position) if as_shift else position
    return position.astype(np.uint32)


def reverse_bits(a: np.ndarray) -> np.ndarray:
    """Reverse the order of the bits: ``brev``."""
    n, width = a.astype(np.uint64), 8 * a.dtype.itemsize
    result = np.zeros_like(n)
    for i in range(width):
        result |= (n >> np.uint64(i) & np.uint64(1)) << np.uint64(width - 1 - i)
    return result.astype(a.dtype)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide, truncated towards zero; the smallest number by -1 wraps. ``b`` has no zeros."""
    if a.dtype.kind == "u":
        return a // b
    quotient, rest = np.divmod(a, np.where(b == -1, 1, b))  # floored
    truncated = quotient + ((rest != 0) & ((a < 0) != (b < 0)))
    return np.where(b == -1, -a, truncated).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the remainder, with the sign of the dividend. ``b`` has no zeros."""
    return (a - divide(a, b) * b).astype(a.dtype)
