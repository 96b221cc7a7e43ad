"""Draw from a generator where a library draws from torch's global one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def global_generator(source: torch.Generator | None) -> Iterator[None]:
    """Draw from ``source``, a generator on the CPU, where a library draws from torch's global
    generator; restore the global generator's state afterwards."""
    if source is None:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(source.get_state())
    try:
        yield
    finally:
        source.set_state(torch.get_rng_state())
        torch.set_rng_state(before)
