"""Parse PTX text. The parser knows the form of PTX, not the meaning of any opcode.

Source: PTX ISA, "Syntax", "State Spaces, Types, and Variables" and "Instruction Operands". The
subset is what Triton prints: one or more ``.entry`` kernels, module variables, inline assembly with
its own scopes, and debug sections, which are skipped.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import NotModelledError, PtxError, PtxSyntaxError

TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
}


class Register(NamedTuple):
    name: str
    type: str  # as declared: pred, b16, b32, ...


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Symbol(NamedTuple):
    """A variable, a parameter or a label, by name."""

    name: str


class Literal(NamedTuple):
    """A constant.

    ``bits`` is the IEEE pattern where ``kind`` is f32 or f64, the number where it is int.
    """

    bits: int
    kind: str = "int"


class Sink(NamedTuple):
    """``_``: a result that is thrown away."""


class Not(NamedTuple):
    """A predicate, inverted."""

    register: Register


class Pair(NamedTuple):
    """``d|p``: two results."""

    first: Operand
    second: Operand


class Vector(NamedTuple):
    elements: tuple[Operand, ...]


class Address(NamedTuple):
    base: Operand
    offset: int


Operand = Register | Special | Symbol | Literal | Sink | Not | Pair | Vector | Address


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    guard: Register | Not | None
    opcode: str  # fma
    modifiers: tuple[str, ...]  # ("rn", "f32")
    operands: tuple[Operand, ...]

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    is_pointer: bool


@dataclass(frozen=True)
class Variable:
    """A variable in global, constant, shared or local memory.

    ``nbytes`` is None where the launch gives the size.
    """

    name: str
    space: str
    align: int
    nbytes: int | None
    data: bytes | None = None


@dataclass
class Kernel:
    name: str
    line: int
    parameters: list[Parameter]
    block: tuple[int, int, int] | None  # .reqntid
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to the index of the next instruction
    variables: dict[str, Variable] = field(default_factory=dict)
    cache: dict[object, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # what is the same in every launch


@dataclass
class Module:
    target: str  # sm_90a
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]


class _Statement(NamedTuple):
    line: int
    text: str  # without the semicolon; "{" and "}" by themselves open and close a scope; "name:" is a label


_NAME = r"[A-Za-z_$%][\w$]*"
_IGNORED_LINE = re.compile(r"\.(loc|file|address_size|pragma)\b")
_HEADER = re.compile(r"(\.visible\s+|\.weak\s+)?\.entry\b")
_LABEL = re.compile(rf"({_NAME}):(?!:)")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid|%nwarpid|%smid|%nsmid|%gridid|%clock(64)?|%globaltimer"
                      r"|%lanemask_\w+|%cluster\w*(\.[xyz])?|%nclusterid\.[xyz]|%is_explicit_cluster|%envreg\d+"
                      r"|%dynamic_smem_size|%total_smem_size|%aggr_smem_size|%reserved_smem_\w+|%pm\d+(_64)?")  # fmt: skip


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _statements(text: str) -> list[_Statement]:
    """Cut the text at semicolons, labels and scopes; drop debug sections and line directives."""
    found: list[_Statement] = []
    pending, start = "", 0
    in_section = False
    for number, line in enumerate(_without_comments(text).split("\n"), 1):
        rest = line.strip()
        if in_section:
            in_section = rest != "}"
            continue
        if not pending and rest.startswith(".section"):
            in_section = True
            continue
        if not pending and (match := re.match(r"\.(version|target)\s+(.*)", rest)):
            found.append(_Statement(number, rest))
            continue
        if not pending and _IGNORED_LINE.match(rest):
            continue
        while rest:
            if not pending:
                start = number
                if rest[0] in "{}":
                    found.append(_Statement(number, rest[0]))
                    rest = rest[1:].lstrip()
                    continue
                if match := _LABEL.match(rest):
                    found.append(_Statement(number, match.group()))
                    rest = rest[match.end() :].lstrip()
                    continue
            end = re.search(r"[{;]" if _HEADER.match(pending or rest) else ";", rest)
            if end is None:
                pending += rest + " "
                break
            found.append(_Statement(start, (pending + rest[: end.start()]).strip()))
            if end.group() == "{":
                found.append(_Statement(number, "{"))
            pending, rest = "", rest[end.end() :].lstrip()
    if pending.strip():
        raise _at(PtxSyntaxError("the text ends within a statement"), _Statement(start, pending))
    return found


@contextlib.contextmanager
def _located(statement: _Statement) -> Iterator[None]:
    """Give errors raised inside the line and text of ``statement``."""
    try:
        yield
    except ValueError as error:
        raise _at(PtxSyntaxError(str(error)), statement) from None
    except PtxError as error:
        raise _at(error, statement) from None


def _at(error: PtxError, statement: _Statement) -> PtxError:
    if error.line is None:
        error.line, error.instruction = statement.line, " ".join(statement.text.split())
    return error


class _Scope:
    """Names of one pair of braces; inner scopes hide outer ones, as inline assembly needs."""

    def __init__(self, outer: _Scope | None, suffix: str):
        self.outer, self.suffix = outer, suffix
        self.registers: dict[str, Register] = {}
        self.families: list[tuple[str, int, str]] = []  # %r<46>
        self.labels: set[str] = set()

    def register(self, name: str) -> Register | None:
        if name in self.registers:
            return self.registers[name]
        for prefix, count, kind in self.families:
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdigit() and int(number) < count:
                return self.registers.setdefault(name, Register(name + self.suffix, kind))
        return self.outer.register(name) if self.outer else None

    def label(self, name: str) -> str | None:
        if name in self.labels:
            return name + self.suffix
        return self.outer.label(name) if self.outer else None


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def _integer(text: str) -> int:
    return int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+U?", text) else int(text.rstrip("U"), 8)


def _operand(text: str, scope: _Scope) -> Operand:
    if text == "_":
        return Sink()
    if text.startswith("{") and text.endswith("}"):
        return Vector(tuple(_operand(part, scope) for part in _split(text[1:-1])))
    if text.startswith("[") and text.endswith("]"):
        match = re.fullmatch(rf"\[\s*({_NAME}|{_INTEGER.pattern})\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise ValueError(f"no address of the form [base + offset]: {text!r}")
        return Address(_operand(match.group(1), scope), _integer(match.group(3)) if match.group(3) else 0)
    if "|" in text:
        return Pair(*(_operand(part.strip(), scope) for part in text.split("|", 1)))
    if text.startswith("!"):
        inverted = _operand(text[1:].strip(), scope)
        if not isinstance(inverted, Register):
            raise ValueError(f"only a predicate can be inverted, got {text!r}")
        return Not(inverted)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Literal(int(match.group(1), 16), "f32")
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Literal(int(match.group(1), 16), "f64")
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Literal(int.from_bytes(struct.pack("<d", float(text)), "little"), "f64")
    if _INTEGER.fullmatch(text):
        return Literal(_integer(text))
    if register := scope.register(text):
        return register
    if _SPECIAL.fullmatch(text):
        return Special(text)
    if re.fullmatch(_NAME, text) and not text.startswith("%"):
        return Symbol(text)
    raise ValueError(f"no register, constant or name known here: {text!r}")


def _declare_registers(text: str, scope: _Scope) -> None:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
    if match is None or match.group(1) not in ("pred", *TYPE_BYTES):
        raise NotModelledError(f"a register declaration of an unknown type: {text!r}")
    for name in _split(match.group(2)):
        if family := re.fullmatch(rf"({_NAME})<(\d+)>", name):
            scope.families.append((family.group(1), int(family.group(2)), match.group(1)))
        else:
            scope.registers[name] = Register(name + scope.suffix, match.group(1))


def _variable(text: str) -> Variable:
    match = re.fullmatch(
        rf"(?:\.(?:visible|extern|weak|common)\s+)?\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({_NAME})"
        r"(\[(\d*)\])?\s*(?:=\s*(.*))?",
        text,
        re.DOTALL,
    )
    if match is None or match.group(3) not in TYPE_BYTES:
        raise NotModelledError(f"a variable declared in a form that is not modelled: {text!r}")
    space, align, kind, name, array, count, values = match.groups()
    size = TYPE_BYTES[kind]
    nbytes = size if array is None else (int(count) * size if count else None)
    data = None
    if values is not None:
        if not values.startswith("{") or nbytes is None or kind[0] not in "bus":
            raise NotModelledError(f"an initial value in a form that is not modelled: {text!r}")
        numbers = [_integer(v) & (1 << 8 * size) - 1 for v in _split(values.strip()[1:-1])]
        data = b"".join(number.to_bytes(size, "little") for number in numbers).ljust(nbytes, b"\0")
    return Variable(name, space, int(align or size), nbytes, data)


def _kernel(line: int, text: str) -> Kernel:
    match = re.fullmatch(
        rf"(?:\.visible\s+|\.weak\s+)?\.entry\s+({_NAME})\s*(?:\(\s*(.*?)\s*\))?\s*((?:\.\w+[\s\d,]*)*)",
        text,
        re.DOTALL,
    )
    if match is None:
        raise PtxSyntaxError("a kernel's header that is not understood")
    parameters = []
    for declaration in _split(match.group(2) or ""):
        form = re.fullmatch(
            rf"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)((?:\s+\.\w+(?:\s+\d+)?)*)\s+({_NAME})(?:\[(\d+)\])?", declaration
        )
        nbytes = TYPE_BYTES.get(form.group(1), 0) * int(form.group(4) or 1) if form else 0
        if form is None or nbytes not in (1, 2, 4, 8):
            raise NotModelledError(f"a parameter in a form that is not modelled: {declaration}")
        kind = form.group(1) if form.group(4) is None else f"b{8 * nbytes}"
        parameters.append(Parameter(form.group(3), kind, ".ptr" in form.group(2)))
    block: tuple[int, int, int] | None = None
    for name, numbers in re.findall(r"\.(\w+)\s*([\d,\s]*)", match.group(3)):
        if name == "reqntid":
            x, y, z, *_ = (*(int(n) for n in numbers.split(",")), 1, 1)
            block = (x, y, z)
        elif name not in ("maxntid", "minnctapersm", "maxnctapersm", "maxnreg"):
            raise NotModelledError(f"the directive .{name} of a kernel is not modelled")
    return Kernel(match.group(1), line, parameters, block)


def _instruction(statement: _Statement, scope: _Scope) -> Instruction:
    match = re.fullmatch(
        rf"(?:@(!?)\s*({_NAME})\s+)?([a-z]\w*)((?:\.\w+(?:::\w+)*)*)\s*(.*)", statement.text, re.DOTALL
    )
    if match is None:
        raise ValueError("no instruction")
    inverted, guard_name, opcode, modifiers, operands = match.groups()
    guard: Register | Not | None = None
    if guard_name:
        predicate = scope.register(guard_name)
        if predicate is None or predicate.type != "pred":
            raise ValueError(f"the guard {guard_name} is no predicate known here")
        guard = Not(predicate) if inverted else predicate
    resolved: tuple[Operand, ...]
    if opcode == "bra" or opcode == "call":
        resolved = tuple(Symbol(scope.label(name) or name) for name in _split(operands))
    else:
        resolved = tuple(_operand(part, scope) for part in _split(operands))
    names = tuple(modifiers.split(".")[1:])
    return Instruction(statement.line, " ".join(statement.text.split()), guard, opcode, names, resolved)


def _parse_body(kernel: Kernel, body: list[_Statement]) -> None:
    """Parse in two passes.

    First labels and registers are declared, because a branch may go forward.
    """
    scopes = [_Scope(None, "")]
    of_statement: list[_Scope] = []
    for i, statement in enumerate(body):
        with _located(statement):
            if statement.text == "{":
                scopes.append(_Scope(scopes[-1], f"@{i}"))
            elif statement.text == "}":
                scopes.pop()
            elif statement.text.endswith(":"):
                scopes[-1].labels.add(statement.text[:-1])
            elif statement.text.startswith(".reg"):
                _declare_registers(statement.text, scopes[-1])
        of_statement.append(scopes[-1])
    for statement, scope in zip(body, of_statement, strict=True):
        text = statement.text
        with _located(statement):
            if text.endswith(":"):
                label = scope.label(text[:-1])
                assert label is not None, "the first pass has declared every label"
                kernel.labels[label] = len(kernel.instructions)
            elif text.startswith(".") and not text.startswith(".reg"):
                variable = _variable(text)
                kernel.variables[variable.name] = variable
            elif text not in "{}" and not text.startswith(".reg"):
                kernel.instructions.append(_instruction(statement, scope))


def _body_length(statements: list[_Statement], header: _Statement) -> int:
    """Return the number of statements between the braces that ``statements`` begin with."""
    depth = 0
    for i, statement in enumerate(statements):
        depth += (statement.text == "{") - (statement.text == "}")
        if depth == 0:
            return i - 1
    raise _at(PtxSyntaxError("a brace is not closed"), header)


def parse(text: str) -> Module:
    """Parse PTX text into a module.

    Raises:
        PtxSyntaxError: The text is not understood.
        NotModelledError: A declaration is understood but not modelled.
    """
    module = Module("", {}, {})
    statements = _statements(text)
    i = 0
    while i < len(statements):
        statement = statements[i]
        i += 1
        with _located(statement):
            if statement.text.startswith(".target"):
                module.target = statement.text.split()[1].rstrip(",")
            elif _HEADER.match(statement.text):
                kernel = _kernel(statement.line, statement.text)
                length = _body_length(statements[i:], statement)
                _parse_body(kernel, statements[i + 1 : i + 1 + length])
                module.kernels[kernel.name] = kernel
                i += length + 2
            elif not statement.text.startswith(".version") and not re.search(r"\.func\b", statement.text):
                variable = _variable(statement.text)
                module.variables[variable.name] = variable
    if not module.kernels:
        raise PtxSyntaxError("the text has no kernel (.entry)")
    return module
