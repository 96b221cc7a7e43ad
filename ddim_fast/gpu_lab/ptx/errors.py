"""Errors of PTX programs.

Each gives the rule, the line, the instruction, the first thread at fault and its values.
"""

from __future__ import annotations


class PtxError(Exception):
    """The base class of all errors of ``ptx``.

    Attributes:
        rule: What is wrong, in one sentence with the values.
        kernel, line, instruction: Where in the PTX text, as far as known.
        cta, thread: ``(x, y, z)`` of the first CTA and thread at fault; None before anything runs.
    """

    def __init__(self, rule: str, *, lane: int | None = None):
        super().__init__(rule)
        self.rule = rule
        self.lane = lane  # the thread at fault, by its number in the chunk
        self.kernel: str | None = None
        self.line: int | None = None
        self.instruction: str | None = None
        self.cta: tuple[int, int, int] | None = None
        self.thread: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = self.rule
        if self.cta is not None:
            text += f"; first at CTA {self.cta}, thread {self.thread}"
        if self.line is not None:
            text += f"\n  PTX line {self.line}: {self.instruction}"
        return text + (f"\n  in kernel {self.kernel}" if self.kernel else "")


class PtxSyntaxError(PtxError):
    """Text that is not PTX as the parser knows it."""


class NotModelledError(PtxError):
    """Something that the emulator has no exact rule for. It is refused, never guessed."""


class LaunchError(PtxError):
    """A grid, a block or arguments that do not fit the kernel."""


class AddressError(PtxError):
    """An access out of bounds, through a null pointer or misaligned, or a write to read-only
    memory."""


class RaceError(PtxError):
    """Accesses of two threads to one byte, at least one a write, that nothing orders."""


class DivergenceError(PtxError):
    """A barrier, or an instruction of a whole warp, that some of its threads do not reach."""


class UnwrittenError(PtxError):
    """A read of a register, or of shared or local memory, that nothing has written."""


class UnspecifiedError(PtxError):
    """A result that PTX leaves open.

    For example, an integer division by zero, or a shuffle from a thread outside the mask.
    """


class EndlessError(PtxError):
    """A program that runs for more instructions than allowed, or waits forever."""
