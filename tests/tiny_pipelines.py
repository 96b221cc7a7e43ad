"""Pipelines of diffusers, tiny, with random weights: each function returns one and the arguments of its call.

Every family of diffusers that docs/MODELS.md names has one here, with the scheduler that its repositories ship. torch's
global generator decides the weights and the prompts' embeddings.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

SIZE = {"height": 16, "width": 16}
NOTHING = dict.fromkeys(
    [
        *("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
        *("safety_checker", "feature_extractor"),
    ]
)
VAE = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
FLOW_VAE = {**VAE, "latent_channels": 4, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}


def made(kind, **parts):
    """Make a pipeline of ``parts`` and nothing else, without a progress bar."""
    parts = {**NOTHING, "requires_safety_checker": False, **parts}
    pipeline = kind(**{name: part for name, part in parts.items() if name in inspect.signature(kind).parameters})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeddings(*names, width=16):
    """Random embeddings of a prompt; pooled ones have one vector."""
    return {name: torch.randn(1, width) if "pooled" in name else torch.randn(1, 5, width) for name in names}


def picture(seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((16, 16))


# --- Stable Diffusion 1 and 2, and diffusers' DDIMPipeline ------------------------------------------------------------

STABLE_DIFFUSION_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def stable_diffusion_parts():
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
        "consistency_unet": UNet2DConditionModel(**unet, **ups, time_cond_proj_dim=16),
        "vae": AutoencoderKL(**{**VAE, **blocks}),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50,
                max_position_embeddings=8,
            )
        ),
    }  # fmt: skip


def stable_diffusion(kind=StableDiffusionPipeline, parts=None, *names, scheduler=DDIMScheduler, **more):
    """Make one of ``parts``, or of new ones, with the parts called ``names``, and the arguments of a prompt."""
    parts, names = parts or stable_diffusion_parts(), names or (() if "unet" in more else ("unet",))
    scheduler = scheduler.from_config(STABLE_DIFFUSION_SCHEDULER)
    named = {name: parts[name] for name in ("vae", "text_encoder", *names)}
    with torch.no_grad():
        encode = parts["text_encoder"]
        prompt = {
            "prompt_embeds": encode(torch.tensor([[1, 2, 3, 4]]))[0],
            "negative_prompt_embeds": encode(torch.tensor([[5, 5, 5, 5]]))[0],
        }
    return made(kind, **named, scheduler=scheduler, **more), prompt


def latent_consistency():
    parts = stable_diffusion_parts()
    pipeline, prompt = stable_diffusion(
        LatentConsistencyModelPipeline, parts, unet=parts["consistency_unet"], scheduler=LCMScheduler
    )
    return pipeline, {**SIZE, "prompt_embeds": prompt["prompt_embeds"]}


def unconditional():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    return made(DDIMPipeline, unet=unet, scheduler=DDIMScheduler()), {"batch_size": 2}


# --- Later ones -------------------------------------------------------------------------------------------------------


def stable_diffusion_xl(scheduler=EulerDiscreteScheduler, kind=StableDiffusionXLPipeline, **config):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    vae = AutoencoderKL(**VAE, latent_channels=4)
    pipeline = made(kind, unet=unet, vae=vae, scheduler=scheduler(**config), add_watermarker=False)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipeline, {**embeddings(*names), **SIZE}


def stable_diffusion_3(kind=StableDiffusion3Pipeline):
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    vae = AutoencoderKL(**FLOW_VAE)
    pipeline = made(kind, transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipeline, {**embeddings(*names), **SIZE}


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    vae = AutoencoderKL(**FLOW_VAE)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = made(FluxPipeline, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipeline, {**embeddings("prompt_embeds", "pooled_prompt_embeds"), **SIZE}


def wan():
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipeline = made(WanPipeline, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipeline, {**embeddings("prompt_embeds", "negative_prompt_embeds"), **SIZE, "num_frames": 5}


def ltx():
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05
    )
    names = ("prompt_embeds", "negative_prompt_embeds")
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, 5, dtype=torch.int64) for name in names}
    pipeline = made(LTXPipeline, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipeline, {**embeddings(*names), **masks, "height": 32, "width": 32, "num_frames": 9}


def cogvideox():
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    pipeline = made(CogVideoXPipeline, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipeline, {**embeddings("prompt_embeds", "negative_prompt_embeds"), **SIZE, "num_frames": 5}
