"""New tensors full of NaN, so that an element nobody wrote cannot pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_memory(nondeterministic: str = "error") -> Iterator[None]:
    """What torch allocates is full of NaN until it is written; torch's switches are put back afterwards.

    Args:
        nondeterministic: torch fills memory only where operations must be deterministic: what it does at one that is not, "error" or
            "warn".
    """
    # (torch.use_deterministic_algorithms would import a compiler.)
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(nondeterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled
