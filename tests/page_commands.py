"""The commands in a page: each is one that exists, with options that it takes; none is run."""

import re
import shlex
from pathlib import Path

import click

from ddim_fast.cli import main

ROOT = Path(__file__).parent.parent
_OPTIONAL = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
EXTRAS = set(re.findall(r"^([a-z]+) = \[", _OPTIONAL, re.M))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
NOT_ON_AN_INDEX = re.compile(r"ddim[-_]fast(\[.*\])?$")


def check_ddim_fast(words):
    """Parse a command as ``ddim-fast`` does, up to where it would begin to work."""
    name, *rest = words
    command = main.get_command(click.Context(main), name)
    if name.startswith("-"):
        return main.make_context("ddim-fast", [name])
    assert command is not None, f"ddim-fast has no command {name}"
    try:
        command.make_context(name, rest, parent=click.Context(main, info_name="ddim-fast"))
    except click.exceptions.Exit:  # what --help and --list say is printed
        pass
    except click.BadParameter as error:
        if "does not exist" not in error.message:  # which files the reader has
            raise


def check_python(words):
    """A script is there, and names every option; ``-m`` names a module that is known here."""
    program, *rest = words
    if program == "-m":
        assert rest[0] in (
            "venv",
            "pip",
            "ddim_fast",
            "ddim_fast.gpu_lab.machine_code",
            "pytest",
            "build",
            "cibuildwheel",
        ), rest
        return
    source = (ROOT / program).read_text()
    for option in (word for word in rest if word.startswith("--")):
        name = option.split("=")[0]
        assert name in source or name[2:].replace("-", "_") in source, f"{program} has no {name}"
    if rest and re.fullmatch(r"[a-z]+", rest[0]):
        assert rest[0] in source, f"{program} has no {rest[0]}"


def check_pip(words):
    """What is installed is here, or is not ours: no index has this package."""
    assert words[0] == "install", words
    for word in words[1:]:
        if "." in word[:1] and "[" in word:
            extras = set(word.split("[")[1].rstrip("]").split(","))
            assert extras <= EXTRAS, f"pyproject.toml has no {word}"
        assert not NOT_ON_AN_INDEX.match(word), f"no index has {word} yet: write . and its extras"


def check_make(words):
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= TARGETS, f"Makefile has no {set(targets) - TARGETS}"


def check_torchrun(words):
    """The part behind ``-m ddim_fast``."""
    check_ddim_fast(words[words.index("ddim_fast") + 1 :])


def nothing(words):
    """What is not ours."""


PROGRAMS = {
    "ddim-fast": check_ddim_fast, "python": check_python, "python3": check_python, "pip": check_pip, "make": check_make,
    "torchrun": check_torchrun, "pytest": nothing, "git": nothing, ".": nothing, "cd": nothing,
}  # fmt: skip


def commands(text):
    """Each command of a block, as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        for words in re.split(r"\s&&\s", line):
            if found := shlex.split(words, comments=True):
                yield found


def check_commands(text):
    """Check every command of a block.

    Raises:
        AssertionError: one of them is none, or takes no such option.
    """
    for program, *words in commands(text):
        program = "python" if program.endswith("/python") else program
        assert program in PROGRAMS, f"{program} is not one of {', '.join(PROGRAMS)}"
        PROGRAMS[program](words)
