"""Real pipelines of diffusers, small, with random weights, whose schedulers few others have."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadeUNet

import ddim_fast.integrations.diffusers as drop_ins

try:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
except ImportError:  # an old version
    from diffusers.pipelines.wuerstchen import PaellaVQModel


def test_the_decoder_of_stable_cascade_gives_the_same_pictures():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        decoder = StableCascadeUNet(
            in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, patch_size=1, conditioning_dim=8,
            block_out_channels=(8,), num_attention_heads=(1,), down_num_layers_per_block=(1,),
            up_num_layers_per_block=(1,), down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock"),), clip_text_pooled_in_channels=8,
            clip_seq=1, effnet_in_channels=4, kernel_size=3, dropout=(0.0,), self_attn=True,
            timestep_conditioning_type=("sca",), switch_level=None,
        )  # fmt: skip
        for parameter in decoder.parameters():  # the output is zeros in a new one
            torch.nn.init.normal_(parameter, std=0.2)
        vqgan = PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8)
        pipeline = StableCascadeDecoderPipeline(
            decoder=decoder, tokenizer=None, text_encoder=None, scheduler=DDPMWuerstchenScheduler(), vqgan=vqgan
        )
        pipeline.set_progress_bar_config(disable=True)
        pooled = {name: torch.randn(1, 1, 8) for name in ("prompt_embeds_pooled", "negative_prompt_embeds_pooled")}
        pictures = []
        for kind in (DDPMWuerstchenScheduler, drop_ins.FastDDPMWuerstchenScheduler):
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
            pictures.append(
                pipeline(
                    image_embeddings=torch.linspace(-1, 1, 36).reshape(1, 4, 3, 3),
                    prompt_embeds=torch.zeros(1, 1, 8),
                    negative_prompt_embeds=torch.zeros(1, 1, 8),
                    **pooled,
                    guidance_scale=2.0,
                    num_inference_steps=6,
                    generator=torch.Generator().manual_seed(3),
                    output_type="np",
                ).images
            )
    assert type(pipeline.scheduler) is drop_ins.FastDDPMWuerstchenScheduler
    assert np.ptp(pictures[0]) > 0.05, "these pictures must show something"
    assert np.abs(pictures[1] - pictures[0]).max() <= 1 / 255
