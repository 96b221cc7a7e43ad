"""The noise standard, version 1: the normal number that each element of each sample gets at each
step.

The number depends on the sample's own 64-bit seed, the element's index within the sample, the step
and the stream, and on nothing else: not on the position in the batch, the batch size, the number of
threads or processes, or the machine. This module is the definition, in NumPy; the C++ and GPU
kernels give the same bits. ``docs/NOISE.md`` says the same in prose, with test vectors.

Words
    Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
    2011) with key = (seed mod 2^32, seed div 2^32) and counter = (element // 4, step, stream, 0).
    Its four words w0 .. w3 belong to four consecutive elements: (w0, w1) give the first two normals
    and (w2, w3) the next two.

From two words (a, b) to two normals, every operation in float32, rounded to nearest even once
    magnitude = a mod 2^31                       the top bit of a is kept for a sign
    u         = fma(float(magnitude), 2^-31, 2^-32)             in [2^-32, 1]
    u = 2^k (1 + f)                                             with 1 + f in [sqrt(1/2), sqrt(2))
    radius    = sqrt(fma(P(f), f, float(k * 2^23) * (-2 log 2 * 2^-23)))       sqrt(-2 log u), Box and Muller (1958)
    t         = float(signed b) * 2^-31                         the angle is pi/2 * t, in [-pi/2, pi/2]
    cosine    = C(t^2), its sign flipped where the top bit of a is set: so the angle covers the circle
    sine      = t * S(t^2)
    normals   = (radius * cosine, radius * sine)
The polynomials P, C and S are evaluated by Horner's rule with fused multiply-adds. Largest possible
|normal|: 6.66.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from ..utils.untraced import untraced

NOISE_STANDARD_VERSION = 1
MAX_ELEMENTS = 1 << 34
"""Most elements that one sample may have: a counter has 32 bits and serves four elements."""


class NoiseStream(IntEnum):
    """What a normal is used for. Streams of one seed are independent of each other."""

    STEP = 0  # z in equation 12 of the DDIM paper
    INITIAL = 1  # x_T
    KNOWN_REGION = 2  # noise on the known part of an image, in inpainting
    SEEDS = 3  # seeds of the samples of a batch: see sample_seeds


# Lowest order first; computed by tools/noise_polynomials.py.
MINUS_TWO_LOG = tuple(
    float.fromhex(c)
    for c in (
        "-0x1.fffffep+0",
        "0x1.000078p+0",
        "-0x1.5559e6p-1",
        "0x1.ff63acp-2",
        "-0x1.978df6p-2",
        "0x1.613e32p-2",
        "-0x1.4c371ep-2",
        "0x1.9e32c4p-3",
    )
)
SINE = tuple(
    float.fromhex(c) for c in ("0x1.921fb6p+0", "-0x1.4abbf0p-1", "0x1.466f3ep-4", "-0x1.32e974p-8", "0x1.4701dep-13")
)
COSINE = tuple(
    float.fromhex(c) for c in ("0x1.fffffep-1", "-0x1.3bd39ep+0", "0x1.03bc76p-2", "-0x1.54e836p-6", "0x1.c117a6p-11")
)
MINUS_TWO_LOG_OF_2 = float.fromhex("-0x1.62e430p+0")

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the key's two words in each round."""
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)


@untraced
def philox4x32(counter: np.ndarray, key: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """Return the words of Philox4x32, ``(..., 4)`` uint32.

    ``counter`` ``(..., 4)`` and ``key`` ``(..., 2)``, uint32, are broadcast against each other.
    """
    c0, c1, c2, c3 = (np.asarray(counter)[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (np.asarray(key)[..., i].astype(np.uint64) for i in range(2))
    for i in range(rounds):
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        round_key0, round_key1 = (k0 + np.uint64(i * WEYL[0])) & _LOW, (k1 + np.uint64(i * WEYL[1])) & _LOW
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ round_key0,
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ round_key1,
            p0 & _LOW,
        )
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def fma(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """Return ``a * b + c`` in float32, rounded once.

    The product of two float32 numbers is exact in float64. The sum is rounded to odd there (its
    last bit is set if it is inexact), so that rounding it again, to float32, is correct (Boldo and
    Melquiond, 2008).
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact (Knuth's two-sum)
    bits = total.view(np.int64)
    inexact_and_even = (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact_and_even, toward, 0)).view(np.float64).astype(np.float32)


def _horner(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = fma(total, x, c)
    return total


@untraced
def words_to_normals(words: np.ndarray) -> np.ndarray:
    """Turn words ``(..., 4)`` uint32 into normals ``(..., 4)`` float32, by the formula above."""
    a, b = words[..., 0::2], words[..., 1::2]
    magnitude = a & np.uint32(0x7FFFFFFF)
    u = fma(magnitude.astype(np.float32), 2.0**-31, 2.0**-32)
    bits = u.view(np.int32)
    k_shifted = (bits - np.int32(0x3F3504F3)) & np.int32(-(1 << 23))
    f = (bits - k_shifted).view(np.float32) - np.float32(1)
    exponent = k_shifted.astype(np.float32) * np.float32(MINUS_TWO_LOG_OF_2 * 2.0**-23)
    radius = np.sqrt(fma(_horner(MINUS_TWO_LOG, f), f, exponent))
    t = b.view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    y = t * t
    sine = _horner(SINE, y) * t
    cosine = _horner(COSINE, y)
    cosine = (cosine.view(np.uint32) ^ (a & np.uint32(0x80000000))).view(np.float32)
    return np.stack([radius * cosine, radius * sine], axis=-1).reshape(words.shape)


@untraced
def philox_words(seed: int, n: int, step: int, stream: int, first_counter: int = 0) -> np.ndarray:
    """Return the words of ``n`` consecutive counters, ``(n, 4)`` uint32."""
    counter = np.zeros((n, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(first_counter, first_counter + n, dtype=np.uint64).astype(np.uint32)
    counter[:, 1] = step
    counter[:, 2] = stream
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    return philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))


_CHUNK = 1 << 16  # counters at a time: keeps the float64 temporaries small


@untraced
def standard_normals(
    seeds: Sequence[int] | np.ndarray, n: int, step: int, stream: int = NoiseStream.STEP
) -> np.ndarray:
    """Return normals of the noise standard, ``(len(seeds), n)`` float32, row i from ``seeds[i]``.

    Raises:
        ValueError: ``n`` is negative or more than ``MAX_ELEMENTS``.
    """
    check_elements(n)
    z = np.empty((len(seeds), n), dtype=np.float32)
    for row, seed in zip(z, seeds, strict=True):
        for first in range(0, n, 4 * _CHUNK):
            part = row[first : first + 4 * _CHUNK]
            words = philox_words(int(seed), -(-len(part) // 4), step, stream, first // 4)
            part[:] = words_to_normals(words).reshape(-1)[: len(part)]
    return z


def check_elements(n: int) -> None:
    """Raise ValueError unless a sample may have ``n`` elements."""
    if not 0 <= n <= MAX_ELEMENTS:
        raise ValueError(f"a sample may have 0 to {MAX_ELEMENTS} elements, got {n}: split it into several samples")


def check_seed(seed: int) -> None:
    """Raise ValueError unless ``seed``, from which samples get their seeds, is in [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed}")


@untraced
def sample_seeds(seed: int, count: int, first: int = 0) -> np.ndarray:
    """Return the seeds of the samples ``first .. first + count - 1`` of a run.

    They are ``(count,)`` int64: the 64 bits of each, as a signed number. Sample i's seed is the
    first two words at counter (i mod 2^32, i div 2^32, SEEDS, 0). It is not ``seed + i``, so
    neighbouring seeds share no samples.

    Raises:
        ValueError: ``seed`` is not in [0, 2^64) or ``count`` or ``first`` is negative.
    """
    check_seed(seed)
    if count < 0 or first < 0:
        raise ValueError(f"count and first must not be negative, got count={count}, first={first}")
    index = np.arange(first, first + count, dtype=np.uint64)
    counter = np.zeros((count, 4), dtype=np.uint32)
    counter[:, 0] = (index & _LOW).astype(np.uint32)
    counter[:, 1] = (index >> np.uint64(32)).astype(np.uint32)
    counter[:, 2] = NoiseStream.SEEDS
    words = philox4x32(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)).astype(np.uint64)
    return (words[:, 0] | words[:, 1] << np.uint64(32)).view(np.int64)
