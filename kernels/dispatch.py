"""Which backend runs a step. BACKENDS is asked in order; the first that has no reason against it runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu_step, reference, triton_backend
from .contract import StepCoefficients, StepInputs, StepTable, check_inputs
from .layout import is_wrapped

BACKENDS = {backend.name: backend for backend in (cpu_step, triton_backend, reference)}
"""Modules, best first, each with ``name``, ``unsupported_reasons(inputs) -> list[str]`` and ``run(inputs) -> x_prev``."""

_run_plain = cpu_step.extension.step if cpu_step.extension is not None else None
_is_inference_mode = torch.is_inference_mode_enabled
# Whether torch.compile traces this, or a mode such as make_fx's or FakeTensorMode's looks at every operation: then a step is one operator.
# (The C++ step declines by itself where a mode is active, or forward-mode derivatives are taken: asking here first would cost more.)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_modes_active = torch._C._len_torch_dispatch_stack
_warned = False
_NOISE_ONLY = StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1)


def ddim_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    *,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int = 0,
    noise_stream: int = 0,
    thresholds: Tensor | None = None,
    mask: Tensor | None = None,
    known_x0: Tensor | None = None,
    known_noise: Tensor | None = None,
    normals: str = "exact",
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    history: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One DDIM update, x_t to x_prev, in a single pass over memory (equation 12 of arXiv 2010.02502).

    Args:
        x_t: noisy samples ``(B, ...)``, float32, float16, bfloat16 (computed in float32) or float64 (reference only).
        model_output: what the model predicted for ``x_t``, of the same shape; the same dtype, or a half dtype beside float32.
        coefficients: the step's row, from a ``SamplingPlan``.
        model_output_uncond, guidance_scale: with both, ``m = uncond + guidance_scale * (model_output - uncond)``
            (classifier-free guidance, arXiv 2207.12598).
        noise: standard normal noise in the shape and dtype of ``x_t``. Read only where the row adds noise.
        seeds: instead of ``noise``: ``(B,)`` int64, each sample's seed; the noise standard's normals at ``noise_step`` of
            ``noise_stream`` are then made in registers.
        thresholds: ``(B,)`` float32: dynamic thresholding, x0 of sample i is multiplied by clip / thresholds[i] before it is clipped.
        mask, known_x0: with both, inpainting: where the mask is 1, x_prev is ``known_x0`` (a clean picture) at the noise level of
            x_prev; between 0 and 1 it is a blend. Shape and dtype of ``x_t``.
        known_noise: standard normal noise for ``known_x0``; from ``seeds`` (in a stream of its own) if none.
        normals: how ``seeds`` become noise: "exact", the noise standard's bits; or "fast", on NVIDIA GPUs the hardware's approximations
            in their place, with fewer instructions (docs/GPU.md). The exact form is used wherever there is no other.
        out: where x_prev goes; may be ``x_t`` itself. A new tensor if none.
        x0_out: where the predicted (and clipped) x0 goes, in the dtype of ``x_t``; nowhere if none.
        history: for a multistep form (a plan with ``order=2``): what the step before wrote here is read, where the row has a
            ``prev_history``, and this step's x0 takes its place, element by element. Shape and dtype of ``x_t``; no memory is shared.
        backend: a name in ``BACKENDS``; the first that can if none.

    Returns:
        x_prev: ``out``, or a new tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule; nothing has been written.
    """
    target = out
    traced = _is_dynamo_compiling()
    plain = mask is None and known_x0 is None and known_noise is None and normals == "exact" and backend is None
    if plain and not traced and _run_plain is not None:
        if out is None and isinstance(x_t, Tensor):
            target = torch.empty_like(x_t)
        result = _run_plain(
            x_t,
            model_output,
            coefficients,
            model_output_uncond,
            guidance_scale,
            noise,
            seeds,
            noise_step,
            noise_stream,
            thresholds,
            target,
            x0_out,
            history,
        )
        if result is not None:
            if not _is_inference_mode():
                _note_writes(out, x0_out, history)
            return result
    inputs = StepInputs(
        x_t, model_output, coefficients, None, model_output_uncond, guidance_scale, noise, seeds, noise_step, noise_stream,
        thresholds, mask, known_x0, known_noise, out, x0_out, normals, history,
    )  # fmt: skip
    if backend is None and (traced or _modes_active()):
        return _through_operator(inputs, target)
    return run(inputs, backend)


def ddim_step_from_table(
    x_t: Tensor,
    model_output: Tensor,
    table: StepTable,
    index: Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    noise_step: int = 0,
    noise_stream: int = 0,
    thresholds: Tensor | None = None,
    mask: Tensor | None = None,
    known_x0: Tensor | None = None,
    known_noise: Tensor | None = None,
    normals: str = "exact",
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """``ddim_step`` by a row of a table, whose number is in memory beside the samples: nothing about the step is known to the host.

    On a GPU nothing waits, and nothing is baked into a CUDA graph that captures this. On a CPU the number is read.

    Args:
        table: the steps, for instance ``plan.table(device, guidance_scale)``. The guidance scale is part of it.
        index: one int64 number on the device of ``x_t``, or ``(B,)``, one for each sample, at least 0 and less than the rows of the
            table: which step this is. (On a GPU, this is not checked.)
        noise_step: added to ``index``, modulo 2**32, it is the noise's step.

    The other arguments, the result and the errors are those of ``ddim_step``. Coefficients are float32, also for samples in float64.
    """
    inputs = StepInputs(
        x_t, model_output, table, index, model_output_uncond, None, noise, seeds, noise_step, noise_stream,
        thresholds, mask, known_x0, known_noise, out, x0_out, normals, history,
    )  # fmt: skip
    return _through_operator(inputs, out) if _is_dynamo_compiling() or _modes_active() else run_from_table(inputs)


def run(inputs: StepInputs, backend: str | None = None) -> Tensor:
    """Check the inputs, and run them by the backend of that name, or the first that can."""
    check_inputs(inputs)
    return _run_checked(inputs, backend)


def _run_checked(inputs: StepInputs, backend: str | None = None) -> Tensor:
    chosen = choose(inputs, backend)
    result = chosen.run(inputs)
    if chosen is not reference and not _is_inference_mode():
        _note_writes(*inputs.writes.values())
    return result


def run_from_table(inputs: StepInputs) -> Tensor:
    """``run`` for inputs whose coefficients are a table: on the device, or else with the row read from it."""
    check_inputs(inputs)
    if not triton_backend.unsupported_reasons(inputs):
        return _run_checked(inputs, "triton")
    table, rows = inputs.coefficients, inputs.index.reshape(-1).tolist()
    if wrong := [row for row in rows if not 0 <= row < len(table.rows)]:
        raise ValueError(
            f"index must be at least 0 and less than the {len(table.rows)} rows of the table, got {wrong[0]}"
        )
    found = [table.coefficients(row) for row in rows]
    if inputs.row_per_sample:
        return run_per_sample(inputs, *zip(*found, strict=True), [inputs.noise_step + row for row in rows])
    coefficients, guidance_scale = found[0]
    return run(
        replace(
            inputs,
            coefficients=coefficients,
            index=None,
            guidance_scale=None if inputs.model_output_uncond is None else guidance_scale,
            noise_step=(inputs.noise_step + rows[0]) & 0xFFFFFFFF,
        )
    )


def run_per_sample(
    inputs: StepInputs,
    coefficients: Sequence[StepCoefficients],
    guidance_scales: Sequence[float | None],
    noise_steps: Sequence[int],
) -> Tensor:
    """``run`` for samples that are each at a step of their own: a kernel call for each."""
    guided = inputs.model_output_uncond is not None
    x_prev = torch.empty_like(inputs.x_t) if inputs.x_prev is None else inputs.x_prev
    inputs = replace(inputs, x_prev=x_prev)
    each = zip(coefficients, guidance_scales, noise_steps, strict=True)
    steps = [(row, scale if guided else None, noise_step) for row, scale, noise_step in each]
    for i, step in enumerate(steps):  # all of them before the first writes
        check_inputs(inputs.sample(i, *step))
    for i, step in enumerate(steps):  # views are made between the writes, so that autograd sees those before
        _run_checked(inputs.sample(i, *step))
    return x_prev


def _through_operator(inputs: StepInputs, target: Tensor | None) -> Tensor:
    """The step as one operator of ``operators``, into ``target``, or new memory if none.

    Differentiable inputs are left to the reference, which is traced itself.
    """
    tensors = [*(t for _, t in inputs.reads), *([] if inputs.history is None else [inputs.history])]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    wrapped = not _is_dynamo_compiling() and any(is_wrapped(t) for t in tensors)  # torch.compile cannot ask
    if recorded or wrapped or forward_ad._current_level >= 0:
        if isinstance(inputs.coefficients, StepTable):
            raise ValueError(
                "a step by a row of a table has no derivatives where it is traced, got tensors that record them: "
                "use ddim_step with a row's coefficients, or torch.inference_mode()"
            )
        return run(inputs, "reference")
    i = inputs
    x_prev = torch.empty_like(i.x_t) if target is None else target
    x_t = None if x_prev is i.x_t else i.x_t
    after = (i.noise, i.seeds, i.noise_step, i.noise_stream, i.thresholds, i.mask, i.known_x0, i.known_noise, i.normals)
    if isinstance(i.coefficients, StepTable):
        c = i.coefficients
        table = (c.rows, c.clipped, c.adds_noise, c.adds_known_noise, c.guided)
        torch.ops.ddim_fast.step_from_table_(
            x_prev,
            i.x0,
            x_t,
            i.model_output,
            *table,
            i.index,
            i.model_output_uncond,
            *after,
            i.history,
            c.reads_history,
        )
    else:
        row = i.coefficients.columns
        torch.ops.ddim_fast.step_(
            x_prev, i.x0, x_t, i.model_output, row, i.model_output_uncond, i.guidance_scale, *after, i.history
        )
    return x_prev


def _note_writes(*written: Tensor | None) -> None:
    """Tell autograd that kernels have written, as torch's own in-place operations do: what was saved of it for a backward is stale.

    Not done under inference mode, where it would cost as much as a small step.
    """
    torch._C._increment_version([t for t in written if t is not None])


def choose(inputs: StepInputs, name: str | None = None):
    """The backend for checked inputs. Raises ValueError with every reason if the one asked for, or none at all, can run them."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    reasons = {}
    for backend in BACKENDS.values() if name is None else [BACKENDS[name]]:
        reasons[backend.name] = backend.unsupported_reasons(inputs)
        if not reasons[backend.name]:
            _warn_if_slow(backend, inputs)
            return backend
    listed = "\n".join(f"  {backend}: {'; '.join(why)}" for backend, why in reasons.items())
    raise ValueError(f"no backend can run this step:\n{listed}")


def _warn_if_slow(backend, inputs: StepInputs) -> None:
    """Say once that the fast backend is missing, where it would have run."""
    global _warned
    if backend is reference and not _warned and cpu_step.extension is None and inputs.x_t.device.type == "cpu":
        _warned = True
        warnings.warn(
            f"ddim_fast computes with its PyTorch reference, which is slower: {cpu_step.missing_reason}", stacklevel=6
        )


def normals(
    seeds: Tensor, shape: tuple[int, ...], step: int, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normals of the noise standard, rounded to ``dtype``: ``(len(seeds), *shape)`` on the device of ``seeds`` ``(B,)`` int64."""
    if seeds.device.type == "cpu":
        return cpu_step.normals(seeds, shape, step, stream).to(dtype)
    # A step that is noise and nothing else.
    zeros = torch.zeros((len(seeds), *shape), device=seeds.device, dtype=torch.float32)
    z = ddim_step(zeros, zeros, _NOISE_ONLY, seeds=seeds, noise_step=step, noise_stream=stream)
    return z.to(dtype)
