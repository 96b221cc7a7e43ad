"""The step in SIMD C++ (csrc/), as a backend, and the noise standard in C++."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.untraced import untraced
from .coefficients import StepCoefficients
from .density import DensityInputs
from .fields import PER_ELEMENT, StepInputs
from .layout import Rows, as_rows, lay_out, plain_memory_reasons
from .noise import NoiseStream, check_seed, sample_seeds, standard_normals

try:
    extension: Any = importlib.import_module("._cpu_step", __package__)
except ImportError as error:
    extension = None
    missing_reason = (
        f"the C++ extension is missing ({error}): install a C++ compiler and reinstall ddim_fast "
        "(pip install --force-reinstall --no-deps . in its folder)"
    )

name = "cpu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of csrc/step.h

if extension is not None and (wanted := os.environ.get("DDIM_FAST_INSTRUCTION_SET")):
    extension.select(wanted)


def _no_step(
    x_t: Any,
    model_output: Any,
    rows: dict[int, StepCoefficients],
    t: Any,
    values: tuple[tuple[dict[str, Any], str, Any], ...],
    writes: tuple[tuple[Tensor, int], ...],
    wants_x0: bool = True,
    noise: Any = None,
    history: Any = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Run ``ddim_step`` without seeds, guidance or thresholds, outside of ``torch.compile``, or
    decline.

    This is for callers that count microseconds. In C++ all of it is one call: it looks up the row,
    and allocates both results without torch, whose new tensors cost six of the twenty microseconds
    that a small step would take.

    Args:
        rows: rows by key.
        t: the key, or an int64 tensor with it.
        values, writes: what the rows were computed from. Each dictionary must still have that very
            value for its key, and each tensor that count of writes.
        wants_x0: if False, x0 is None.
        noise, history: what the row adds as such, in the shape and dtype of ``x_t``. They are left
            as they are.

    Returns:
        ``(x_prev, x0)`` in new tensors. Or None, having done nothing and without an error, if the
        tensors are not plain CPU tensors that fit together, or there is no such row, or the rows
        are outdated. The tensors own their memory as those from ``torch.from_dlpack`` do:
        ``resize_`` cannot enlarge them.
    """


plain_step = _no_step if extension is None else extension.step_to_new


def _finite_is_not_known(tensor: Any) -> bool | None:
    """Return whether no element is NaN or infinite; None if it is not a plain tensor on the CPU."""


is_finite = _finite_is_not_known if extension is None else extension.is_finite


def _no_density(*arguments: Any) -> Any:
    """Compute ``density`` of plain tensors in one call of C++, or decline.

    This is for callers that count microseconds. The arguments are those of ``ddim_log_prob``, and
    those of the backward pass beside them, in the order of csrc/density_calls.cpp, which says what
    each call returns. None says that it declines, having done nothing.
    """


plain_density = _no_density if extension is None else extension.density_of_plain
plain_density_backward = _no_density if extension is None else extension.density_backward_of_plain


def unsupported_reasons(inputs: StepInputs, more: Iterable[Tensor] = ()) -> list[str]:
    """Return why this backend cannot run these (valid) inputs; empty if it can."""
    reasons = []
    if extension is None:
        reasons.append(missing_reason)
    if inputs.x_t.device.type != "cpu":
        reasons.append(f"tensors are on {inputs.x_t.device}, it runs on cpu")
    reasons += plain_memory_reasons(inputs, more)
    given = (*(tensor for _, tensor in inputs.tensors), *more)
    if not reasons and any(t.data_ptr() == 0 and t.numel() for t in given):
        reasons.append("a tensor has no memory, such as zeros that torch knows without any")
    return reasons


def run(inputs: StepInputs) -> Tensor:
    """Run checked inputs.

    Samples may have any stride between them. Tensors whose samples are not contiguous are copied.
    """
    x_t, log_prob = inputs.x_t, inputs.log_prob_out
    result = inputs.x_prev if inputs.x_prev is not None else torch.empty_like(x_t)
    if x_t.numel() == 0:
        if log_prob is not None:
            log_prob.zero_()
        return result
    assert isinstance(inputs.coefficients, StepCoefficients)  # dispatch has read a table's row
    rows = as_rows(inputs, result)
    keep = []  # copies stay alive until the kernel has run

    def address(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        keep.append(tensor.contiguous())
        return keep[-1].data_ptr()

    arguments: tuple[Any, ...] = (
        rows.n_samples,
        rows.n_elements,
        _described(rows, PER_ELEMENT, {"noise": inputs.adds_noise, "known_noise": inputs.adds_known_noise}),
        inputs.guidance_scale or 0.0,
        inputs.coefficients.packed,
        address(inputs.thresholds),
        address(inputs.seeds if inputs.adds_noise and inputs.noise is None else None),
        address(inputs.seeds if inputs.adds_known_noise and inputs.known_noise is None else None),
        inputs.noise_step,
        inputs.noise_stream,
        torch.get_num_threads(),
    )
    if log_prob is None:
        extension.run(*arguments)
    else:
        scale, offset = inputs.coefficients.scale_and_offset(inputs.min_std)
        dense = log_prob.contiguous()
        extension.run(*arguments, dense.data_ptr(), scale, offset, inputs.log_prob_reduction == "mean")
        if dense is not log_prob:
            log_prob.copy_(dense)
    rows.copy_back()
    return result


def _described(rows: Rows, names: Iterable[str], wanted: Mapping[str, bool] = MappingProxyType({})) -> tuple[Any, ...]:
    """Return (address, stride, dtype) of each tensor; zeros where it is not given or not wanted."""

    def describe(name: str) -> tuple[int, int, int]:
        tensor = rows.tensors.get(name)
        if tensor is None or not wanted.get(name, True):
            return (0, 0, 0)
        return (tensor.data_ptr(), rows.strides[name], DTYPES[tensor.dtype])

    return tuple(describe(name) for name in names)


# --- The density of a step --------------------------------------------------------------------------------------------

_OF_DENSITY = ("x_t", "model_output", "model_output_uncond", "x_prev", "reference", "reference_uncond", "mask")
_GRADIENTS = tuple(f"of_{name}" for name in ("x_t", "model_output", "model_output_uncond"))


def density(inputs: DensityInputs, counts: Tensor | None = None) -> Tensor:
    """Return the log-density or divergence of checked inputs, ``(B,)`` float32; see
    ``reference.density``."""
    result = torch.empty(len(inputs.step.x_t), dtype=torch.float32, device="cpu")
    if inputs.step.x_t.numel() == 0:
        if counts is not None:
            counts.zero_()
        return result.zero_()
    _run_density(inputs, {}, result.data_ptr(), 0 if counts is None else counts.data_ptr(), 0)
    return result


def density_backward(inputs: DensityInputs, factors: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients; see ``reference.density_backward``. This is one pass over memory."""
    if inputs.step.x_t.numel():
        factors = factors.contiguous()
        _run_density(inputs, {f"of_{name}": t for name, t in gradients.items()}, 0, 0, factors.data_ptr())


def _run_density(inputs: DensityInputs, gradients: dict[str, Tensor], results: int, counts: int, factors: int) -> None:
    rows = lay_out(inputs.tensors, gradients)
    extension.density(
        rows.n_samples,
        rows.n_elements,
        _described(rows, (*_OF_DENSITY, *_GRADIENTS)),
        inputs.step.guidance_scale or 0.0,
        inputs.row.packed,
        inputs.scale,
        inputs.offset,
        inputs.sign,
        inputs.reduction == "mean",
        results,
        counts,
        factors,
        torch.get_num_threads(),
    )
    rows.copy_back()


@untraced
def seeds_of(seed: int, count: int) -> Tensor:
    """Return ``noise.sample_seeds`` of the first ``count`` samples, ``(count,)`` int64 on the CPU.

    NumPy computes them where the extension is missing, which takes as long as a small step.
    """
    words = torch.empty(
        (max(count, 0), 2), dtype=torch.int64, device="cpu"
    )  # four of 32 bits; a seed has the first two
    in_cpp = extension is not None and type(words) is Tensor and sys.byteorder == "little"
    if not in_cpp or not 0 <= count < 1 << 32:
        return torch.from_numpy(sample_seeds(seed, count))
    check_seed(seed)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    extension.words(signed, 0, 0, int(NoiseStream.SEEDS), words.data_ptr(), count)
    return words[:, 0].clone()


@untraced
def normals(seeds: Tensor, shape: tuple[int, ...], step: int, stream: int) -> Tensor:
    """Return normals of the noise standard, ``(len(seeds), *shape)`` float32 on the CPU.

    NumPy computes them where the extension is missing.
    """
    n_elements = math.prod(shape)
    if extension is None:
        return torch.from_numpy(standard_normals(np.asarray(seeds), n_elements, step, stream)).view(-1, *shape)
    seeds = seeds.contiguous()
    count = seeds.shape[0]
    z = torch.empty((count, *shape), dtype=torch.float32, device="cpu")
    extension.normals(seeds.data_ptr(), count, n_elements, step, stream, z.data_ptr(), torch.get_num_threads())
    return z
