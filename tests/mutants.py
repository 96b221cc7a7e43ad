"""PTX that is wrong on purpose: a test that passes on one of these could not have failed.

    for mutant in MUTANTS:
        for wrong in mutant.sites(ptx): ...  # one text for each place that can be broken

    # The first place only:
    with emulated_gpu("sm_90", transform=MUTANTS_BY_NAME["dropped-barrier"]): ...

Each is a mutation of the text, so it needs no compiler, and the emulated GPU runs it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


class NothingToMutateError(ValueError):
    """PTX that has no place that a mutant could break."""


@dataclass(frozen=True)
class Mutant:
    """A mutation of PTX.

    ``corrupts`` says what it breaks; ``find`` yields ``(start, end, replacement)`` for each place.
    """

    name: str
    corrupts: str
    find: Callable[[str], Iterator[tuple[int, int, str]]]
    at_once: bool = False  # whether all places are one mutation

    def sites(self, ptx: str) -> list[str]:
        """Return the mutated texts, one for each place, or one for all places that only work together."""
        places = [place for place in self.find(ptx) if ptx[place[0] : place[1]] != place[2]]
        groups = [places] if self.at_once and places else [[place] for place in places]
        return [_replaced(ptx, group) for group in groups]

    def __call__(self, ptx: str) -> str:
        """Return the text broken in its first place.

        Raises:
            NothingToMutateError: There is none.
        """
        sites = self.sites(ptx)
        if not sites:
            raise NothingToMutateError(f"the PTX has no place for the mutant {self.name} ({self.corrupts})")
        return sites[0]


def _replaced(text: str, places: list[tuple[int, int, str]]) -> str:
    for start, end, replacement in sorted(places, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def _by_pattern(
    pattern: str, replacement: str | Callable[[re.Match], str]
) -> Callable[[str], Iterator[tuple[int, int, str]]]:
    compiled = re.compile(pattern)

    def find(ptx: str) -> Iterator[tuple[int, int, str]]:
        for match in compiled.finditer(ptx):
            yield *match.span(), match.expand(replacement) if isinstance(replacement, str) else replacement(match)

    return find


_M0, _M1 = 0xD2511F53, 0xCD9E8D57


def _spellings(word: int) -> tuple[str, ...]:
    return str(word), str(word - (1 << 32)), f"0x{word:X}", f"0x{word:x}"


_MULTIPLIERS = "|".join(re.escape(s) for word in (_M0, _M1) for s in _spellings(word))
_HOLDER = re.compile(rf"mov\.\w+\s+(%\w+), (?:{_MULTIPLIERS});")
_PRODUCT = re.compile(r"mul\.(hi|lo|wide)\.[us](32|64)\s+(%\w+), ([-\w%]+), ([-\w%]+);")


def _other_multiplier(match: re.Match) -> str:
    return str(int(match.group(), 0) ^ 0x100)


def _tenth_products(ptx: str) -> Iterator[tuple[int, int, str]]:
    """Find products by Philox's multipliers that follow from nine others in a row.

    The tenth round's.
    """
    multipliers = {*_spellings(_M0), *_spellings(_M1), *_HOLDER.findall(ptx)}
    rounds: dict[str, int] = {}  # of a register: how many products it has come through
    for match in re.finditer(r"[^;\n]*;", ptx):
        product = _PRODUCT.search(match.group())
        factors = [] if product is None else [x for x in product.groups()[3:] if x not in multipliers]
        if len(factors) != 1:
            _pass_on(match.group(), rounds)
            continue
        part, width, target, _, _ = product.groups()
        rounds[target] = rounds.get(factors[0], 0) + 1
        if rounds[target] == 10:
            whole = "b64" if width == "64" or part == "wide" else "b32"
            kept = "0" if part == "hi" else f"{{{factors[0]}, 0}}" if part == "wide" else factors[0]
            yield match.start() + product.start(), match.start() + product.end(), f"mov.{whole} {target}, {kept};"


def _pass_on(statement: str, rounds: dict[str, int]) -> None:
    """Give an instruction's results the number of products of its deepest operand."""
    words = re.findall(r"%\w+", statement)
    unpacked = re.match(r"[^,{%]*\{([^}]*)\}", statement)
    targets = re.findall(r"%\w+", unpacked.group(1)) if unpacked else words[:1]
    deepest = max((rounds.get(word, 0) for word in words[len(targets) :]), default=0)
    rounds.update(dict.fromkeys(targets, deepest))


def _separately_rounded(match: re.Match) -> str:
    kind, operands = match.groups()
    d, a, b, c = (x.strip() for x in operands.split(","))
    bits = "b64" if kind == "f32x2" else "b32"
    return f"{{ .reg .{bits} mutant_product; mul.rn.{kind} mutant_product, {a}, {b}; add.rn.{kind} {d}, mutant_product, {c}; }}"


def _swapped(match: re.Match) -> str:
    head, first, second, rest = match.groups()
    return f"{head}{second}, {first}{rest}"


def _one_element_late(match: re.Match) -> str:
    head, width, offset, tail = match.groups()
    return f"{head}{int(offset or 0) + int(width) // 8}{tail}"


_LAST_CTA_RETURNS = """
	{
	.reg .pred mutant_last;
	.reg .b32 mutant_cta, mutant_ctas;
	mov.u32 mutant_cta, %ctaid.x;
	mov.u32 mutant_ctas, %nctaid.x;
	add.s32 mutant_cta, mutant_cta, 1;
	setp.eq.s32 mutant_last, mutant_cta, mutant_ctas;
	@mutant_last ret;
	}
"""


def _after_declarations(ptx: str) -> Iterator[tuple[int, int, str]]:
    declarations = list(re.finditer(r"^\s*\.reg [^;]*;[^\n]*\n", ptx, re.MULTILINE))
    if declarations:
        end = declarations[-1].end()
        yield end, end, _LAST_CTA_RETURNS


MUTANTS = (
    Mutant("dropped-barrier", "a bar.sync is missing", _by_pattern(r"bar\.sync\s+0;", "")),
    Mutant("dropped-warp-barrier", "a bar.warp.sync is missing", _by_pattern(r"bar\.warp\.sync\s+[-\w]+;", "")),
    Mutant(
        "dropped-wait",
        "asynchronous copies are not waited for",
        _by_pattern(r"cp\.async\.wait_group\s+\d+;", ""),
        at_once=True,
    ),
    Mutant(
        "philox-constant",
        "a multiplier of Philox has one bit changed",
        _by_pattern(rf"(?<![\w-])(?:{_MULTIPLIERS})(?!\w)", _other_multiplier),
        at_once=True,
    ),
    Mutant("nine-rounds", "the tenth round of Philox multiplies nothing", _tenth_products, at_once=True),
    Mutant(
        "truncating-conversion",
        "a conversion to a half type rounds toward zero",
        _by_pattern(r"cvt\.rn\.(b?f16(?:x2)?\.f32)", r"cvt.rz.\1"),
    ),
    Mutant(
        "unfused",
        "a fused multiply-add rounds twice",
        _by_pattern(r"fma\.rn\.(f32|f32x2)\s+([^;]*);", _separately_rounded),
        at_once=True,
    ),
    Mutant(
        "swapped-fma-operands",
        "a factor and the addend of a fused multiply-add change places",
        _by_pattern(r"(fma\.rn\.[\w.]+\s+%\w+, [^,;]+, )([^,;]+), ([^,;]+)(;)", _swapped),
    ),
    Mutant(
        "swapped-subtraction",
        "a subtraction has its operands the wrong way round",
        _by_pattern(r"(sub\.(?:rn\.)?[fs]\w+\s+%\w+, )([^,;]+), ([^,;]+)(;)", _swapped),
    ),
    Mutant(
        "flushed-subnormals",
        "an operation flushes subnormals",
        _by_pattern(r"(fma|mul|add)\.rn\.(f32)\b", r"\1.rn.ftz.\2"),
        at_once=True,
    ),
    Mutant("nan-lost", "a minimum or maximum passes over NaN", _by_pattern(r"(min|max)\.NaN\.", r"\1."), at_once=True),
    Mutant("unmasked-load", "a load has lost its guard", _by_pattern(r"@!?%p\d+\s+(ld\.global)", r"\1"), at_once=True),
    Mutant(
        "unmasked-store", "a store has lost its guard", _by_pattern(r"@!?%p\d+\s+(st\.global)", r"\1"), at_once=True
    ),
    Mutant(
        "mask-off-by-one",
        "a mask lets one element too many through",
        _by_pattern(r"setp\.lt\.([su])", r"setp.le.\1"),
        at_once=True,
    ),
    Mutant("short-grid", "the last CTA of the grid does nothing", _after_declarations),
    Mutant(
        "false-alignment",
        "a vector access begins one element late",
        _by_pattern(r"((?:ld|st)\.global[\w.:]*\.v\d\.b(\d+)[^;]*\[ ?%\w+ ?(?:\+ ?))(\d+)( ?\])", _one_element_late),
    ),
    Mutant(
        "wrong-shuffle",
        "a shuffle takes its value from another thread",
        _by_pattern(
            r"(shfl\.sync\.\w+\.b32\s+[^,;]+, [^,;]+, )(\d+)", lambda m: m.group(1) + str((int(m.group(2)) * 2) % 31)
        ),
    ),
    Mutant(
        "plain-addition", "an atomic addition is an exchange", _by_pattern(r"\badd\.u32(\s+%\w+, \[)", r"exch.b32\1")
    ),
)
"""All mutants. Not every one fits every kernel: see ``Mutant.sites``."""

MUTANTS_BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
