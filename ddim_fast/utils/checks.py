"""Check arguments: every error states the rule, the value received and, where there is one, the
remedy.

    check_integer("window", window, at_least=1, remedy="1 solves for one step at a time")

raises ``window must be an integer, at least 1, got 0: 1 solves for one step at a time``. A value of
the wrong kind is a TypeError, a value out of range a ValueError.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .suggestions import did_you_mean

_MOST_OF_TEXT, _MOST_OF_OTHERS = 200, 80
"""Characters that an error shows: of text, paths and numbers; and of other values."""


def refuse(rule: str, value: object, remedy: str = "", kind: type[Exception] = ValueError) -> NoReturn:
    """Raise ``kind`` with ``rule, got VALUE: remedy``."""
    raise kind(f"{rule}, got {shown(value)}" + (f": {remedy}" if remedy else ""))


def shown(value: object) -> str:
    """Return a value for an error, in one line: a tensor or an array with dimensions by its shape and
    dtype, and what has a long text, such as a pipeline or a config, by its beginning."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    text = repr(value)
    if "\n" in text and not isinstance(value, (Tensor, np.ndarray)):  # what describes itself in lines
        return f"an object of class {type(value).__name__}"
    most = _MOST_OF_TEXT if isinstance(value, (str, bytes, os.PathLike, Real)) else _MOST_OF_OTHERS
    return text if len(text) <= most else f"{text[: most - 3]}..."


def as_index(value: Any) -> int:
    """Return ``value`` as an int, as ``operator.index`` does.

    Raises:
        TypeError: it is not an integer.
    """
    # torch.compile fails in operator.index of an IntEnum.
    return int(value) if isinstance(value, int) else operator.index(value)


def check_choice(name: str, value: object, choices: Iterable[str], remedy: str = "") -> None:
    """Raise ValueError unless ``value`` is one of ``choices``; it names the nearest, or else the
    remedy."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        refuse(f"{name} must be one of {', '.join(choices)}", value, did_you_mean(value, choices) or remedy)


def check_integer(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None, remedy: str = ""
) -> int:
    """Return ``value`` as an int.

    Raises:
        TypeError: it is not an integer (a bool is none).
        ValueError: it is below ``at_least`` or above ``at_most``.
    """
    rule = f"{name} must be an integer" + _range(at_least, at_most)
    try:
        number = as_index(value)
    except TypeError:
        refuse(rule, value, remedy, TypeError)
    if isinstance(value, bool):
        refuse(rule, value, remedy, TypeError)
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        refuse(rule, number, remedy)
    return number


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    remedy: str = "",
) -> float:
    """Return ``value`` as a finite float.

    Raises:
        TypeError: it is not a real number (a bool is none).
        ValueError: it is not finite, below ``at_least``, not above ``above``, or above ``at_most``.
    """
    rule = f"{name} must be a finite number" + _range(at_least, at_most, above)
    if not isinstance(value, Real) or isinstance(value, bool):
        refuse(rule, value, remedy, TypeError)
    try:
        number = float(value)
    except OverflowError:
        refuse(rule, value, remedy)
    if (
        not math.isfinite(number)
        or (at_least is not None and number < at_least)
        or (above is not None and number <= above)
        or (at_most is not None and number > at_most)
    ):
        refuse(rule, value, remedy)
    return number


def _range(at_least: float | None, at_most: float | None, above: float | None = None) -> str:
    if at_least is not None and at_most is not None:
        return f" in [{at_least}, {at_most}]"
    if above is not None and at_most is not None:
        return f" in ({above}, {at_most}]"
    if at_least is not None:
        return f", at least {at_least}"
    if above is not None:
        return f", above {above}"
    return "" if at_most is None else f", at most {at_most}"


def check_sample_shape(name: str, value: Any) -> tuple[int, ...]:
    """Return the shape of one sample, ``(C, ...)``, as a tuple.

    Raises:
        TypeError: it is no sequence of integers.
        ValueError: it is empty, or a size is below 1.
    """
    rule, remedy = f"{name} must be that of one sample, (C, ...)", f"for instance {name}=(3, 32, 32)"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        refuse(rule, value, remedy, TypeError)
    if not value:
        refuse(rule, tuple(value), remedy)
    return tuple(check_integer(f"{name}[{i}]", size, at_least=1, remedy=remedy) for i, size in enumerate(value))


def check_path(name: str, value: Any) -> Path:
    """Return ``value`` as a path.

    Raises:
        TypeError: it is neither text nor a path.
        ValueError: it contains a NUL character, which no path can.
    """
    rule = f"{name} must be a path, as text or a pathlib.Path"
    if not isinstance(value, (str, os.PathLike)):
        refuse(rule, value, kind=TypeError)
    path = os.fspath(value)
    if not isinstance(path, str):
        refuse(rule, value, kind=TypeError)
    if "\0" in path:
        refuse(f"{name} must be a path, without NUL characters", value)
    return Path(path)


def check_text(name: str, value: Any, remedy: str = "") -> str:
    """Return ``value``.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty.
    """
    if not isinstance(value, str) or not value:
        refuse(f"{name} must be text, not empty", value, remedy, ValueError if value == "" else TypeError)
    return value


def check_memory(name: str, value: object, needed: int, remedy: str) -> None:
    """Raise ValueError where more bytes are needed than this machine, or this container, has."""
    there = _memory()
    if needed > there:
        rule = f"{name} must fit into memory, of {there // 10**9} GB, and would take at least {needed // 10**9:,} GB"
        refuse(rule, value, remedy)


def _memory() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another system; "max"
        return machine


def check_callable(name: str, value: object, remedy: str = "") -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        refuse(f"{name} must be callable", value, remedy, TypeError)


def check_device(name: str, value: Any) -> torch.device:
    """Return ``value`` as a device.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be one of this machine, got {shown(value)}: for instance 'cpu'") from error


def check_samples(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a floating-point tensor ``(B, C, ...)``."""
    rule = f"{name} must be a floating-point tensor (B, C, ...)"
    if isinstance(value, np.ndarray):
        raise TypeError(f"{rule}, got an array {value.shape} {value.dtype}: use torch.from_numpy({name}).float()")
    if not isinstance(value, Tensor):
        refuse(rule, value, kind=TypeError)
    if value.dtype == torch.uint8:
        refuse(rule, value.dtype, f"pictures of 8 bits are {name}.float() / 127.5 - 1", TypeError)
    is_float = value.dtype.is_floating_point
    if not is_float or value.is_nested or value.ndim < 2:
        if value.is_nested or value.layout != torch.strided:
            refuse(rule, value, kind=TypeError)
        remedy = f"{name}.view(B, C, ...)" if is_float else f"{name}.float()"
        raise TypeError(f"{rule}, got {tuple(value.shape)} {value.dtype}: use {remedy}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}: call .to_dense()")


def check_dtype(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a floating-point dtype."""
    if not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{name} must be a floating-point torch.dtype such as torch.float16, got {shown(value)}")


def check_alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError where two tensors of samples differ in shape, dtype or device."""
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(other, what), getattr(value, what)
        if wanted != got:
            shown = [tuple(x) if what == "shape" else x for x in (wanted, got)]
            raise ValueError(
                f"{name} must have the {what} of {other_name}, {shown[0]}, got {shown[1]}: convert one of them"
            )


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: there is no such name, it is "meta", or torch finds no CUDA device.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device must be a torch device such as cpu, cuda or cuda:1, got {shown(device)}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be one that torch finds, and it finds no CUDA device, got {str(found)!r}: use cpu, or a torch "
            "built for CUDA on a machine with a GPU"
        )
    if found.type == "meta":
        raise ValueError("device must be one that holds numbers, got meta: use cpu or cuda")
    return found
