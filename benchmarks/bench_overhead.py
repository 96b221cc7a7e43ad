"""Call overhead of a checked ddim_step on 16 elements with ``out``, x.add_(m), and diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from step_case import StepCase

from ddim_fast import ddim_step

CALLS, FEW_CALLS = 1000, 5
CALLS_OF = {"ours in place": CALLS, "ours out": CALLS, "x.add_(m)": CALLS, "diffusers": FEW_CALLS}


def _batches(case: StepCase) -> dict[str, Callable[[], None]]:
    """Return batches of ``CALLS_OF`` calls, written out so that only the loop adds overhead."""
    x, m, row, out = case.x_t, case.model_output, case.step.coefficients, case.out
    diffusers = case.diffusers()["diffusers"]

    def ours_in_place():
        for _ in range(CALLS):
            ddim_step(x, m, row, out=x)

    def ours_out():
        for _ in range(CALLS):
            ddim_step(x, m, row, out=out)

    def add():
        for _ in range(CALLS):
            x.add_(m)

    def diffusers_step():
        for _ in range(FEW_CALLS):
            diffusers()

    return {"ours in place": ours_in_place, "ours out": ours_out, "x.add_(m)": add, "diffusers": diffusers_step}


def test_overhead(measure, benchmark, show):
    """Time one call, in batches of 1000 calls."""
    case = StepCase("eta0", (1, 16))
    batches = _batches(case)
    once = {**case.ours(), **case.diffusers(), "x.add_(m)": lambda: case.x_t.add_(case.model_output)}

    def check(name, _):
        case.prepare()
        result = once[name]()
        if name == "x.add_(m)":
            torch.testing.assert_close(result, (case.start.double() + case.model_output.double()).float())
        else:
            case.check(name, result)

    result = measure("overhead", batches, check, baseline="ours in place", prepare=case.prepare, units=CALLS_OF)
    benchmark.extra_info.update(microseconds_per_call={name: result.seconds(name) * 1e6 for name in batches})
    for name in batches:
        cells = {
            "us": f"{result.seconds(name) * 1e6:.2f}",
            "ratio": f"{result.ratio(name):.2f}",
            "spread": f"{100 * result.spread(name):.0f}%",
        }
        show("a call on 16 elements", call=name, **cells)
