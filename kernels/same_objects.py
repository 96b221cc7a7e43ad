"""Whether containers hold the very objects that they held, and tensors are where they were.

This is asked before each replay of a captured loop, of all that a model holds. So it has two
executions: what follows, and csrc/same_objects.cpp, which takes a twentieth of the time.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

from torch import Tensor

from . import cpu_step
from .layout import is_wrapper

_END = object()
_LAYOUT = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))


class Snapshot:
    """What containers hold and where tensors are, at one moment. It keeps all of them alive.

    Objects are compared by identity, and not looked into: what they hold is another container's.

    Args:
        dicts: their keys and values count, in the order in which they were put there. Of an
            ``OrderedDict``, its own order counts, too.
        iterables: lists, queues, views of dictionaries: what iterating gives, one after the other.
        sets: their members count.
        objects: their classes count.
        tensors: their addresses, shapes, strides and dtypes count.
    """

    def __init__(
        self,
        dicts: Iterable[dict[Any, Any]] = (),
        iterables: Iterable[Any] = (),
        sets: Iterable[set[Any]] = (),
        objects: Iterable[Any] = (),
        tensors: Iterable[Tensor] = (),
    ):
        self._dicts, self._sets, self._objects = tuple(dicts), tuple(sets), tuple(objects)
        ordered = (each for each in self._dicts if isinstance(each, OrderedDict) and dict.__len__(each))
        self._iterables = (*iterables, *ordered)
        self._counted = [*map(dict.keys, self._dicts), *self._iterables, *self._sets]
        self._lengths = list(map(len, self._counted))
        # What was empty still is, as long as its length is the same.
        filled = [each for each in self._dicts if dict.__len__(each)]
        self._views = [view for each in filled for view in (dict.keys(each), dict.values(each))]
        self._views += [each for each in self._iterables if len(each)]
        self._filled_sets = [each for each in self._sets if len(each)]
        self._held = list(self._all_held())
        words = (*self._lengths, *map(id, self._held))
        self._record = struct.pack(f"{len(words)}N", *words)
        tensors = list(tensors)
        self._plain = tuple(tensor for tensor in tensors if _is_read_by_cpp(tensor))
        self._layouts = None if cpu_step.extension is None else cpu_step.extension.layouts(self._plain)
        plain = set(map(id, self._plain))
        self._others = [tensor for tensor in tensors if id(tensor) not in plain]
        self._other_layouts = list(_layouts_of(self._others))

    def is_current(self) -> bool:
        """Return whether all of it is as it was."""
        try:
            return self._holds_the_same() and self._are_where_they_were()
        except RuntimeError:  # something changed while it was looked at
            return False

    def _holds_the_same(self) -> bool:
        if cpu_step.extension is None:
            return self._holds_the_same_in_python()
        return cpu_step.extension.same_objects(self._dicts, self._iterables, self._sets, self._objects, self._record)

    def _holds_the_same_in_python(self) -> bool:
        lengths = map(eq, map(len, self._counted), self._lengths)
        return all(lengths) and all(map(is_, chain(self._all_held(), (_END,)), chain(self._held, (_END,))))

    def _all_held(self) -> Iterator[Any]:
        """Return everything that is held, one after the other."""
        members = (sorted(each, key=id) for each in self._filled_sets)
        return chain(chain.from_iterable(self._views), chain.from_iterable(members), map(type, self._objects))

    def _are_where_they_were(self) -> bool:
        if self._plain and cpu_step.extension.layouts(self._plain) != self._layouts:
            return False
        return not self._others or all(map(eq, _layouts_of(self._others), self._other_layouts))


def _is_read_by_cpp(tensor: Tensor) -> bool:
    if cpu_step.extension is None or is_wrapper(tensor):
        return False
    return cpu_step.extension.layouts((tensor,)) is not None


def _layouts_of(tensors: list[Tensor]) -> Iterator[Any]:
    return chain.from_iterable(map(method, tensors) for method in _LAYOUT)
