"""What something was computed from, and whether it is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.torch_internals import write_count
from . import internals


class Watched:
    """Attributes of a scheduler and fields of its config: unchanged as long as ``is_valid()``.

    Args:
        scheduler: one of diffusers'.
        attributes: names of those that are compared by identity.
        tensors: their values, of which tensors are watched for writes.
        config_fields: the fields of its config that count; those that a version does not have are
            none.
    """

    def __init__(self, scheduler: Any, attributes: Sequence[str], tensors: Sequence[Any], config_fields: Sequence[str]):
        config = scheduler.config
        config_entry = internals.config_entry(scheduler)
        self._scheduler, self._config = scheduler, config
        self.kind = type(scheduler)
        self.fields = tuple((name, getattr(config, name)) for name in config_fields if name in vars(config))
        """What the fields of the config are."""
        self.values = (
            *((vars(scheduler), name, getattr(scheduler, name)) for name in attributes),
            *([] if config_entry is None else [config_entry]),
            *((vars(config), name, value) for name, value in self.fields),
        )
        """(dictionary, key, value): each dictionary must still hold that very value."""
        written = [
            t for t in tensors if isinstance(t, Tensor) and not t.is_inference()
        ]  # those that count their writes
        counts = [(t, count) for t in written if (count := write_count(t)) is not None]
        self.writes = tuple(counts) if internals.COUNTS_WRITES else ()
        """(tensor, count): each tensor must have been written that often."""
        self._copies = [] if internals.COUNTS_WRITES else [(t, t.clone()) for t in written]
        self.allows_short_path = config_entry is not None and internals.COUNTS_WRITES
        """Whether ``values`` and ``writes`` are all there is to check, as ``plain_step`` does."""

    def is_valid(self) -> bool:
        """Return whether everything is unchanged."""
        return (
            self._scheduler.config is self._config
            and all(found.get(name) is value for found, name, value in self.values)
            and all(write_count(tensor) == count for tensor, count in self.writes)
            and all(torch.equal(tensor, copy) for tensor, copy in self._copies)
        )
