"""What each instruction on registers does: its operands, their types and a function on arrays.

Memory, control flow and instructions of a whole warp are decoded by ``decoder``. An opcode,
modifier, rounding mode or type that has no rule here is refused. Source: PTX ISA, "Instructions",
section by section; the approximate functions (``.approx``, ``.full``) are taken as the correctly
rounded result: **the hardware's own error in them is not modelled**. ``add``, ``sub`` and ``mul``
of floating-point numbers without a rounding modifier round to nearest even, but the assembler may
contract them to ``fma``: ``Operation.contractible`` marks them, because their bits are only certain
where contraction is switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import floats, integers
from .errors import NotModelledError, UnspecifiedError
from .parser import TYPE_BYTES, Instruction, Literal, Operand, Pair, Register, Vector

DTYPES = {
    "pred": np.dtype(np.bool_),
    **{kind: np.dtype(f"u{size}") for kind, size in TYPE_BYTES.items()},
    **{kind: np.dtype(f"i{size}") for kind, size in TYPE_BYTES.items() if kind[0] == "s"},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
"""How the bits of a type are held. bf16 and packed types have no NumPy type and stay unsigned."""


def unsigned(kind: str) -> np.dtype:
    """Return the dtype that holds the raw bits of a register of type ``kind``."""
    return np.dtype(np.bool_) if kind == "pred" else np.dtype(f"u{TYPE_BYTES[kind]}")


CARRY = Register("%carry", "pred")
"""The condition code register that ``.cc`` writes."""

FLOATS = ("f16", "bf16", "f32", "f64")
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
SIGNED, UNSIGNED, BITS = (tuple(f"{letter}{width}" for width in (16, 32, 64)) for letter in "sub")


@dataclass(frozen=True)
class Operation:
    """An instruction on registers, as a function on arrays."""

    results: tuple[tuple[Operand, str], ...]  # with the type each is written as
    sources: tuple[tuple[Operand, str], ...]
    apply: Callable
    contractible: bool = False
    approximate: bool = False
    undefined: Callable | None = None
    """From the sources' values and undefined bits to those of the results; see
    ``undefined_results``."""

    def undefined_results(self, values: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
        """Return the undefined bits of each result.

        They follow the operation's own rule. Without one, all bits are undefined where any bit of a
        source is.
        """
        own = self.undefined(values, masks) if self.undefined else None
        if own is not None:
            return list(own) if isinstance(own, tuple) else [own]
        some = np.logical_or.reduce(np.broadcast_arrays(*(mask != 0 for mask in masks)))
        return [_all_bits(some, kind) for _, kind in self.results]


def _all_bits(where: np.ndarray, kind: str) -> np.ndarray:
    if kind == "pred":
        return where
    dtype = np.dtype(f"u{TYPE_BYTES[kind]}")
    return np.where(where, ~dtype.type(0), dtype.type(0))


class _Modifiers:
    """Modifiers, taken one by one; what is left over is refused."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.left = list(instruction.modifiers)

    def take(self, *names: str) -> str | None:
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def type(self, *allowed: str) -> str:
        """Take the last modifier that is left."""
        if not self.left or self.left[-1] not in allowed:
            raise self.refuse(f"the type must be one of {', '.join(allowed)}")
        return self.left.pop()

    def refuse(self, why: str) -> NotModelledError:
        return NotModelledError(f"{self.instruction.name} is not modelled: {why}")

    def finish(self, operands: int) -> tuple[Operand, ...]:
        if self.left:
            raise self.refuse(f"the modifier .{self.left[0]} has no rule")
        if len(self.instruction.operands) != operands:
            raise self.refuse(f"{operands} operands are expected, got {len(self.instruction.operands)}")
        return self.instruction.operands


_DECODERS: dict[str, Callable[[_Modifiers], Operation]] = {}


def _decoder(*opcodes: str) -> Callable:
    def register(function: Callable) -> Callable:
        _DECODERS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def decode(instruction: Instruction) -> Operation | None:
    """Return the operation of an instruction on registers; None for other opcodes.

    Raises:
        NotModelledError: The opcode is known, but not with these modifiers, types or operands.
    """
    decoder = _DECODERS.get(instruction.opcode)
    return decoder(_Modifiers(instruction)) if decoder else None


def opcodes() -> tuple[str, ...]:
    return tuple(sorted(_DECODERS))


def _simple(
    operands: tuple[Operand, ...],
    kind: str,
    function: Callable,
    result: str = "",
    *,
    contractible: bool = False,
    approximate: bool = False,
    undefined: Callable | None = None,
) -> Operation:
    """Return an operation whose first operand is the result, and the others sources of one type."""
    sources = tuple((operand, kind) for operand in operands[1:])
    results = ((operands[0], result or kind),)
    return Operation(results, sources, function, contractible, approximate, undefined)


def _with_flush(function: Callable, kind: str, ftz: bool, sat: bool = False) -> Callable:
    if ftz and kind not in ("f32", "f32x2"):
        raise NotModelledError(f".ftz is modelled for f32 only, got {kind}")
    if not ftz and not sat:
        return function

    def flushed(*operands: np.ndarray) -> np.ndarray:
        if ftz:
            operands = tuple(floats.flush(x) for x in operands)
        result = function(*operands)
        result = floats.flush(result) if ftz else result
        return floats.saturate(result) if sat else result

    return flushed


def over_elements(function: Callable, packed: str) -> Callable:
    """Apply a function of single numbers to registers that hold two each."""
    element = DTYPES[PACKED[packed]]
    whole = DTYPES[packed]

    def on_packed(*operands: np.ndarray) -> np.ndarray:
        if len({len(x) for x in operands}) > 1:
            operands = np.broadcast_arrays(*operands)
        result = function(*(np.ascontiguousarray(x).view(element) for x in operands))
        return result if result.dtype == np.bool_ else np.ascontiguousarray(result).view(whole)

    return on_packed


def _float_operation(
    modifiers: _Modifiers,
    rules: dict[str, Callable],
    kind: str,
    operands: int,
    *,
    contractible: bool = False,
    approximate: bool = False,
) -> Operation:
    """Return an operation on a type, or on two of it packed, with .ftz and .sat."""
    ftz, sat = modifiers.take("ftz") is not None, modifiers.take("sat") is not None
    element = PACKED.get(kind, kind)
    if sat and element not in ("f32", "f16"):
        raise modifiers.refuse(".sat is modelled for f32 and f16 only")
    function = _with_flush(rules[element], element, ftz, sat)
    undefined = None
    if kind in PACKED:
        function, undefined = over_elements(function, kind), _undefined_elements(element)
    return _simple(
        modifiers.finish(operands),
        kind,
        function,
        contractible=contractible,
        approximate=approximate,
        undefined=undefined,
    )


def _undefined_elements(element: str) -> Callable:
    """Return the rule of registers that hold two numbers: one of the result is undefined where the
    same of a source is in any bit."""
    unsigned = np.dtype(f"u{TYPE_BYTES[element]}")

    def undefined(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
        parts = [np.ascontiguousarray(mask).view(unsigned) for mask in np.broadcast_arrays(*masks)]
        some = np.logical_or.reduce([part != 0 for part in parts])
        return _all_bits(some, element).view(masks[0].dtype)

    return undefined


# --- floating point ---


def _rounded(operator: Callable, kind: str) -> Callable:
    """Return NumPy's +, - or *, which round once to nearest even in f16, f32 and f64."""
    return lambda a, b: floats.canonical(operator(a, b), kind)


def _bf16(function: Callable) -> Callable:
    """Compute in float32, which holds every bf16; for functions whose results are bf16 already."""
    return lambda *operands: floats.f32_to_bf16(function(*(floats.bf16_to_f32(x) for x in operands)))


_ONE, _MINUS_ZERO, _MINUS_ONE = (np.array([bits], np.uint16) for bits in (0x3F80, 0x8000, 0xBF80))
_ARITHMETIC = {
    "add": {"bf16": lambda a, b: floats.fma_bf16(a, _ONE, b)}
    | {kind: _rounded(np.add, kind) for kind in ("f16", "f32", "f64")},
    "sub": {"bf16": lambda a, b: floats.fma_bf16(b, _MINUS_ONE, a)}
    | {kind: _rounded(np.subtract, kind) for kind in ("f16", "f32", "f64")},
    "mul": {"bf16": lambda a, b: floats.fma_bf16(a, b, _MINUS_ZERO)}
    | {kind: _rounded(np.multiply, kind) for kind in ("f16", "f32", "f64")},
    "fma": {"f16": floats.fma_f16, "bf16": floats.fma_bf16, "f32": floats.fma_f32, "f64": floats.fma_f64},
}


def _float_arithmetic(modifiers: _Modifiers, kind: str) -> Operation:
    opcode = modifiers.instruction.opcode
    rounding = modifiers.take("rn", "rz", "rm", "rp")
    if rounding not in (None, "rn"):
        raise modifiers.refuse(f"rounding .{rounding} has no rule, only .rn")
    if opcode == "fma" and rounding is None:
        raise modifiers.refuse("fma needs a rounding modifier")
    return _float_operation(
        modifiers, _ARITHMETIC[opcode], kind, 4 if opcode == "fma" else 3, contractible=rounding is None
    )


def _mixed_arithmetic(modifiers: _Modifiers, half: str) -> Operation:
    """Decode ``add.f32.bf16 d, a, c``: a is a half type, d and c are f32."""
    function = _ARITHMETIC[modifiers.instruction.opcode]["f32"]
    rounding = modifiers.take("rn")
    modifiers.take("f32")
    *factors, c = modifiers.finish(4 if modifiers.instruction.opcode == "fma" else 3)
    widen = floats.bf16_to_f32 if half == "bf16" else lambda x: x.astype(np.float32)
    sources = (*((operand, half) for operand in factors[1:]), (c, "f32"))
    return Operation(
        ((factors[0], "f32"),),
        sources,
        lambda *x: function(*(widen(half) for half in x[:-1]), x[-1]),
        contractible=rounding is None,
    )


@_decoder("add", "sub", "mul", "fma")
def _add_sub_mul_fma(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*FLOATS, *PACKED, *SIGNED, *UNSIGNED)
    if kind in ("f16", "bf16") and "f32" in modifiers.left and modifiers.instruction.opcode != "mul":
        return _mixed_arithmetic(modifiers, kind)
    if kind in FLOATS or kind in PACKED:
        return _float_arithmetic(modifiers, kind)
    if modifiers.instruction.opcode == "fma":
        raise modifiers.refuse("fma is for floating point")
    return _integer_arithmetic(modifiers, kind)


@_decoder("min", "max")
def _min_max(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*FLOATS, *PACKED, *SIGNED, *UNSIGNED)
    less = modifiers.instruction.opcode == "min"
    if kind in SIGNED + UNSIGNED:
        return _simple(modifiers.finish(3), kind, np.minimum if less else np.maximum)
    nan = modifiers.take("NaN") is not None
    xorsign = modifiers.take("xorsign") is not None
    if xorsign and modifiers.take("abs") is None:
        raise modifiers.refuse(".xorsign needs .abs")

    def rule(kind: str) -> Callable:
        return lambda a, b: floats.minimum_or_maximum(a, b, take_less=less, kind=kind, nan=nan, xorsign=xorsign)

    rules = {kind: rule(kind) for kind in ("f16", "f32", "f64")} | {"bf16": _bf16(rule("f32"))}
    if kind == "f32" and len(modifiers.instruction.operands) == 4 and not xorsign:
        of_two = rules["f32"]
        return _float_operation(modifiers, {"f32": lambda a, b, c: of_two(of_two(a, b), c)}, kind, 4)
    return _float_operation(modifiers, rules, kind, 3)


@_decoder("abs", "neg")
def _abs_neg(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*FLOATS, *PACKED, *SIGNED)
    function = np.abs if modifiers.instruction.opcode == "abs" else np.negative
    if kind in SIGNED:
        return _simple(modifiers.finish(2), kind, function)
    rules = {k: (lambda a, k=k: floats.canonical(function(a), k)) for k in ("f16", "f32", "f64")}
    return _float_operation(modifiers, rules | {"bf16": _bf16(function)}, kind, 2)


@_decoder("copysign")
def _copysign(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("f32", "f64")
    return _simple(modifiers.finish(3), kind, lambda a, b: np.copysign(b, a))


_APPROXIMATE: dict[str, Callable] = {
    "sqrt": lambda a: floats.canonical(np.sqrt(a), "f32"),
    "rcp": lambda a: floats.canonical(np.float32(1) / a, "f32"),
    "div": lambda a, b: floats.canonical(a / b, "f32"),
    "rsqrt": lambda a: floats.correctly_rounded(lambda x: 1 / np.sqrt(x), a),
    "lg2": lambda a: floats.correctly_rounded(np.log2, a),
    "ex2": lambda a: floats.correctly_rounded(np.exp2, a),
    "sin": lambda a: floats.correctly_rounded(np.sin, a),
    "cos": lambda a: floats.correctly_rounded(np.cos, a),
    "tanh": lambda a: floats.correctly_rounded(np.tanh, a),
}
_EXACT_F64: dict[str, Callable] = {
    "sqrt": lambda a: floats.canonical(np.sqrt(a), "f64"),
    "rcp": lambda a: floats.canonical(1 / a, "f64"),
    "div": lambda a, b: floats.canonical(a / b, "f64"),
}


@_decoder(*_APPROXIMATE)
def _function(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("f32", "f64")
    opcode = modifiers.instruction.opcode
    how = modifiers.take("rn", "approx", *(["full"] if opcode == "div" else []))
    exact = how == "rn" and opcode in _EXACT_F64
    if how is None or (how == "rn" and not exact) or (kind == "f64" and not exact):
        raise modifiers.refuse("only .rn of sqrt, rcp and div is exact, and only f32 has .approx here")
    rule = (_EXACT_F64 if kind == "f64" else _APPROXIMATE)[opcode]
    return _float_operation(modifiers, {kind: rule}, kind, 3 if opcode == "div" else 2, approximate=not exact)


# --- integers ---


def _product(kind: str, part: str) -> Callable:
    dtype, width = DTYPES[kind], 8 * TYPE_BYTES[kind]
    if part == "lo":
        return lambda a, b: a * b
    if width == 64:
        return integers.high_s64 if kind[0] == "s" else integers.high_u64
    wide = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}")
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide.type(width)).astype(dtype)


def _wide(kind: str) -> str:
    return f"{kind[0]}{16 * TYPE_BYTES[kind]}"


def _integer_arithmetic(modifiers: _Modifiers, kind: str) -> Operation:
    opcode = modifiers.instruction.opcode
    if opcode == "mul":
        part = modifiers.take("lo", "hi", "wide")
        if part is None or (part == "wide" and TYPE_BYTES[kind] == 8):
            raise modifiers.refuse("an integer product needs .lo, .hi or, up to 32 bits, .wide")
        return _simple(modifiers.finish(3), kind, _product(kind, part), _wide(kind) if part == "wide" else kind)
    if modifiers.take("cc"):
        return _with_carry(modifiers, kind, carry_in=False, carry_out=True)
    if modifiers.take("sat"):
        if kind != "s32":
            raise modifiers.refuse(".sat is for s32")
        operator = np.add if opcode == "add" else np.subtract
        limit = np.iinfo(np.int32)
        return _simple(
            modifiers.finish(3),
            kind,
            lambda a, b: np.clip(operator(a.astype(np.int64), b), limit.min, limit.max).astype(np.int32),
        )
    return _simple(modifiers.finish(3), kind, np.add if opcode == "add" else np.subtract)


@_decoder("addc", "subc", "madc")
def _carry_in(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("u32", "s32")
    return _with_carry(modifiers, kind, carry_in=True, carry_out=modifiers.take("cc") is not None)


def _with_carry(modifiers: _Modifiers, kind: str, *, carry_in: bool, carry_out: bool) -> Operation:
    """Return an addition, subtraction or multiply-add of 32 bits with carry.

    The carry is bit 32 of an exact 64-bit sum.
    """
    if kind not in ("u32", "s32"):
        raise modifiers.refuse("the carry is modelled for 32 bits only")
    opcode = modifiers.instruction.opcode.removesuffix("c")
    part = modifiers.take("lo", "hi") if opcode == "mad" else None
    if opcode == "mad" and part is None:
        raise modifiers.refuse("a multiply-add with carry needs .lo or .hi")
    operands = modifiers.finish(4 if opcode == "mad" else 3)
    product = _product(kind, part) if part else None

    def apply(*values: np.ndarray):
        carry = values[-1].astype(np.int64) if carry_in else np.int64(0)
        a, b = (values[0], values[1]) if product is None else (product(values[0], values[1]), values[2])
        a, b = (x.view(np.uint32).astype(np.int64) for x in (a, b))
        total = a - b - carry if opcode == "sub" else a + b + carry
        low = (total & 0xFFFFFFFF).astype(np.uint32).view(DTYPES[kind])
        return (low, total >> 32 & 1 != 0) if carry_out else low

    results = ((operands[0], kind), *([(CARRY, "pred")] if carry_out else []))
    sources = (*((operand, kind) for operand in operands[1:]), *([(CARRY, "pred")] if carry_in else []))
    return Operation(results, sources, apply)


@_decoder("mad")
def _mad(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*SIGNED, *UNSIGNED)
    if modifiers.take("cc"):
        return _with_carry(modifiers, kind, carry_in=False, carry_out=True)
    part = modifiers.take("lo", "hi", "wide")
    if part is None or (part == "wide" and TYPE_BYTES[kind] == 8):
        raise modifiers.refuse("an integer multiply-add needs .lo, .hi or, up to 32 bits, .wide")
    product, result = _product(kind, part), _wide(kind) if part == "wide" else kind
    d, a, b, c = modifiers.finish(4)
    return Operation(((d, result),), ((a, kind), (b, kind), (c, result)), lambda a, b, c: product(a, b) + c)


@_decoder("rem")
def _rem(modifiers: _Modifiers) -> Operation:
    return _division(modifiers, integers.remainder)


_div_of_floats = _DECODERS["div"]


@_decoder("div")
def _div(modifiers: _Modifiers) -> Operation:
    if modifiers.left and modifiers.left[-1] in SIGNED + UNSIGNED:
        return _division(modifiers, integers.divide)
    return _div_of_floats(modifiers)


def _division(modifiers: _Modifiers, function: Callable) -> Operation:
    kind = modifiers.type(*SIGNED, *UNSIGNED)

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not b.all():
            raise UnspecifiedError("an integer division by zero has no specified result", lane=int(np.argmin(b != 0)))
        return function(a, b)

    return _simple(modifiers.finish(3), kind, apply)


@_decoder("and", "or", "xor", "not")
def _logic(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*BITS, "pred")
    operator = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    opcode = modifiers.instruction.opcode

    def undefined(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
        if opcode in ("xor", "not"):
            return np.bitwise_or.reduce(np.broadcast_arrays(*masks))
        (a, b), (of_a, of_b) = values, masks
        decides = (lambda x: x) if opcode == "and" else np.invert  # bits of the other operand that let this one through
        return (of_a & of_b) | (of_a & decides(b)) | (of_b & decides(a))

    return _simple(modifiers.finish(2 if opcode == "not" else 3), kind, operator[opcode], undefined=undefined)


@_decoder("shl", "shr")
def _shift(modifiers: _Modifiers) -> Operation:
    left = modifiers.instruction.opcode == "shl"
    kind = modifiers.type(*BITS, *(() if left else SIGNED + UNSIGNED))
    d, a, count = modifiers.finish(3)
    function = integers.shift_left if left else integers.shift_right

    def undefined(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray | None:
        shifted = function(masks[0].view(values[0].dtype), values[1])
        return None if masks[1].any() else shifted.view(masks[0].dtype)

    return Operation(((d, kind),), ((a, kind), (count, "u32")), function, undefined=undefined)


@_decoder("shf")
def _funnel_shift(modifiers: _Modifiers) -> Operation:
    modifiers.type("b32")
    side, mode = modifiers.take("l", "r"), modifiers.take("wrap", "clamp")
    if side is None or mode is None:
        raise modifiers.refuse(".l or .r and .wrap or .clamp are needed")
    return _simple(
        modifiers.finish(4),
        "u32",
        lambda a, b, c: integers.funnel_shift(a, b, c, left=side == "l", wrap=mode == "wrap"),
    )


@_decoder("bfe", "bfi")
def _field(modifiers: _Modifiers) -> Operation:
    if modifiers.instruction.opcode == "bfe":
        kind = modifiers.type("u32", "s32", "u64", "s64")
        d, a, position, length = modifiers.finish(4)
        return Operation(((d, kind),), ((a, kind), (position, "u32"), (length, "u32")), integers.extract_field)
    kind = modifiers.type("b32", "b64")
    d, a, b, position, length = modifiers.finish(5)
    return Operation(((d, kind),), ((a, kind), (b, kind), (position, "u32"), (length, "u32")), integers.insert_field)


@_decoder("lop3")
def _lop3(modifiers: _Modifiers) -> Operation:
    modifiers.type("b32")
    *operands, table = modifiers.finish(5)
    if not isinstance(table, Literal):
        raise modifiers.refuse("the table must be a constant")
    return _simple(tuple(operands), "b32", lambda a, b, c: integers.logic3(a, b, c, table.bits))


@_decoder("prmt")
def _prmt(modifiers: _Modifiers) -> Operation:
    modifiers.type("b32")

    def undefined(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray | None:
        return None if masks[2].any() else integers.permute_bytes(masks[0], masks[1], values[2])

    return _simple(modifiers.finish(4), "b32", integers.permute_bytes, undefined=undefined)


@_decoder("popc", "clz", "brev")
def _count(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("b32", "b64")
    opcode = modifiers.instruction.opcode
    function = {"popc": integers.count_ones, "clz": integers.leading_zeros, "brev": integers.reverse_bits}[opcode]
    return _simple(modifiers.finish(2), kind, function, kind if opcode == "brev" else "u32")


@_decoder("bfind")
def _bfind(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("u32", "s32", "u64", "s64")
    as_shift = modifiers.take("shiftamt") is not None
    return _simple(modifiers.finish(2), kind, lambda a: integers.find_leading(a, as_shift=as_shift), "u32")


# --- comparison and selection ---

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(name: str, kind: str) -> Callable | None:
    """Return a comparison of PTX ISA, "Comparison Operators"; None where the type has no such one."""
    if kind in BITS:
        return _ORDERED[name] if name in ("eq", "ne") else None
    if kind in SIGNED:
        return _ORDERED.get(name)
    if kind in UNSIGNED:
        return _ORDERED.get(_UNSIGNED_NAMES.get(name, name))
    either_nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731 (a comparison, like those below)
    if name in ("num", "nan"):
        return either_nan if name == "nan" else lambda a, b: ~either_nan(a, b)
    if name in _ORDERED:  # false for NaN: only NumPy's != is true
        return _ORDERED[name] if name != "ne" else lambda a, b: (a != b) & ~either_nan(a, b)
    if name.endswith("u") and name[:-1] in _ORDERED:
        ordered = _ORDERED[name[:-1]]
        return lambda a, b: ordered(a, b) | either_nan(a, b)
    return None


@_decoder("setp")
def _setp(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*FLOATS, "f16x2", "bf16x2", *SIGNED, *UNSIGNED, *BITS)
    element = PACKED.get(kind, kind)
    name = modifiers.left.pop(0)
    combine = modifiers.take("and", "or", "xor")
    ftz = modifiers.take("ftz") is not None
    compare = _comparison(name, element)
    if compare is None:
        raise modifiers.refuse(f".{name} is no comparison of {element}")
    if element == "bf16":
        of_floats = compare
        compare = lambda a, b: of_floats(floats.bf16_to_f32(a), floats.bf16_to_f32(b))  # noqa: E731 (one of those above, widened)
    if ftz:
        compare = _flushed_comparison(compare, element, modifiers)
    result, a, b, *others = modifiers.finish(4 if combine else 3)
    sources = ((a, kind), (b, kind), *((other, "pred") for other in others))
    if kind in PACKED:
        if combine or not isinstance(result, Pair):
            raise modifiers.refuse("a packed comparison writes p|q, and is combined with nothing here")
        packed = over_elements(compare, kind)
        return Operation(((result.first, "pred"), (result.second, "pred")), sources, lambda a, b: _halves(packed(a, b)))
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combine or "")
    if not isinstance(result, Pair):
        if join is None:
            return Operation(((result, "pred"),), sources, compare)
        return Operation(((result, "pred"),), sources, lambda a, b, c: join(compare(a, b), c))

    def both(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        true = compare(a, b)
        return (true, ~true) if join is None else (join(true, c[0]), join(~true, c[0]))

    return Operation(((result.first, "pred"), (result.second, "pred")), sources, both)


def _flushed_comparison(compare: Callable, kind: str, modifiers: _Modifiers) -> Callable:
    if kind != "f32":
        raise modifiers.refuse(".ftz is modelled for f32 only")
    return lambda a, b: compare(floats.flush(a), floats.flush(b))


def _halves(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pairs[0::2].copy(), pairs[1::2].copy()


@_decoder("selp")
def _selp(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type(*BITS, *SIGNED, *UNSIGNED, "f32", "f64")
    bits = f"b{8 * TYPE_BYTES[kind]}"
    d, a, b, chosen = modifiers.finish(4)

    def undefined(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray | None:
        return None if masks[2].any() else np.where(values[2], masks[0], masks[1])

    sources = ((a, bits), (b, bits), (chosen, "pred"))
    return Operation(((d, bits),), sources, lambda a, b, p: np.where(p, a, b), undefined=undefined)


@_decoder("slct")
def _slct(modifiers: _Modifiers) -> Operation:
    by = modifiers.type("s32", "f32")
    ftz = modifiers.take("ftz") is not None
    kind = modifiers.type(*BITS, *SIGNED, *UNSIGNED, "f32", "f64")
    bits = f"b{8 * TYPE_BYTES[kind]}"
    d, a, b, c = modifiers.finish(4)
    sign = (lambda c: floats.flush(c) >= 0) if ftz and by == "f32" else (lambda c: c >= 0)
    return Operation(((d, bits),), ((a, bits), (b, bits), (c, by)), lambda a, b, c: np.where(sign(c), a, b))


# --- moves and conversions ---


@_decoder("mov")
def _mov(modifiers: _Modifiers) -> Operation:
    kind = modifiers.type("pred", *BITS, *SIGNED, *UNSIGNED, "f32", "f64")
    d, a = modifiers.finish(2)
    if kind == "pred":
        return _move(((d, kind),), ((a, kind),), lambda a: a)
    width = 8 * TYPE_BYTES[kind]
    bits = f"b{width}"
    if isinstance(a, Vector):
        part = f"b{width // len(a.elements)}"
        return _move(((d, bits),), tuple((x, part) for x in a.elements), lambda *x: _joined(x, DTYPES[bits]))
    if isinstance(d, Vector):
        count = len(d.elements)
        part = f"b{width // count}"
        results = tuple((x, part) for x in d.elements)
        return _move(results, ((a, bits),), lambda a: tuple(a.view(DTYPES[part])[i::count] for i in range(count)))
    return _move(((d, bits),), ((a, bits),), lambda a: a)


def _move(results: tuple, sources: tuple, function: Callable) -> Operation:
    """Return an operation that moves bits, undefined ones alike."""
    return Operation(results, sources, function, undefined=lambda values, masks: function(*masks))


def _joined(parts: tuple[np.ndarray, ...], whole: np.dtype) -> np.ndarray:
    """Join parts, the least significant first."""
    n = max(len(x) for x in parts)
    joined = np.empty((n, len(parts)), parts[0].dtype)
    for i, part in enumerate(parts):
        joined[:, i] = part
    return joined.view(whole)[:, 0]


@_decoder("cvta")
def _cvta(modifiers: _Modifiers) -> Operation:
    """Decode a conversion to or from generic addresses, which for global memory are the same."""
    modifiers.type("u64")
    modifiers.take("to")
    if not modifiers.take("global"):
        raise modifiers.refuse("only global addresses are generic addresses here")
    return _simple(modifiers.finish(2), "u64", lambda a: a)


_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_INTEGERS = tuple(f"{letter}{width}" for letter in "su" for width in (8, 16, 32, 64))


@_decoder("cvt")
def _cvt(modifiers: _Modifiers) -> Operation:
    source = modifiers.type(*_INTEGERS, *FLOATS)
    result = modifiers.type(*_INTEGERS, *FLOATS, "f16x2", "bf16x2")
    rounding = modifiers.take("rn", "rz", "rm", "rp", *_TO_INTEGRAL)
    ftz, sat = modifiers.take("ftz") is not None, modifiers.take("sat") is not None
    if ftz and "f32" not in (source, result):
        raise modifiers.refuse(".ftz is for f32")
    function = _conversion(source, PACKED.get(result, result), rounding, sat)
    if function is None:
        raise modifiers.refuse("this conversion has no rule")
    if ftz:
        function = _flushed_conversion(function, source, result)
    if result not in PACKED:
        d, a = modifiers.finish(2)
        moves = source in _INTEGERS and result in _INTEGERS and not sat
        undefined = (lambda values, masks: _same_bits(function(masks[0].view(values[0].dtype)))) if moves else None
        return Operation(((d, result),), ((a, source),), function, undefined=undefined)
    if source != "f32":
        raise modifiers.refuse("only two f32 are packed here")
    d, high, low = modifiers.finish(3)

    def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return _joined((function(low).view(np.uint16), function(high).view(np.uint16)), DTYPES[result])

    def undefined_halves(values: list[np.ndarray], masks: list[np.ndarray]) -> np.ndarray:
        return _joined(tuple(_all_bits(mask != 0, "b16") for mask in masks), DTYPES[result])

    return Operation(((d, result),), ((low, source), (high, source)), pack, undefined=undefined_halves)


def _same_bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _flushed_conversion(function: Callable, source: str, result: str) -> Callable:
    def flushed(a: np.ndarray) -> np.ndarray:
        converted = function(floats.flush(a) if source == "f32" else a)
        return floats.flush(converted) if result == "f32" else converted

    return flushed


def _conversion(source: str, result: str, rounding: str | None, sat: bool) -> Callable | None:
    """Return a function of PTX ISA, "cvt"; None where the combination is not modelled."""
    if source in _INTEGERS and result in _INTEGERS:
        return None if rounding else _integer_to_integer(source, result, sat)
    if source in _INTEGERS:
        return _integer_to_float(result) if rounding == "rn" and not sat else None
    if result in _INTEGERS:
        return _float_to_integer(source, result, _TO_INTEGRAL[rounding]) if rounding in _TO_INTEGRAL else None
    function = _float_to_float(source, result, rounding)
    if function is None or not sat:
        return function
    return (lambda a: floats.saturate(function(a))) if result in ("f32", "f16") else None


def _integer_to_integer(source: str, result: str, sat: bool) -> Callable:
    if not sat:
        return lambda a: a.astype(DTYPES[result])
    limits = np.iinfo(DTYPES[result])
    own = np.iinfo(DTYPES[source])
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return lambda a: np.clip(a, low, high).astype(DTYPES[result])


def _integer_to_float(result: str) -> Callable | None:
    if result == "f16":
        return lambda a: floats.f64_to_f16(_odd_f64(a))
    if result == "bf16":
        return lambda a: floats.f64_to_bf16(_odd_f64(a))
    return lambda a: a.astype(DTYPES[result])


def _odd_f64(a: np.ndarray) -> np.ndarray:
    """Convert to a float64 that rounds to any half type as the integer itself would.

    Bits that do not fit are or-ed into the last one.
    """
    if a.dtype.itemsize < 8:
        return a.astype(np.float64)
    fits = (a < 1 << 53) & (a > -(1 << 53))
    sticky = ((a & a.dtype.type(0x7FF)) != 0).astype(a.dtype) << a.dtype.type(11)
    return np.where(fits, a, (a & ~a.dtype.type(0x7FF)) | sticky).astype(np.float64)


def _float_to_integer(source: str, result: str, to_integral: Callable) -> Callable:
    """Return a conversion that clamps to the range.

    NaN gives 0, but the bits of the lowest signed number where a 64-bit type takes part.
    """
    dtype, limits = DTYPES[result], np.iinfo(DTYPES[result])
    nan_bits = 0 if source != "f64" and TYPE_BYTES[result] < 8 else 1 << 8 * TYPE_BYTES[result] - 1
    for_nan = np.array(nan_bits, DTYPES[f"u{8 * TYPE_BYTES[result]}"]).view(dtype)
    widen = {"bf16": floats.bf16_to_f32}.get(source, lambda a: a)
    above = float(limits.max) + (0 if TYPE_BYTES[result] == 8 else 1)  # the first number out of range; exact

    def convert(a: np.ndarray) -> np.ndarray:
        whole = to_integral(widen(a).astype(np.float64))
        inside = (whole >= limits.min) & (whole < above)
        converted = np.where(inside, whole, 0).astype(dtype)
        clamped = np.where(whole < limits.min, dtype.type(limits.min), dtype.type(limits.max))
        return np.where(np.isnan(whole), for_nan, np.where(inside, converted, clamped))

    return convert


def _float_to_float(source: str, result: str, rounding: str | None) -> Callable | None:
    if source == result:
        if source == "bf16":
            return None
        if rounding is None:
            return lambda a: floats.canonical(a, source)
        if rounding in _TO_INTEGRAL:
            return lambda a: floats.canonical(_TO_INTEGRAL[rounding](a), source)
        return None
    narrow = {
        ("f32", "f16", "rn"): floats.f32_to_f16,
        ("f32", "f16", "rz"): floats.f32_to_f16_toward_zero,
        ("f32", "bf16", "rn"): floats.f32_to_bf16,
        ("f32", "bf16", "rz"): floats.f32_to_bf16_toward_zero,
        ("f64", "f16", "rn"): floats.f64_to_f16,
        ("f64", "bf16", "rn"): floats.f64_to_bf16,
        ("f64", "f32", "rn"): lambda a: floats.canonical(a.astype(np.float32), "f32"),
        ("f16", "f32", None): lambda a: floats.canonical(a.astype(np.float32), "f32"),
        ("f16", "f64", None): lambda a: floats.canonical(a.astype(np.float64), "f64"),
        ("bf16", "f32", None): lambda a: floats.canonical(floats.bf16_to_f32(a), "f32"),
        ("f32", "f64", None): lambda a: floats.canonical(a.astype(np.float64), "f64"),
    }
    return narrow.get((source, result, rounding))
