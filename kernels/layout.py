"""Lay a step's tensors out for kernels: each as B samples of n contiguous elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import overlaps_itself
from .fields import PER_ELEMENT, TENSORS, StepInputs
from .torch_internals import is_wrapped, takes_forward_derivatives

DTYPES_OF_KERNELS = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels read and write; all compute in float32."""


@dataclass(eq=False)
class Rows:
    """A step's tensors as rows: sample i of ``tensors[name]`` starts ``strides[name] * i`` elements
    in.

    ``copied`` holds the outputs whose own layout has no such rows: (the tensor, the rows that are
    copied to it once they are written).
    """

    n_samples: int
    n_elements: int
    tensors: dict[str, Tensor]
    strides: dict[str, int]
    copied: list[tuple[Tensor, Tensor]]

    def copy_back(self) -> None:
        for tensor, rows in self.copied:
            tensor.copy_(rows)


def as_rows(inputs: StepInputs, x_prev: Tensor) -> Rows:
    """Return the rows of checked inputs with at least one element.

    Tensors whose samples are not contiguous are copied. All samples become one row where all
    tensors are dense in the same order and nothing depends on an element's sample or index.
    """
    read = {name: t.detach() for name, t in inputs.reads if name in PER_ELEMENT}
    written = {"x_prev": x_prev, **{name: t for name, t in inputs.writes.items() if name in PER_ELEMENT}}
    return lay_out(read, written, _flat_order(inputs, [*read.values(), *written.values()]))


def lay_out(read: dict[str, Tensor], written: dict[str, Tensor], flat: bool = False) -> Rows:
    """Return the rows of tensors of one shape with at least one element: one row of all if
    ``flat``."""
    like = next(iter(read.values()))
    n_samples = 1 if flat else like.shape[0]
    n_elements = like.numel() // n_samples
    tensors, copied = {}, []
    for name, tensor in read.items():
        tensors[name] = tensor if flat or _has_rows(tensor) else tensor.contiguous()
    for name, tensor in written.items():
        tensors[name] = tensor
        if not flat and not _has_rows(tensor):
            tensors[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if name in TENSORS and TENSORS[name].read:
                tensors[name].copy_(tensor)
            copied.append((tensor, tensors[name]))
    strides = {name: n_elements if flat or len(t) == 1 else t.stride(0) for name, t in tensors.items()}
    return Rows(n_samples, n_elements, tensors, strides, copied)


def _has_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor[0].is_contiguous()


def _flat_order(inputs: StepInputs, tensors: list[Tensor]) -> bool:
    x_t = inputs.x_t
    of_a_sample = inputs.thresholds is not None or inputs.log_prob_out is not None
    if inputs.generates_noise or of_a_sample or inputs.row_per_sample:
        return False
    span = sum((size - 1) * stride for size, stride in zip(x_t.shape, x_t.stride(), strict=True)) + 1
    dense = span == x_t.numel() and not overlaps_itself(x_t)
    return dense and all(t.stride() == x_t.stride() for t in tensors)


def plain_memory_reasons(inputs: StepInputs, more: Iterable[Tensor] = ()) -> list[str]:
    """Return why kernels, which read plain memory, cannot run these inputs, with ``more`` tensors
    beside them; empty if they can."""
    reasons = []
    x_t, m = inputs.x_t, inputs.model_output
    if x_t.dtype not in DTYPES_OF_KERNELS:
        reasons.append(f"x_t is {x_t.dtype}, it takes float32, float16 and bfloat16")
    elif m.dtype not in DTYPES_OF_KERNELS or x_t.dtype not in (m.dtype, torch.float32):
        reasons.append(
            f"model_output is {m.dtype} beside an x_t of {x_t.dtype}, it takes the same dtype, or a half beside float32"
        )
    if inputs.model_input_out is not None and inputs.model_input_out.dtype not in DTYPES_OF_KERNELS:
        reasons.append(f"model_input_out is {inputs.model_input_out.dtype}, it takes float32, float16 and bfloat16")
    tensors = [*(tensor for _, tensor in inputs.tensors), *more]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("a tensor requires gradients, which only the reference computes: use torch.no_grad()")
    if any(is_wrapper(t) for t in tensors):
        reasons.append(
            "a tensor is a subclass, a lazy negative or inside a torch.func transform: it is not plain memory"
        )
    if takes_forward_derivatives(tensors):
        reasons.append("forward-mode derivatives are being taken, which only the reference computes")
    return reasons


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor is anything but plain memory that it describes itself."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg() or is_wrapped(tensor)
