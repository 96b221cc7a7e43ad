"""What of a module a replay would not follow: everything that its Python code can read.

A graph bakes in where weights are, and every branch and number that Python took from the module.
``ModelState`` looks through the module for them: submodules, hooks, attributes with and without an
underscore, nested containers, plain objects, what its classes hold. What it cannot look into, or
knows to change between calls, is a doubt: ``capture="auto"`` then does without graphs.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
from collections import deque
from collections.abc import Hashable, Iterable
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels import layout
from ..kernels.same_objects import Snapshot
from ..kernels.torch_internals import GLOBAL_HOOKS, MODULE_PARTS, are_fake, compiled_by, flattened, write_count
from .contents import Contents
from .cuda_graphs import CaptureError
from .forward_slot import what_replaces_forward

PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_SAME = frozenset((*PLAIN, complex, range, type(...), torch.layout, torch.memory_format, torch.Size))
_NEVER_READ = (types.ModuleType, types.BuiltinFunctionType, type, enum.Enum, logging.Logger, np.dtype)
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | {"forward"}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement


class DoubtError(CaptureError):
    """A module for which ``capture="auto"`` cannot vouch."""

    def __init__(self, what: str):
        super().__init__(
            "a graph is kept of a model whose state can be seen and whose weights stay where they are, got one of "
            f"which {what}: run it without graphs"
        )


class ModelState:
    """The state of a module at one moment.

    Args:
        vouch_on: the device of the samples of a graph that has to be vouched for. None: doubts are
            only noted.

    Attributes:
        key: equal for states that lead to the same graph. It is hashed once.
        doubt: why nobody can vouch for a graph of this module, wherever it runs; None if one can.
        is_compiled: whether any of it is compiled by torch.compile.

    Raises:
        DoubtError: nobody can vouch for such a graph; as soon as it is found.
    """

    def __init__(self, model: nn.Module, vouch_on: torch.device | None = None):
        self.doubt: str | None = None
        self._vouch_on = vouch_on
        self.is_compiled = False
        self.kept: list[Any] = [model]  # what the key knows by its id
        self._seen: dict[int, int] = {}
        self._where: list[str] = []
        self._weights: dict[torch.device, str] = {}
        self._tensors: dict[torch.device, str] = {}
        self._made_here: list[Any] = []  # so that an id stands for one object
        self._dicts: list[dict[Any, Any]] = []
        self._iterables: list[Any] = []
        self._sets: list[set[Any]] = []
        self._objects: list[Any] = []  # whose classes can be changed
        self._places: list[Tensor] = []
        self._place_names: list[str] = []
        try:
            self.key = Key((id(model), (self._visit(model), self._named([("all modules' hooks", GLOBAL_HOOKS)]))))
        except RecursionError:
            self._doubt("is nested too deeply to be looked through")
            self.key = Key((id(model), None))
        self._snapshot = Snapshot(self._dicts, self._iterables, self._sets, self._objects, self._places)

    def is_current(self) -> bool:
        """Return whether nothing has changed since; cheaper than to make another state."""
        return self._snapshot.is_current()

    def vouch(self, device: torch.device) -> None:
        """Raise ``DoubtError`` if nobody can vouch for a graph with samples on this device."""
        for where, name in (self._weights | self._tensors).items():
            self._check_device(where, name, device)
        if self.doubt is not None:
            raise DoubtError(self.doubt)

    def _check_device(self, where: torch.device, name: str, device: torch.device) -> None:
        if not same_device(where, device):
            raise DoubtError(f"{name} is on {where}, and the samples are on {device}")

    def check_weights(self) -> None:
        """Raise ``DoubtError`` if no graph of this module can be right."""
        name = self._weights.get(torch.device("meta"))
        if name is not None:
            raise DoubtError(f"{name} is on meta, so its values come and go with each call")

    def writes(self) -> list[int | None]:
        """Return how often each tensor has been written in place; None where nothing counts."""
        return list(map(write_count, self._places))

    def written_since(self, writes: list[int | None], contents: Contents) -> dict[str, Tensor]:
        """Return the tensors that were written in place since ``writes`` and ``contents``, by their
        names. Not all operators count what they write: batch statistics are known by their values."""
        found = zip(self._place_names, self._places, writes, self.writes(), strict=True)
        return {name: each for name, each, before, after in found if before != after or contents.is_changed(each)}

    def contents(self) -> Contents:
        """Return what its containers hold now, and its tensors."""
        lists = [each for each in self._iterables if isinstance(each, (list, deque))]
        return Contents(self._dicts, lists, self._sets, self._places)

    def difference(self, other: ModelState) -> str | None:
        """Return the name of something that differs from another state of the module; None if
        nothing does."""
        return None if self.key == other.key else _first_difference(self.key.parts[1], other.key.parts[1], "the model")

    # ---- the whole of it ---------------------------------------------------------------------------------------

    def _doubt(self, what: str) -> None:
        if self.doubt is None:
            self.doubt = f"{'.'.join(self._where) or 'the model'} {what}"
            if self._vouch_on is not None:
                raise DoubtError(self.doubt)

    def _known_by_id(self, value: Any) -> Hashable:
        self.kept.append(value)
        return id(value)

    def _visit(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in _SAME:
            return plain_key(value)
        if isinstance(value, Tensor):
            return self._tensor(value, self._tensors)
        if isinstance(value, (PurePath, np.generic)):
            return kind, repr(value)
        if isinstance(value, _NEVER_READ):
            return self._known_by_id(value)
        known = self._seen.get(id(value))
        if known is not None:
            return "again", known
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (list, tuple, deque, set, frozenset, dict, types.MappingProxyType)):
            return self._container(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            return self._function(value)
        return self._object(value)

    def _named(self, pairs: Iterable[tuple[Any, Any]], without: frozenset[str] = frozenset()) -> Hashable:
        found = []
        for name, value in pairs:
            if name not in without:
                self._where.append(str(name))
                found.append((name if isinstance(name, str) else self._visit(name), self._visit(value)))
                self._where.pop()
        return tuple(found)

    def _module(self, module: nn.Module) -> Hashable:
        held = vars(module)
        self._dicts.append(held)
        self._objects.append(module)
        parameters, buffers, modules, *hooks = parts = [held[name] for name in MODULE_PARTS]
        self._dicts += parts
        compiler = compiled_by(module)
        if compiler is not None:
            self.is_compiled = True
            if compiler.makes_graphs is not False:
                how = (
                    "with CUDA graphs of its own" if compiler.makes_graphs else "by a backend that may make CUDA graphs"
                )
                self._doubt(f"is compiled {how}")
        without = _BOOKKEEPING if compiler is None else _BOOKKEEPING | compiler.attributes
        forward = None if compiler is not None and "forward" in compiler.attributes else what_replaces_forward(module)
        if forward is not None:
            self._doubt("has its forward replaced, as hooks that move weights do")
        if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
            self._doubt("is a dropout in training mode, which draws random numbers")
        if "peft_config" in held:
            self._doubt("has adapters of peft")
        weights = []
        for name, weight in chain(parameters.items(), buffers.items()):
            self._where.append(name)
            weights.append((name, None if weight is None else self._tensor(weight, self._weights)))
            self._where.pop()
        return (
            type(module),
            self._class(type(module)),
            None if compiler is None else self._known_by_id(compiler.identity),
            tuple(weights),
            self._named(held.items(), without),
            () if forward is None else ("forward", self._visit(forward)),
            tuple(self._visit(hook) for kind in hooks for hook in kind.values()),
            self._named(modules.items()),
        )

    def _class(self, kind: type) -> Hashable:
        """Return what the classes between a class and torch's or Python's own hold."""
        if id(kind) in self._seen:
            return "again", self._seen[id(kind)]
        self._seen[id(kind)] = len(self._seen)
        found = []
        for each in kind.__mro__:
            if each.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
                continue
            self._iterables += [vars(each).keys(), vars(each).values()]
            for name, value in vars(each).items():
                if name.startswith("__") and name != "__call__":
                    continue
                if type(value) in _SAME or isinstance(value, (list, dict, set, tuple, Tensor)):
                    found.append((name, self._visit(value)))
                else:
                    found.append((name, self._known_by_id(value)))
        return tuple(found)

    def _container(self, value: Any) -> Hashable:
        kind = type(value)
        if isinstance(value, dict):
            self._dicts.append(value)
            return kind, self._named(value.items()), self._named(self._attributes(value).items())
        if isinstance(value, types.MappingProxyType):
            self._doubt(f"holds a {kind.__name__}, behind which a dictionary can change unseen")
            return kind, self._named(value.items())
        if isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                self._sets.append(value)
            return kind, frozenset(self._visit(item) for item in value)
        if not isinstance(value, tuple):
            self._iterables.append(value)
        return kind, tuple(map(self._visit, value)), self._named(self._attributes(value).items())

    def _attributes(self, value: Any) -> dict[str, Any]:
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict):
            return {}
        self._dicts.append(held)
        self._objects.append(value)
        return held

    def _function(self, value: Any) -> Hashable:
        if isinstance(value, types.MethodType):
            return "method", self._visit(value.__func__), self._visit(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self._visit(value.func), self._visit(value.args), self._visit(value.keywords)
        if value.__closure__:
            self._doubt(f"holds the function {value.__qualname__}, which closes over what cannot be seen")
        return self._known_by_id(value), self._named(self._attributes(value).items())

    def _object(self, value: Any) -> Hashable:
        kind = type(value)
        own = [each for each in kind.__mro__ if each is not object]
        is_python = all(each.__flags__ & _HEAP_TYPE and not _slots(each) for each in own)
        if not is_python or not isinstance(getattr(value, "__dict__", None), dict):
            self._doubt(f"holds a {kind.__module__}.{kind.__qualname__}, which cannot be looked into")
            return self._known_by_id(value)
        return kind, self._class(kind), self._named(self._attributes(value).items())

    def _tensor(self, tensor: Tensor, among: dict[torch.device, str]) -> Hashable:
        if tensor.device not in among:
            among[tensor.device] = name = ".".join(self._where)
            if self._vouch_on is not None:
                self._check_device(tensor.device, name, self._vouch_on)
        kind = type(tensor)
        inner = flattened(tensor) if layout.is_wrapper(tensor) else None
        if inner is None:
            try:
                address = tensor.data_ptr()
            except RuntimeError:  # sparse, or a wrapper
                address = 0
            if address == 0 and tensor.numel() > 0 and tensor.device.type != "meta":
                self._doubt(f"is a tensor of type {kind.__module__}.{kind.__qualname__}, whose memory cannot be seen")
                return self._known_by_id(tensor), self._named(self._attributes(tensor).items())
            self._places.append(tensor)
            self._place_names.append(".".join(self._where))
            # A fake tensor's attributes are its mode's.
            rest = None if are_fake() else self._named(self._attributes(tensor).items())
            return kind, address, tensor.dtype, tuple(tensor.shape), tensor.stride(), rest
        tensors, rest = inner
        self._made_here += [*tensors.values(), rest]
        self._attributes(tensor)
        return (
            kind,
            tuple(tensor.shape),
            tuple((name, self._tensor(each, among)) for name, each in tensors.items()),
            self._visit(rest),
        )


class Key:
    """Nested tuples that are hashed once, and compared by identity first."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: tuple[Any, ...]):
        self.parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._hash == other._hash and self.parts == other.parts)


def plain_key(value: Any) -> Hashable:
    """Return a key that differs between True and 1 and between 0.0 and -0.0, and is the same for
    every NaN."""
    return type(value), value.hex() if isinstance(value, float) else value


def _slots(kind: type) -> bool:
    slots = vars(kind).get("__slots__", ())
    return bool({slots} if isinstance(slots, str) else set(slots) - {"__dict__", "__weakref__"})


def same_device(a: torch.device, b: torch.device) -> bool:
    """Return whether two devices are one; without an index, any of the kind."""
    return a.type == b.type and (None in (a.index, b.index) or a.index == b.index)


def _first_difference(a: Any, b: Any, name: str) -> str:
    """Return the name of the innermost part in which two keys differ."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        if _is_pair(a) and _is_pair(b) and a[0] == b[0]:
            return _first_difference(a[1], b[1], a[0] if name == "the model" else f"{name}.{a[0]}")
        for left, right in zip(a, b, strict=False):
            if left != right:
                return _first_difference(left, right, name)
        longer = max(a, b, key=len)
        if len(a) != len(b) and _is_pair(longer[min(len(a), len(b))]):
            return _first_difference((), (longer[min(len(a), len(b))],), name)
    if a == () and isinstance(b, tuple) and len(b) == 1 and _is_pair(b[0]):
        return b[0][0] if name == "the model" else f"{name}.{b[0][0]}"
    return name


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str)
