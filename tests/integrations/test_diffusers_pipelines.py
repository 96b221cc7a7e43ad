"""Real pipelines of diffusers, small, with random weights: our scheduler gives the same images."""

from __future__ import annotations

import functools
import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from tiny_pipelines import SIZE, picture, stable_diffusion, stable_diffusion_parts, unconditional

from ddim_fast.integrations.diffusers import FastDDIMInverseScheduler, FastDDIMParallelScheduler, FastDDIMScheduler


@pytest.fixture(scope="module")
def parts():
    return stable_diffusion_parts()


def of_nothing(parts):
    return unconditional()


def text_to_image(parts):
    pipeline, prompt = stable_diffusion(StableDiffusionPipeline, parts)
    return pipeline, {**SIZE, **prompt}


def image_to_image(parts):
    pipeline, prompt = stable_diffusion(StableDiffusionImg2ImgPipeline, parts)
    return pipeline, {"image": picture(), "strength": 0.6, **prompt}


MASK = {"image": picture(), "mask_image": Image.fromarray(np.tri(16, dtype=np.uint8) * 255), **SIZE}


def inpainting(parts):
    pipeline, prompt = stable_diffusion(StableDiffusionInpaintPipeline, parts, unet=parts["inpainting_unet"])
    return pipeline, {**MASK, **prompt}


def inpainting_by_blending(parts):
    """With a text-to-image U-Net the pipeline itself blends the known picture in."""
    pipeline, prompt = stable_diffusion(StableDiffusionInpaintPipeline, parts)
    return pipeline, {**MASK, **prompt}


def controlnet(parts):
    pipeline, prompt = stable_diffusion(StableDiffusionControlNetPipeline, parts, "unet", "controlnet")
    return pipeline, {"image": picture(), **prompt}


PIPELINES = {
    f.__name__: f for f in (of_nothing, text_to_image, image_to_image, inpainting, inpainting_by_blending, controlnet)
}


def run(pipeline, arguments, **more):
    generator = torch.Generator().manual_seed(3)
    return pipeline(**arguments, generator=generator, num_inference_steps=8, output_type="np", **more).images


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_pictures(parts, name, eta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, of its own defaults
        pipeline, arguments = PIPELINES[name](parts)
        expected = run(pipeline, arguments, eta=eta)
        pipeline.scheduler = FastDDIMScheduler.from_config(pipeline.scheduler.config)
        got = run(pipeline, arguments, eta=eta)
    assert type(pipeline.scheduler) is FastDDIMScheduler
    assert np.ptp(expected) > 0.05, "these pictures must show something"
    assert np.abs(got - expected).max() <= 1 / 255


class ByTheList(DDIMScheduler):
    """The original's own step, from each timestep of a list to the next: it steps by T // num_inference_steps."""

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None):
        self.timesteps, self.num_inference_steps = torch.tensor(timesteps, device=device), len(timesteps)

    @functools.wraps(DDIMScheduler.step)  # pipelines look for eta in its signature
    def step(self, model_output, timestep, *arguments, **more):
        visited, count = [*self.timesteps.tolist(), -1], self.num_inference_steps
        stride = int(timestep) - visited[visited.index(int(timestep)) + 1]
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)
        try:
            return super().step(model_output, timestep, *arguments, **more)
        finally:
            self.num_inference_steps = count


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("name", ["text_to_image", "image_to_image", "controlnet"])
def test_a_list_of_timesteps_gives_the_originals_pictures_of_that_list(parts, name, eta):
    listed = [951, 800, 433, 222, 221, 30, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline, arguments = PIPELINES[name](parts)
        pictures = []
        for kind in (ByTheList, FastDDIMScheduler):
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
            generator = torch.Generator().manual_seed(3)
            more = {"generator": generator, "output_type": "np", "eta": eta, "timesteps": listed}
            pictures.append(pipeline(**arguments, **more).images)
    assert np.ptp(pictures[0]) > 0.05
    assert np.abs(pictures[1] - pictures[0]).max() <= 1 / 255


def test_a_run_without_the_noise_would_be_seen(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline, arguments = text_to_image(parts)
        assert np.abs(run(pipeline, arguments, eta=0.7) - run(pipeline, arguments, eta=0.6)).max() > 2 / 255


def test_a_saved_pipeline_comes_back(parts, tmp_path):
    """``model_index.json`` names our class; a process that has ddim_fast finds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline, arguments = text_to_image(parts)
        pipeline.scheduler = FastDDIMScheduler.from_config(pipeline.scheduler.config, explicit_pairs=True)
        expected = run(pipeline, arguments)
        pipeline.save_pretrained(tmp_path)
        again = StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, local_files_only=True)
        again.set_progress_bar_config(disable=True)
        got = run(again, arguments)
    assert type(again.scheduler) is FastDDIMScheduler
    assert again.scheduler.config.explicit_pairs
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", [FastDDIMScheduler, FastDDIMParallelScheduler, FastDDIMInverseScheduler])
def test_a_pipeline_that_was_saved_with_version_0_1_loads(parts, tmp_path, kind):
    """Its ``model_index.json`` names the module that held the classes then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline, _ = text_to_image(parts)
        pipeline.save_pretrained(tmp_path)
        index, config = tmp_path / "model_index.json", tmp_path / "scheduler" / "scheduler_config.json"
        for file, changes in (
            (index, {"scheduler": ["ddim_fast.integrations.diffusers", kind.__name__]}),
            (config, {"_class_name": kind.__name__, "explicit_pairs": True}),
        ):
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        again = StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, local_files_only=True)
    assert type(again.scheduler) is kind
    assert again.scheduler.config.explicit_pairs
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert saved["scheduler"] == ["ddim_fast.integrations.diffusers", kind.__name__]
