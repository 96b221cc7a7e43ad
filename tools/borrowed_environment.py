"""Make an environment that has all packages of this one, and a few more.

Packages are installed without their dependencies. What they import, but what is asked of them does not
need, is replaced by modules in which every name exists and means nothing.

    python tools/borrowed_environment.py FOLDER PACKAGE... --stand-in NAME --stand-in NAME.MODULE
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import click

_STAND_INS = """
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {names!r}


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {{}})


class StandIn(ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {{}})


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        stands_in = any(f"{{name}}.".startswith(f"{{one}}.") for one in NAMES)
        return ModuleSpec(name, Finder, is_package=True) if stands_in else None

    @staticmethod
    def create_module(spec):
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.insert(0, Finder)
"""


def make_environment(folder: Path, packages: Iterable[str], stand_ins: Iterable[str] = ()) -> None:
    """Make the environment.

    Args:
        folder: where; it must not exist.
        packages: what pip installs there, without dependencies.
        stand_ins: packages and modules that are replaced.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    there = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    here = sysconfig.get_path("purelib")
    (there / "stand_ins.py").write_text(_STAND_INS.format(names=tuple(stand_ins)).lstrip())
    (there / "zz_this_environment.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    (there / "zzz_stand_ins.pth").write_text("import stand_ins\n")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=False))
@click.argument("packages", nargs=-1, required=True)
@click.option("--stand-in", "stand_ins", multiple=True, help="A package or module to replace; may be repeated.")
def main(folder: Path, packages: tuple[str, ...], stand_ins: tuple[str, ...]) -> None:
    make_environment(folder, packages, stand_ins)


if __name__ == "__main__":
    main()
