"""What is declared once, in kernels/fields.py and kernels/coefficients.py, against the places that repeat it."""

import ast
import dataclasses
import inspect
import math
import re
import struct
from pathlib import Path

import pytest
import torch

from ddim_fast.kernels import dispatch, reference, triton_step, triton_sums
from ddim_fast.kernels.coefficients import ONLY_IN_TABLE, ROW_WIDTH, Column, StepCoefficients, StepTable
from ddim_fast.kernels.fields import NUMBERS, PER_ELEMENT, PER_SAMPLE, READ_ONLY, TENSORS, WRITTEN, StepInputs

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
FIELDS = [field.name for field in dataclasses.fields(StepInputs) if field.init]
OTHER_NAMES = {"target": "x_prev", "x0_out": "x0", "out": "x_prev"}  # of arguments of ddim_step


def source(name):
    return re.sub(r"//[^\n]*", "", (CSRC / name).read_text())


def body(pattern, text):
    return re.search(pattern + r"\s*(?:=\s*)?\{(.*?)\}", text, re.DOTALL)[1]


def camel_case(name):
    return "k" + "".join(part.capitalize() for part in name.split("_"))


# --- Columns ---------------------------------------------------------------------------------------


def test_columns_are_those_of_the_c_struct():
    declared = re.findall(r"\b\w+(?=[,;])", body("struct Coefficients", source("step.h")))
    assert [name.upper() for name in declared] == [column.name for column in Column if column not in ONLY_IN_TABLE]
    assert [int(column) for column in Column] == list(range(len(Column)))
    assert 1 << (len(Column) - 1).bit_length() == ROW_WIDTH  # kernels multiply an index by it


def test_each_column_holds_its_number():
    more = {"known_x0": 23, "known_noise": 29, "prev_history": 31, "prev_history_2": 41, "input_scale": 43}
    row = StepCoefficients(2, 3, 5, 7, 11, 13, 17, 19, clip=0.5, **more)
    total = 13 + 17 * 11
    expected = {
        "FOLD_X": total * 2 + 17 * 5,
        "FOLD_M": total * 3 + 17 * 7,
        "NOISE": 19,
        "CLIP_X": total * 2,
        "CLIP_M": total * 3,
        "CLIP_BOUND": total * 0.5,
        "REST_X": 17 * 5,
        "REST_M": 17 * 7,
        "X0_X": 2,
        "X0_M": 3,
        "X0_BOUND": 0.5,
        "CLIP_SCALE": total,
        "KNOWN_X0": 23,
        "KNOWN_NOISE": 29,
        "HISTORY": 31,
        "GUIDANCE_SCALE": 37,
        "HISTORY_2": 41,
        "INPUT_SCALE": 43,
        "LOG_PROB_SCALE": 1 / (2 * 19**2),
        "LOG_PROB_OFFSET": math.log(19) + math.log(2 * math.pi) / 2,
    }
    numbers = row.row(37)
    assert {column.name: numbers[column] for column in Column} == expected
    assert numbers[len(Column) :] == (0,) * (ROW_WIDTH - len(Column))
    others = [column.name for column in ONLY_IN_TABLE]
    assert struct.unpack("=17fI", row.packed) == (*(expected[n] for n in expected if n not in others), True)
    table = StepTable.of([row], guidance_scale=37)
    assert [float(value) for value in table.prediction(torch.tensor([0]))] == [2, 3, 0.5, 37]


@pytest.mark.parametrize("clip", [math.inf, 0.3])
def test_coefficients_of_a_row_keep_its_bits_and_forget_them_when_replaced(clip):
    more = {"prev_history": -0.3, "prev_history_2": 0.7, "input_scale": 1.3}
    row = StepCoefficients(1.1, -0.7, 0.3, 0.9, 0.2, 0.8, 0.6, 0.1, clip=clip, **more)
    again, guidance_scale = StepTable.of([row], guidance_scale=5).coefficients(0)
    assert again.packed == row.packed
    assert guidance_scale == 5
    assert {name: getattr(again, name) for name in more} == pytest.approx(more)
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(again, prev_noise=0.5)  # nothing says what its bits would be


# --- Tensors and numbers -----------------------------------------------------------------------------


def test_every_field_has_a_rule():
    assert set(TENSORS) | set(NUMBERS) | {"coefficients", "index"} == set(FIELDS)
    assert set(PER_ELEMENT) | set(PER_SAMPLE) == set(TENSORS) == set(WRITTEN) | set(READ_ONLY)
    assert all(rule.read or rule.written for rule in TENSORS.values())


def test_c_reads_the_tensors_in_order():
    members = re.findall(r"&Step::(\w+)", body(r"kPerElement\[\]", source("step.h")))
    assert tuple(members) == PER_ELEMENT


def step_arguments():
    *names, last = re.findall(r"\w+", body("enum StepArgument", source("module.cpp")))
    assert last == "kNumStepArguments"
    return names


def tree_of_ddim_step():
    return ast.parse(inspect.getsource(dispatch.ddim_step))


def test_c_takes_the_arguments_of_a_plain_step_in_order():
    plain = [name for name in FIELDS if camel_case(name) in step_arguments()]
    assert [camel_case(name) for name in plain] == step_arguments()
    (call,) = [
        node
        for node in ast.walk(tree_of_ddim_step())
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "_run_plain"
    ]
    assert [OTHER_NAMES.get(argument.id, argument.id) for argument in call.args] == plain


def test_a_step_with_any_other_argument_is_not_plain():
    (assigned,) = [
        node.value
        for node in ast.walk(tree_of_ddim_step())
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "plain"
    ]
    asked = {node.id for node in ast.walk(assigned) if isinstance(node, ast.Name)}
    others = {name for name in FIELDS if camel_case(name) not in step_arguments()} - {"index"}
    assert asked == others | {"backend"}


def test_public_functions_have_every_argument():
    for function in (dispatch.ddim_step, dispatch.ddim_step_from_table):
        names = [OTHER_NAMES.get(name, name) for name in inspect.signature(function).parameters]
        in_table = {name for name, rule in NUMBERS.items() if rule.in_table}
        expected = set(FIELDS) - ({"index"} if function is dispatch.ddim_step else in_table | {"coefficients"})
        assert set(names) - {"backend", "table"} == expected


def test_triton_reads_every_tensor():
    names = inspect.signature(triton_step.ddim_step_kernel.fn).parameters
    pointers = {name.removesuffix("_ptr") for name in names if name.endswith("_ptr")}
    strides = {name.removesuffix("_stride") for name in names if name.endswith("_stride")}
    assert pointers == set(TENSORS) | {"rows", "index", "block_sums"}
    assert strides == set(PER_ELEMENT)
    for column in Column:
        if column is not Column.CLIP_SCALE:  # per-sample bounds are folded into other columns
            module = triton_sums if column.name.startswith("LOG_PROB") else triton_step
            assert getattr(module, column.name).value == column


def test_the_reference_reads_every_tensor():
    text = inspect.getsource(reference)
    for name in TENSORS:
        assert f"inputs.{name}" in text


def test_operators_declare_what_is_written():
    for operator in (torch.ops.ddim_fast.step_, torch.ops.ddim_fast.step_from_table_):
        arguments = operator.default._schema.arguments
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        assert written == set(WRITTEN)
        assert {a.name for a in arguments} >= set(TENSORS) | {
            name for name, rule in NUMBERS.items() if not rule.in_table or operator is torch.ops.ddim_fast.step_
        }
