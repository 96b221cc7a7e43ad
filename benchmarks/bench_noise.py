"""Noise: a full step at eta = 1 with our normals, and our normals alone, against torch.randn."""

from __future__ import annotations

import math

import pytest
import torch
from step_case import NOISE_STEP, StepCase, assert_normal

from ddim_fast import NoiseStream, standard_normals
from ddim_fast.kernels import cpu_step

SHAPES = [(1, 4, 64, 64), (64, 3, 32, 32)]


@pytest.mark.skipif(cpu_step.extension is None, reason="the C++ extension is missing")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_noise(shape, settings, measure, benchmark, show):
    """Time the eta = 1 step in place, normals into a buffer, and torch.randn(out=), per element."""
    case = StepCase("eta1", shape)
    z, per_sample = torch.empty(shape), math.prod(shape[1:])

    def normals():
        seeds, threads = case.seeds, settings.threads
        cpu_step.extension.normals(
            seeds.data_ptr(), len(seeds), per_sample, NOISE_STEP, NoiseStream.STEP, z.data_ptr(), threads
        )
        return z

    def check(name, result):
        if name == "torch.randn":
            assert_normal(name, result.double().numpy())
        elif name == "ours, normals":
            assert (
                result.view(len(case.seeds), -1).numpy() == standard_normals(case.seeds, per_sample, NOISE_STEP)
            ).all()
        else:
            case.check(name, result)

    contenders = {
        "torch.randn": lambda: torch.randn(shape, out=z),
        "ours, normals": normals,
        "ours in place": case.ours()["ours in place"],
    }
    pairs = [("torch.randn", name) for name in ("ours, normals", "ours in place")]
    result = measure("noise", contenders, check, baseline="torch.randn", pairs=pairs, prepare=case.prepare)
    faster = {name: result.ratio("torch.randn", to=name) for name in contenders}
    nanoseconds = {name: result.seconds(name) / case.elements * 1e9 for name in contenders}
    benchmark.extra_info.update(shape="x".join(map(str, shape)), ns_per_element=nanoseconds)
    show(
        "noise, ns per element, and times faster than torch.randn(out=) alone",
        shape="x".join(map(str, shape)),
        **{"torch.randn": f"{nanoseconds['torch.randn']:.2f}"},
        **{"normals": f"{nanoseconds['ours, normals']:.2f} ({faster['ours, normals']:.2f}x)"},
        **{"eta 1 step in place": f"{nanoseconds['ours in place']:.2f} ({faster['ours in place']:.2f}x)"},
        spread=f"{100 * result.spread('ours in place'):.0f}%",
    )
