"""Real pipelines of diffusers with flow matching, Euler's and multistep steps, small, with random weights."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

import ddim_fast.integrations.diffusers as drop_ins

VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
NOTHING_OF_XL = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
NOTHING = dict.fromkeys(["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"])


def made(kind, **parts):
    pipeline = kind(**{name: part for name, part in parts.items() if name in inspect.signature(kind).parameters})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_3(kind=StableDiffusion3Pipeline):
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    vae = AutoencoderKL(**VAE, latent_channels=4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    pipeline = made(
        kind, **NOTHING, transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipeline, {name: torch.randn(1, 16) if "pooled" in name else torch.randn(1, 5, 16) for name in names} | {
        "height": 16,
        "width": 16,
    }


def image_to_image():
    pipeline, arguments = stable_diffusion_3(StableDiffusion3Img2ImgPipeline)
    return pipeline, {**arguments, "image": picture(), "strength": 0.6}


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    vae = AutoencoderKL(**VAE, latent_channels=4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = made(FluxPipeline, **NOTHING, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipeline, {
        "prompt_embeds": torch.randn(1, 5, 16),
        "pooled_prompt_embeds": torch.randn(1, 16),
        "height": 16,
        "width": 16,
    }


def stable_diffusion_xl(scheduler=EulerDiscreteScheduler, kind=StableDiffusionXLPipeline, **config):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    pipeline = made(
        kind,
        **NOTHING,
        unet=unet,
        vae=AutoencoderKL(**VAE, latent_channels=4),
        scheduler=scheduler(**config),
        add_watermarker=False,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipeline, {name: torch.randn(1, 16) if "pooled" in name else torch.randn(1, 5, 16) for name in names} | {
        "height": 16,
        "width": 16,
    }


def euler_leading_karras():
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "use_karras_sigmas": True}
    return stable_diffusion_xl(**config)


def ancestral():
    return stable_diffusion_xl(EulerAncestralDiscreteScheduler, prediction_type="v_prediction")


def edm():
    return stable_diffusion_xl(EDMEulerScheduler)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))


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


def wan():
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {**NOTHING, "vae": None, "transformer": transformer, "scheduler": scheduler}
    embeds = {name: torch.randn(1, 5, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return made(WanPipeline, **parts), {**embeds, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}


PIPELINES = [
    stable_diffusion_3,
    image_to_image,
    flux,
    stable_diffusion_xl,
    euler_leading_karras,
    ancestral,
    edm,
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
