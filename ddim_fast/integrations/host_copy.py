"""The values of a tensor of a scheduler on the host, without waiting for its device in each step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.torch_internals import write_count


class HostCopy(NamedTuple):
    """The values of a tensor, and how often it had been written then."""

    tensor: Tensor
    write_count: int | None
    values: Any
    """A list, or of a tensor without dimensions a number."""

    @classmethod
    def of(cls, tensor: Tensor, values: Any = None) -> HostCopy:
        """Copy ``tensor``, which waits for its device; or take its ``values`` where they are known."""
        return cls(tensor, write_count(tensor), tensor.tolist() if values is None else values)

    def is_of(self, tensor: Any) -> bool:
        """Return whether these are the values of ``tensor`` still."""
        return tensor is self.tensor and write_count(tensor) == self.write_count
