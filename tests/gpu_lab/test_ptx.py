"""The PTX executor: every kind of instruction against exact arithmetic, and every check shown to fire."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from ddim_fast.gpu_lab.ptx import (
    AddressError,
    DivergenceError,
    EndlessError,
    Execution,
    LaunchError,
    NotModelledError,
    PtxError,
    PtxSyntaxError,
    RaceError,
    Region,
    UnspecifiedError,
    UnwrittenError,
    execute,
    parse,
)
from ddim_fast.gpu_lab.ptx import operations as ptx_operations

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<60>;
"""


def kernel(body: str, pointers: int = 2, scalars: tuple[str, ...] = (), block: int = 32, before: str = "") -> str:
    """A kernel ``k`` whose pointers are in %rd50, %rd51, ..., with %tid.x in %r50, %ctaid.x in %r51 and the thread of the grid in %r52."""
    parameters = [f".param .u64 .ptr .global .align 1 k_{i}" for i in range(pointers)]
    parameters += [f".param .{kind} s_{i}" for i, kind in enumerate(scalars)]
    loads = "\n".join(f"ld.param.b64 %rd{50 + i}, [k_{i}];" for i in range(pointers))
    return f"""{HEADER}{before}
.visible .entry k(
    {", ".join(parameters)}
)
.reqntid {block}
{{
    {REGISTERS}
    {loads}
    mov.u32 %r50, %tid.x;
    mov.u32 %r51, %ctaid.x;
    mad.lo.s32 %r52, %r51, {block}, %r50;
    {body}
    ret;
}}
"""


def run(text: str, *arguments: object, grid: int = 1, regions: tuple = (), **options: object) -> Execution:
    return execute(parse(text), "k", (grid,), list(arguments), regions, **options)


def evaluate(snippet: str, result: type, *operands: np.ndarray) -> np.ndarray:
    """A snippet for every element: {0}, {1}, ... are registers with the operands' bits, {d} is the result's."""
    n = len(operands[0])
    padded = -(-n // 32) * 32
    arrays = [np.ascontiguousarray(np.resize(x, padded)) for x in operands]
    out = np.zeros(padded, result)
    prefix = {1: "rs", 2: "rs", 4: "r", 8: "rd"}
    body, registers = [], {}
    for i, x in enumerate([*arrays, out]):
        register = f"%{prefix[x.itemsize]}{i + 20}"
        registers["d" if i == len(arrays) else str(i)] = register
        body.append(f"mad.wide.s32 %rd{30 + i}, %r52, {x.itemsize}, %rd{50 + i};")
        if i < len(arrays):
            body.append(f"ld.global.b{8 * x.itemsize} {register}, [%rd{30 + i}];")
    for key, register in registers.items():
        snippet = snippet.replace("{" + key + "}", register)
    body += [snippet, f"st.global.b{8 * out.itemsize} [%rd{30 + len(arrays)}], {registers['d']};"]
    run(kernel("\n".join(body), len(arrays) + 1), *arrays, out, grid=padded // 32)
    return out[:n]


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).view(f"u{values.dtype.itemsize}")


def crossed(values: np.ndarray, times: int) -> list[np.ndarray]:
    """All tuples of values, as ``times`` arrays."""
    indices = np.array(list(itertools.product(range(len(values)), repeat=times)))
    return [values[indices[:, i]] for i in range(times)]


# --- floating point against exact fractions ---

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}
HELD = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def decoded(pattern: int, kind: str) -> Fraction | float:
    """The exact number; infinities, NaN and negative zero as floats."""
    digits, lowest, highest = FORMATS[kind]
    sign = -1 if pattern >> (8 * HELD[kind]().itemsize - 1) else 1
    mantissa = pattern & (1 << digits - 1) - 1
    exponent = pattern >> digits - 1 & 2 * highest + 1
    if exponent == 2 * highest + 1:
        return float("nan") if mantissa else sign * float("inf")
    if exponent:
        return sign * Fraction(mantissa | 1 << digits - 1) * Fraction(2) ** (exponent + lowest - digits)
    return sign * Fraction(mantissa) * Fraction(2) ** (lowest - digits + 1) if mantissa else sign * 0.0


def encoded(exact: Fraction | float, kind: str) -> int:
    """The nearest number's bits, ties to even."""
    digits, lowest, highest = FORMATS[kind]
    top = 1 << 8 * HELD[kind]().itemsize - 1
    infinity = (2 * highest + 1) << digits - 1
    if isinstance(exact, float):
        if exact != exact:
            return NAN[kind]
        return (top if np.signbit(exact) else 0) | (infinity if exact else 0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    exponent = max(exponent, lowest)
    scaled = size / Fraction(2) ** (exponent - digits + 1)
    whole = round(scaled)  # Python rounds fractions half to even
    pattern = whole + ((exponent - lowest) << digits - 1)  # a carry goes into the exponent, as it should
    return (top if exact < 0 else 0) | min(pattern, infinity)


def exactly(operator: str, a: Fraction | float, b: Fraction | float, c: Fraction | float = 0.0) -> Fraction | float:
    """An operation without rounding. Floats take over where something is infinite, NaN or a zero with a sign."""
    rules = {"add": (a, 1.0, b), "sub": (a, 1.0, _negative(b)), "mul": (a, b, None), "fma": (a, b, c)}
    x, y, z = rules[operator]
    special = [v for v in (x, y, z) if isinstance(v, float) and (v != v or abs(v) == float("inf"))]
    if special:
        signs = [
            v if v in special or (isinstance(v, float) and v == 0) else float(np.sign(float(v > 0) - 0.5))
            for v in (x, y)
        ]
        product = np.float64(signs[0]) * np.float64(signs[1])
        addend = z if z is None or isinstance(z, float) else 0.0
        return float(product if z is None else product + np.float64(addend))
    product = Fraction(x) * Fraction(y)
    total = product if z is None else product + Fraction(z)
    if total:
        return total
    of_product = float(np.copysign(1.0, _sign(x) * _sign(y)) * 0.0) if product == 0 else None
    if z is None:
        return of_product
    return of_product + z if of_product is not None and isinstance(z, float) else 0.0


def _negative(x: Fraction | float) -> Fraction | float:
    return -x


def _sign(x: Fraction | float) -> float:
    return float(np.copysign(1.0, x)) if isinstance(x, float) else (1.0 if x > 0 else -1.0)


def edges(kind: str, rng: np.random.Generator, random: int) -> np.ndarray:
    digits, _, highest = FORMATS[kind]
    top = 1 << 8 * HELD[kind]().itemsize - 1
    one, infinity = highest << digits - 1, (2 * highest + 1) << digits - 1
    positive = [
        0,
        1,
        (1 << digits - 1) - 1,
        1 << digits - 1,
        one,
        one + 1,
        one - 1,
        one + (1 << digits - 2),
        infinity - 1,
        infinity,
    ]
    patterns = positive + [p | top for p in positive] + [infinity + 1, NAN[kind], top | infinity | 5]
    patterns += (
        [int(x) for x in rng.integers(0, 2 * top, random, dtype=np.uint64, endpoint=False)] if top < 1 << 63 else []
    )
    return np.array(patterns, HELD[kind])


@pytest.mark.parametrize("operator", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_arithmetic_rounds_once(operator, kind):
    rng = np.random.default_rng(1)
    times = 3 if operator == "fma" else 2
    values = edges(kind, rng, 4 if times == 3 else 40)
    values = values[:: 2 if times == 3 else 1]
    operands = crossed(values, times)
    got = evaluate(f"{operator}.rn.{kind} {{d}}, {', '.join(f'{{{i}}}' for i in range(times))};", HELD[kind], *operands)
    with np.errstate(all="ignore"):
        expected = [
            encoded(exactly(operator, *(decoded(int(p), kind) for p in pattern)), kind)
            for pattern in zip(*operands, strict=True)
        ]
    np.testing.assert_array_equal(got, np.array(expected, HELD[kind]))


def test_fma_is_fused_where_two_roundings_differ():
    a = np.float32(1 + 2**-12)
    rng = np.random.default_rng(2)
    n = 4000
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    z = -(x * y) * (1 + rng.integers(-2, 3, n).astype(np.float32) * np.float32(2**-23))  # cancels
    # Sums that lie halfway between two float32, and a little beside.
    x = np.r_[x, np.full(4, a), np.float32(2**-75) * np.ones(2, np.float32)]
    y = np.r_[y, np.full(4, a), np.float32(2**-74) * np.ones(2, np.float32)]
    z = np.r_[z, np.float32([0, 2**-60, -(2**-60), 1]), np.float32([2**-149, -(2**-149)])]
    got = evaluate("fma.rn.f32 {d}, {0}, {1}, {2};", np.uint32, x, y, z.astype(np.float32))
    exact = [
        Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
        for p, q, r in zip(x, y, z.astype(np.float32), strict=True)
    ]
    expected = [encoded(e if e else 0.0, "f32") for e in exact]
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))
    assert (got.view(np.float32) != (x * y + z).astype(np.float32)).any()


@pytest.mark.parametrize(("name", "element"), [("f16x2", "f16"), ("bf16x2", "bf16"), ("f32x2", "f32")])
def test_packed_arithmetic_is_that_of_each_half(name, element):
    rng = np.random.default_rng(3)
    whole = np.uint32 if element != "f32" else np.uint64
    halves = rng.integers(0, 1 << 8 * HELD[element]().itemsize, (3, 256), dtype=np.uint64).astype(HELD[element])
    packed = [h.view(whole) for h in halves]
    for operator, count in (("fma", 3), ("mul", 2), ("add", 2), ("sub", 2)):
        arguments = ", ".join(f"{{{i}}}" for i in range(count))
        got = evaluate(f"{operator}.rn.{name} {{d}}, {arguments};", whole, *packed[:count])
        one = evaluate(f"{operator}.rn.{element} {{d}}, {arguments};", HELD[element], *halves[:count])
        np.testing.assert_array_equal(got.view(HELD[element]), one)


def test_a_packed_operand_may_be_the_same_for_all_threads():
    x = np.arange(64, dtype=np.float32).view(np.uint64)
    got = evaluate("mov.b32 %r1, 0f40400000; mov.b64 %rd1, {%r1, %r1}; mul.rn.f32x2 {d}, {0}, %rd1;", np.uint64, x)
    np.testing.assert_array_equal(got.view(np.float32), 3 * np.arange(64, dtype=np.float32))


SPECIAL = np.array(
    [
        *(
            0x0,
            0x80000000,
            0x1,
            0x80000001,
            0x7FFFFF,
            0x800000,
            0x3F800000,
            0xBF800000,
            0x7F7FFFFF,
            0x7F800000,
            0xFF800000,
        ),
        *(0x7FC00000, 0xFFC00001, 0x40490FDB, 0xC0490FDB),
    ],
    np.uint32,
)


def test_minimum_and_maximum_know_signed_zeros_and_nan():
    a, b = crossed(SPECIAL, 2)
    x, y = a.view(np.float32), b.view(np.float32)
    either, both = np.isnan(x) | np.isnan(y), np.isnan(x) & np.isnan(y)
    for name, less in (("min", True), ("max", False)):
        order = (x < y) | ((x == y) & np.signbit(x))
        expected = np.where(order == less, a, b)
        expected = np.where(np.isnan(x), b, np.where(np.isnan(y), a, expected))
        plain = np.where(both, NAN["f32"], expected)
        np.testing.assert_array_equal(evaluate(f"{name}.f32 {{d}}, {{0}}, {{1}};", np.uint32, a, b), plain)
        strict = np.where(either, NAN["f32"], expected)
        np.testing.assert_array_equal(evaluate(f"{name}.NaN.f32 {{d}}, {{0}}, {{1}};", np.uint32, a, b), strict)


def test_xorsign_compares_magnitudes_and_multiplies_signs():
    x, y = (v.view(np.float32) for v in crossed(SPECIAL[:11], 2))
    got = evaluate("min.xorsign.abs.f32 {d}, {0}, {1};", np.float32, x, y)
    expected = np.copysign(
        np.minimum(np.abs(x), np.abs(y)), np.where(np.signbit(x) ^ np.signbit(y), np.float32(-1), np.float32(1))
    )
    np.testing.assert_array_equal(bits(got), bits(expected))


def test_signs_are_copied_and_changed():
    x, y = (v.view(np.float32) for v in crossed(SPECIAL[:11], 2))
    got = evaluate(
        "copysign.f32 {d}, {0}, {1};", np.float32, x, y
    )  # the sign of the first, the magnitude of the second
    np.testing.assert_array_equal(bits(got), bits(np.copysign(y, x)))
    halves = np.arange(0, 1 << 16, 41).astype(np.uint16)
    for kind, exponent in (("f16", 0x7C00), ("bf16", 0x7F80)):
        nan = (halves & 0x7FFF) > exponent
        negative, magnitude = np.where(nan, 0x7FFF, halves ^ 0x8000), np.where(nan, 0x7FFF, halves & 0x7FFF)
        np.testing.assert_array_equal(evaluate(f"neg.{kind} {{d}}, {{0}};", np.uint16, halves), negative)
        np.testing.assert_array_equal(evaluate(f"abs.{kind} {{d}}, {{0}};", np.uint16, halves), magnitude)


def test_three_operands_have_one_maximum():
    x, y, z = (v.view(np.float32) for v in crossed(SPECIAL[:10:2], 3))
    got = evaluate("max.f32 {d}, {0}, {1}, {2};", np.float32, x, y, z)
    np.testing.assert_array_equal(got, np.maximum(np.maximum(x, y), z))


def test_minimum_of_bfloat16():
    values = edges("bf16", np.random.default_rng(4), 20)
    a, b = crossed(values, 2)
    x, y = ((v.astype(np.uint32) << 16).view(np.float32) for v in (a, b))
    expected = np.where(np.isnan(x), b, np.where(np.isnan(y), a, np.where((x < y) | ((x == y) & np.signbit(x)), a, b)))
    expected = np.where(np.isnan(x) & np.isnan(y), NAN["bf16"], expected)
    np.testing.assert_array_equal(evaluate("min.bf16 {d}, {0}, {1};", np.uint16, a, b), expected)


@pytest.mark.parametrize(
    ("snippet", "function"),
    [
        ("sqrt.rn.f32 {d}, {0};", np.sqrt),
        ("rcp.rn.f32 {d}, {0};", lambda x: np.float32(1) / x),
        ("abs.f32 {d}, {0};", np.abs),
        ("neg.f32 {d}, {0};", np.negative),
        ("cvt.rni.f32.f32 {d}, {0};", np.rint),
        ("cvt.rzi.f32.f32 {d}, {0};", np.trunc),
        ("cvt.rmi.f32.f32 {d}, {0};", np.floor),
        ("cvt.rpi.f32.f32 {d}, {0};", np.ceil),
        ("rsqrt.approx.f32 {d}, {0};", lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)),
        ("ex2.approx.f32 {d}, {0};", lambda x: np.exp2(x.astype(np.float64)).astype(np.float32)),
        ("lg2.approx.f32 {d}, {0};", lambda x: np.log2(x.astype(np.float64)).astype(np.float32)),
        ("sin.approx.f32 {d}, {0};", lambda x: np.sin(x.astype(np.float64)).astype(np.float32)),
        ("cos.approx.f32 {d}, {0};", lambda x: np.cos(x.astype(np.float64)).astype(np.float32)),
        ("tanh.approx.f32 {d}, {0};", lambda x: np.tanh(x.astype(np.float64)).astype(np.float32)),
    ],
)
def test_functions_of_one_float(snippet, function):
    rng = np.random.default_rng(5)
    x = np.r_[
        SPECIAL.view(np.float32),
        (rng.standard_normal(500) * 10).astype(np.float32),
        np.float32([0.5, 1.5, 2.5, -0.5, -1.5]),
    ]
    with np.errstate(all="ignore"):
        expected = function(x)
    expected = np.where(np.isnan(expected), np.uint32(NAN["f32"]), bits(expected))
    np.testing.assert_array_equal(evaluate(snippet, np.uint32, x), expected)


@pytest.mark.parametrize("name", ["div.rn.f32", "div.full.f32", "div.approx.f32"])
def test_division_is_correctly_rounded(name):
    rng = np.random.default_rng(6)
    x, y = (rng.standard_normal(300).astype(np.float32) for _ in range(2))
    exact = [encoded(Fraction(float(p)) / Fraction(float(q)), "f32") for p, q in zip(x, y, strict=True)]
    np.testing.assert_array_equal(evaluate(f"{name} {{d}}, {{0}}, {{1}};", np.uint32, x, y), np.array(exact, np.uint32))


def test_subnormals_are_flushed_only_where_written():
    tiny = np.float32([2**-149, -(2**-130), 2**-126])
    one = np.ones(3, np.float32)
    kept = evaluate("mul.rn.f32 {d}, {0}, {1};", np.float32, tiny, one)
    np.testing.assert_array_equal(bits(kept), bits(tiny))
    flushed = evaluate("mul.rn.ftz.f32 {d}, {0}, {1};", np.float32, tiny, one)
    np.testing.assert_array_equal(bits(flushed), [0, 0x80000000, 0x00800000])
    result = evaluate("fma.rn.ftz.f32 {d}, {0}, {1}, {1};", np.float32, np.float32([2**-126]), np.float32([2**-126]))
    assert result[0] == np.float32(2**-126)  # 2^-252 + 2^-126
    below = evaluate("mul.rn.ftz.f32 {d}, {0}, {1};", np.float32, np.float32([2**-100]), np.float32([2**-40]))
    assert below[0] == 0


def test_saturation_takes_nan_to_zero():
    x = np.float32([-1, -0.0, 0.25, 2, np.inf, -np.inf, np.nan])
    got = evaluate("add.rn.sat.f32 {d}, {0}, 0f00000000;", np.float32, x)
    np.testing.assert_array_equal(bits(got), bits(np.float32([0, 0, 0.25, 1, 1, 0, 0])))


def test_mixed_arithmetic_widens_the_half_operand():
    rng = np.random.default_rng(7)
    half, c = rng.standard_normal(100).astype(np.float16), rng.standard_normal(100).astype(np.float32)
    got = evaluate("add.rn.f32.f16 {d}, {0}, {1};", np.float32, half, c)
    np.testing.assert_array_equal(got, half.astype(np.float32) + c)


# --- integers ---

WIDTHS = {16: (np.uint16, np.int16), 32: (np.uint32, np.int32), 64: (np.uint64, np.int64)}


def integer_edges(width: int) -> np.ndarray:
    rng = np.random.default_rng(8)
    top = 1 << width - 1
    values = [
        0,
        1,
        2,
        3,
        5,
        31,
        32,
        33,
        width - 1,
        width,
        top - 1,
        top,
        top + 1,
        2 * top - 1,
        2 * top - 2,
        0xAAAAAAAA & 2 * top - 1,
    ]
    return np.array(values + [int(x) for x in rng.integers(0, 2 * top - 1, 12, dtype=np.uint64)], WIDTHS[width][0])


def signed(pattern: int, width: int, kind: str) -> int:
    return pattern - (1 << width) if kind == "s" and pattern >> width - 1 else pattern


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_RULES = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul.lo": lambda a, b, w: a * b,
    "mul.hi": lambda a, b, w: a * b >> w,
    "min": lambda a, b, w: min(a, b),
    "max": lambda a, b, w: max(a, b),
    "div": lambda a, b, w: truncated(a, b),
    "rem": lambda a, b, w: a - truncated(a, b) * b,
}


@pytest.mark.parametrize("operator", INTEGER_RULES)
@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(operator, kind):
    width = int(kind[1:])
    a, b = crossed(integer_edges(width), 2)
    if operator in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    got = evaluate(f"{operator}.{kind} {{d}}, {{0}}, {{1}};", WIDTHS[width][0], a, b)
    rule = INTEGER_RULES[operator]
    expected = [
        rule(signed(int(x), width, kind[0]), signed(int(y), width, kind[0]), width) & (1 << width) - 1
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(expected, WIDTHS[width][0]))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products_and_their_sums(kind):
    width = int(kind[1:])
    wide = WIDTHS[2 * width][0]
    a, b = crossed(integer_edges(width), 2)
    c = np.resize(integer_edges(2 * width), len(a))
    products = [signed(int(x), width, kind[0]) * signed(int(y), width, kind[0]) for x, y in zip(a, b, strict=True)]
    modulus = 1 << 2 * width
    got = evaluate(f"mul.wide.{kind} {{d}}, {{0}}, {{1}};", wide, a, b)
    np.testing.assert_array_equal(got, np.array([p % modulus for p in products], wide))
    got = evaluate(f"mad.wide.{kind} {{d}}, {{0}}, {{1}}, {{2}};", wide, a, b, c)
    np.testing.assert_array_equal(
        got, np.array([(p + int(z)) % modulus for p, z in zip(products, c, strict=True)], wide)
    )


def test_carries_make_a_sum_of_64_bits():
    a, b = crossed(integer_edges(64), 2)
    snippet = """
        mov.b64 {%r1, %r2}, {0};
        mov.b64 {%r3, %r4}, {1};
        add.cc.u32 %r5, %r1, %r3;
        addc.u32 %r6, %r2, %r4;
        mov.b64 {d}, {%r5, %r6};
    """
    np.testing.assert_array_equal(evaluate(snippet, np.uint64, a, b), a + b)
    difference = snippet.replace("add.cc", "sub.cc").replace("addc", "subc")
    np.testing.assert_array_equal(evaluate(difference, np.uint64, a, b), a - b)
    product = snippet.replace("add.cc.u32 %r5, %r1, %r3;", "mad.lo.cc.u32 %r5, %r1, %r3, %r2;").replace(
        "addc.u32 %r6, %r2, %r4;", "madc.hi.u32 %r6, %r1, %r3, 0;"
    )
    low, high = (a & 0xFFFFFFFF).astype(object), (a >> np.uint64(32)).astype(object)
    expected = [
        (int(x) * int(y & 0xFFFFFFFF) + int(z)) % (1 << 64) for x, y, z in zip(low, b.astype(object), high, strict=True)
    ]
    np.testing.assert_array_equal(evaluate(product, np.uint64, a, b), np.array(expected, np.uint64))


@pytest.mark.parametrize("name", ["and", "or", "xor"])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic(name, width):
    a, b = crossed(integer_edges(width), 2)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    got = evaluate(f"{name}.b{width} {{d}}, {{0}}, {{1}};", WIDTHS[width][0], a, b)
    np.testing.assert_array_equal(got, function(a, b))
    np.testing.assert_array_equal(evaluate(f"not.b{width} {{d}}, {{0}};", WIDTHS[width][0], a), ~a)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_clamp_their_counts(kind):
    width = int(kind[1:])
    a = np.repeat(integer_edges(width), 9)
    count = np.resize(np.array([0, 1, 7, 15, 16, 31, 32, 64, 2**32 - 1], np.uint32), len(a))
    right = [signed(int(x), width, kind[0]) >> min(int(n), width) for x, n in zip(a, count, strict=True)]
    got = evaluate(f"shr.{kind} {{d}}, {{0}}, {{1}};", WIDTHS[width][0], a, count)
    np.testing.assert_array_equal(got, np.array([r & (1 << width) - 1 for r in right], WIDTHS[width][0]))
    if kind[0] == "b":
        left = [(int(x) << min(int(n), width)) & (1 << width) - 1 for x, n in zip(a, count, strict=True)]
        got = evaluate(f"shl.{kind} {{d}}, {{0}}, {{1}};", WIDTHS[width][0], a, count)
        np.testing.assert_array_equal(got, np.array(left, WIDTHS[width][0]))


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side, mode):
    edge = integer_edges(32)
    a, b, count = (
        np.repeat(edge, 7),
        np.repeat(edge[::-1], 7),
        np.resize(np.array([0, 1, 16, 31, 32, 33, 2**32 - 1], np.uint32), 7 * len(edge)),
    )
    got = evaluate(f"shf.{side}.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", np.uint32, a, b, count)
    for x, y, n, result in zip(a, b, count, got, strict=True):
        shift = int(n) & 31 if mode == "wrap" else min(int(n), 32)
        both = int(y) << 32 | int(x)
        assert result == ((both << shift >> 32) if side == "l" else (both >> shift)) & 0xFFFFFFFF


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    width = int(kind[1:])
    edge = integer_edges(width)
    counts = np.array([0, 1, 5, 31, 32, 33, 63, 64, 255, 256 + 3], np.uint32)
    position, length = crossed(counts, 2)
    a = np.resize(edge, len(position) * 3)
    position, length = np.tile(position, 3), np.tile(length, 3)
    got = evaluate(f"bfe.{kind} {{d}}, {{0}}, {{1}}, {{2}};", WIDTHS[width][0], a, position, length)
    for x, p, n, result in zip(a, position, length, got, strict=True):
        p, n = int(p) & 255, int(n) & 255
        value = signed(int(x), width, kind[0])
        top = min(p + n - 1, width - 1)
        sign = (int(x) >> top & 1) if kind[0] == "s" and n else 0
        expected = 0
        for i in range(width):
            expected |= ((int(x) >> p + i & 1) if i < n and p + i < width else sign) << i
        assert result == expected, (value, p, n)


def test_bit_field_insertion():
    rng = np.random.default_rng(9)
    a, b = (rng.integers(0, 2**32, 200, dtype=np.uint64).astype(np.uint32) for _ in range(2))
    p, n = (np.resize(np.array(v, np.uint32), 200) for v in ([0, 1, 8, 31, 32, 40, 255], [0, 1, 4, 8, 32, 33]))
    got = evaluate("bfi.b32 {d}, {0}, {1}, {2}, {3};", np.uint32, a, b, p, n)
    for x, y, at, count, result in zip(a, b, p, n, got, strict=True):
        mask = ((1 << int(count)) - 1 << int(at)) & 0xFFFFFFFF
        assert result == (int(y) & ~mask & 0xFFFFFFFF) | (int(x) << int(at) & mask)


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x3C, 0xFF])
def test_any_logic_of_three(table):
    a, b, c = crossed(integer_edges(32)[:8], 3)
    got = evaluate(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", np.uint32, a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        expected = sum(
            (table >> ((int(x) >> i & 1) * 4 + (int(y) >> i & 1) * 2 + (int(z) >> i & 1)) & 1) << i for i in range(32)
        )
        assert result == expected


def test_byte_permutation():
    a, b = np.full(6, 0x83020180, np.uint32), np.full(6, 0x07060504, np.uint32)
    selectors = np.array([0x3210, 0x7654, 0x5410, 0x0123, 0xBA98, 0x3340], np.uint32)
    got = evaluate("prmt.b32 {d}, {0}, {1}, {2};", np.uint32, a, b, selectors)
    np.testing.assert_array_equal(got, [0x83020180, 0x07060504, 0x05040180, 0x80010283, 0xFF0000FF, 0x83830480])


@pytest.mark.parametrize("width", [32, 64])
def test_counting_bits(width):
    a = integer_edges(width)
    strings = [format(int(x), f"0{width}b") for x in a]
    np.testing.assert_array_equal(
        evaluate(f"popc.b{width} {{d}}, {{0}};", np.uint32, a), [s.count("1") for s in strings]
    )
    zeros = [width - len(s.lstrip("0")) for s in strings]
    np.testing.assert_array_equal(evaluate(f"clz.b{width} {{d}}, {{0}};", np.uint32, a), zeros)
    found = [0xFFFFFFFF if z == width else width - 1 - z for z in zeros]
    np.testing.assert_array_equal(evaluate(f"bfind.u{width} {{d}}, {{0}};", np.uint32, a), found)
    of_signed = [0xFFFFFFFF if "10"[int(s[0])] not in s else width - 1 - s.index("10"[int(s[0])]) for s in strings]
    np.testing.assert_array_equal(evaluate(f"bfind.s{width} {{d}}, {{0}};", np.uint32, a), of_signed)
    as_shift = [0xFFFFFFFF if z == width else z for z in zeros]
    np.testing.assert_array_equal(evaluate(f"bfind.shiftamt.u{width} {{d}}, {{0}};", np.uint32, a), as_shift)
    backwards = np.array([int(s[::-1], 2) for s in strings], WIDTHS[width][0])
    np.testing.assert_array_equal(evaluate(f"brev.b{width} {{d}}, {{0}};", WIDTHS[width][0], a), backwards)


def test_absolute_value_of_the_smallest_integer_wraps():
    a = np.array([0x80000000, 0xFFFFFFFF, 7], np.uint32)
    np.testing.assert_array_equal(evaluate("abs.s32 {d}, {0};", np.uint32, a), [0x80000000, 1, 7])
    np.testing.assert_array_equal(evaluate("neg.s32 {d}, {0};", np.uint32, a), [0x80000000, 1, 0xFFFFFFF9])


def test_multiply_add_and_saturating_sums():
    a, b = crossed(integer_edges(32), 2)
    c = np.resize(integer_edges(32), len(a))
    got = evaluate("mad.lo.s32 {d}, {0}, {1}, {2};", np.uint32, a, b, c)
    np.testing.assert_array_equal(got, a * b + c)
    high = [((int(x) * int(y) >> 32) + int(z)) % (1 << 32) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(evaluate("mad.hi.u32 {d}, {0}, {1}, {2};", np.uint32, a, b, c), high)
    exact = a.view(np.int32).astype(np.int64) + b.view(np.int32)
    got = evaluate("add.sat.s32 {d}, {0}, {1};", np.int32, a, b)
    np.testing.assert_array_equal(got, np.clip(exact, -(2**31), 2**31 - 1))


# --- comparison and selection ---

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
AS_NUMBER = "selp.b32 {d}, 1, 0, %p1;"


@pytest.mark.parametrize("name", [*COMPARISONS, *(f"{c}u" for c in COMPARISONS), "num", "nan"])
def test_comparison_of_floats(name):
    a, b = (x.view(np.float32) for x in crossed(SPECIAL, 2))
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        expected = unordered if name == "nan" else ~unordered
    else:
        ordered = np.array([eval(f"x {COMPARISONS[name[:2]]} y") for x, y in zip(a, b, strict=True)])
        expected = (ordered | unordered) if name.endswith("u") else (ordered & ~unordered)
    got = evaluate(f"setp.{name}.f32 %p1, {{0}}, {{1}}; {AS_NUMBER}", np.uint32, a, b)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", ["u16", "s32", "u64", "s64"])
def test_comparison_of_integers(kind):
    width = int(kind[1:])
    a, b = crossed(integer_edges(width), 2)
    for name, sign in COMPARISONS.items():
        expected = [
            eval(f"{signed(int(x), width, kind[0])} {sign} {signed(int(y), width, kind[0])}")
            for x, y in zip(a, b, strict=True)
        ]
        got = evaluate(f"setp.{name}.{kind} %p1, {{0}}, {{1}}; {AS_NUMBER}", np.uint32, a, b)
        np.testing.assert_array_equal(got, expected)


def test_combined_comparisons_write_both_predicates():
    a = np.arange(8, dtype=np.uint32)
    setting = "setp.lt.u32 %p3, {0}, 2; setp.lt.{how}.u32 %p1|%p2, {0}, 4, !%p3;"
    setting += "selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; or.b32 {d}, %r1, %r2;"
    less, other = a < 4, a >= 2
    for how, join in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        got = evaluate(setting.replace("{how}", how), np.uint32, a)
        np.testing.assert_array_equal(got, join(less, other) * 1 + join(~less, other) * 2)


def test_packed_comparison_writes_a_predicate_for_each_half():
    halves = np.array([1, 2, 3, np.nan], np.float16)
    low, high = crossed(halves, 2)
    packed = np.stack([low, high], 1).copy().view(np.uint32)[:, 0]
    limit = np.full(len(packed), np.array([2, 2], np.float16).view(np.uint32)[0])
    got = evaluate(
        "setp.ge.f16x2 %p1|%p2, {0}, {1}; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; or.b32 {d}, %r1, %r2;",
        np.uint32,
        packed,
        limit,
    )
    np.testing.assert_array_equal(got, (low >= 2) * 1 + (high >= 2) * 2)


def test_slct_selects_by_sign():
    a, b = np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.uint32) + 10
    c = np.array([0, -1, 5, -(2**31)], np.int32)
    np.testing.assert_array_equal(evaluate("slct.b32.s32 {d}, {0}, {1}, {2};", np.uint32, a, b, c), [0, 11, 2, 13])
    c = np.float32([-0.0, np.nan, 1, -1])
    np.testing.assert_array_equal(evaluate("slct.b32.f32 {d}, {0}, {1}, {2};", np.uint32, a, b, c), [0, 11, 2, 13])


# --- conversions ---


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversion_to_a_half_type(kind):
    rng = np.random.default_rng(10)
    x = np.r_[SPECIAL, rng.integers(0, 2**32, 3000, dtype=np.uint64).astype(np.uint32)]
    digits, lowest, _ = FORMATS[kind]
    ties = np.float32(
        [
            1 + 2.0**-digits,
            1 + 3 * 2.0**-digits,
            65519.996,
            65520,
            2.0 ** (lowest - digits),
            1.5 * 2.0 ** (lowest - digits),
        ]
    )
    x = np.r_[x, bits(ties)]
    expected = np.array([encoded(decoded(int(p), "f32"), kind) for p in x], np.uint16)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{kind}.f32 {{d}}, {{0}};", np.uint16, x), expected)
    packed = evaluate(f"cvt.rn.{kind}x2.f32 {{d}}, {{0}}, {{1}};", np.uint32, x, x[::-1].copy())
    np.testing.assert_array_equal(packed, expected.astype(np.uint32) << 16 | expected[::-1])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversion_toward_zero_never_grows(kind):
    rng = np.random.default_rng(11)
    x = np.r_[SPECIAL[:11], rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)]
    got = evaluate(f"cvt.rz.{kind}.f32 {{d}}, {{0}};", np.uint16, x)
    for pattern, result in zip(x, got, strict=True):
        exact, number = decoded(int(pattern), "f32"), decoded(int(result), kind)
        if exact == exact and abs(exact) != float("inf"):
            assert abs(number) <= abs(exact)
            following = decoded((int(result) & 0x7FFF) + 1, kind)
            assert following != following or following > abs(exact)


def test_widening_a_half_type_is_exact():
    for kind in ("f16", "bf16"):
        x = np.arange(1 << 16, dtype=np.uint64)[::37].astype(np.uint16)
        got = evaluate(f"cvt.f32.{kind} {{d}}, {{0}};", np.uint32, x)
        np.testing.assert_array_equal(got, [encoded(decoded(int(p), kind), "f32") for p in x])


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("result", ["f16", "f32", "f64"])
def test_integers_to_floats_round_once(source, result):
    width = int(source[1:])
    base = integer_edges(width)
    near = [int(x) for x in base] + [(1 << k) + d for k in range(8, width - 1) for d in (-1, 0, 1)]
    near += [(3 << k) + (1 << max(k - 24, 0)) + d for k in range(24, width - 2) for d in (-1, 0, 1)]
    x = np.array([v & (1 << width) - 1 for v in near], WIDTHS[width][0])
    got = evaluate(f"cvt.rn.{result}.{source} {{d}}, {{0}};", HELD[result], x)
    numbers = [signed(int(p), width, source[0]) for p in x]
    expected = [encoded(Fraction(v) if v else 0.0, result) for v in numbers]
    np.testing.assert_array_equal(got, np.array(expected, HELD[result]))


@pytest.mark.parametrize("result", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_floats_to_integers_clamp(source, result):
    width = int(result[1:])
    numbers = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        127.4,
        127.5,
        255.5,
        32767.5,
        65535.5,
        2.0**31,
        2.0**32,
        2.0**63,
        2.0**64,
        1e30,
    ]
    numbers += [-x for x in numbers] + [float("inf"), float("-inf"), float("nan")]
    x = np.array(numbers, np.float32 if source == "f32" else np.float64)
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if result[0] == "s" else (0, (1 << width) - 1)
    for mode, rule in (("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)):
        # A result narrower than its register is extended into it.
        got = evaluate(f"cvt.{mode}.{result}.{source} {{d}}, {{0}};", np.uint64 if width == 64 else np.uint32, x)
        for value, found in zip(x.astype(np.float64), got, strict=True):
            if np.isnan(value):
                expected = 1 << width - 1 if source == "f64" or width == 64 else 0
                expected = signed(expected, width, result[0])
            else:
                whole = float(rule(value))
                expected = low if whole <= low else high if whole >= high else int(whole)
            assert int(found) == expected & (1 << (64 if width == 64 else 32)) - 1, (mode, value)


def test_integers_are_extended_and_cut():
    x = np.array([0x80, 0x7F, 0xFF81, 0x1234], np.uint16)
    np.testing.assert_array_equal(evaluate("cvt.s32.s8 {d}, {0};", np.uint32, x), [0xFFFFFF80, 0x7F, 0xFFFFFF81, 0x34])
    np.testing.assert_array_equal(evaluate("cvt.u32.u8 {d}, {0};", np.uint32, x), [0x80, 0x7F, 0x81, 0x34])
    np.testing.assert_array_equal(evaluate("cvt.s64.s16 {d}, {0};", np.int64, x), [0x80, 0x7F, -127, 0x1234])
    wide = np.array([300, 2**32 - 300, 5], np.uint32)
    np.testing.assert_array_equal(
        evaluate("cvt.sat.s8.s32 %rs1, {0}; cvt.s32.s8 {d}, %rs1;", np.int32, wide), [127, -128, 5]
    )
    np.testing.assert_array_equal(evaluate("cvt.u16.u32 {d}, {0};", np.uint16, wide), [300, 65236, 5])


def test_float64_to_float32_and_back():
    x = np.float64([1 + 2**-24, 1 + 2**-24 + 2**-50, 1e39, -1e-46, np.nan, 0.1])
    with np.errstate(all="ignore"):
        expected = x.astype(np.float32)
    got = evaluate("cvt.rn.f32.f64 {d}, {0};", np.float32, x)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(evaluate("cvt.f64.f32 {d}, {0};", np.float64, expected), expected.astype(np.float64))


def test_moves_pack_and_unpack():
    x = np.array([0x1122334455667788], np.uint64)
    assert evaluate("mov.b64 {_, {d}}, {0};", np.uint32, x)[0] == 0x11223344
    assert evaluate("mov.b64 {{d}, _}, {0};", np.uint32, x)[0] == 0x55667788
    assert evaluate("mov.b64 {%rs1, %rs2, %rs3, %rs4}, {0}; mov.b32 {d}, {%rs4, %rs1};", np.uint32, x)[0] == 0x77881122


# --- warps ---


def in_warp(snippet: str, values: np.ndarray) -> np.ndarray:
    return evaluate(snippet, np.uint32, np.asarray(values, np.uint32))


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("idx", 9, 31, lambda i: 9),
        ("down", 3, 0x1807, lambda i: i + 3 if i + 3 <= (i & 0x18 | 7) else i),
        ("idx", 2, 0x1C03, lambda i: i & 28 | 2),
    ],
)
def test_shuffles(mode, b, c, source):
    values = np.arange(100, 132)
    got = in_warp(f"shfl.sync.{mode}.b32 {{d}}|%p1, {{0}}, {b}, {c}, -1;", values)
    np.testing.assert_array_equal(got, [100 + source(i) for i in range(32)])
    inside = in_warp(f"shfl.sync.{mode}.b32 %r1|%p1, {{0}}, {b}, {c}, -1; {AS_NUMBER}", values)
    np.testing.assert_array_equal(
        inside, [source(i) != i or (mode, b) == ("idx", 9) or mode == "idx" for i in range(32)]
    )


def test_votes():
    values = np.arange(32)
    setting = "setp.lt.u32 %p2, {0}, 5;"
    assert (in_warp(f"{setting} vote.sync.ballot.b32 {{d}}, %p2, -1;", values) == 31).all()
    for name, expected in (("any", 1), ("all", 0), ("uni", 0)):
        assert (in_warp(f"{setting} vote.sync.{name}.pred %p1, %p2, -1; {AS_NUMBER}", values) == expected).all()
    assert (in_warp("activemask.b32 {d};", values) == 0xFFFFFFFF).all()


def test_matches_find_equal_values():
    values = np.arange(32) % 3
    got = in_warp("match.any.sync.b32 {d}, {0}, -1;", values)
    expected = [sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)]
    np.testing.assert_array_equal(got, expected)
    assert (in_warp("match.all.sync.b32 {d}|%p1, {0}, -1;", values) == 0).all()
    assert (in_warp("match.all.sync.b32 {d}|%p1, {0}, -1;", np.full(32, 7)) == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.s32", lambda x: x.astype(np.int64).sum()),
        ("min.s32", lambda x: x.view(np.int32).min()),
        ("max.s32", lambda x: x.view(np.int32).max()),
        ("min.u32", np.min),
        ("max.u32", np.max),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ],
)
def test_reductions_over_a_warp(name, function):
    values = np.random.default_rng(12).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    assert (in_warp(f"redux.sync.{name} {{d}}, {{0}}, -1;", values) == int(function(values)) & 0xFFFFFFFF).all()


def test_float_reductions_over_a_warp_pass_over_nan_or_not():
    values = np.random.default_rng(13).standard_normal(32).astype(np.float32)
    values[7] = np.nan
    assert (
        in_warp("redux.sync.max.f32 {d}, {0}, -1;", values.view(np.uint32)) == bits(np.nanmax(values)[None])[0]
    ).all()
    assert (in_warp("redux.sync.max.NaN.f32 {d}, {0}, -1;", values.view(np.uint32)) == NAN["f32"]).all()
    assert (
        in_warp("redux.sync.min.abs.f32 {d}, {0}, -1;", values.view(np.uint32))
        == bits(np.nanmin(np.abs(values))[None])[0]
    ).all()


# --- control flow ---


def test_every_thread_loops_as_often_as_its_own_number_says():
    x = np.random.default_rng(14).integers(0, 40, 256).astype(np.uint32)
    snippet = """
        mov.u32 {d}, 0;
        mov.u32 %r1, {0};
    LOOP:
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra DONE;
        add.u32 {d}, {d}, %r1;
        and.b32 %r2, %r1, 1;
        setp.eq.u32 %p2, %r2, 1;
        @!%p2 bra EVEN;
        add.u32 {d}, {d}, 1000;
    EVEN:
        sub.u32 %r1, %r1, 1;
        bra LOOP;
    DONE:
    """
    odd = (x + 1) // 2
    np.testing.assert_array_equal(evaluate(snippet, np.uint32, x), x * (x + 1) // 2 + 1000 * odd)


def test_labels_and_registers_of_inline_assembly_have_their_own_scope():
    x = np.arange(32, dtype=np.uint32)
    part = (
        "{ .reg .b32 t; mov.b32 t, {0}; setp.lt.u32 %p1, t, 9; @%p1 bra END; add.u32 t, t, 100; END: mov.b32 {d}, t; }"
    )
    snippet = f"// begin inline asm\n{part}\n// end inline asm\n{part.replace('{0}', '{d}')}"
    once = np.where(x < 9, x, x + 100)
    np.testing.assert_array_equal(evaluate(snippet, np.uint32, x), np.where(once < 9, once, once + 100))


def test_a_barrier_in_a_loop_waits_for_slower_threads():
    """Threads that go round at once meet those that take the long way."""
    body = """
        mov.u32 %r1, 0;
        mov.u32 %r2, %r50;
    LOOP:
        bar.sync 0;
        add.u32 %r1, %r1, 1;
        setp.eq.u32 %p1, %r1, 4;
        @%p1 bra DONE;
        and.b32 %r3, %r50, 1;
        setp.eq.u32 %p2, %r3, 0;
        @%p2 bra LOOP;
        add.u32 %r2, %r2, 100;
        bra LOOP;
    DONE:
        mad.wide.u32 %rd1, %r50, 4, %rd50;
        st.global.b32 [%rd1], %r2;
    """
    out = np.zeros(64, np.uint32)
    execution = run(kernel(body, 1, block=64), out)
    np.testing.assert_array_equal(out, [i + 300 * (i % 2) for i in range(64)])
    assert execution.barriers == 4


def test_barriers_do_not_wait_for_threads_that_have_ended():
    body = "setp.gt.u32 %p1, %r50, 40; @%p1 ret; bar.sync 0; mad.wide.u32 %rd1, %r50, 4, %rd50; st.global.b32 [%rd1], %r50;"
    out = np.zeros(64, np.uint32)
    run(kernel(body, 1, block=64), out)
    np.testing.assert_array_equal(out, [i if i <= 40 else 0 for i in range(64)])


def test_counts_are_of_threads_and_warps():
    body = "setp.lt.u32 %p1, %r50, 33; mov.u32 %r1, 7; @%p1 add.u32 %r1, %r1, 1;"
    execution = run(kernel(body, 0, block=64), grid=3)
    assert execution.thread_instructions["add.u32"] == 99
    assert execution.warp_instructions["add.u32"] == 6
    assert execution.warp_instructions["mov.u32"] == 18


def test_contractible_and_approximate_instructions_are_named():
    x = np.ones(32, np.float32)
    body = "ld.global.b32 %r1, [%rd50]; mul.f32 %r2, %r1, %r1; add.rn.f32 %r3, %r2, %r1; sqrt.approx.f32 %r4, %r3;"
    execution = run(kernel(body, 1), x)
    assert execution.contractible == {"mul.f32"}
    assert execution.approximate == {"sqrt.approx.f32"}
    assert (execution.bytes_read, execution.bytes_written) == (128, 0)


def test_more_ctas_than_fit_at_once_share_atomics():
    out = np.zeros(2, np.uint32)
    run(
        kernel("red.global.gpu.relaxed.add.u32 [%rd50], 1; atom.global.max.u32 %r1, [%rd50+4], %r52;", 1, block=1024),
        out,
        grid=70,
    )
    np.testing.assert_array_equal(out, [70 * 1024, 70 * 1024 - 1])


# --- memory ---


@pytest.mark.parametrize(("vector", "width"), [(v, w) for v in (1, 2, 4, 8) for w in (8, 16, 32, 64) if v * w <= 256])
def test_vectors_are_loaded_and_stored(vector, width):
    size = vector * width // 8
    dtype = np.dtype(f"u{width // 8}")
    x = np.random.default_rng(15).integers(0, 1 << min(width, 62), 32 * vector).astype(dtype)
    memory = np.zeros(x.nbytes + 64, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][: x.nbytes].view(dtype)
    aligned[:] = x
    out = np.zeros(x.nbytes + 64, np.uint8)
    out = out[-out.ctypes.data % 64 :][: x.nbytes].view(dtype)
    prefix = {8: "rs", 16: "rs", 32: "r", 64: "rd"}[width]
    registers = ", ".join(f"%{prefix}{i + 1}" for i in range(vector))
    kind = f"v{vector}.b{width}" if vector > 1 else f"b{width}"
    body = f"""
        mul.wide.u32 %rd40, %r50, {size};
        add.s64 %rd41, %rd50, %rd40;
        add.s64 %rd42, %rd51, %rd40;
        ld.global.nc.L1::no_allocate.{kind} {{ {registers} }}, [%rd41 + 0];
        st.global.cg.{kind} [%rd42+0], {{ {registers} }};
    """
    run(kernel(body), aligned, out)
    np.testing.assert_array_equal(out, x)


def test_shared_memory_carries_values_across_a_barrier():
    body = """
        mov.b32 %r1, buffer;
        mad.lo.s32 %r2, %r50, 4, %r1;
        st.shared.b32 [%r2], %r50;
        bar.sync 0;
        xor.b32 %r3, %r50, 33;
        mad.lo.s32 %r4, %r3, 4, %r1;
        ld.shared.b32 %r5, [%r4];
        mad.wide.u32 %rd1, %r52, 4, %rd50;
        st.global.b32 [%rd1], %r5;
    """
    out = np.zeros(192, np.uint32)
    before = ".extern .shared .align 16 .b8 buffer[];\n"
    run(kernel(body, 1, block=64, before=before), out, grid=3, shared_bytes=256)
    np.testing.assert_array_equal(out, np.tile(np.arange(64) ^ 33, 3))
    static = ".shared .align 4 .b8 buffer[256];\n"
    out[:] = 0
    run(kernel(body, 1, block=64, before=static), out, grid=3)
    np.testing.assert_array_equal(out, np.tile(np.arange(64) ^ 33, 3))


def test_tables_of_the_module_and_local_memory_can_be_read():
    before = ".global .align 4 .b8 table[8] = {1, 2, 3, 4, 0xFF, 0, 0, 1};\n"
    body = """
        .local .align 4 .b8 spill[8];
        mov.b64 %rd1, table;
        ld.global.b32 %r1, [%rd1+4];
        mov.b64 %rd2, spill;
        add.u32 %r2, %r1, %r50;
        st.local.b32 [%rd2+4], %r2;
        ld.local.b32 %r3, [%rd2+4];
        cvta.to.global.u64 %rd4, %rd50;
        mad.wide.u32 %rd3, %r50, 4, %rd4;
        st.global.b32 [%rd3], %r3;
    """
    out = np.zeros(32, np.uint32)
    run(kernel(body, 1, before=before), out)
    np.testing.assert_array_equal(out, 0x010000FF + np.arange(32))


def test_matrices_are_loaded_by_rows_and_by_columns():
    body = """
        mov.b32 %r1, buffer;
        mad.lo.s32 %r2, %r50, 16, %r1;
        mul.lo.u32 %r3, %r50, 8;
        cvt.u16.u32 %rs1, %r3;
        {fill}
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
        mad.wide.u32 %rd1, %r50, 16, %rd50;
        st.global.v4.b32 [%rd1], {{%r10, %r11, %r12, %r13}};
    """
    fill = "".join(f"add.u16 %rs2, %rs1, {i}; st.shared.b16 [%r2+{2 * i}], %rs2; " for i in range(8))
    tiles = np.arange(256).reshape(4, 8, 8)
    for trans in ("", ".trans"):
        memory = np.zeros(32 * 16 + 16, np.uint8)
        out = memory[-memory.ctypes.data % 16 :][:512].view(np.uint16)
        text = body.format(fill=fill, trans=trans)
        run(kernel(text, 1, before=".shared .align 16 .b8 buffer[512];\n"), out)
        expected = np.empty((32, 4, 2))
        for thread, tile, i in itertools.product(range(32), range(4), range(2)):
            row, column = thread // 4, 2 * (thread % 4) + i
            expected[thread, tile, i] = tiles[tile, column, row] if trans else tiles[tile, row, column]
        np.testing.assert_array_equal(out.reshape(32, 4, 2), expected)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_that_are_stored_can_be_loaded(trans, count):
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    again = ", ".join(f"%r{20 + i}" for i in range(count))
    body = "mov.b32 %r1, buffer; mad.lo.s32 %r2, %r50, 16, %r1;"
    body += "".join(f"mad.lo.s32 %r{10 + i}, %r50, 77777, {i * 31337};" for i in range(count))
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2], {{ {registers} }}; bar.warp.sync -1;"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{ {again} }}, [%r2];"
    body += f"mad.wide.u32 %rd1, %r50, {4 * count}, %rd50;"
    body += "".join(f"st.global.b32 [%rd1+{4 * i}], %r{20 + i};" for i in range(count))
    out = np.zeros((32, count), np.uint32)
    run(kernel(body, 1, before=".shared .align 16 .b8 buffer[512];\n"), out)
    np.testing.assert_array_equal(out, np.arange(32)[:, None] * 77777 + np.arange(count) * 31337)


def test_cache_policies_change_nothing():
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
        mad.wide.u32 %rd1, %r50, 4, %rd50;
        mad.wide.u32 %rd2, %r50, 4, %rd51;
        createpolicy.fractional.L2::evict_first.b64 %rd3, 1.0;
        ld.global.L1::evict_first.L2::cache_hint.b32 { %r1 }, [ %rd1 + 0 ], %rd3;
        st.global.L1::evict_first.L2::cache_hint.b32 [ %rd2 + 0 ], { %r1 }, %rd3;
    """
    run(kernel(body), x, out)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
    ("operator", "kind", "expected"),
    [
        ("add", "u32", lambda v: v.sum()),
        ("min", "s32", lambda v: v.view(np.int32).min()),
        ("max", "u32", lambda v: v.max()),
        ("or", "b32", np.bitwise_or.reduce),
        ("and", "b32", lambda v: 0),
        ("xor", "b32", np.bitwise_xor.reduce),
        ("exch", "b32", lambda v: v[-1]),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(operator, kind, expected, space):
    values = np.random.default_rng(16).integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
    out = np.zeros(2, np.uint32)
    address = "%rd51" if space == "global" else "%r9"
    body = f"""
        mov.b32 %r9, cell;
        setp.eq.u32 %p1, %r50, 0;
        @%p1 st.shared.b32 [%r9], 0;
        bar.sync 0;
        mad.wide.u32 %rd1, %r50, 4, %rd50;
        ld.global.b32 %r1, [%rd1];
        atom.{space}.gpu.acq_rel.{operator}.{kind} %r2, [{address}], %r1;
        bar.sync 0;
        @%p1 ld.shared.b32 %r3, [%r9];
        @%p1 st.global.b32 [%rd51+4], %r3;
    """
    run(kernel(body, block=64, before=".shared .align 4 .b8 cell[4];\n"), values, out)
    assert out[0 if space == "global" else 1] == int(expected(values)) & 0xFFFFFFFF


def test_one_thread_wins_a_compare_and_swap_and_float_sums_take_turns():
    out = np.zeros(34, np.float32)
    body = """
        cvt.rn.f32.u32 %r1, %r50;
        atom.global.add.f32 %r2, [%rd50], %r1;
        atom.global.relaxed.gpu.cas.b32 %r3, [%rd50+4], 0, %r1;
        mad.wide.u32 %rd1, %r50, 4, %rd50;
        st.global.b32 [%rd1+8], %r2;
    """
    run(kernel(body, 1), out)
    assert out[0] == 496
    assert out[1] == 1  # thread 0 swaps 0 for 0
    np.testing.assert_array_equal(out[2:], np.r_[0, np.cumsum(np.arange(31))])


def test_asynchronous_copies_arrive_when_waited_for():
    body = """
        mov.b32 %r1, buffer;
        mad.lo.s32 %r2, %r50, 16, %r1;
        mad.wide.u32 %rd1, %r50, 16, %rd50;
        setp.lt.u32 %p1, %r50, 30;
        selp.b32 %r3, 16, 0, %p1;
        cp.async.cg.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x10, %r3;
        cp.async.commit_group;
        WAIT
        bar.sync 0;
        ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];
        mad.wide.u32 %rd2, %r50, 4, %rd51;
        st.global.b32 [%rd2], %r7;
    """
    memory = np.arange(30 * 4 + 16, dtype=np.uint32)
    x = memory[(-memory.ctypes.data % 16) // 4 :][:120]
    out = np.zeros(32, np.uint32)
    before = ".shared .align 16 .b8 buffer[512];\n"
    run(kernel(body.replace("WAIT", "cp.async.wait_group 0;"), before=before), x, out)
    np.testing.assert_array_equal(out, np.r_[x[3::4], 0, 0])
    with pytest.raises(UnwrittenError, match="shared memory"):
        run(kernel(body.replace("WAIT", ""), before=before), x, out)


# --- the checks ---

SHARED = ".shared .align 16 .b8 buffer[256];\n"
SLOT = "mov.b32 %r1, buffer; mad.lo.s32 %r2, %r50, 4, %r1; xor.b32 %r3, %r50, {}; mad.lo.s32 %r4, %r3, 4, %r1;"
OWN = "mad.wide.u32 %rd1, %r52, 4, %rd50;"


def fails(error: type, match: str, body: str, *arguments: object, line: str = "", **options: object) -> PtxError:
    launch = {k: options.pop(k) for k in ("grid", "shared_bytes", "max_steps") if k in options}
    with pytest.raises(error, match=match) as caught:
        run(kernel(body, len(arguments), **options), *arguments, **launch)
    assert line in (caught.value.instruction or ""), str(caught.value)
    return caught.value


def test_an_access_past_the_end_names_thread_and_byte():
    error = fails(
        AddressError,
        "byte 160 of argument 0, which has 160 bytes",
        OWN + "ld.global.b32 %r1, [%rd1];",
        np.zeros(40, np.int32),
        grid=2,
        line="ld.global.b32",
    )
    assert (error.cta, error.thread) == ((1, 0, 0), (8, 0, 0))
    assert "PTX line" in str(error)
    assert "in kernel k" in str(error)


def test_one_tensor_ends_where_another_begins():
    memory = np.zeros(64, np.int32)
    fails(AddressError, "of argument 0", OWN + "ld.global.b32 %r1, [%rd1];", memory[:31], memory[31:])


def test_overlapping_tensors_keep_their_distance():
    memory, out = np.arange(64, dtype=np.int32), np.zeros(1, np.int64)
    body = (
        OWN
        + "ld.global.b32 %r1, [%rd1+64]; sub.s64 %rd2, %rd51, %rd50; setp.eq.u32 %p1, %r50, 0; @%p1 st.global.b64 [%rd52], %rd2;"
    )
    run(kernel(body, 3), memory[:32], memory[16:], out)
    assert out[0] == 64


def test_pointers_through_null_are_refused():
    fails(AddressError, "null pointer", "mov.b64 %rd2, 0; ld.global.b32 %r1, [%rd2];", np.zeros(4, np.int32))


def test_wild_pointers_are_refused():
    fails(
        AddressError,
        "an access of 4 bytes",
        "add.s64 %rd2, %rd50, -1099511627776; ld.global.b32 %r1, [%rd2];",
        np.zeros(4, np.int32),
    )


def test_vectors_must_be_aligned():
    memory = np.zeros(64, np.int32)
    x = memory[(-memory.ctypes.data % 16) // 4 :][:40]
    fails(AddressError, "aligned to 16 bytes, got byte 4", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd50+4];", x)


def test_read_only_memory_is_not_written():
    x = np.zeros(32, np.int32)
    fails(
        AddressError,
        "weights is read-only",
        OWN + "st.global.b32 [%rd1], %r50;",
        Region.of(x, "weights", writable=False),
    )
    x.flags.writeable = False
    fails(AddressError, "read-only", OWN + "st.global.b32 [%rd1], %r50;", x)


def test_shared_memory_has_an_end():
    fails(
        AddressError,
        "outside shared memory, which has 256 bytes",
        SLOT.format(0) + "st.shared.b32 [%r2+252], %r50;",
        before=SHARED,
    )


def test_two_threads_write_one_byte():
    fails(RaceError, "written by one thread and written by CTA", "st.global.b32 [%rd50], %r50;", np.zeros(4, np.int32))
    fails(
        RaceError,
        "written by one thread and written by",
        "st.global.b32 [%rd50], %r51;",
        np.zeros(4, np.int32),
        grid=2,
        line="st.global",
    )


def test_two_ctas_write_one_byte_in_turn():
    body = "setp.eq.u32 %p1, %r50, 0; @%p1 st.global.b32 [%rd50], %r51;"
    fails(RaceError, r"written by CTA \(\d+, 0, 0\), thread \(0, 0, 0\)", body, np.zeros(4, np.int32), grid=3000)


def test_global_memory_written_by_one_and_read_by_another():
    neighbour = "xor.b32 %r1, %r52, {}; mad.wide.u32 %rd2, %r1, 4, %rd50;"
    x = np.zeros(128, np.int32)
    fails(
        RaceError,
        "read by one thread and written by",
        OWN + neighbour.format(1) + "st.global.b32 [%rd1], 1; ld.global.b32 %r2, [%rd2];",
        x,
    )
    fails(
        RaceError,
        "written by one thread and read by",
        OWN + neighbour.format(1) + "ld.global.b32 %r2, [%rd2]; st.global.b32 [%rd1], 1;",
        x,
    )
    # A barrier orders the threads of one CTA, but not those of two.
    ordered = OWN + neighbour + "st.global.b32 [%rd1], 1; bar.sync 0; ld.global.b32 %r2, [%rd2];"
    run(kernel(ordered.format(33), 1, block=64), x, grid=2)
    fails(RaceError, "read by one thread and written by", ordered.format(64), x, block=64, grid=2)


def test_atomics_race_with_plain_accesses():
    body = "setp.eq.u32 %p1, %r50, 5; @%p1 ld.global.b32 %r1, [%rd50]; red.global.add.u32 [%rd50], 1;"
    fails(RaceError, "changed atomically by one thread and read by", body, np.zeros(4, np.int32))


def test_shared_memory_without_a_barrier_is_a_race():
    exchange = SLOT + "st.shared.b32 [%r2], %r50; {sync} ld.shared.b32 %r5, [%r4];"

    def body(distance: int, sync: str) -> str:
        return exchange.replace("{sync}", sync).format(distance)

    options = dict(block=64, before=SHARED)
    fails(RaceError, "read by one thread and written by", body(1, ""), **options, line="ld.shared")
    fails(
        RaceError, "read by one thread and written by", body(1, "shfl.sync.bfly.b32 %r9, %r50, 1, 31, -1;"), **options
    )
    fails(RaceError, "read by one thread and written by", body(33, "bar.warp.sync -1;"), **options)
    run(kernel(body(1, "bar.warp.sync -1;"), 0, **options))
    run(kernel(body(33, "bar.sync 0;"), 0, **options))


def test_readers_must_be_done_before_shared_memory_is_written_again():
    body = SLOT.format(33) + "st.shared.b32 [%r2], 1; bar.sync 0; ld.shared.b32 %r5, [%r4]; {} st.shared.b32 [%r2], 2;"
    fails(RaceError, "written by one thread and read by", body.format(""), block=64, before=SHARED)
    run(kernel(body.format("bar.sync 0;"), 0, block=64, before=SHARED))
    everyone = "mov.b32 %r1, buffer; setp.eq.u32 %p1, %r50, {}; @%p1 st.shared.b32 [%r1], 1;"
    everyone += "bar.sync 0; ld.shared.b32 %r5, [%r1]; {} @%p1 st.shared.b32 [%r1], 2;"
    fails(RaceError, "written by one thread and read by several", everyone.format(3, ""), block=64, before=SHARED)
    fails(
        RaceError,
        "written by one thread and read by several",
        everyone.format(3, "bar.warp.sync -1;"),
        block=64,
        before=SHARED,
    )
    run(kernel(everyone.format(3, "bar.sync 0;"), 0, block=64, before=SHARED))


def test_a_warp_that_reads_together_may_write_after_its_own_barrier():
    body = """
        mov.b32 %r1, buffer;
        shr.u32 %r2, %r50, 5;
        mad.lo.s32 %r2, %r2, 4, %r1;
        and.b32 %r3, %r50, 31;
        setp.eq.u32 %p1, %r3, 7;
        @%p1 st.shared.b32 [%r2], 1;
        bar.warp.sync -1;
        ld.shared.b32 %r5, [%r2];
        {}
        @%p1 st.shared.b32 [%r2], 2;
    """
    run(kernel(body.format("bar.warp.sync -1;"), 0, block=64, before=SHARED))
    fails(RaceError, "read by several threads of warp", body.format(""), block=64, before=SHARED)


def test_barriers_that_some_threads_do_not_reach():
    body = "setp.lt.u32 %p1, %r50, 40; @%p1 bra HERE; bar.sync 0; bra END; HERE: mov.u32 %r1, 1; bar.sync 0; END: mov.u32 %r2, 1;"
    error = fails(
        DivergenceError, "40 of 64 threads of the cta do not reach this.*waits at line", body, block=64, line="bar.sync"
    )
    assert error.thread == (40, 0, 0)
    fails(DivergenceError, "do not reach this", "setp.lt.u32 %p1, %r50, 40; @%p1 bar.sync 0; bar.sync 0;", block=64)


def test_shuffles_need_every_thread_of_their_mask():
    body = "setp.lt.u32 %p1, %r50, 8; @%p1 ret; shfl.sync.bfly.b32 %r1, %r50, 1, 31, {};"
    fails(DivergenceError, "8 of 32 threads of the warp do not reach this.*has ended", body.format(-1))
    run(kernel(body.format("0xffffff00"), 0))
    fails(DivergenceError, "not in its own member mask", body.format("0xff"))
    fails(UnspecifiedError, "which does not take part", body.format("0xffffff00").replace("50, 1, 31", "50, 16, 31"))


def test_the_mask_of_a_warp_that_has_branched_apart_is_not_known():
    fails(NotModelledError, "branched apart", "setp.lt.u32 %p1, %r50, 8; @%p1 ret; activemask.b32 %r1;")


def test_unwritten_registers_may_not_be_used():
    x = np.zeros(32, np.int32)
    fails(UnwrittenError, "register %r9", OWN + "st.global.b32 [%rd1], %r9;", x)
    fails(
        UnwrittenError,
        "register %r9",
        OWN + "setp.lt.u32 %p1, %r50, 31; @%p1 mov.u32 %r9, 1; st.global.b32 [%rd1], %r9;",
        x,
    )
    fails(UnwrittenError, "register %rd9", "ld.global.b32 %r1, [%rd9];", x)
    fails(UnwrittenError, "register %p9", "@%p9 mov.u32 %r1, 1;", x)
    fails(UnwrittenError, "register %r8", OWN + "add.u32 %r8, %r9, 1; st.global.b32 [%rd1], %r8;", x)
    fails(UnwrittenError, "register %p8", "setp.lt.u32 %p8, %r9, 1; @%p8 bra END; END: mov.u32 %r1, 1;", x)


def test_what_is_made_of_unwritten_bits_may_be_thrown_away():
    """Triton builds halves of registers of nothing, and shuffles values that only some threads have loaded."""
    x = np.zeros(32, np.uint32)
    halves = "mov.b32 %r8, 0x1234; prmt.b32 %r7, %r8, %r9, 0x5410; and.b32 %r6, %r7, 0xffff;"
    run(kernel(OWN + halves + "st.global.b32 [%rd1], %r6;", 1), x)
    assert (x == 0x1234).all()
    fails(UnwrittenError, "register %r7", OWN + halves + "st.global.b32 [%rd1], %r7;", x)
    some = "setp.lt.u32 %p1, %r50, 4; @%p1 mov.u32 %r5, %r50; shfl.sync.bfly.b32 %r6, %r5, {}, 31, -1; @%p1 st.global.b32 [%rd1], %r6;"
    run(kernel(OWN + some.format(2), 1), x)
    np.testing.assert_array_equal(x[:4], [2, 3, 0, 1])
    fails(UnwrittenError, "register %r6", OWN + some.format(4), x)


def test_half_of_a_packed_register_may_be_of_nothing():
    """Triton computes with pairs of float32 of which one is never used."""
    x = np.zeros(32, np.float32)
    pair = "mov.b32 %r8, 0f3F800000; mov.b64 %rd2, {%r8, %r9}; add.rn.f32x2 %rd3, %rd2, %rd2; mov.b64 {%r7, %r6}, %rd3;"
    run(kernel(OWN + pair + "st.global.b32 [%rd1], %r7;", 1), x)
    assert (x == 2).all()
    fails(UnwrittenError, "register %r6", OWN + pair + "st.global.b32 [%rd1], %r6;", x)


def test_unwritten_shared_memory_may_not_be_read():
    fails(UnwrittenError, "nothing has written them", SLOT.format(0) + "ld.shared.b32 %r5, [%r2];", before=SHARED)


def test_division_by_zero_has_no_result():
    error = fails(
        UnspecifiedError,
        "division by zero",
        "setp.gt.u32 %p1, %r50, 2; sub.u32 %r1, %r50, 9; @%p1 div.u32 %r2, 5, %r1;",
    )
    assert error.thread == (9, 0, 0)


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.rz.f32 %r1, %r2, %r3;",
        "fma.f32 %r1, %r2, %r3, %r4;",
        "fma.rn.relu.f16 %rs1, %rs2, %rs3, %rs4;",
        "cvt.rm.f32.f64 %r1, %rd1;",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;",
        "cvt.rna.tf32.f32 %r1, %r2;",
        "add.u8 %rs1, %rs2, %rs3;",
        "add.f32 %r1, %r2, 1;",
        "add.f32 %rd1, %rd2, %rd3;",
        "mov.u32 %r1, %smid;",
        "mov.u32 %r1, %clusterid.x;",
        "mov.u64 %rd1, %clock64;",
        "ld.b32 %r1, [%rd50];",
        "ld.volatile.global.b32 %r1, [%rd50];",
        "ld.acquire.gpu.global.b32 %r1, [%rd50];",
        "st.release.gpu.global.b32 [%rd50], %r1;",
        "ld.global.v3.b32 {%r1, %r2, %r3}, [%rd50];",
        "ld.global.v2.b32 %r1, [%rd50];",
        "ld.global.v8.b64 {%rd1, %rd2, %rd3, %rd4, %rd5, %rd6, %rd7, %rd8}, [%rd50];",
        "atom.global.add.noftz.bf16x4 %r1, [%rd50], %r2;",
        "atom.global.inc.u32 %r1, [%rd50], %r2;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "barrier.cluster.arrive;",
        "mbarrier.init.shared.b64 [%r1], 1;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "call foo;",
        "bra.uni NOWHERE;",
        "sin.approx.f64 %rd1, %rd2;",
        "sqrt.f32 %r1, %r2;",
        "lop3.or.b32 %r1, %r2, %r3, %r4, 0x80;",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "setp.lt.b32 %p1, %r1, %r2;",
        "setp.ltu.s32 %p1, %r1, %r2;",
        "shfl.up.b32 %r1, %r2, 1, 0;",
        "vote.ballot.b32 %r1, %p1;",
        "redux.sync.add.u64 %rd1, %rd2, -1;",
        "mul.u32 %r1, %r2, %r3;",
        "mul.wide.u64 %rd1, %rd2, %rd3;",
        "min.abs.f32 %r1, %r2, %r3;",
        "cvta.shared.u64 %rd1, %rd2;",
    ],
)
def test_what_is_not_modelled_is_refused_before_anything_runs(instruction):
    x = np.zeros(32, np.int32)
    with pytest.raises(NotModelledError) as caught:
        run(kernel(OWN + "st.global.b32 [%rd1], 7;" + instruction, 1), x)
    assert caught.value.line
    assert (x == 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kernel"),
        (HEADER + ".visible .entry k() { ret;", "brace is not closed"),
        (HEADER + ".visible .entry k() { mov.u32 %r1, 0; ret; }", "%r1"),
        (HEADER + ".visible .entry k() { ret }", "ends within a statement"),
        (kernel("@%r1 ret;", 0), "no predicate"),
        (kernel("ld.global.b32 %r1, [%rd1 * 4];", 0), "no address of the form"),
    ],
)
def test_text_that_is_not_understood(text, message):
    with pytest.raises(PtxSyntaxError, match=message):
        parse(text)


def test_endless_loops_end():
    fails(EndlessError, "more than 1000 instructions", "LOOP: add.u32 %r1, %r50, 1; bra LOOP;", max_steps=1000)


def test_threads_may_not_run_past_the_end():
    with pytest.raises(PtxSyntaxError, match="past the last instruction"):
        execute(parse(HEADER + ".visible .entry k() .reqntid 32 { .reg .b32 %r<2>; mov.u32 %r1, 0; }"), "k", (1,), [])


def test_launches_that_do_not_fit():
    module = parse(kernel("mov.u32 %r1, 0;", 1, scalars=("u32", "f32")))
    x = np.zeros(4, np.int32)
    execute(module, "k", (1,), [x, 3, 0.5])
    for arguments, message in (
        ([x], "takes 3 arguments"),
        ([x, 1 << 40, 0.5], "has 32 bits"),
        ([x, 0.5, 0.5], "pass an integer"),
        ([x, x, 0.5], "takes no pointer"),
        ([12345, 3, 0.5], "is a pointer"),
        (["x", 3, 0.5], "NumPy array or a CPU tensor"),
        ([x[::-1], 3, 0.5], "negative strides"),
    ):
        with pytest.raises(LaunchError, match=message):
            execute(module, "k", (1,), arguments)
    with pytest.raises(LaunchError, match="requires blocks"):
        execute(module, "k", (1,), [x, 3, 0.5], block=64)
    with pytest.raises(LaunchError, match="three positive numbers"):
        execute(module, "k", (0,), [x, 3, 0.5])
    with pytest.raises(LaunchError, match="there is no kernel"):
        execute(module, "other", (1,), [])


def test_every_operation_has_been_named_here():
    """A decoder that no test of this file runs would be untested."""
    with open(__file__) as file:
        source = file.read()
    assert [name for name in ptx_operations.opcodes() if f"{name}." not in source and f'"{name}"' not in source] == []
