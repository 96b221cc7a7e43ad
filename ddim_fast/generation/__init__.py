"""Sets of samples of any size: by many processes, on many machines, nothing lost, the same bits.
See docs/GENERATE.md."""

from .conditioning import Conditioning, EveryClass, OneClass, Table
from .directory import GenerationError, check_set
from .join import join_npz
from .run import Generated, generate

__all__ = [
    "Conditioning",
    "EveryClass",
    "Generated",
    "GenerationError",
    "OneClass",
    "Table",
    "check_set",
    "generate",
    "join_npz",
]
