"""Samples of a run by their numbers, each with the same bits whatever else is computed.

A convolution may round differently for another batch size, since libraries choose their algorithms
by it. So the model is only ever called with ``compute_batch_size`` samples, and sample i always has
the same place among the same others: i mod that size, in batch i div that size. The last batch of a
run is filled up with the samples that would follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.noise import sample_seeds
from ..kernels.torch_internals import tree_map_only
from ..models.protocol import Model, output_tensor
from ..sampler import DDIMSampler
from .conditioning import Conditioning
from .directory import Slice

_STATED = ("prediction_type", "clip_sample_range")


class FixedBatch(nn.Module):
    """A model that is called with ``size`` samples at a time, for batches of a multiple of it."""

    def __init__(self, model: Model, size: int):
        super().__init__()
        self.model, self.size = model, size
        for name in _STATED:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))
        if hasattr(model, "unconditional"):
            self.unconditional = model.unconditional

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        if len(x) == self.size:
            return output_tensor(self.model(x, t, **conditioning), x)
        outputs = []
        for first in range(0, len(x), self.size):
            part = slice(first, first + self.size)
            # A copy, as for a batch alone: an algorithm may depend on the address of its input.
            own = x[part].clone()
            outputs.append(output_tensor(self.model(own, t[part], **_part(conditioning, part, len(x))), own))
        return torch.cat(outputs)


def _part(conditioning: Mapping[str, Any], part: slice, batch_size: int) -> Mapping[str, Any]:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[part].clone() if tensor.ndim > 0 and len(tensor) == batch_size else tensor

    return tree_map_only(Tensor, cut, dict(conditioning))


@dataclass
class Samples:
    """The samples of a run, by number.

    Attributes:
        sampler: and ``model``: what draws them.
        shape: of one sample.
        compute_batch_size: samples in a model call.
        batch_size: samples in a call of the sampler: a multiple of it.
        options: further arguments of ``sampler.sample``.
        decode: makes of samples ``(B, *shape)`` what is written, each of ``written_shape``; None:
            the samples are written.
    """

    sampler: DDIMSampler
    model: Model
    shape: tuple[int, ...]
    seed: int
    compute_batch_size: int
    batch_size: int
    conditioning: Conditioning | None
    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, Any]
    written_shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self._fixed = FixedBatch(self.model, self.compute_batch_size).eval()

    def __call__(self, part: Slice, is_wanted: Callable[[], bool] = lambda: True) -> Tensor | None:
        """Return the samples ``(count, ...)`` on the CPU, or None if ``is_wanted`` is false before
        one of the batches."""
        size = self.compute_batch_size
        if part.first % size:
            raise ValueError(f"a slice must begin at a multiple of {size}, got {part.first}")
        found = torch.empty((part.count, *self.written_shape), dtype=self.dtype, device="cpu")
        end = part.first + -(-part.count // size) * size
        for first in range(part.first, end, self.batch_size):
            if not is_wanted():
                return None
            batch = self._draw(first, min(self.batch_size, end - first))
            place = found[first - part.first : first - part.first + len(batch)]
            place.copy_(batch[: len(place)] if self.decode is None else self.decode(batch[: len(place)]))
        return found

    def _draw(self, first: int, count: int) -> Tensor:
        rows = None if self.conditioning is None else self.conditioning.rows(first, count)
        return self.sampler.sample(
            self._fixed,
            (count, *self.shape),
            seeds=torch.from_numpy(sample_seeds(self.seed, count, first)),
            conditioning=None if rows is None else {name: tensor.to(self.device) for name, tensor in rows.items()},
            device=self.device,
            dtype=self.dtype,
            check_finite=False,  # what is written is checked
            **self.options,
        )
