"""Real pipelines of diffusers, small, with random weights: our scheduler gives the same images."""

from __future__ import annotations

import functools
import json
import re
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ddim_fast.integrations.diffusers import FastDDIMInverseScheduler, FastDDIMParallelScheduler, FastDDIMScheduler

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def parts():
    """A Stable Diffusion of a hundred thousand weights."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 8}
    unet = {
        **blocks,
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return {
        "unet": UNet2DConditionModel(**unet, **ups),
        "inpainting_unet": UNet2DConditionModel(**unet, **ups, in_channels=9),
        "controlnet": ControlNetModel(
            **{k: v for k, v in unet.items() if k != "sample_size"}, conditioning_embedding_out_channels=(8, 16)
        ),
        "vae": AutoencoderKL(
            **blocks,
            sample_size=16,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50,
                max_position_embeddings=8,
            )
        ),
    }  # fmt: skip


def stable_diffusion(kind, parts, *names, **more):
    pipeline = kind(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=None,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{name: parts[name] for name in names},
        **more,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(parts):
    with torch.no_grad():
        encode = parts["text_encoder"]
        return {
            "prompt_embeds": encode(torch.tensor([[1, 2, 3, 4]]))[0],
            "negative_prompt_embeds": encode(torch.tensor([[5, 5, 5, 5]]))[0],
        }


def picture(seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((16, 16))


def unconditional(parts, scheduler=None):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"batch_size": 2}


def text_to_image(parts):
    return stable_diffusion(StableDiffusionPipeline, parts, "unet"), {"height": 16, "width": 16, **prompt(parts)}


def image_to_image(parts):
    pipeline = stable_diffusion(StableDiffusionImg2ImgPipeline, parts, "unet")
    return pipeline, {"image": picture(), "strength": 0.6, **prompt(parts)}


def inpainting(parts):
    pipeline = stable_diffusion(StableDiffusionInpaintPipeline, parts, unet=parts["inpainting_unet"])
    mask = Image.fromarray(np.tri(16, dtype=np.uint8) * 255)
    return pipeline, {"image": picture(), "mask_image": mask, "height": 16, "width": 16, **prompt(parts)}


def inpainting_by_blending(parts):
    """With a text-to-image U-Net the pipeline itself blends the known picture in."""
    pipeline = stable_diffusion(StableDiffusionInpaintPipeline, parts, "unet")
    mask = Image.fromarray(np.tri(16, dtype=np.uint8) * 255)
    return pipeline, {"image": picture(), "mask_image": mask, "height": 16, "width": 16, **prompt(parts)}


def controlnet(parts):
    pipeline = stable_diffusion(StableDiffusionControlNetPipeline, parts, "unet", "controlnet")
    return pipeline, {"image": picture(), **prompt(parts)}


PIPELINES = {
    f.__name__: f
    for f in (unconditional, text_to_image, image_to_image, inpainting, inpainting_by_blending, controlnet)
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


def test_the_examples_of_the_documentation_run_top_to_bottom():
    page = Path(__file__).parents[2] / "docs" / "drop_ins" / "diffusers.md"
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(code, names)
    assert names["images"].shape == (1, 16, 16, 3)
    assert type(names["pipe"].scheduler) is names["FastDDIMScheduler"]
