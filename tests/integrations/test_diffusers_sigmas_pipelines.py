"""Real pipelines of diffusers with flow matching, Euler's and multistep steps, small, with random weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from tiny_pipelines import flux, picture, stable_diffusion_3, stable_diffusion_xl, wan

import ddim_fast.integrations.diffusers as drop_ins

NOTHING_OF_XL = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])


def image_to_image():
    pipeline, arguments = stable_diffusion_3(StableDiffusion3Img2ImgPipeline)
    return pipeline, {**arguments, "image": picture(), "strength": 0.6}


def euler_leading_karras():
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "use_karras_sigmas": True}
    return stable_diffusion_xl(**config)


def ancestral():
    return stable_diffusion_xl(EulerAncestralDiscreteScheduler, prediction_type="v_prediction")


def edm():
    return stable_diffusion_xl(EDMEulerScheduler)


def heun():
    return stable_diffusion_xl(HeunDiscreteScheduler, beta_schedule="scaled_linear")


def dpm_solver_karras():
    return stable_diffusion_xl(DPMSolverMultistepScheduler, beta_schedule="scaled_linear", use_karras_sigmas=True)


def sde_dpm_solver_image_to_image():
    config = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    pipeline, arguments = stable_diffusion_xl(DPMSolverMultistepScheduler, StableDiffusionXLImg2ImgPipeline, **config)
    arguments = {name: value for name, value in arguments.items() if name not in ("height", "width")}
    return pipeline, {**arguments, "image": picture(), "strength": 0.9}


def edm_dpm_solver():
    return stable_diffusion_xl(EDMDPMSolverMultistepScheduler)


def unipc():
    return stable_diffusion_xl(UniPCMultistepScheduler)


PIPELINES = [
    stable_diffusion_3,
    image_to_image,
    flux,
    stable_diffusion_xl,
    euler_leading_karras,
    ancestral,
    edm,
    heun,
    dpm_solver_karras,
    sde_dpm_solver_image_to_image,
    edm_dpm_solver,
    unipc,
    wan,
]


@pytest.mark.parametrize("build", PIPELINES)
def test_the_same_pictures(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, of its own defaults
        torch.manual_seed(0)
        pipeline, arguments = build()
        pictures = []
        for prefix in ("", "Fast"):
            name = prefix + type(pipeline.scheduler).__name__.removeprefix("Fast")
            if prefix:
                pipeline.scheduler = getattr(drop_ins, name).from_config(pipeline.scheduler.config)
            generator = torch.Generator().manual_seed(3)
            options = {"output_type": "np", **arguments}
            pictures.append(np.asarray(pipeline(**options, generator=generator, num_inference_steps=6)[0]))
        assert type(pipeline.scheduler).__name__ == name
    assert np.ptp(pictures[0]) > 0.05, "these pictures must show something"
    assert np.abs(pictures[1] - pictures[0]).max() <= 1 / 255


def test_a_saved_pipeline_comes_back(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        pipeline, _ = stable_diffusion_xl()
        pipeline.scheduler = drop_ins.FastEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        pipeline.save_pretrained(tmp_path)
        again = StableDiffusionXLPipeline.from_pretrained(tmp_path, **NOTHING_OF_XL, local_files_only=True)
    assert type(again.scheduler) is drop_ins.FastEulerDiscreteScheduler
