"""The step with its log-probability, and the log-probability with its gradient, against the formulas that public code for policy gradients
has, in eager PyTorch and under torch.compile."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim_fast import NoiseSchedule, SamplingPlan, ddim_log_prob, ddim_step
from ddim_fast.kernels import cpu_step

SHAPES = [(1, 4, 64, 64), pytest.param((16, 16, 128, 128), marks=pytest.mark.full)]
DTYPES = [torch.float32, torch.bfloat16]
per_case = pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for shape in SHAPES[:1] for dtype in DTYPES]
    + [pytest.param(*shape.values, dtype, marks=shape.marks) for shape in SHAPES[1:] for dtype in DTYPES],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
needs_extension = pytest.mark.skipif(cpu_step.extension is None, reason="the C++ extension is missing")


class Case:
    """One step of 50, eta = 1, and the numbers that the published formulas compute with."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        schedule = NoiseSchedule.linear()
        step = SamplingPlan(schedule, (520, 500, 480), eta=1.0).steps[1]
        self.row, self.elements = step.coefficients, math.prod(shape)
        self.alpha_bar_t, self.alpha_bar_prev = (torch.tensor(a) for a in (step.alpha_bar_t, step.alpha_bar_prev))
        generator = torch.Generator().manual_seed(0)
        self.x_t, self.m = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.seeds, self.log_prob = torch.arange(shape[0]), torch.empty(shape[0])
        self.x_prev = ddim_step(self.x_t, self.m, self.row, seeds=self.seeds, log_prob_out=self.log_prob)
        self.expected = self.log_prob.clone()
        self.out = torch.empty_like(self.x_t)

    def published(self, x_t: Tensor, m: Tensor, x_prev: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The formulas of DDPO's step, of equation 12 of arXiv 2010.02502 and the normal density, in float32."""
        dtype, x_t, m = x_t.dtype, x_t.float(), m.float()
        beta_t, beta_prev = 1 - self.alpha_bar_t, 1 - self.alpha_bar_prev
        x0 = (x_t - beta_t**0.5 * m) / self.alpha_bar_t**0.5
        std = (beta_prev / beta_t * (1 - self.alpha_bar_t / self.alpha_bar_prev)) ** 0.5
        mean = self.alpha_bar_prev**0.5 * x0 + (beta_prev - std**2) ** 0.5 * m
        if x_prev is None:
            x_prev = (mean + std * torch.randn_like(mean)).to(dtype)
        each = (
            -((x_prev.float().detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        )
        return x_prev, each.mean(dim=tuple(range(1, each.ndim)))

    def trained(self, log_prob: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """Return a call that gives the gradient in the model's output."""

        def call() -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                m = self.m.detach().requires_grad_()
                log_prob(m).sum().backward()
                assert m.grad is not None
                return m.grad

        return call


@needs_extension
@per_case
def test_rollout(shape, dtype, measure, show, benchmark):
    """Time x_prev and its log-probability, with noise; and our step without the log-probability."""
    case = Case(shape, dtype)
    compiled = torch.compile(case.published, dynamic=False)
    contenders = {
        "ours": lambda: (
            ddim_step(case.x_t, case.m, case.row, seeds=case.seeds, out=case.out, log_prob_out=case.log_prob),
            case.log_prob,
        ),
        "ours, step alone": lambda: (
            ddim_step(case.x_t, case.m, case.row, seeds=case.seeds, out=case.out),
            case.expected,
        ),
        "eager": lambda: case.published(case.x_t, case.m),
        "torch.compile": lambda: compiled(case.x_t, case.m),
    }

    def check(name: str, result: Any) -> None:
        x_prev, log_prob = result
        assert x_prev.isfinite().all()
        if name.startswith("ours"):
            assert torch.equal(x_prev, case.x_prev)
            assert torch.equal(log_prob, case.expected)
        else:
            assert (log_prob - case.expected).abs().max() < 6 / math.sqrt(case.elements / shape[0])

    result = measure("log-probability", contenders, check, baseline="ours")
    share = result.ratio("ours", to="ours, step alone")
    benchmark.extra_info.update(of_the_step_alone=share, **named(shape, dtype))
    show(
        "x_prev and its log-probability, times faster",
        **named(shape, dtype),
        **{"than eager": f"{result.ratio('eager'):.1f}", "than torch.compile": f"{result.ratio('torch.compile'):.1f}"},
        **{"of the step alone": f"{share:.2f}x", "us": f"{result.seconds('ours') * 1e6:.0f}"},
    )


@needs_extension
@per_case
def test_training(shape, dtype, measure, show, benchmark):
    """Time the log-probability of a given x_prev with its gradient in the model's output, and count the memory of the backward pass."""
    case = Case(shape, dtype)
    compiled = torch.compile(lambda m: case.published(case.x_t, m, case.x_prev)[1], dynamic=False)
    contenders = {
        "ours": case.trained(lambda m: ddim_log_prob(case.x_prev, case.x_t, m, case.row)),
        "eager": case.trained(lambda m: case.published(case.x_t, m, case.x_prev)[1]),
        "torch.compile": case.trained(compiled),
    }
    expected = contenders["eager"]().float()

    def check(name: str, result: Tensor) -> None:
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))

    result = measure("training", contenders, check, baseline="ours")
    memory = {
        "ours": peak_of_backward(case, lambda m: ddim_log_prob(case.x_prev, case.x_t, m, case.row)),
        "eager": peak_of_backward(case, lambda m: case.published(case.x_t, m, case.x_prev)[1]),
    }
    gradients = {name: size / (case.elements * dtype.itemsize) for name, size in memory.items()}
    benchmark.extra_info.update(peak_of_the_backward_pass_in_gradients=gradients, **named(shape, dtype))
    show(
        "a log-probability and its gradient, times faster",
        **named(shape, dtype),
        **{"than eager": f"{result.ratio('eager'):.1f}", "than torch.compile": f"{result.ratio('torch.compile'):.1f}"},
        **{"us": f"{result.seconds('ours') * 1e6:.0f}"},
        **{"backward's peak, in gradients": f"{gradients['ours']:.2f} (eager {gradients['eager']:.2f})"},
    )


def named(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, str]:
    return {"shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}


def peak_of_backward(case: Case, log_prob: Callable[[Tensor], Tensor]) -> int:
    """Return the most bytes that the backward pass has at once, beside those before it."""
    m = case.m.detach().requires_grad_()
    result = log_prob(m).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result.backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("name") == "[memory]"]
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak
