"""PTX executed on the CPU: a program is parsed, decoded and run in lock step, with every access
checked.

    module = parse(ptx_text)
    execution = execute(module, "kernel", grid=(8,), arguments=[x, y, 1000], block=128)

Needs NumPy, and nothing else of this package. The files, top to bottom (imports only point down):
``executor``; ``decoder`` and ``warp``; ``scheduler``; ``program``; ``operations``, ``memory`` and
``parser``; ``floats``, ``integers`` and ``errors``.
"""

from .errors import (
    AddressError,
    DivergenceError,
    EndlessError,
    LaunchError,
    NotModelledError,
    PtxError,
    PtxSyntaxError,
    RaceError,
    UnspecifiedError,
    UnwrittenError,
)
from .executor import execute
from .memory import Region
from .parser import Kernel, Module, parse
from .scheduler import Execution

__all__ = [
    "AddressError",
    "DivergenceError",
    "EndlessError",
    "Execution",
    "Kernel",
    "LaunchError",
    "Module",
    "NotModelledError",
    "PtxError",
    "PtxSyntaxError",
    "RaceError",
    "Region",
    "UnspecifiedError",
    "UnwrittenError",
    "execute",
    "parse",
]
