"""Proof about GPU code without a GPU.

    from ddim_fast.gpu_lab import FakeCuda, Replay, compile, run

``compile`` a Triton kernel for a GPU that is not there; ``run`` one on an emulated GPU, with every
memory access checked; ``FakeCuda``, a CUDA device without memory that refuses what a graph capture
refuses; ``Replay``, a stand-in for CUDA graphs that records and replays on the CPU. Below them is
``ptx``, which executes PTX and needs only NumPy.

Each name is loaded when it is first used, so that importing this package loads neither torch nor
Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compiling import compile
    from .emulated_gpu import run
    from .fake_cuda import FakeCuda
    from .replay import Replay

__all__ = ["FakeCuda", "Replay", "compile", "run"]

_MODULES = {"FakeCuda": "fake_cuda", "Replay": "replay", "compile": "compiling", "run": "emulated_gpu"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
