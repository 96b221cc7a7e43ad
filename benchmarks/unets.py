"""U-Nets with the structure of well-known ones, and few channels: what looking through them costs."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

_SHARED: dict[str, Any] = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4
)  # fmt: skip
_STRUCTURES: dict[str, dict[str, Any]] = {
    "SD1.5": dict(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    ),
    "SDXL": dict(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    ),
}
MODULES = {"SD1.5": 709, "SDXL": 1930}
"""How many modules the originals have."""


def unet(structure: str) -> UNet2DConditionModel:
    """Return a U-Net with the modules of the one named."""
    model = UNet2DConditionModel(**_SHARED, **_STRUCTURES[structure]).eval().requires_grad_(False)
    modules = sum(1 for _ in model.modules())
    assert modules == MODULES[structure], f"{structure} has {MODULES[structure]} modules, got {modules}"
    return model
