"""Models: what the sampler needs of one, what real libraries return, and the model that ships with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .schedule import NoiseSchedule
from .unet import SmallUNet

WEIGHTS = Path(__file__).parent / "weights"


class Model(Protocol):
    """Anything that can be called so. ``x``: ``(B, C, ...)``; ``t``: ``(B,)`` int64 timesteps; conditioning by name.

    It returns a tensor of the shape of ``x`` (or with twice the channels, the second half being a learned variance, which DDIM does not
    use), or a tuple that begins with one, or an object or mapping that has one as ``sample``, as diffusers' models do.

    A model may say more about itself in attributes, which the sampler uses where the user says nothing: ``prediction_type``,
    ``clip_sample_range``; ``unconditional(conditioning) -> conditioning`` for classifier-free guidance; and ``batches_guidance``, true
    where both halves of guidance should be one call with twice the batch.
    """

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Any) -> Any: ...


def output_tensor(output: Any, like: Tensor) -> Tensor:
    """The prediction in what a model returned, as a tensor of the shape of ``like``; a view, never a copy.

    Raises:
        TypeError: there is no tensor where one should be.
        ValueError: its shape or device is wrong.
    """
    found = output if isinstance(output, Tensor) else _found_in(output)
    if not isinstance(found, Tensor):
        raise TypeError(
            "a model must return a tensor, a tuple that begins with one, or an object with a tensor as .sample, "
            f"got {type(output).__name__}: wrap it in a function that returns its prediction"
        )
    if found.layout != torch.strided:
        raise TypeError(f"a model must return a dense tensor, got layout {found.layout}: call .to_dense()")
    if found.shape != like.shape:
        if found.ndim == like.ndim > 1 and found.shape == (like.shape[0], 2 * like.shape[1], *like.shape[2:]):
            found = found[:, : like.shape[1]]  # beside it, a learned variance
        else:
            raise ValueError(
                f"a model must return the shape of its input, {tuple(like.shape)} (or twice the channels), got {tuple(found.shape)}"
            )
    if found.device != like.device:
        raise ValueError(
            f"a model must return its prediction on the device of its input, {like.device}, got {found.device}"
        )
    if not found.dtype.is_floating_point:
        raise TypeError(f"a model must return floating point, got {found.dtype}")
    return found


def _found_in(output: Any) -> Any:
    """What should be the prediction, where a model did not return it alone."""
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)


@dataclass(frozen=True)
class ModelCard:
    """What a shipped model is: enough to sample it well without asking anyone.

    Attributes:
        clip_sample_range: what x0 is clipped to where the user does not say; None where clipping makes its samples worse.
    """

    name: str
    sample_shape: tuple[int, ...]
    prediction_type: str
    clip_sample_range: float | None
    class_names: tuple[str, ...]


FASHION = ModelCard(
    name="fashion",
    sample_shape=(1, 28, 28),
    prediction_type="v_prediction",
    clip_sample_range=None,  # docs/MODEL_CARD.md has what clipping costs
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)
SHIPPED = {"fashion": FASHION}


class ShippedModel(nn.Module):
    """The shipped U-Net with its card. ``model(x, t, class_labels=None)``; labels ``(B,)`` int64, ``num_classes`` meaning "no label"."""

    def __init__(self, card: ModelCard, unet: SmallUNet):
        super().__init__()
        self.card = card
        self.unet = unet
        self.prediction_type = card.prediction_type
        self.clip_sample_range = card.clip_sample_range
        self.sample_shape = card.sample_shape
        self.class_names = card.class_names
        self.num_classes = unet.num_classes
        self.schedule = NoiseSchedule.linear()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t, class_labels)

    def unconditional(self, conditioning: Mapping[str, Any]) -> dict[str, Any]:
        """The conditioning of classifier-free guidance's other half: the same without a label."""
        labels = conditioning.get("class_labels")
        return {**conditioning, "class_labels": None if labels is None else torch.full_like(labels, self.num_classes)}


def load_shipped_model(
    name: str = "fashion", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ShippedModel:
    """The model that ships with the package, in eval mode, its weights frozen.

    Args:
        name: "fashion": pictures of clothes, 28 x 28, ten classes, trained on Fashion-MNIST (model card: docs/MODEL_CARD.md).

    Raises:
        ValueError: there is no such model.
    """
    if name not in SHIPPED:
        raise ValueError(f"a shipped model must be one of {', '.join(SHIPPED)}, got {name!r}")
    with safe_open(WEIGHTS / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    with torch.device("meta"):
        unet = SmallUNet(**config)
    unet.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    model = ShippedModel(SHIPPED[name], unet).to(device, memory_format=torch.channels_last)
    return model.requires_grad_(False).eval()
