"""The noise standard: known answers, exact arithmetic, equal bits everywhere, and normals that look it.

Statistical tests use fixed seeds: they pass or fail for good.
"""

import importlib.util
import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

from ddim_fast.kernels import cpu_step, noise
from ddim_fast.kernels.noise import (
    NoiseStream,
    fma,
    philox4x32,
    philox_words,
    sample_seeds,
    standard_normals,
    words_to_normals,
)

INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
per_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -(2**32), 2**32 - 1]

# --- Philox ---------------------------------------------------------------------------------------------------------------


def philox_again(counter, key, rounds=10):
    """Philox4x32 once more, from the paper: Python integers, (L, R) pairs of Feistel-like rounds."""
    word = (1 << 32) - 1
    (r0, l0, r1, l1), (k0, k1) = counter, key
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * r0, 0xCD9E8D57 * r1
        r0, l0, r1, l1 = (product1 >> 32) ^ l0 ^ k0, product1 & word, (product0 >> 32) ^ l1 ^ k1, product0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [r0, l0, r1, l1]


def hex_words(text):
    return [int(word, 16) for word in text.split()]


# Random123, tests/kat_vectors, the lines "philox4x32 7" and "philox4x32 10": counter, key, answer
KNOWN_ANSWERS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, answer):
    assert philox_again(hex_words(counter), hex_words(key), rounds) == hex_words(answer)
    got = philox4x32(np.array(hex_words(counter), np.uint32), np.array(hex_words(key), np.uint32), rounds)
    assert got.dtype == np.uint32
    assert got.tolist() == hex_words(answer)


def test_philox_is_philox_everywhere():
    rng = np.random.default_rng(1)
    counters, keys = (
        rng.integers(0, 2**32, (200, 4), dtype=np.uint32),
        rng.integers(0, 2**32, (200, 2), dtype=np.uint32),
    )
    assert philox4x32(counters, keys).tolist() == [
        philox_again(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)
    ]


@pytest.mark.parametrize("seed", [*SEEDS, 2**64 - 1, 2**63])
def test_words_have_the_published_counter_and_key(seed):
    """Counter (element // 4, step, stream, 0); key (low, high) half of the seed."""
    for step, stream, first in [(0, 0, 0), (3, 1, 7), (2**32 - 1, 2**32 - 1, 2**32 - 3)]:
        expected = [philox_again((first + i, step, stream, 0), (seed % 2**32, (seed >> 32) % 2**32)) for i in range(3)]
        assert philox_words(seed, 3, step, stream, first).tolist() == expected


# --- The fused multiply-add in NumPy ----------------------------------------------------------------------------------------------


def nearest_float32(x):
    """A Fraction rounded to float32, nearest even, by integers."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x))) if abs(x) > Fraction(1, 2**1000) else -1000
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 23, -149)
    whole = round(x / unit)  # Python rounds a Fraction half to even
    return math.inf * (1 if x > 0 else -1) if abs(whole * unit) >= 2**128 else float(whole * unit)


def check_fma(a, b, c):
    a, b, c = (np.asarray(v, np.float32) for v in (a, b, c))
    with np.errstate(over="ignore"):
        got = fma(a, b, c)
    assert got.dtype == np.float32
    for one, x, y, z in zip(
        got.ravel().tolist(), a.ravel().tolist(), b.ravel().tolist(), c.ravel().tolist(), strict=True
    ):
        assert one == nearest_float32(Fraction(x) * Fraction(y) + Fraction(z)), (x.hex(), y.hex(), z.hex())


def test_fma_is_rounded_once():
    rng = np.random.default_rng(2)
    for spread in (1, 8, 30):
        a, b, c = (rng.standard_normal(3000) * 2.0 ** rng.integers(-spread, spread + 1, 3000) for _ in range(3))
        check_fma(a, b, c)
        a, b = a.astype(np.float32), b.astype(np.float32)
        check_fma(a, b, -(a.astype(np.float64) * b) * (1 + rng.integers(-3, 4, 3000) * 2.0**-23))  # cancellation


def test_fma_survives_double_rounding():
    """Sums that float64 rounds onto a midpoint of float32, from either side, with either parity."""
    a, b, c = [], [], []
    for odd in (0, 1):
        for sign in (1, -1):
            for tiny in (2.0**-60, 2.0**-100, 2.0**-149, -(2.0**-60), -(2.0**-100), -(2.0**-149), 0.0):
                # (1 + k 2^-12)^2 has bits at 2^-24: the middle between two float32
                for k in (1, 3, 4095, 2049):
                    a.append(sign * (1 + k * 2.0**-12)), b.append(1 + k * 2.0**-12), c.append(tiny)
                a.append(sign * (1 + odd * 2.0**-23)), b.append(1.0), c.append(sign * 2.0**-24 + tiny)
                a.append(sign * tiny), b.append(1.0), c.append(1.0 + odd * 2.0**-23)
                # half an ulp of float32 exactly, and an addend far below float64's last bit
                a.append(sign * (2.0**-12 + 2.0**-23)), b.append(2.0**-12), c.append(1 + odd * 2.0**-23)
                a.append(sign * 2.0**-75), b.append(2.0**-74), c.append(tiny)
    check_fma(a, b, c)
    trap = np.float32(1 + 2.0**-12), np.float32(2.0**-80)
    plain = np.float32(np.float64(trap[0]) * trap[0] + np.float64(trap[1]))
    assert plain != fma(*map(np.array, (trap[0], trap[0], trap[1])))  # the trap does catch plain float64 arithmetic


def test_fma_at_the_ends_of_float32():
    largest, smallest = np.finfo(np.float32).max, 2.0**-149
    check_fma(
        [largest, largest, smallest, smallest, smallest, -smallest],
        [1, 1, 0.5, 0.5, 0.25, 0.5],
        [largest, -largest, 0, smallest, smallest, 0],
    )
    check_fma(
        np.array([2.0**-75, 2.0**-75, 3 * 2.0**-76]),
        np.array([2.0**-75, -(2.0**-75), 2.0**-74]),
        np.array([0, 0, smallest]),
    )


# --- Words to normals --------------------------------------------------------------------------------------------------------------


def exact_normals(words):
    """The definition in float64, but for the two roundings to float32 that belong to it (of u and of t), and the radius."""
    a, b = words[..., 0::2].astype(np.int64), words[..., 1::2].astype(np.int64)
    magnitude = (
        (a & 0x7FFFFFFF).astype(np.float32).astype(np.float64)
    )  # exact products and sums follow: one rounding, as fma
    u = (magnitude * 2.0**-31 + 2.0**-32).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    t = np.where(b >= 2**31, b - 2**32, b).astype(np.float32).astype(np.float64) * 2.0**-31
    sign = np.where(a >= 2**31, -1.0, 1.0)
    return np.stack([sign * radius * np.cos(np.pi / 2 * t), radius * np.sin(np.pi / 2 * t)], axis=-1).reshape(
        words.shape
    ), np.repeat(radius, 2, -1)


def edge_words():
    edges = [
        0,
        1,
        2,
        3,
        127,
        128,
        2**24 - 1,
        2**24,
        2**24 + 1,
        2**30,
        2**31 - 129,
        2**31 - 128,
        2**31 - 65,
        2**31 - 64,
        2**31 - 1,
    ]
    edges += [
        int(f * 2**31) + d for f in (0.25, 0.5**0.5, 0.5**1.5, 0.5) for d in (-200, -64, 0, 64, 200)
    ]  # where k changes
    edges = np.array(edges + [e | 1 << 31 for e in edges], dtype=np.uint32)
    pairs = np.stack(np.meshgrid(edges, edges, indexing="ij"), -1).reshape(-1, 2)
    return np.concatenate([pairs, pairs[::-1]], axis=1)


LARGEST_ERROR = 3.2e-7
"""Of a normal, relative to the radius of its pair (0 to 6.66): 2.7 float32 eps. Measured on 16 million: 3.02e-7."""
LARGEST_ABSOLUTE_ERROR = 1.1e-6
"""Measured: 1.01e-6, at the largest radii."""


def test_normals_are_near_the_definition():
    rng = np.random.default_rng(3)
    for words in (edge_words(), rng.integers(0, 2**32, (250_000, 4), dtype=np.uint32)):
        exact, radius = exact_normals(words)
        error = np.abs(words_to_normals(words) - exact)
        assert np.all(error <= LARGEST_ERROR * radius)
        assert error.max() <= LARGEST_ABSOLUTE_ERROR


def test_error_bound_is_not_slack():
    words = np.random.default_rng(3).integers(0, 2**32, (250_000, 4), dtype=np.uint32)
    exact, radius = exact_normals(words)
    assert np.max(np.abs(words_to_normals(words) - exact)[radius > 0] / radius[radius > 0]) > LARGEST_ERROR / 2


def test_largest_normal():
    words = np.array(
        [[0, 0, 2**31, 0], [0, 2**31, 0, 2**31 - 1]], dtype=np.uint32
    )  # u = 2^-32, angles 0, pi, -pi/2 and pi/2
    z = words_to_normals(words)
    assert z[0, 0] == -z[0, 2]
    assert z[0].tolist()[1::2] == [0.0, 0.0]
    assert 6.66 <= z[0, 0] < 6.661
    assert -6.661 < z[1, 1] <= -6.66
    assert 6.66 <= z[1, 3] < 6.661
    assert np.abs(words_to_normals(edge_words())).max() < 6.661
    assert math.sqrt(-2 * math.log(2.0**-32)) >= 6.5


def test_smallest_radius_is_zero_not_nan():
    words = np.array([[2**31 - 1, 5, 2**32 - 1, 2**31 + 7]], dtype=np.uint32)  # u = 1
    assert np.all(words_to_normals(words) == 0)
    assert np.isfinite(words_to_normals(edge_words())).all()


def test_quadrants():
    """The sign bit of a mirrors the cosine, the sign of b the sine."""
    a, b = 123456789, 987654321
    words = np.array([[a, b, a | 1 << 31, b], [a, 2**32 - b, a | 1 << 31, 2**32 - b]], dtype=np.uint32)
    (c0, s0, c1, s1), (c2, s2, c3, s3) = words_to_normals(words).tolist()
    assert c0 > 0
    assert s0 > 0
    assert (c1, s1) == (-c0, s0)
    assert (c2, s2) == (c0, -s0)
    assert (c3, s3) == (-c0, -s0)


def test_published_vectors():
    """Version 1 never changes: these numbers are part of the standard (C hex floats; written down from this test's first run)."""
    assert noise.NOISE_STANDARD_VERSION == 1
    assert [x.hex() for x in standard_normals([0], 4, 0)[0].tolist()] == PUBLISHED[0]
    assert [x.hex() for x in standard_normals([-1], 6, 41, NoiseStream.INITIAL)[0, 2:].tolist()] == PUBLISHED[1]
    assert philox_words(0, 1, 0, 0).tolist() == [hex_words("6627e8d5 e169c58d bc57ac4c 9b00dbd8")]


PUBLISHED = [
    ["0x1.3fec6c0000000p-1", "-0x1.f83fc80000000p-3", "-0x1.9893400000000p-2", "-0x1.28ded20000000p+0"],
    ["-0x1.05d0640000000p-1", "0x1.8e90fa0000000p-2", "0x1.082d520000000p-1", "0x1.edd9e20000000p-2"],
]


@pytest.fixture(scope="module")
def fits():
    path = Path(__file__).parents[2] / "tools" / "noise_polynomials.py"
    spec = importlib.util.spec_from_file_location("noise_polynomials", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["MINUS_TWO_LOG", "SINE", "COSINE"])
def test_polynomials_are_as_good_as_their_fit(fits, name):
    function, low, high, degree, weight = fits.FITS[name]
    _, error = fits.fit(function, low, high, degree, weight)
    ours = getattr(noise, name)
    assert len(ours) == degree + 1
    assert all(float(np.float32(c)) == c for c in ours)
    x = np.linspace(low, high, 200_001)
    ours_error = np.abs(weight(x) * (np.polynomial.polynomial.polyval(x, ours) - function(x))).max()
    assert error < 2e-7
    assert ours_error <= 1.05 * error + 1e-10


def test_constant_of_the_exponent():
    assert np.float32(noise.MINUS_TWO_LOG_OF_2) == np.float32(-2 * math.log(2))


# --- C++ is NumPy, bit for bit --------------------------------------------------------------------------------------------------------


def cpp_words(seed, first, step, stream, n):
    guard = np.full((n + 8, 4), 0xDEADBEEF, dtype=np.uint32)
    cpu_step.extension.words(seed, first, step, stream, guard[4:].ctypes.data, n)
    assert (guard[:4] == 0xDEADBEEF).all()
    assert (guard[4 + n :] == 0xDEADBEEF).all()
    return guard[4 : 4 + n]


def cpp_normals(seeds, n, step, stream, threads=1):
    seeds, size = np.asarray(seeds, np.int64), len(seeds) * n
    guard = np.full(size + 33, -77.0, dtype=np.float32)
    cpu_step.extension.normals(seeds.ctypes.data, len(seeds), n, step, stream, guard[17:].ctypes.data, threads)
    assert (guard[:17] == -77).all()
    assert (guard[17 + size :] == -77).all()
    return guard[17 : 17 + size].reshape(len(seeds), n)


def assert_same_bits(a, b):
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@per_instruction_set
@pytest.mark.parametrize("seed", SEEDS)
def test_cpp_words(select, instruction_set, seed):
    select(instruction_set)
    for step, stream, first in [(0, 0, 0), (41, 3, 12345), (2**32 - 1, 2**32 - 1, 2**31 - 5), (1, 0, 2**32 - 60)]:
        expected = philox_words(seed, 60, step, stream, first)
        for n in [*range(20), 31, 32, 33, 60]:
            assert_same_bits(cpp_words(seed, first, step, stream, n), expected[:n])


@per_instruction_set
def test_cpp_words_random(select, instruction_set):
    select(instruction_set)
    rng = np.random.default_rng(4)
    for seed, step, stream, first in zip(
        rng.integers(-(2**63), 2**63, 200).tolist(), *rng.integers(0, 2**32 - 20, (3, 200)).tolist(), strict=True
    ):
        assert_same_bits(cpp_words(seed, first, step, stream, 19), philox_words(seed, 19, step, stream, first))


@per_instruction_set
def test_cpp_normals_every_length(select, instruction_set):
    select(instruction_set)
    for seed, step, stream in [(0, 0, 0), (-1, 2**32 - 1, 2), (-(2**63), 999, NoiseStream.INITIAL)]:
        expected = standard_normals([seed], 300, step, stream)
        for n in range(301):
            assert_same_bits(cpp_normals([seed], n, step, stream), expected[:, :n])


@per_instruction_set
def test_cpp_normals_many(select, instruction_set):
    """A million of them, over seeds, steps and streams; every branch-free path of the formula is met."""
    select(instruction_set)
    for step, stream in [(0, 0), (17, 1), (2**31, 2)]:
        assert_same_bits(cpp_normals(SEEDS, 40_001, step, stream), standard_normals(SEEDS, 40_001, step, stream))


@per_instruction_set
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8191, 8192, 8193, 8196, 24_581])
def test_cpp_normals_do_not_depend_on_threads(select, instruction_set, n):
    select(instruction_set)
    expected = standard_normals([5, -6, 7], n, 3)
    for threads in (1, 2, 3, 7):
        assert_same_bits(cpp_normals([5, -6, 7], n, 3, 0, threads), expected)


def test_normals_of_cpu_step():
    seeds = torch.tensor([4, -9, 1])[::2]
    z = cpu_step.normals(seeds, (3, 5, 7), 6, NoiseStream.KNOWN_REGION)
    assert z.shape == (2, 3, 5, 7)
    assert_same_bits(z.numpy().reshape(2, -1), standard_normals([4, 1], 105, 6, NoiseStream.KNOWN_REGION))
    assert cpu_step.normals(torch.zeros(0, dtype=torch.int64), (3,), 0, 0).shape == (0, 3)
    assert cpu_step.normals(torch.tensor([1]), (0, 2), 0, 0).shape == (1, 0, 2)


# --- What a normal depends on ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_its_seed():
    alone = [standard_normals([s], 50, 2)[0] for s in SEEDS]
    assert_same_bits(standard_normals(SEEDS, 50, 2), np.stack(alone))
    assert_same_bits(standard_normals(SEEDS[::-1], 50, 2), np.stack(alone[::-1]))
    assert_same_bits(standard_normals(np.array(SEEDS, np.int64), 50, 2), np.stack(alone))
    assert_same_bits(standard_normals([-1], 50, 2), standard_normals([2**64 - 1], 50, 2))
    assert_same_bits(standard_normals([3], 300, 2)[:, :41], standard_normals([3], 41, 2))


def test_long_samples_are_made_in_seamless_chunks():
    n = 4 * (1 << 16) + 7
    z = standard_normals([11], n, 5)
    assert_same_bits(z[0, -11:], words_to_normals(philox_words(11, 3, 5, 0, (1 << 16) - 1)).ravel()[:11])


def test_every_input_changes_every_normal():
    base = standard_normals([7], 400, 5, 1)
    for other in [
        standard_normals([8], 400, 5, 1),
        standard_normals([7 + 2**32], 400, 5, 1),
        standard_normals([7], 400, 6, 1),
        standard_normals([7], 400, 5, 2),
    ]:
        assert np.mean(other == base) < 0.01


@pytest.mark.parametrize("n", [-1, noise.MAX_ELEMENTS + 1])
def test_count_of_elements_is_checked(n):
    with pytest.raises(ValueError, match=f"a sample may have 0 to {noise.MAX_ELEMENTS} elements, got {n}"):
        standard_normals([1], n, 0)


def test_seeds_of_samples_have_the_published_counter():
    seed = 0xFEDCBA9876543210
    for first in (0, 5, 2**32 - 2):
        expected = []
        for i in range(first, first + 4):
            words = philox_again((i % 2**32, i >> 32, NoiseStream.SEEDS, 0), (seed % 2**32, seed >> 32))
            expected.append((words[0] | words[1] << 32) - (words[1] >> 31 << 64))
        got = sample_seeds(seed, 4, first)
        assert got.dtype == np.int64
        assert got.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("count", [0, 1, 2, 127, 129])
def test_seeds_of_samples_are_the_standards(seed, count):
    got = cpu_step.seeds_of(seed, count)
    assert got.dtype == torch.int64
    assert got.is_contiguous()
    assert_same_bits(got.numpy(), sample_seeds(seed, count))
    for wrong in (-1, 1 << 64):
        with pytest.raises(ValueError, match="seed must be an integer in"):
            cpu_step.seeds_of(wrong, count)
    with pytest.raises(ValueError, match="count and first must not be negative"):
        cpu_step.seeds_of(seed, -1)


def test_seeds_of_samples_are_a_prefix():
    long = sample_seeds(42, 1000)
    for count in (0, 1, 2, 7, 999):
        assert_same_bits(sample_seeds(42, count), long[:count])
        assert_same_bits(sample_seeds(42, 1000 - count, count), long[count:])


def test_seeds_of_samples_do_not_collide():
    runs = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    everyone = np.concatenate([sample_seeds(seed, 20_000) for seed in runs])
    assert len(np.unique(everyone)) == len(everyone)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_of_a_run_is_checked(seed):
    with pytest.raises(ValueError, match=rf"seed must be an integer in \[0, 2\*\*64\), got {seed}"):
        sample_seeds(seed, 1)


@pytest.mark.parametrize(("count", "first"), [(-1, 0), (1, -1)])
def test_count_of_seeds_is_checked(count, first):
    with pytest.raises(ValueError, match=f"must not be negative, got count={count}, first={first}"):
        sample_seeds(1, count, first)


# --- Do they look normal? -----------------------------------------------------------------------------------------------------------------

MOMENTS = [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
"""Order, expected value, variance of one term: E z^2k = (2k - 1)!!"""


def assert_moments(sums, n):
    for order, expected, variance in MOMENTS:
        assert abs(sums[order - 1] / n - expected) < 4.5 * math.sqrt(variance / n), f"moment {order}"


def assert_tails(counts, n):
    for level, count in counts.items():
        p = special.ndtr(-level)
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p) + 1, f"beyond {level}"


def tail_counts(z):
    return {level: int(np.count_nonzero(z > level)) for level in TAILS}, {
        level: int(np.count_nonzero(z < -level)) for level in TAILS
    }


TAILS = (0.5, 1.0, 2.0, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5)


@pytest.fixture(scope="module")
def million():
    return standard_normals(sample_seeds(2024, 4), 250_000, 3)


def test_moments(million):
    z = million.astype(np.float64)
    assert_moments([float((z**order).sum()) for order, *_ in MOMENTS], z.size)


def test_tails(million):
    for counts in tail_counts(million):
        assert_tails(counts, million.size)


def test_kolmogorov_smirnov(million):
    for part in (
        million.ravel(),
        million[:, 0::4].ravel(),
        million[:, 1::4].ravel(),
        million[:, 2::4].ravel(),
        million[:, 3::4].ravel(),
    ):
        assert stats.kstest(part, "norm").pvalue > 1e-3


def test_quadrants_and_angles_are_uniform(million):
    pairs = million.reshape(-1, 2).astype(np.float64)
    counts = np.histogram(np.arctan2(pairs[:, 1], pairs[:, 0]), bins=256, range=(-np.pi, np.pi))[0]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_checks_of_normality_can_fail(million):
    assert stats.kstest(million.ravel() * 1.01, "norm").pvalue < 1e-3
    with pytest.raises(AssertionError, match="moment 2"):
        assert_moments([0.0, 1.01 * million.size, 0.0, 3.0 * million.size], million.size)
    with pytest.raises(AssertionError, match="beyond 4"):
        assert_tails({4.0: 0}, million.size)


def correlation(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(a.size)


def pairs_of_streams():
    z = standard_normals([1], 400_000, 10)[0]
    yield "pair", z[0::2], z[1::2]
    yield "halves of a counter", z.reshape(-1, 4)[:, :2], z.reshape(-1, 4)[:, 2:]
    for lag in (1, 2, 3, 4, 8, 16, 32, 64, 1024):
        yield f"lag {lag}", z[:-lag], z[lag:]
    yield "steps", z, standard_normals([1], 400_000, 11)[0]
    yield "far steps", z, standard_normals([1], 400_000, 10 + 2**16)[0]
    yield "streams", z, standard_normals([1], 400_000, 10, 1)[0]
    yield "seeds", z, standard_normals([2], 400_000, 10)[0]
    yield "seeds that differ in the high half", z, standard_normals([1 + 2**32], 400_000, 10)[0]
    yield "seeds of one run", *standard_normals(sample_seeds(0, 2), 400_000, 10)
    yield "step and stream swapped", standard_normals([1], 400_000, 1, 2)[0], standard_normals([1], 400_000, 2, 1)[0]


def test_no_correlation():
    """Of the values, their squares and their signs with the other's square; each within 4.5 standard errors."""
    for name, a, b in pairs_of_streams():
        assert abs(correlation(a, b)) < 4.5, name
        assert abs(correlation(a * a, b * b)) < 4.5, name
        assert abs(correlation(a, b * b)) < 4.5, name
        assert abs(correlation(np.abs(a), b)) < 4.5, name


@pytest.mark.slow
def test_a_hundred_million():
    chunk, chunks, bins = 2_000_000, 50, 4096
    edges = special.ndtri(np.arange(1, bins) / bins)
    histogram, sums, largest = np.zeros(bins, np.int64), np.zeros(4), 0.0
    upper, lower = dict.fromkeys(TAILS, 0), dict.fromkeys(TAILS, 0)
    for i, seed in enumerate(sample_seeds(7, chunks)):
        z = cpp_normals([seed], chunk, i, 0)[0].astype(np.float64)
        histogram += np.bincount(np.searchsorted(edges, z, side="right"), minlength=bins)
        sums += [(z**order).sum() for order, *_ in MOMENTS]
        for total, counts in zip((upper, lower), tail_counts(z), strict=True):
            for level, count in counts.items():
                total[level] += count
        largest = max(largest, np.abs(z).max())
    n = chunk * chunks
    assert_moments(sums, n)
    assert_tails(upper, n)
    assert_tails(lower, n)
    assert stats.chisquare(histogram).pvalue > 1e-3
    distance = np.abs(np.cumsum(histogram) / n - np.arange(1, bins + 1) / bins).max()
    assert stats.kstwobign.sf(distance * math.sqrt(n)) > 1e-3  # Kolmogorov and Smirnov's test, at the bins' edges
    assert 5.3 < largest < 6.661


def test_no_warnings_from_wrapping_integers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        philox4x32(np.full((3, 4), 2**32 - 1, np.uint32), np.full(2, 2**32 - 1, np.uint32))
        words_to_normals(edge_words())
        sample_seeds(2**64 - 1, 3, 2**40)
