"""The models that ship with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..plans.schedules import NoiseSchedule
from ..utils.checks import check_choice
from .class_labels import ClassConditional, check_labels, check_range
from .unet import SmallUNet

WEIGHTS = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class ModelCard:
    """The facts about a shipped model that a sampler needs.

    Attributes:
        clip_sample_range: the default range of clipping x0; None where clipping makes the samples
            worse.
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
SCENES = ModelCard(
    name="scenes",
    sample_shape=(3, 32, 32),
    prediction_type="v_prediction",
    clip_sample_range=None,
    class_names=("Sphere", "Cylinder", "Cube", "Octahedron", "Pyramid", "Cone"),
)
SHIPPED = {card.name: card for card in (FASHION, SCENES)}


class ShippedModel(ClassConditional, nn.Module):
    """The shipped U-Net with its card: ``model(x, t, class_labels=None)``.

    Labels are ``(B,)`` int64, from 0 to ``num_classes`` - 1; ``num_classes`` means "no label". Others
    raise TypeError or ValueError, where they are on the CPU.
    """

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
        if class_labels is not None:
            check_labels(class_labels, x.shape[0], self.num_classes)  # len(x) would fix the batch of torch.export
        try:
            return self.unet(x, t, class_labels)
        except IndexError:  # of a label: to look at them before takes a while, and cannot be captured
            if class_labels is not None:
                check_range(class_labels, self.num_classes)
            raise


def load_shipped_model(
    name: str = "fashion", device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ShippedModel:
    """Load a model that ships with the package, in eval mode, its weights frozen.

    Args:
        name: "fashion": pictures of clothes, 28 x 28, ten classes, trained on Fashion-MNIST; or
            "scenes": pictures of solids on a floor, 32 x 32 in colour, six classes (model cards:
            docs/MODEL_CARD.md).

    Raises:
        ValueError: there is no such model.
    """
    check_choice("a shipped model", name, SHIPPED)
    with safe_open(WEIGHTS / f"{name}.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    with torch.device("meta"):
        unet = SmallUNet(**config)
    unet.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    model = ShippedModel(SHIPPED[name], unet).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return model.requires_grad_(False).eval()
