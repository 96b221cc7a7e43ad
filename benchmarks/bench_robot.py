"""A robot policy: 16 actions of 7 numbers from a small 1-D U-Net, batch size 1.

The overhead around the model dominates.
"""

from __future__ import annotations

import copy

import pytest
import torch
from loop_case import LoopCase
from policy import ACTIONS, HORIZON, OBSERVED, PolicyUNet

CASES = [(10, "contiguous"), (20, "contiguous"), (100, "contiguous"), (20, "transposed")]
QUICK = (20, "contiguous")


def policy_case(steps: int, layout: str = "contiguous") -> LoopCase:
    torch.manual_seed(0)
    model = PolicyUNet(layout).eval().requires_grad_(False)
    x_T, observation = torch.randn(1, HORIZON, ACTIONS), torch.randn(1, OBSERVED)
    return LoopCase(model, copy.deepcopy(model).double(), x_T, steps, {"observation": observation})


@pytest.mark.parametrize(
    ("steps", "layout"), [pytest.param(*case, marks=() if case == QUICK else pytest.mark.full) for case in CASES]
)
def test_policy(steps, layout, measure, benchmark, show):
    """Time one sequence of actions."""
    case = policy_case(steps, layout)
    contenders = case.contenders()
    result = measure("robot", {**contenders, "model alone": case.model_alone()}, case.check, baseline="ours")
    share = result.ratio("model alone")
    benchmark.extra_info.update(shape="1x16x7", steps=steps, layout=layout, share_of_the_model=share)
    show(
        "a robot policy, 16 x 7 actions: ms, and times longer than ours",
        steps=str(steps),
        layout=layout,
        **{"ours, ms": f"{result.seconds('ours') * 1e3:.2f}"},
        **{name: f"{result.ratio(name):.2f}" for name in contenders if name != "ours"},
        **{"of ours, the model": f"{100 * share:.0f}%"},
        spread=f"{100 * result.spread('ours'):.0f}%",
    )
