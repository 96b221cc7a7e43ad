"""The slot of a module's forward: an attribute of the instance, which stands before its class's."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn


class KeptForward:
    """Something in a module's forward slot that computes what the module computed without it.

    Attributes:
        module: whose forward it is.
        replaced: what was in the slot; None for nothing, which is the forward of the class.
    """

    __slots__ = ("__weakref__", "module", "replaced")

    def __init__(self, module: nn.Module, replaced: Callable[..., Any] | None = None):
        self.module, self.replaced = module, replaced

    @property
    def eager(self) -> Callable[..., Any]:
        """The forward without it."""
        if self.replaced is not None:
            return self.replaced
        return types.MethodType(type(self.module).forward, self.module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.eager  # whose signature is this one's

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward without it, in a way that torch.compile traces."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        return KeptForward, (self.module, self.replaced)  # a copy of the module has no graphs

    def is_in_place(self) -> bool:
        """Return whether it is in the slot, and nothing stands before it."""
        return vars(self.module).get("forward") is self

    def put_in_place(self) -> None:
        """Put it into the slot."""
        self.module.forward = self  # type: ignore[method-assign]

    def take_away(self) -> None:
        """Put back what was in the slot, unless something else is there by now."""
        if not self.is_in_place():
            return
        if self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced  # type: ignore[method-assign]


def what_is_below(module: nn.Module) -> Any:
    """Return what is in the slot, or below what computes the same; None if nothing is."""
    found = vars(module).get("forward")
    return found.replaced if isinstance(found, KeptForward) else found


def what_replaces_forward(module: nn.Module) -> Any:
    """Return what is in the slot instead of the module's own forward; None if nothing is."""
    found = what_is_below(module)
    # accelerate leaves the class's own method there when it takes its hooks away.
    is_own = isinstance(found, types.MethodType) and found.__self__ is module
    return None if is_own and found.__func__ is type(module).forward else found
