"""The model protocol, models from files, the network that ships, and the quality of samples."""

from .protocol import Model, output_tensor
from .shipped import SHIPPED, ModelCard, ShippedModel, load_shipped_model

__all__ = ["SHIPPED", "Model", "ModelCard", "ShippedModel", "load_shipped_model", "output_tensor"]
