"""The Triton kernels in Triton's interpreter, against float64.

Run by ``test_triton.py`` in a process with TRITON_INTERPRET=1.

The interpreter shows what the program says, not what is compiled: its ``tl.fma`` rounds twice and
its conversion to bfloat16 truncates, so results are held to float64 within the table of tolerances,
and bfloat16 is rounded here where the interpreter would not.
"""

import os

import numpy as np
import pytest
import torch
import triton_cases
from covering import covering

from ddim_fast.kernels import triton_step
from ddim_fast.kernels.contract import StepCoefficients, StepInputs, StepTable
from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.kernels.layout import as_rows
from ddim_fast.kernels.thresholding import dynamic_thresholds
from ddim_fast.kernels.triton_backend import dynamic_thresholds as thresholds_by_triton
from ddim_fast.kernels.triton_backend import run
from ddim_fast.verify.truth.tolerances import SCALED_EPS, to_numpy

CHOICES = [c for c in covering(triton_cases.OPTIONS, seed=2) if torch.bfloat16 not in (c["types"][0], c["model_input"])]


def test_triton_interprets_here():
    assert os.environ.get("TRITON_INTERPRET") == "1"
    assert type(triton_step.ddim_step_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("choice", CHOICES, ids=triton_cases.name_of)
def test_step_is_near_float64(choice, monkeypatch):
    # Twice the roundings of a fused multiply-add.
    monkeypatch.setitem(SCALED_EPS, torch.float32, 2 * SCALED_EPS[torch.float32])
    case = triton_cases.make(choice)
    case.check(run(case.inputs))


def test_a_million_elements_in_large_tiles():
    """Without noise.

    The interpreter takes minutes for it, the executed PTX half a second (test_triton.py).
    """
    rng = np.random.default_rng(0)
    x, m = (torch.from_numpy(rng.standard_normal((1, 1 << 20))).float() for _ in range(2))
    row = StepCoefficients(1.5, -0.5, 0.0, 1.0, 0.0, 0.75, 0.5, 0.0)
    got = run(StepInputs(x, m, row))
    expected = ddim_step(x.double(), m.double(), row, backend="reference")
    np.testing.assert_allclose(to_numpy(got), expected.numpy(), rtol=0, atol=1e-5)


def test_bfloat16_is_read_right():
    """Written in float32, since the interpreter truncates when it writes bfloat16."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((2, 1000))).float()
    m = torch.from_numpy(rng.standard_normal((2, 1000))).bfloat16()
    row = StepCoefficients(1.5, -0.5, 0.0, 1.0, 0.0, 0.75, 0.5, 0.0, clip=1.0)
    got = run(StepInputs(x, m, row))
    expected = ddim_step(x, m, row, backend="cpu")
    np.testing.assert_allclose(to_numpy(got), to_numpy(expected), rtol=0, atol=1e-6)


def test_thresholds_are_the_quantile():
    torch.manual_seed(0)
    x, m = torch.randn(2, 3, 5000)
    row = StepCoefficients(2.0, -1.5, 0, 1, 0, 0.5, 0.5, 0, clip=0.25)
    for ratio in (0.0, 0.3, 0.995, 1.0):
        got = thresholds_by_triton(StepInputs(x, m, row), ratio, 100.0)
        torch.testing.assert_close(got, dynamic_thresholds(x, m, row, ratio, 100.0), rtol=1e-6, atol=0)


def test_a_row_of_a_table():
    x, m = torch.randn(2, 2, 300)
    rows = [StepCoefficients(1.0, 0.0, 0.0, 1.0, 0.0, k, 0.0, 0.0) for k in (1.0, 2.0, 3.0)]
    for k in range(3):
        out = torch.empty_like(x)
        inputs = StepInputs(x, m, StepTable.of(rows), torch.tensor([k]), x_prev=out)
        triton_step.launch(as_rows(inputs, out), inputs.coefficients, inputs.index)
        assert torch.equal(out, (k + 1) * x)
