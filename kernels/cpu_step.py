"""The step in SIMD C++ (csrc/), as a backend, and the noise standard at the same speed."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .contract import StepInputs
from .noise import standard_normals

try:
    from . import _cpu_step as extension
except ImportError as error:
    extension = None
    missing_reason = (
        f"the C++ extension is not there ({error}): install a C++ compiler and reinstall ddim_fast "
        "(pip install --force-reinstall --no-deps . in its folder)"
    )

name = "cpu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/step.h

if extension is not None and (wanted := os.environ.get("DDIM_FAST_INSTRUCTION_SET")):
    extension.select(wanted)


def unsupported_reasons(inputs: StepInputs) -> list[str]:
    """Why this backend cannot run these (valid) inputs; empty if it can."""
    reasons = []
    if extension is None:
        reasons.append(missing_reason)
    x_t, m = inputs.x_t, inputs.model_output
    if x_t.device.type != "cpu":
        reasons.append(f"tensors are on {x_t.device}, it runs on cpu")
    if x_t.dtype not in DTYPES:
        reasons.append(f"x_t is {x_t.dtype}, it takes float32, float16 and bfloat16")
    elif m.dtype not in DTYPES or x_t.dtype not in (m.dtype, torch.float32):
        reasons.append(
            f"model_output is {m.dtype} beside an x_t of {x_t.dtype}, it takes the same dtype, or a half beside float32"
        )
    tensors = [t for _, t in inputs.reads]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("an input requires gradients, which only the reference computes: use torch.inference_mode()")
    written = [t for t in (inputs.x_prev, inputs.x0) if t is not None]
    if any(_is_wrapper(t) for t in (*tensors, *written)):
        reasons.append(
            "a tensor is a subclass, a lazy negative or inside a torch.func transform: it is no plain memory"
        )
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode derivatives are being taken, which only the reference computes")
    return reasons


def _is_wrapper(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_neg():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _by_sample(tensor: Tensor) -> Tensor:
    """The tensor itself if each of its samples is contiguous, else a contiguous copy."""
    inner = tensor[0] if len(tensor) else tensor
    return tensor if inner.is_contiguous() else tensor.contiguous()


def _flat_order(inputs: StepInputs, written: list[Tensor]) -> bool:
    """Whether memory can be walked as it lies: every tensor has the same dense strides, and nothing depends on an element's index."""
    x_t = inputs.x_t
    if (inputs.adds_noise and inputs.seeds is not None) or inputs.thresholds is not None:
        return False
    tensors = [t for name, t in inputs.reads if name not in ("seeds", "thresholds")] + written
    dense = (
        torch._debug_has_internal_overlap(x_t) == 0
        and sum((s - 1) * d for s, d in zip(x_t.shape, x_t.stride(), strict=True)) == x_t.numel() - 1
    )
    return dense and all(t.stride() == x_t.stride() for t in tensors)


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs. Samples may have any stride between them; other layouts than contiguous samples are copied first."""
    x_t = inputs.x_t
    result = inputs.x_prev if inputs.x_prev is not None else torch.empty_like(x_t)
    if x_t.numel() == 0:
        return result
    written = [t for t in (result, inputs.x0) if t is not None]
    flat = _flat_order(inputs, written)
    n_samples = 1 if flat else x_t.shape[0]
    n_elements = x_t.numel() // n_samples
    as_rows = (lambda t: t) if flat else _by_sample
    outputs = {
        id(t): t if flat or _by_sample(t) is t else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in written
    }
    keep = []  # copies stay alive until the kernel has run

    def describe(tensor: Tensor | None, output: bool = False) -> tuple[int, int, int]:
        if tensor is None:
            return (0, 0, 0)
        rows = outputs[id(tensor)] if output else as_rows(tensor.detach())
        keep.append(rows)
        return (rows.data_ptr(), n_elements if flat or rows.shape[0] == 1 else rows.stride(0), DTYPES[rows.dtype])

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        keep.append(tensor.contiguous())
        return keep[-1].data_ptr()

    given_noise = inputs.noise if inputs.adds_noise else None
    seeds = inputs.seeds if inputs.adds_noise and given_noise is None else None
    extension.run(
        n_samples,
        n_elements,
        (
            describe(x_t),
            describe(inputs.model_output),
            describe(inputs.model_output_uncond),
            describe(given_noise),
            describe(result, output=True),
            describe(inputs.x0, output=True),
        ),
        inputs.guidance_scale or 0.0,
        inputs.coefficients.packed,
        address(inputs.thresholds),
        address(seeds),
        inputs.noise_step,
        inputs.noise_stream,
        torch.get_num_threads(),
    )
    for tensor in written:
        if outputs[id(tensor)] is not tensor:
            tensor.copy_(outputs[id(tensor)])
    return result


def normals(seeds: Tensor, shape: tuple[int, ...], step: int, stream: int) -> Tensor:
    """Normals of the noise standard: ``(len(seeds), *shape)`` float32 on the CPU; by NumPy where the extension is missing."""
    n_elements = math.prod(shape)
    if extension is None:
        return torch.from_numpy(standard_normals(np.asarray(seeds), n_elements, step, stream)).view(-1, *shape)
    seeds = seeds.contiguous()
    z = torch.empty((len(seeds), *shape), dtype=torch.float32)
    extension.normals(seeds.data_ptr(), len(seeds), n_elements, step, stream, z.data_ptr(), torch.get_num_threads())
    return z
