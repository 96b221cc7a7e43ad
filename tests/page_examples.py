"""The examples of README.md and docs/, found by Sybil: Python runs in one namespace a page, top to bottom, and commands are parsed.

Comments before a block say what it needs: ``<!-- given: NAME -->`` names what its reader has (``readers.GIVEN``), and
``<!-- skip: next "REASON" -->`` why it cannot run here.
"""

from pathlib import Path
from typing import NamedTuple

from page_commands import check_commands
from readers import GIVEN
from sybil import Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SHELL = ("sh", "bash")


def give(example):
    """Add to a page's names what the comment says that the reader has."""
    example.namespace.update(GIVEN[example.parsed]())


def given(document):
    for lexed in DirectiveInHTMLCommentLexer("given", r"\w+")(document):
        yield Region(lexed.start, lexed.end, lexed.lexemes["arguments"], give)


def check_shell(example):
    check_commands(example.parsed)


SYBIL = Sybil([PythonCodeBlockParser(), *(CodeBlockParser(name, check_shell) for name in SHELL), given, SkipParser()])


def parse(page):
    """Return a page as Sybil reads it, by its name in docs/."""
    return SYBIL.parse(DOCS / page)


class Example(NamedTuple):
    """A block of Python, to be run with other names than its page's.

    Attributes:
        given: what the comment before the block names. "" for none.
    """

    page: str
    line: int
    given: str
    code: str

    def run(self, names):
        """Run it with these names, which it adds to."""
        exec(compile(self.code, f"{self.page}, line {self.line}", "exec"), names)


def examples(page):
    """Return every example in Python of a page, by its name in docs/."""
    found, name = [], ""
    for example in parse(page).examples():
        if example.region.evaluator is give:
            name = example.parsed
        elif is_python(example):
            found.append(Example(page, example.line, name, str(example.parsed)))
            name = ""
    return found


def is_python(example):
    return isinstance(example.region.evaluator, PythonEvaluator)
