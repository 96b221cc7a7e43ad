"""The noise standard in torch operations, on whichever device the seeds are: for devices without a
kernel of ours.

The words are the standard's, bit by bit: Philox in int64, whose products are taken in halves, so
that none of them needs more than 63 bits. The normals are the standard's, bit by bit, where the
device has float64, in which a fused multiply-add is computed exactly and rounded once. Elsewhere it
is computed from float32 numbers and their rounding errors (Dekker 1971, Knuth's two-sum), which
may round the last bit otherwise.

Nothing waits for the device, and nothing is copied to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..utils.devices import has_float64
from .noise import (
    COSINE,
    MINUS_TWO_LOG,
    MINUS_TWO_LOG_OF_2,
    MULTIPLIERS,
    ROUNDS,
    SINE,
    WEYL,
    NoiseStream,
    check_elements,
)

_LOW = 0xFFFFFFFF
_TOP = 1 << 31
_SPLIT = float((1 << 12) + 1)  # cuts the 24 bits of a float32 in two halves
_CHUNK = 1 << 20  # counters at a time: keeps the temporaries small

Word = TypeVar("Word", int, Tensor)


def _product(multiplier: int, word: Word) -> tuple[Word, Word]:
    """Return the upper and the lower 32 bits of a product of 32-bit numbers."""
    low, high = word * (multiplier & 0xFFFF), word * (multiplier >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW


def philox_words(seeds: Tensor, counters: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of each seed ``(B,)`` int64 at each counter ``(n,)`` int64, in [0,
    2^32): ``(B, n)`` int64, in the standard's order."""
    # Some are numbers, until a product with a tensor has reached them.
    words: tuple[Any, Any, Any, Any] = (counters & _LOW, step & _LOW, stream & _LOW, 0)
    c0, c1, c2, c3 = words
    rounds = torch.arange(ROUNDS, dtype=torch.int64, device=seeds.device)[:, None, None]
    keys0 = ((seeds & _LOW)[:, None] + rounds * WEYL[0]) & _LOW
    keys1 = ((seeds >> 32)[:, None] + rounds * WEYL[1]) & _LOW
    for key0, key1 in zip(keys0, keys1, strict=True):
        upper0, lower0 = _product(MULTIPLIERS[0], c0)
        upper1, lower1 = _product(MULTIPLIERS[1], c2)
        c0, c1 = upper1 ^ c1 ^ key0, lower1
        c2, c3 = upper0 ^ c3 ^ key1, lower0
    return c0, c1, c2, c3


def fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """Return ``a * b + c`` of float32 tensors in float32: rounded once where the device has
    float64, and nearly so elsewhere."""
    return _fma_by_float64(a, b, c) if has_float64(a.device) else _fma_by_float32(a, b, c)


def _fma_by_float64(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """Round the exact product plus c to odd in float64, and then to float32: see ``noise.fma``."""
    product = a.double() * b.double()
    c = c.double() if isinstance(c, Tensor) else c
    total, error = _two_sum(product, c)
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + toward, bits)
    return odd.view(torch.float64).float()


def _fma_by_float32(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    of_product = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low  # exact
    total, of_sum = _two_sum(product, c)
    lost = of_sum + of_product
    return torch.where(lost == 0, total, total + lost)  # which keeps the sign of a zero


def _two_sum(a: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return a + b rounded, and what rounding lost, exactly."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers of half the bits each, whose sum is ``a``."""
    wide = a * _SPLIT
    high = wide - (wide - a)
    return high, a - high


def _square_root(x: Tensor) -> Tensor:
    """Return square roots that are correctly rounded, which those of libraries for float32 are not:
    by float64, or nearly so by one step of Newton's method."""
    if has_float64(x.device):
        return x.double().sqrt().float()
    root = x.sqrt()
    better = root + _fma_by_float32(-root, root, x) * (0.5 / root)
    return torch.where(root > 0, better, root)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = fma(total, x, c)
    return total


def words_to_normals(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two normals of words a and b, int64 in [0, 2^32), by the standard's formula:
    float32."""
    # A product with a power of two is exact: this sum alone rounds.
    u = (a & (_TOP - 1)).float() * 2.0**-31 + 2.0**-32
    bits = u.view(torch.int32)
    k_shifted = (bits - 0x3F3504F3) & -(1 << 23)
    f = (bits - k_shifted).view(torch.float32) - 1.0
    exponent = k_shifted.float() * (MINUS_TWO_LOG_OF_2 * 2.0**-23)
    radius = _square_root(fma(_horner(MINUS_TWO_LOG, f), f, exponent))
    t = (b - ((b & _TOP) << 1)).float() * 2.0**-31
    y = t * t
    sine = _horner(SINE, y) * t
    cosine = _horner(COSINE, y)
    cosine = torch.where(a >= _TOP, -cosine, cosine)
    return radius * cosine, radius * sine


def standard_normals(seeds: Tensor, n: int, step: int, stream: int = NoiseStream.STEP) -> Tensor:
    """Return normals of the noise standard, ``(len(seeds), n)`` float32, on the device of
    ``seeds``, ``(B,)`` int64.

    Raises:
        ValueError: ``n`` is negative or more than ``MAX_ELEMENTS``.
    """
    check_elements(n)
    z = torch.empty((len(seeds), n), dtype=torch.float32, device=seeds.device)
    at_once = 4 * max(1, _CHUNK // max(1, len(seeds)))
    for first in range(0, n, at_once):
        part = z[:, first : first + at_once]
        counters = torch.arange(
            first // 4, math.ceil((first + part.shape[1]) / 4), dtype=torch.int64, device=seeds.device
        )
        a0, b0, a1, b1 = philox_words(seeds, counters, step, stream)
        pairs = words_to_normals(torch.stack([a0, a1], dim=-1), torch.stack([b0, b1], dim=-1))
        part.copy_(torch.stack(pairs, dim=-1).flatten(1)[:, : part.shape[1]])
    return z
