"""The interface that the sampler needs of a model, and the outputs of real libraries' models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..utils.checks import check_sample_shape, refuse


class Model(Protocol):
    """Any callable with this signature: ``x`` ``(B, C, ...)``; ``t`` ``(B,)`` int64 timesteps;
    conditioning by name.

    It returns a tensor of the shape of ``x`` (or with twice the channels, where the second half is
    a learned variance, which DDIM ignores), a tuple that begins with one, or an object or mapping
    with one as ``sample``, as diffusers' models do.

    A model may have attributes that the sampler uses as defaults: ``prediction_type``,
    ``clip_sample_range``; ``sample_shape``, ``(C, ...)``; ``unconditional(conditioning) ->
    conditioning`` for classifier-free guidance; and ``batches_guidance``, true where both
    predictions of guidance should be one call with twice the batch. A ``schedule`` that is not the
    sampler's is warned of.
    """

    # To type checkers, ``*arguments: Any, **conditioning: Any`` is whatever else a model takes, or
    # nothing: ``def eps(x, t)`` and ``def unet(x, t, class_labels)`` are both models.
    def __call__(self, x: Tensor, t: Tensor, /, *arguments: Any, **conditioning: Any) -> Any: ...


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` can be called as a model."""
    if isinstance(model, nn.Module):
        return
    rule, kind = "model must be callable as model(x, t, **conditioning)", type(model).__name__
    if not callable(model):
        remedy = f": load it with load_model({model!r:.80})" if isinstance(model, (str, os.PathLike)) else ""
        raise TypeError(f"{rule}, got {kind}{remedy}")
    if name := denoiser_in(model):
        raise TypeError(f"{rule}, got {kind}, a whole pipeline: pass its denoiser, pipe.{name}")


def denoiser_in(pipeline: object) -> str | None:
    """Return the name of the denoiser in a pipeline as diffusers has them; None where it is none."""
    if not hasattr(pipeline, "scheduler"):
        return None
    names = ("unet", "transformer")
    return next((name for name in names if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def sample_shape_of(model: Model, shape: Sequence[int] | None) -> tuple[int, ...]:
    """Return the shape of one sample, ``(C, ...)``: ``shape``, or for None the model's
    ``sample_shape``.

    Raises:
        TypeError, ValueError: there is none, or it breaks a rule.
    """
    if shape is not None:
        return check_sample_shape("shape", shape)
    stated = getattr(model, "sample_shape", None)
    if stated is None:
        refuse("shape must be given for a model without sample_shape", None, "for instance shape=(3, 32, 32)")
    return check_sample_shape("model.sample_shape", stated)


def output_tensor(output: Any, like: Tensor) -> Tensor:
    """Return the prediction in a model's output, as a tensor of the shape of ``like``; a view,
    never a copy.

    Raises:
        TypeError: the output has no tensor where one should be, or its layout or dtype is wrong.
        ValueError: its shape or device is wrong.
    """
    found = output if isinstance(output, Tensor) else _prediction_in(output)
    if not isinstance(found, Tensor):
        raise TypeError(
            "a model must return a tensor, a tuple that begins with one, or an object with a tensor as .sample, "
            f"got {type(output).__name__}: wrap it in a function that returns its prediction"
        )
    if found.layout != torch.strided:
        raise TypeError(f"a model must return a dense tensor, got layout {found.layout}: call .to_dense()")
    if found.is_nested:
        raise TypeError(
            "a model must return a tensor with one shape, got a nested one: use torch.nested.to_padded_tensor"
        )
    if found.shape != like.shape:
        if found.ndim == like.ndim > 1 and found.shape == (like.shape[0], 2 * like.shape[1], *like.shape[2:]):
            found = found[:, : like.shape[1]]  # learned-variance channels are ignored, without a copy
        else:
            remedy = ""
            if found.ndim == like.ndim + 1:
                sizes = ", ".join(map(str, like.shape))
                remedy = f": if the input is one sample, its batch is missing, and its shape is (1, {sizes})"
            raise ValueError(
                f"a model must return the shape of its input, {tuple(like.shape)} (or twice the channels), got {tuple(found.shape)}"
                f"{remedy}"
            )
    if found.device != like.device:
        raise ValueError(
            f"a model must return its prediction on the device of its input, {like.device}, got {found.device}"
        )
    if not found.dtype.is_floating_point:
        raise TypeError(f"a model must return floating point, got {found.dtype}")
    return found


def _prediction_in(output: Any) -> Any:
    """Return what should be the prediction in a tuple, mapping or object."""
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output.get("sample") if isinstance(output, Mapping) else getattr(output, "sample", None)
