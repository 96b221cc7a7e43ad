"""Add config fields of our own to a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import register_to_config

from ...utils.checks import refuse


def add_config_fields(original: type) -> Callable[[Callable[..., None]], Any]:
    """Decorate an ``__init__(self, *args, <fields>, **kwargs)``.

    Its signature, which diffusers reads for the config, becomes the original's with these fields
    added.
    """

    def decorate(init: Callable[..., None]) -> Any:
        added = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        inherited = list(inspect.signature(original.__init__).parameters.values())  # type: ignore[misc] # read only
        rest = [inherited.pop()] if inherited[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        init.__signature__ = inspect.Signature([*inherited, *added, *rest])  # type: ignore[attr-defined] # of any function
        return register_to_config(init)

    return decorate


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless every value is a bool."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            refuse(f"{name} must be True or False", value, kind=TypeError)
