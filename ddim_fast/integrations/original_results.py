"""Results with the dtype and the memory layout that an original's arithmetic gives them.

Noise is drawn in the order of the samples' memory, so another layout is another picture. PyTorch
gives each operation's result a layout that depends on the shapes, strides and dtypes of all
operands, and on the device. So an original's operations are run once for each combination, on
tensors without values, and what they return is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..kernels.dispatch import ddim_step

HALF_PRECISION = (torch.float16, torch.bfloat16)
_MAX_KNOWN = 1024
_known: dict[Any, tuple[ResultKind, ...]] = {}


class ResultKind(NamedTuple):
    """The strides and the dtype of a result."""

    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate such a result in the shape and on the device of ``like``."""
        return torch.empty_strided(like.shape, self.strides, dtype=dtype or self.dtype, device=like.device)


def kinds_of_results(
    operations: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, **options: Any
) -> tuple[ResultKind, ...]:
    """Return what ``operations(*tensors, **options)`` returns but for the values.

    Args:
        operations: a function of a module (it is remembered), which makes tensors of its own on the
            device of its first argument.
        options: the same ones, in the same order, in each call of ``operations``.
    """
    first = cast(Tensor, tensors[0])
    shape, strides = first.shape, first.stride()
    parts = [operations, shape, strides, first.is_cpu, torch.get_default_dtype(), *options.values()]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif tensor is first or (tensor.stride() == strides and tensor.shape == shape):  # nearly always
            parts.append(tensor.dtype)
        else:
            parts.append((tensor.shape, tensor.stride(), tensor.dtype))
    key = tuple(parts)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        found = _known[key] = _run(operations, tensors, options)
    return found


def _run(
    operations: Callable[..., tuple[Tensor, ...]], tensors: Any, options: dict[str, Any]
) -> tuple[ResultKind, ...]:
    # Before it adds tensors of two dtypes, PyTorch converts one of them: on CPUs to a new tensor,
    # whose layout counts. The meta device, which computes nothing, does not show that.
    given = [tensor for tensor in tensors if tensor is not None]
    as_allocated = all(tensor.stride() == _strides_when_new(tensor.shape) for tensor in given)
    device = "cpu" if given[0].device.type == "cpu" and not as_allocated else "meta"
    with torch.no_grad():
        results = operations(*_without_values(tensors, device), **options)
        return tuple(ResultKind(result.stride(), result.dtype) for result in results)


def strides_when_traced(
    operations: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None, **options: Any
) -> tuple[tuple[int, ...], ...]:
    """Return the strides of ``kinds_of_results`` inside ``torch.compile``, where shapes may be symbols.

    Of tensors of one dtype, they are those of ``kinds_of_results``.
    """
    return tuple(result.stride() for result in operations(*_without_values(tensors, "meta"), **options))


def _without_values(tensors: Iterable[Tensor | None], device: str) -> list[Tensor | None]:
    return [
        None
        if tensor is None
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        for tensor in tensors
    ]


def _strides_when_new(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in this dtype; asking first takes a tenth of the time of ``Tensor.to``."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def readable(model_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``model_output`` as a step of samples of this dtype reads it.

    Half precision beside float32 stays.
    """
    stays = dtype == torch.float32 and model_output.dtype in HALF_PRECISION
    return model_output if stays else converted(model_output, dtype)


def step_of_kind(
    kind: ResultKind,
    x_t: Tensor,
    model_output: Tensor,
    step: Any,
    *,
    noise: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    take: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Take a step that returns an x_prev of this kind, in its dtype.

    Args:
        step: the third argument of ``take``: a row, or a timestep.
        noise, model_output_uncond: of any floating-point dtype.
        take: ``ddim_step`` if None.
        options: other arguments of ``take``.
    """
    if model_output_uncond is not None:
        options["model_output_uncond"] = readable(model_output_uncond, kind.dtype)
    if noise is not None:
        options["noise"] = converted(noise, kind.dtype)
    take = ddim_step if take is None else take
    return take(converted(x_t, kind.dtype), readable(model_output, kind.dtype), step, out=kind.empty(x_t), **options)


def step_with_x0(
    x0_kind: ResultKind, x_prev_kind: ResultKind, x_t: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Take ``step_of_kind``; return x_prev and the predicted x0, of a kind of its own."""
    x0 = x0_kind.empty(x_t, x_prev_kind.dtype)
    return step_of_kind(x_prev_kind, x_t, *args, x0_out=x0, **options), converted(x0, x0_kind.dtype)


def step_of_kinds(
    kinds: tuple[ResultKind, ...],
    x_t: Tensor,
    model_output: Tensor,
    step: Any,
    *,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    writes_x0: bool = False,
    take: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Take a step that returns an x_prev of the first kind, in a dtype that keeps the digits of every tensor.

    Args:
        history: what ``ddim_step`` reads as such. It is left as it is.
        writes_x0: return x0, too, of the second kind; None in its place otherwise.

    The other arguments are those of ``step_of_kind``.
    """
    dtype = torch.promote_types(x_t.dtype, model_output.dtype)
    for more in (noise, history, kinds[1] if writes_x0 else None):
        dtype = dtype if more is None else torch.promote_types(dtype, more.dtype)
    tensors: dict[str, Any] = {"out": kinds[0].empty(x_t, dtype)}
    x0 = kinds[1].empty(x_t, dtype) if writes_x0 else None
    if history is None:
        tensors["x0_out"] = x0
    else:  # where the step then writes x0
        tensors["history"] = history.to(dtype, copy=True) if x0 is None else x0.copy_(history)
    if noise is not None:
        tensors["noise"] = converted(noise, dtype)
    take = ddim_step if take is None else take
    x_prev = take(converted(x_t, dtype), readable(model_output, dtype), step, **tensors)
    return converted(x_prev, kinds[0].dtype), x0 if x0 is None else converted(x0, kinds[1].dtype)


def coefficient(x: Tensor) -> Tensor:
    """Return a coefficient of an original's step as most have it: one number, in float32."""
    return torch.empty((), dtype=torch.float32, device=x.device)


def per_sample_coefficient(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a coefficient ``(B, 1, ...)`` of an original's step, in torch's default dtype."""
    return torch.empty((len(x), *[1] * (x.ndim - 1)), dtype=dtype, device=x.device)


def originals_x0(k: Tensor, x: Tensor, m: Tensor, prediction_type: str) -> Tensor:
    """Run the operations of the originals' predictions of x0, with a coefficient ``k``."""
    if prediction_type == "sample":
        return m
    return k * x - k * m if prediction_type == "v_prediction" else (x - k * m) / k


def originals_eps(k: Tensor, x: Tensor, m: Tensor, x0: Tensor, prediction_type: str, recomputed: bool) -> Tensor:
    """Run the operations of the originals' predictions of eps: from x0 where ``recomputed``."""
    if recomputed or prediction_type == "sample":
        return (x - k * x0) / k
    return k * m + k * x if prediction_type == "v_prediction" else m
