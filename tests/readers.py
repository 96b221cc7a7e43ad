"""What the pages' readers have: models of their own, tiny here. A page's comment ``<!-- given: NAME -->`` names one."""

import torch


def per_sample(t):
    return t.view(-1, 1, 1, 1)


def networks():
    """Models of flow matching, EDM's raw network, and EDM's denoiser."""
    return {
        "network": lambda x, t: 0.3 * x * per_sample(t).clamp(max=1),
        "raw_network": lambda x, t: torch.tanh(x + per_sample(t)),
        "denoiser": lambda x, sigma: x / (1 + per_sample(sigma) ** 2),
    }


def pipeline():
    """A pipeline of diffusers."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return {"pipe": DDIMPipeline(UNet2DModel(norm_num_groups=4, **blocks), DDIMScheduler())}


GIVEN = {"networks": networks, "pipeline": pipeline}
