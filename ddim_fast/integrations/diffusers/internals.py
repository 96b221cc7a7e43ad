"""The private names of diffusers and torch that the drop-ins use. Each has a public fallback."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ...kernels.torch_internals import WRITE_COUNT

COUNTS_WRITES = WRITE_COUNT is not None
"""Whether torch counts the writes to a tensor.

Saves keeping and comparing copies of the noise levels.
"""


def config_entry(scheduler: Any) -> tuple[dict[str, Any], str, Any] | None:
    """Return (dictionary, key, value) of a scheduler's config, or None if it is kept elsewhere.

    Saves a call of the property ``config`` in each step: C++ compares the
    value with the one that the rows were computed from. The fallback reads the property, and each
    step takes the general path.
    """
    attributes = vars(scheduler)
    config = scheduler.config
    return (attributes, "_internal_dict", config) if attributes.get("_internal_dict") is config else None


def scales_up(scheduler: Any) -> bool:
    """Return whether the steps of a ``FlowMatchLCMScheduler`` scale the sample up."""
    return bool(scheduler._scale_factors and scheduler._upscale_mode)


def attention_backend() -> Any:
    """Return which implementation of attention diffusers' models use unless theirs is set.

    There is no public way to ask. Without the name, a graph goes on with the one that it was
    captured with.
    """
    with suppress(ImportError, AttributeError):
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        return str(_AttentionBackendRegistry._active_backend)
    return None
