"""Loops of 10 to 1000 steps with a free model: only the update and its overhead are timed."""

from __future__ import annotations

import pytest
import torch
from loop_case import LoopCase

SHAPES = {"1x4x64x64": (1, 4, 64, 64), "64x3x32x32": (64, 3, 32, 32)}
CASES = [("1x4x64x64", 10), ("1x4x64x64", 50), ("1x4x64x64", 200), ("1x4x64x64", 1000), ("64x3x32x32", 50)]
QUICK = ("1x4x64x64", 50)


def free_model(output: torch.Tensor):
    """Return a model that returns a precomputed tensor."""
    return lambda x, t: output


@pytest.mark.parametrize(
    ("shape", "steps"), [pytest.param(*case, marks=() if case == QUICK else pytest.mark.full) for case in CASES]
)
def test_loop(shape, steps, measure, benchmark, show):
    """Time a full loop."""
    generator = torch.Generator().manual_seed(0)
    x_T, output = (torch.randn(SHAPES[shape], generator=generator) for _ in range(2))
    case = LoopCase(free_model(output), free_model(output.double()), x_T, steps)
    contenders = case.contenders()
    result = measure("loops", contenders, case.check, baseline="ours")
    per_step = {name: result.seconds(name) / steps * 1e6 for name in contenders}
    benchmark.extra_info.update(shape=shape, steps=steps, microseconds_per_step=per_step)
    show(
        "loops with a free model: us per step, and times longer than ours",
        shape=shape,
        steps=str(steps),
        **{"ours, us": f"{per_step['ours']:.1f}"},
        **{name: f"{result.ratio(name):.2f}" for name in contenders if name != "ours"},
        spread=f"{100 * result.spread('ours'):.0f}%",
    )
