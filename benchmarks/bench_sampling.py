"""The shipped model end to end: the same images from our sampler and from diffusers' pipeline, and
where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import ConfigMixin, DDIMPipeline, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

import ddim_fast as df
from ddim_fast.integrations.diffusers import FastDDIMScheduler

STEPS, SEED = 20, 0
BATCHES = {1: 10, 8: 6, 64: 4}
"""Batch size, and the minimum number of rounds: rounds of 64 images take seconds each."""
QUICK = 8
GREY_LEVEL = 1 / 255
EXACT = 2
"""Images also drawn in float64."""


class LabelledUNet(ModelMixin, ConfigMixin):
    """The shipped model for ``DDIMPipeline``: with stored labels, and its output in ``.sample``."""

    @register_to_config
    def __init__(self, sample_size: int = 28, in_channels: int = 1):
        super().__init__()

    def of(self, model: torch.nn.Module, labels: Tensor) -> LabelledUNet:
        self.model, self.labels = model, labels
        return self

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.model(x, t, self.labels))


@dataclass
class PictureCase:
    """``batch`` images in [0, 1], ``STEPS`` steps, the same x_T and labels for all contenders."""

    batch: int

    def __post_init__(self) -> None:
        self.model = df.load_model("fashion")
        shape = (self.batch, *self.model.sample_shape)
        self.x_T = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))  # as the pipeline draws it
        self.labels = torch.arange(self.batch) % self.model.num_classes
        self.sampler = df.DDIMSampler(self.model.schedule, STEPS)

    def contenders(self, optimized: bool = True) -> dict[str, Callable[[], Tensor]]:
        """Return all contenders.

        Args:
            optimized: include ``DDIMSampler.optimize``, which takes about a minute to compile.
        """
        contenders = {
            "diffusers": self.pipeline(DDIMScheduler),
            "ours": self.ours(self.model),
            "ours, drop-in": self.pipeline(FastDDIMScheduler),
        }
        if optimized:
            conditioning = {"class_labels": self.labels}
            fast = self.sampler.optimize(self.model, self.x_T.shape, conditioning=conditioning)
            contenders["ours, optimized"] = self.ours(fast)
        return contenders

    def ours(self, model: Callable) -> Callable[[], Tensor]:
        def run(timing: df.Timing | None = None):
            conditioning = {"class_labels": self.labels}
            x = self.sampler.sample(model, x_T=self.x_T, seed=SEED, conditioning=conditioning, timing=timing)
            return (x / 2 + 0.5).clamp(0, 1)

        return run

    def pipeline(self, kind: type[DDIMScheduler]) -> Callable[[], Tensor]:
        unet = LabelledUNet().of(self.model, self.labels)
        pipeline = DDIMPipeline(unet, DDIMScheduler(prediction_type=self.model.prediction_type, clip_sample=False))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)

        def run():
            generator = torch.Generator().manual_seed(SEED)
            return pipeline(self.batch, generator, num_inference_steps=STEPS, output_type="pt").images

        return run

    def check(self, name: str, pictures: Tensor) -> None:
        """Check that images are within one of 255 grey levels of the pipeline's.

        The pipeline is the first contender; its first images are checked against float64.
        """
        if name == "diffusers":
            self.expected = pictures
            self._assert_same("diffusers, against float64", pictures[:EXACT], self._exact())
        self._assert_same(name, pictures, self.expected)

    @staticmethod
    def _assert_same(name: str, pictures: Tensor, expected: Tensor) -> None:
        worst = (pictures - expected).abs().max().item()
        assert worst <= GREY_LEVEL, f"{name} is wrong: its error is {255 * worst:.3g} grey levels, so it is not timed"

    def _exact(self) -> Tensor:
        model, few = df.load_model("fashion", dtype=torch.float64), slice(0, EXACT)
        conditioning = {"class_labels": self.labels[few]}
        x = self.sampler.sample(model, x_T=self.x_T[few].double(), seed=SEED, conditioning=conditioning)
        return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("batch", [pytest.param(b, marks=() if b == QUICK else pytest.mark.full) for b in BATCHES])
def test_pictures(batch, settings, measure, benchmark, show):
    """Time sampling from x_T to images."""
    case = PictureCase(batch)
    torch.set_num_threads(settings.threads)
    contenders = case.contenders(optimized=not settings.quick)
    if batch == max(BATCHES):
        del contenders["ours, drop-in"]  # indistinguishable from diffusers here: see the smaller batches
    rounds = 4 if settings.quick else BATCHES[batch]
    result = measure("pictures", contenders, case.check, baseline="ours", pairs=_pairs(contenders), min_rounds=rounds)
    shares = _shares(contenders["ours"], 1 if batch == max(BATCHES) else 5)
    benchmark.extra_info.update(pictures=batch, steps=STEPS, share=shares)
    show(
        f"the shipped model, {STEPS} steps: seconds, times longer than ours, and shares of ours",
        pictures=str(batch),
        **{"ours, s": f"{result.seconds('ours'):.3f}"},
        **{name: f"{result.ratio(name):.3f}" for name in contenders if name != "ours"},
        **{name: f"{100 * share:.2f}%" for name, share in shares.items()},
        spread=f"{100 * result.spread('ours'):.0f}%",
    )


def _pairs(contenders: dict[str, Callable[[], Tensor]]) -> list[tuple[str, str]]:
    """Return diffusers' pipeline paired with each of ours."""
    return [("diffusers", name) for name in contenders if name.startswith("ours")]


def _shares(run: Callable[[df.Timing], Tensor], runs: int) -> dict[str, float]:
    """Return the shares of time of the model, the update and the rest: medians over runs."""
    found = []
    for _ in range(runs):
        timing, started = df.Timing(), perf_counter()
        run(timing)
        total = perf_counter() - started
        found.append((timing.model_seconds / total, timing.update_seconds / total))
    model, update = (median(column) for column in zip(*found, strict=True))
    return {"model": model, "update": update, "rest": 1 - model - update}
