"""New tensors filled with NaN, so that an element that is never written cannot pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def nan_memory(nondeterministic: str = "error") -> Iterator[None]:
    """Fill what torch allocates with NaN; restore torch's settings afterwards.

    Args:
        nondeterministic: torch fills memory only while deterministic operations are required:
            "error" or "warn" at an operation that is not deterministic.
    """
    # (torch.use_deterministic_algorithms would import a compiler.)
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic  # torch declares no types for its attributes
    filled = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(nondeterministic)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = filled
