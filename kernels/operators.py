"""The step as torch operators, for torch.compile, make_fx and torch.export: one node in a graph,
with what it writes declared.

``dispatch.ddim_step`` and ``ddim_step_from_table`` call these where they are traced. Elsewhere they
call a backend directly, without torch's dispatcher. Schemas and arguments come from ``fields``.

Both operators write ``x_prev`` and, where given, the other tensors that a step writes. ``x_t`` may
be None: then ``x_prev`` holds it, and is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

from .coefficients import StepCoefficients, StepTable
from .fields import NUMBERS, TENSORS, WRITTEN, StepInputs

_ALWAYS_GIVEN = {field.name for field in fields(StepInputs) if field.default is MISSING} - {"x_t"} | {"x_prev"}
_TENSORS = (*WRITTEN, *(name for name in TENSORS if name not in WRITTEN))
_ROW = {"coefficients": "float[]"}  # the fields of ``StepCoefficients``, in order
_TABLE = {field.name: {"rows": "Tensor", "min_std": "float?"}.get(field.name, "bool") for field in fields(StepTable)}


def _arguments(from_table: bool) -> dict[str, str]:
    """Return the names of an operator's arguments, in order, with their types in a schema."""
    types = {}
    for name in _TENSORS:
        alias = f"(a{WRITTEN.index(name)}!)" if name in WRITTEN else ""
        types[name] = f"Tensor{alias}" + ("" if name in _ALWAYS_GIVEN else "?")
    types |= _TABLE | {"index": "Tensor"} if from_table else _ROW
    return types | {name: rule.schema for name, rule in NUMBERS.items() if not (from_table and rule.in_table)}


_STEP, _STEP_FROM_TABLE = _arguments(from_table=False), _arguments(from_table=True)


def arguments_of(inputs: StepInputs, x_prev: Tensor) -> dict[str, Any]:
    """Return the arguments of the operator that takes these steps, which writes ``x_prev``."""
    row = inputs.coefficients
    if isinstance(row, StepTable):
        arguments = {name: getattr(row, name) for name in _TABLE}
        names = _STEP_FROM_TABLE
    else:
        arguments = {"coefficients": row.columns}
        names = _STEP
    arguments |= {name: getattr(inputs, name) for name in names if name not in arguments}
    return arguments | {"x_prev": x_prev, "x_t": None if x_prev is inputs.x_t else inputs.x_t}


def _inputs_of(names: dict[str, str], values: tuple[Any, ...]) -> StepInputs:
    given = dict(zip(names, values, strict=True))
    if given["x_t"] is None:
        given["x_t"] = given["x_prev"]
    if names is _STEP:
        return StepInputs(**given | {"coefficients": StepCoefficients(*given["coefficients"])})
    table = StepTable(**{name: given.pop(name) for name in _TABLE})
    return StepInputs(coefficients=table, **given)


def register(run: Callable[[StepInputs], Tensor], run_from_table: Callable[[StepInputs], Tensor]) -> None:
    """Define the operators ``ddim_fast::step_`` and ``ddim_fast::step_from_table_``, run by these
    functions."""

    def step_(*values: Any) -> None:
        run(_inputs_of(_STEP, values))

    def step_from_table_(*values: Any) -> None:
        run_from_table(_inputs_of(_STEP_FROM_TABLE, values))

    for name, function, arguments in (
        ("step_", step_, _STEP),
        ("step_from_table_", step_from_table_, _STEP_FROM_TABLE),
    ):
        schema = "(" + ", ".join(f"{type_} {argument}" for argument, type_ in arguments.items()) + ") -> ()"
        operator = torch.library.custom_op(f"ddim_fast::{name}", function, mutates_args=WRITTEN, schema=schema)
        operator.register_fake(lambda *values: None)
