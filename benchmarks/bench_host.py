"""What the host does for a GPU, without one: the key of a warm call, a whole warm call, and a launch.

Graphs are those of the stand-in, whose replays are left out when they are timed, and launches go to
a driver that launches nothing: what CUDA's own driver takes is not in these numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unets import MODULES, unet

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.emulated_gpu import emulated_gpu
from ddim_fast.gpu_lab.triton_internals import compile_only
from ddim_fast.kernels import cpu_step, triton_backend, triton_internals
from ddim_fast.kernels.contract import StepInputs, check_inputs
from ddim_fast.kernels.dispatch import ddim_step
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.model_state import ModelState

STEPS = 50


def _show(show, benchmark, case, result, names):
    benchmark.extra_info.update(case=case, microseconds={name: result.seconds(name) * 1e6 for name in names})
    for name in names:
        show(case, what=name, us=f"{result.seconds(name) * 1e6:.1f}", ratio=f"{result.ratio(name):.2f}")


@pytest.mark.parametrize("structure", MODULES)
def test_key(structure, measure, benchmark, show, monkeypatch):
    """Time finding out that nothing of a model has changed, in C++ and in Python."""
    model = unet(structure)
    state = ModelState(model)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_step, "extension", None)
        in_python = ModelState(model)
    extension = cpu_step.extension

    def python():
        cpu_step.extension = None
        try:
            return in_python.is_current()
        finally:
            cpu_step.extension = extension

    contenders = {"ours": state.is_current, "in Python": python}

    def check(name, result):
        assert result is True, name

    result = measure("host", contenders, check, baseline="ours")
    _show(show, benchmark, f"is a model as it was? {structure}, {MODULES[structure]} modules", result, contenders)


class _Silent(Replay):
    """Graphs that replay until they are told not to."""

    silent = False

    def capture(self, function, pool=None):
        graph = super().capture(function, pool)
        replay = graph.replay
        graph.replay = lambda: None if self.silent else replay()
        return graph


class _Nothing(nn.Module):
    prediction_type = "epsilon"

    def forward(self, x, t):
        return x


def test_warm_call(measure, benchmark, show):
    """Time a call of 50 steps whose graph is there, without its replays: all that is left to the host."""
    graphs, model = _Silent(), _Nothing()
    cache = GraphCache(backend=lambda device: graphs, device_types=("cpu",))
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), STEPS, graphs=cache)
    x = torch.ones(16)

    def call():
        return sampler.sample(model, (1, 4, 8, 8), seed=0, capture="step")

    expected = sampler.sample(model, (1, 4, 8, 8), seed=0, capture="off")
    for _ in range(2):
        torch.testing.assert_close(call(), expected, rtol=0, atol=0)
    graphs.silent = True
    contenders = {"ours": call, "x.add_(x)": lambda: x.add_(0)}
    result = measure("host", contenders, lambda name, result: None, baseline="ours")
    _show(show, benchmark, "a warm captured call of 50 steps", result, contenders)


def test_launch(measure, benchmark, show):
    """Time the host's part of a step that is not captured: prepared, checked in Python, and by Triton's own launch."""
    row = df.DDIMSampler(df.NoiseSchedule.linear(), STEPS).plan().steps[5].coefficients
    x, m, out = torch.randn(3, 1, 4, 64, 64)
    plain = (x, m, row, None, None, None, None, 0, 0, None, out, None, None, None, None, None, "mean", None)

    def checked():
        inputs = StepInputs(x, m, row, x_prev=out)
        check_inputs(inputs)
        triton_backend.unsupported_reasons(inputs)  # that they are on the CPU is not heeded
        return triton_backend.run(inputs)

    def by_triton():
        watched = triton_internals.is_watched
        triton_internals.is_watched = lambda kernel: True
        try:
            return checked()
        finally:
            triton_internals.is_watched = watched

    contenders = {
        "ours": lambda: triton_backend.run_plain(*plain),
        "ours, checked in Python": checked,
        "checked, by Triton's launch": by_triton,
        "x.add_(m)": lambda: x.add_(m, alpha=0),
    }
    expected = ddim_step(x, m, row)
    with emulated_gpu("sm_90"):
        for name in list(contenders)[:3]:
            for _ in range(2):
                out.zero_()
                contenders[name]()
                torch.testing.assert_close(out, expected, rtol=0, atol=0)
    with compile_only("sm_90"):
        result = measure("host", contenders, lambda name, result: None, baseline="x.add_(m)")
    _show(show, benchmark, "a launch of a step, to a driver that does nothing", result, contenders)
