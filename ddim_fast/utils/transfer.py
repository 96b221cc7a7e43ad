"""Copies from the host to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a host tensor on a device; itself if that is the host.

    To CUDA devices it goes from pinned memory: the copy takes its turn on the current stream, and
    the host goes on. From other memory, the host would wait until the stream has come so far.
    """
    # Fake tensors, those that torch.compile traces with included, have no memory to pin.
    plain = type(tensor) is Tensor and not torch.compiler.is_dynamo_compiling()
    if torch.device(device).type != "cuda" or not plain:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
