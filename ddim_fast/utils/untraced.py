"""Code that ``torch.compile`` runs as it is, instead of looking into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Break the graph of ``torch.compile`` around a function, such as NumPy code on integers, which
    it cannot turn into torch operations.

    ``torch.compiler.disable`` alone would load the compiler with this package, for everyone.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
