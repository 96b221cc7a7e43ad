"""Scaling with threads and batch size, for the step and for the shipped model."""

from __future__ import annotations

import os

import pytest
import torch
from step_case import StepCase

import ddim_fast as df

THREADS = [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)]
SHAPES = [(64, 3, 32, 32), (64, 3, 256, 256)]
BATCHES, STEPS = (1, 8, 64), 2

more_than_one = pytest.mark.skipif(len(THREADS) < 2, reason="needs a second processor")


def _words(count: int, unit: str) -> str:
    return f"{count} {unit}{'s' if count > 1 else ''}"


def _on(threads: int) -> str:
    return _words(threads, "thread")


@more_than_one
@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("variant", ["eta0", "eta1"])
def test_threads(variant, shape, measure, benchmark, show):
    """Time an in-place step, ours and eager PyTorch's, on one thread and on more."""
    case = StepCase(variant, shape)
    ours, eager = case.ours()["ours in place"], case.eager()["eager"]
    contenders, threads = {}, {}
    for n in THREADS:
        contenders |= {f"ours {_on(n)}": ours, f"eager {_on(n)}": eager}
        threads |= {f"ours {_on(n)}": n, f"eager {_on(n)}": n}
    first = f"ours {_on(1)}"
    pairs = [(f"eager {_on(n)}", f"ours {_on(n)}") for n in THREADS] + [(first, f"ours {_on(n)}") for n in THREADS[1:]]
    result = measure(
        "threads", contenders, case.check, baseline=first, pairs=pairs, threads=threads, prepare=case.prepare
    )
    names = {"variant": variant, "shape": "x".join(map(str, shape))}
    gains = {
        who: {n: result.ratio(f"{who} {_on(1)}", to=f"{who} {_on(n)}") for n in THREADS} for who in ("ours", "eager")
    }
    benchmark.extra_info.update(names, times_faster_than_one_thread=gains)
    show(
        "threads: times faster than on one",
        **names,
        **{f"{who}, {_on(n)}": f"{gains[who][n]:.2f}" for who in gains for n in THREADS[1:]},
        **{f"eager / ours, {_on(n)}": f"{result.ratio(f'eager {_on(n)}', to=f'ours {_on(n)}'):.1f}" for n in THREADS},
    )


@pytest.mark.full
def test_batches(measure, benchmark, show):
    """Time the shipped model per image, by batch size and threads."""
    model = df.load_model("fashion")
    sampler = df.DDIMSampler(model.schedule, num_inference_steps=STEPS)
    x_T = torch.randn(max(BATCHES), *model.sample_shape, generator=torch.Generator().manual_seed(0))
    exact = sampler.sample(df.load_model("fashion", dtype=torch.float64), x_T=x_T[:1].double(), seed=0)
    contenders, threads, units = {}, {}, {}
    for n in THREADS:
        for batch in BATCHES:
            name = f"ours {_words(batch, 'picture')}, {_on(n)}"
            contenders[name] = lambda batch=batch: sampler.sample(model, x_T=x_T[:batch], seed=0)
            threads[name], units[name] = n, batch

    def check(_, pictures):
        torch.testing.assert_close(pictures[:1].double(), exact, rtol=0, atol=1e-3)

    first, *others = contenders
    pairs = [(first, name) for name in others]
    result = measure("batches", contenders, check, baseline=first, pairs=pairs, threads=threads, units=units)
    per_second = {name: 1 / (result.seconds(name) * 20 / STEPS) for name in contenders}
    benchmark.extra_info.update(steps=STEPS, pictures_per_second_of_20_steps=per_second)
    for name in contenders:
        show(
            "batches and threads: the shipped model, 20 steps",
            run=name,
            **{"pictures/s": f"{per_second[name]:.2f}"},
            **{"times faster than one by one": f"{result.ratio(first, to=name):.2f}"},
            spread=f"{100 * result.spread(name):.0f}%",
        )
