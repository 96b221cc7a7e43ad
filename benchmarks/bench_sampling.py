"""The shipped model end to end: where the time of a run goes."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

import ddim_fast as df

PICTURES, STEPS, RUNS, QUICK_RUNS = 8, 10, 9, 3


def _check(model: torch.nn.Module, sampler: df.DDIMSampler, x_T: torch.Tensor) -> None:
    """The same run, model and all, in float64."""
    exact = sampler.sample(df.load_model("fashion", dtype=torch.float64), x_T=x_T.double(), seed=0)
    torch.testing.assert_close(sampler.sample(model, x_T=x_T, seed=0).double(), exact, rtol=0, atol=1e-3)


def test_sampling(settings, benchmark, show):
    """Seconds of a run of 8 pictures in 10 steps, and the shares of the model, of the update and of the rest."""
    model = df.load_model("fashion")
    sampler = df.DDIMSampler(model.schedule, num_inference_steps=STEPS)
    shape = (PICTURES, *model.sample_shape)
    _check(model, sampler, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    runs = []

    def run():
        timing = df.Timing()
        started = perf_counter()
        samples = sampler.sample(model, shape, seed=0, timing=timing)
        runs.append((perf_counter() - started, timing.model_seconds, timing.update_seconds))
        return samples

    benchmark.group = "sampling"
    benchmark.pedantic(run, rounds=QUICK_RUNS if settings.quick else RUNS, iterations=1, warmup_rounds=1)
    shares = {
        "model": median(model_seconds / total for total, model_seconds, _ in runs),
        "update": median(update / total for total, _, update in runs),
        "rest": median((total - model_seconds - update) / total for total, model_seconds, update in runs),
    }
    seconds = median(total for total, _, _ in runs)
    per_update = median(update for _, _, update in runs) / STEPS * 1e6
    benchmark.extra_info.update(
        seconds=seconds,
        share=shares,
        update_microseconds_per_step=per_update,
        threads=settings.threads,
        pictures=PICTURES,
        steps=STEPS,
    )
    show(
        f"the shipped model, {PICTURES} pictures, {STEPS} steps",
        **{"ms": f"{seconds * 1e3:.1f}", "us/update": f"{per_update:.1f}"},
        **{name: f"{100 * share:.2f}%" for name, share in shares.items()},
    )
