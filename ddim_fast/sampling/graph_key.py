"""The key under which a graph is kept: everything that it bakes in."""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .captured_loop import LOADED, SCRATCH, Job, capacity
from .model_state import PLAIN, ModelState, plain_key

_tensors_of = attrgetter(*LOADED, *SCRATCH)


def graph_key(mode: str, job: Job, state: ModelState | None) -> Hashable:
    """Return everything that a graph bakes in.

    The model of a graph is kept alive, so an id is not reused.
    """
    return id(job.model) if state is None else state.key, call_key(mode, job), _precisions()


def call_key(mode: str, job: Job) -> Hashable:
    """Return what a graph bakes in of a call, apart from its model."""
    loop, plan = job.loop, job.plan
    return (
        mode,
        capacity(mode, plan.num_inference_steps),
        *[None if tensor is None else _tensor_key(tensor) for tensor in _tensors_of(loop)],
        len(loop.calls),
        loop.thresholding,
        loop.normals,
        (plan.steps[0].coefficients.clipped, plan.adds_noise, loop.mask is not None and plan.adds_known_noise),
        loop.guidance_rescale,
        job.structure,
        tuple(map(_leaf_key, job.leaves)),
    )


def _precisions() -> Hashable:
    """Return what decides which kernels torch chooses for matrix products and convolutions."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None))
    chosen = [getattr(backend, "fp32_precision", None) for backend in backends]
    if chosen[0] is None:  # torch before 2.9
        chosen = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    return (*chosen, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, *autocast)


def _tensor_key(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _leaf_key(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _tensor_key(leaf)
    if not isinstance(leaf, PLAIN):
        raise TypeError(
            "conditioning of a captured graph must be tensors and plain values (numbers, strings, None), got a "
            f"{type(leaf).__name__}: pass a tensor, or use capture='off'"
        )
    return plain_key(leaf)
