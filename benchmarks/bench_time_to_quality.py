"""The time that a picture takes at one quality: the shipped model with a fitted solver and
``optimize``, diffusers' ``DDIMPipeline`` at 50 steps, and diffusers' other schedulers, each at the
fewest model calls that are as good.

Quality is the distance to converged samples from the same noise, on ``JUDGED`` pictures; the target
is that of ``DDIMPipeline``. Each contender must reach it, or it is not timed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_sampling import BATCHES, SEED, LabelledUNet
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

import ddim_fast as df
from ddim_fast.integrations.named_schedulers import configured, named_scheduler
from ddim_fast.models.metrics import sample_distances

SOLVER = Path(__file__).parent.parent / "docs" / "examples" / "fashion-8.json"
PIPELINE_STEPS, CONVERGED_STEPS, JUDGED = 50, 200, 128
QUICK = 8
OTHERS = {
    "UniPC": "diffusers:UniPCMultistepScheduler",
    "DPM-Solver++(2M)": "diffusers:DPMSolverMultistepScheduler?use_lu_lambdas=true",
    "DPM-Solver++(3M)": "diffusers:DPMSolverMultistepScheduler?use_lu_lambdas=true&solver_order=3",
    "DEIS": "diffusers:DEISMultistepScheduler",
}
"""diffusers' schedulers, with the options that were best for this model: see docs/TRADEOFF.md."""
FEWEST_CALLS, MOST_CALLS = 5, 30


class Study:
    """The contenders, and which of them are as good as the pipeline."""

    def __init__(self, batch: int):
        self.model = df.load_model("fashion")
        self.labels = torch.arange(batch) % self.model.num_classes
        shape = (batch, *self.model.sample_shape)
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))  # as the pipeline draws it
        self.options = {"prediction_type": self.model.prediction_type, "clip_sample": False}

    def sampler(self, **steps: Any) -> df.DDIMSampler:
        return df.DDIMSampler(self.model.schedule, clip_sample=False, **steps)

    def ours(self, model: Callable[..., Any], sampler: df.DDIMSampler) -> Tensor:
        return sampler.sample(model, x_T=self.x_T, seed=SEED, conditioning={"class_labels": self.labels})

    def converged(self) -> Tensor:
        return self.ours(
            self.model, self.sampler(num_inference_steps=CONVERGED_STEPS, order=2, timestep_spacing="log_snr")
        )

    def solved(self) -> tuple[df.DDIMSampler, Any]:
        """Return the fitted solver and the optimized model."""
        sampler = self.sampler(timesteps=SOLVER)
        fast = sampler.optimize(self.model, self.x_T.shape, conditioning={"class_labels": self.labels})
        return sampler, fast

    def pipeline(self) -> Callable[[], Tensor]:
        unet = LabelledUNet().of(self.model, self.labels)
        pipeline = DDIMPipeline(unet, DDIMScheduler(**self.options))
        pipeline.set_progress_bar_config(disable=True)

        def run():
            generator = torch.Generator().manual_seed(SEED)
            return pipeline(len(self.labels), generator, num_inference_steps=PIPELINE_STEPS, output_type="pt").images

        return run

    def scheduler(self, name: str, steps: int) -> Callable[[], Tensor]:
        """Return the loop of diffusers' pipelines with one of its schedulers."""
        named = named_scheduler(OTHERS[name], "a scheduler")
        scheduler = configured(named, self.model.schedule, self.model.prediction_type)

        def run():
            scheduler.set_timesteps(steps)
            x = self.x_T * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                output = self.model(scheduler.scale_model_input(x, t), t, self.labels)
                x = scheduler.step(output, t, x).prev_sample
            return x

        return run


def pictures(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


@cache
def judged() -> tuple[float, dict[str, float], dict[str, int]]:
    """Return the target, the distance of each contender that reaches it, and its model calls.

    Distances are those of samples in [-1, 1]; the pipeline returns pictures, which are clamped, so
    all are.
    """
    study = Study(JUDGED)
    with torch.no_grad():
        exact = study.converged().clamp(-1, 1)

        def distance(x: Tensor) -> float:
            return sample_distances(x.clamp(-1, 1), exact).mean().item()

        target = distance(2 * study.pipeline()() - 1)
        distances = {"ours": distance(study.ours(study.model, study.sampler(timesteps=SOLVER)))}
        calls = {}
        for name in OTHERS:
            tried = {}

            def is_as_good(steps: int, name: str = name, tried: dict[int, float] = tried) -> bool:
                tried[steps] = distance(study.scheduler(name, steps)())
                return tried[steps] <= target

            fewest = bisect_left(range(MOST_CALLS), True, lo=FEWEST_CALLS, key=is_as_good)  # more calls come nearer
            if fewest < MOST_CALLS:
                calls[name], distances[name] = fewest, tried[fewest]
    return target, distances, calls


@pytest.mark.parametrize("batch", [pytest.param(b, marks=() if b == QUICK else pytest.mark.full) for b in BATCHES])
def test_time_to_quality(batch, settings, measure, benchmark, show):
    """Time from x_T to pictures of one quality."""
    torch.set_num_threads(settings.threads)
    target, distances, calls = judged()
    assert distances["ours"] <= target, f"the fitted solver is at {distances['ours']:.4f}, the pipeline at {target:.4f}"
    study = Study(batch)
    sampler, fast = study.solved()
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: pictures(study.ours(fast, sampler)),
        "ours, model as it is": lambda: pictures(study.ours(study.model, sampler)),
        "DDIMPipeline": study.pipeline(),
    }
    for name, steps in calls.items():
        run = study.scheduler(name, steps)
        contenders[name] = lambda run=run: pictures(run())
    with torch.no_grad():
        exact = pictures(study.converged())

    def check(name: str, result: Tensor) -> None:
        """Check that pictures are the ones that converged samples show, roughly: a wrong loop is far
        away."""
        worst = (result - exact).square().mean().sqrt().item()
        assert worst <= 5 * target, f"{name} is wrong: its distance is {worst:.3g}, so it is not timed"

    rounds = 4 if settings.quick else max(4, BATCHES[batch] // 2)
    pairs = [(name, "ours") for name in contenders if name != "ours"]
    result = measure("time to quality", contenders, check, baseline="ours", pairs=pairs, min_rounds=rounds)
    best = min(calls, key=result.seconds, default=None)
    benchmark.extra_info.update(
        pictures=batch,
        target=target,
        distances=distances,
        calls={"ours": len(sampler.timesteps), "DDIMPipeline": PIPELINE_STEPS, **calls},
        never=[name for name in OTHERS if name not in calls],
        best_scheduler=best,
        gain=str(fast.gain),
    )
    show(
        f"time to the quality of DDIMPipeline at {PIPELINE_STEPS} steps: seconds, and times longer than ours",
        pictures=str(batch),
        **{"ours, s": f"{result.seconds('ours'):.3f}"},
        **{name: f"{result.ratio(name):.2f} ({calls.get(name, '')})" for name in contenders if name != "ours"},
        spread=f"{100 * result.spread('ours'):.0f}%",
    )
