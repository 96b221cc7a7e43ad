"""Choose the backend of a step: the first in ``BACKENDS`` that has no reason against it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..utils.checks import check_choice
from . import cpu_step, operators, reference, triton_backend
from .coefficients import StepCoefficients, StepTable
from .contract import check_inputs, numbers_on_host
from .fields import TENSORS, StepInputs
from .torch_internals import increment_version, is_wrapped, modes_active, takes_forward_derivatives

BACKENDS = {backend.name: backend for backend in (cpu_step, triton_backend, reference)}
"""Modules, best first, each with ``name``, ``unsupported_reasons(inputs, more tensors) ->
list[str]``, ``run(inputs) -> x_prev``, and ``density`` and ``density_backward`` as in
``reference``."""

_run_plain = cpu_step.extension.step if cpu_step.extension is not None else None
_is_inference_mode = torch.is_inference_mode_enabled
# Where torch.compile traces a step, or a mode such as make_fx's looks at every operation, it is one
# operator. (The C++ step asks for modes and forward-mode derivatives itself, and declines: asking
# here first would cost more.)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_warned: set[str] = set()
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
    history_2: Tensor | None = None,
    model_input_out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
    log_prob_reduction: str = "mean",
    min_std: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute one DDIM update, x_t to x_prev, in a single pass over memory.

    (Equation 12 of arXiv 2010.02502.)

    Args:
        x_t: noisy samples ``(B, ...)`` in float32, float16, bfloat16 (all computed in float32) or
            float64 (by the reference only).
        model_output: the model's prediction for ``x_t``, of the same shape. It has the same dtype,
            or is float16 or bfloat16 where ``x_t`` is float32.
        coefficients: the step's row, from a ``SamplingPlan``.
        model_output_uncond, guidance_scale: classifier-free guidance (arXiv 2207.12598), both or
            neither: ``m = uncond + guidance_scale * (model_output - uncond)``.
        noise: standard normal noise in the shape and dtype of ``x_t``. Read only if the row adds
            noise.
        seeds: instead of ``noise``, each sample's seed, ``(B,)`` int64. The noise standard's
            normals at ``noise_step`` of ``noise_stream`` are generated in registers.
        thresholds: ``(B,)`` float32, for dynamic thresholding: x0 of sample i is multiplied by
            clip / thresholds[i], or by 2**64 if that is less, before it is clipped.
        mask, known_x0: inpainting, both or neither, in the shape and dtype of ``x_t``. Where the
            mask is 1, x_prev is ``known_x0`` (a clean image) at the noise level of x_prev; between
            0 and 1 the two are blended.
        known_noise: standard normal noise for ``known_x0``. If None, it comes from ``seeds``, in a
            separate stream.
        normals: how ``seeds`` become noise. "exact" gives the noise standard's bits. "fast" uses
            the hardware's approximations on NVIDIA GPUs, with fewer instructions (docs/GPU.md), and
            is the same as "exact" elsewhere.
        out: receives x_prev; may be ``x_t`` itself. If None, a new tensor does.
        x0_out: receives the predicted (and clipped) x0, in the dtype of ``x_t``.
        history: for a multistep solver (a plan with ``order=2``), in the shape and dtype of
            ``x_t``. The x0 that the previous step wrote here is read, if the row has a
            ``prev_history``, and replaced by this step's. It shares no memory with another
            argument.
        history_2: beside ``history``, in the same shape and dtype, for a solver of third order. The
            x0 of the step before the previous one is read, if the row has a ``prev_history_2``,
            and replaced by what ``history`` held. It shares no memory with another argument.
        model_input_out: receives the model's next input, ``input_scale * x_prev`` of the row, in
            the shape of ``x_t`` and any floating-point dtype of at least 16 bits (float64 by the
            reference only). The bits are those of ``(input_scale * x_prev.float()).to(dtype)``.
        log_prob_out: ``(B,)`` float32, receives the log-probability of each sample's x_prev, as it
            is stored, under this step: see ``ddim_log_prob``. Where gradients are recorded, x_prev
            is a constant in it, since it was sampled. With a ``mask``, elements where that is not 0
            do not count.
        log_prob_reduction: over the elements of a sample, "mean" or "sum".
        min_std: the least standard deviation that ``log_prob_out`` is taken with; the step itself
            adds its own noise. Without it, a step that adds no noise has no log-probability.
        backend: a name in ``BACKENDS``. If None, the first that can run the step.

    Returns:
        x_prev: ``out``, or a new tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule. Nothing has been written.
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
            history_2,
            model_input_out,
            log_prob_out,
            log_prob_reduction,
            min_std,
        )
        if result is None and isinstance(x_t, Tensor) and x_t.is_cuda and isinstance(coefficients, StepCoefficients):
            result = triton_backend.run_plain(
                x_t, model_output, coefficients, model_output_uncond, guidance_scale, noise, seeds, noise_step, noise_stream,
                thresholds, target, x0_out, history, history_2, model_input_out, log_prob_out, log_prob_reduction, min_std,
            )  # fmt: skip
        if result is not None:
            if not _is_inference_mode():
                if x0_out is None and history is None and model_input_out is None and log_prob_out is None:
                    written = [] if out is None else [out]  # most steps: without a loop
                else:
                    given = (out, x0_out, history, history_2, model_input_out, log_prob_out)
                    written = [tensor for tensor in given if tensor is not None]
                increment_version(written)
            return result
    inputs = StepInputs(
        x_t=x_t,
        model_output=model_output,
        coefficients=coefficients,
        model_output_uncond=model_output_uncond,
        guidance_scale=guidance_scale,
        noise=noise,
        seeds=seeds,
        noise_step=noise_step,
        noise_stream=noise_stream,
        thresholds=thresholds,
        mask=mask,
        known_x0=known_x0,
        known_noise=known_noise,
        x_prev=out,
        x0=x0_out,
        normals=normals,
        history=history,
        history_2=history_2,
        model_input_out=model_input_out,
        log_prob_out=log_prob_out,
        log_prob_reduction=log_prob_reduction,
        min_std=min_std,
    )
    if backend is None and (traced or modes_active()):
        return _through_operator(inputs, target)
    return run(inputs, backend)


def plain_step_(
    x_t: Tensor,
    model_output: Any,
    coefficients: StepCoefficients,
    history: Tensor | None = None,
    history_2: Tensor | None = None,
) -> bool:
    """Compute ``ddim_step`` of a row without noise in ``x_t``, if it is one of plain tensors on the CPU.

    Args:
        model_output: whatever a model returned.

    Returns:
        Whether it was computed. If not, nothing has been written, and nothing is known to be wrong.
    """
    if _run_plain is None or _is_dynamo_compiling():
        return False
    result = _run_plain(
        x_t, model_output, coefficients, None, None, None, None, 0, 0, None, x_t, None, history, history_2, None, None, "mean", None
    )  # fmt: skip
    if result is not None and not _is_inference_mode():
        increment_version([x_t] if history is None else [t for t in (x_t, history, history_2) if t is not None])
    return result is not None


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
    history_2: Tensor | None = None,
    model_input_out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
    log_prob_reduction: str = "mean",
) -> Tensor:
    """Compute ``ddim_step`` by the row of a table whose index is in device memory.

    The host does not know which step this is. On a GPU nothing waits, and a CUDA graph that
    captures the call runs any step. On a CPU the index is read.

    Args:
        table: the steps, for instance ``plan.table(device, guidance_scale)``. It holds the guidance
            scale, too.
        index: which row, as one int64 number on the device of ``x_t``, or one for each sample,
            ``(B,)``. It must be at least 0 and less than the number of rows, which is not checked
            on a GPU.
        noise_step: added to ``index`` modulo 2**32, it is the noise's step.

    The other arguments, the result and the errors are those of ``ddim_step``. Coefficients are
    float32, even for float64 samples.
    """
    traced = _is_dynamo_compiling()
    plain = mask is None and known_x0 is None and known_noise is None
    if plain and not traced and isinstance(table, StepTable) and isinstance(x_t, Tensor) and x_t.is_cuda:
        scale = 0.0 if table.guided else None
        result = triton_backend.run_plain(
            x_t, model_output, table, model_output_uncond, scale, noise, seeds, noise_step, noise_stream, thresholds, out, x0_out,
            history, history_2, model_input_out, log_prob_out, log_prob_reduction, None, index, normals,
        )  # fmt: skip
        if result is not None:
            if not _is_inference_mode():
                written = [out, x0_out, history, history_2, model_input_out, log_prob_out]
                increment_version([tensor for tensor in written if tensor is not None])
            return result
    inputs = StepInputs(
        x_t=x_t,
        model_output=model_output,
        coefficients=table,
        index=index,
        model_output_uncond=model_output_uncond,
        noise=noise,
        seeds=seeds,
        noise_step=noise_step,
        noise_stream=noise_stream,
        thresholds=thresholds,
        mask=mask,
        known_x0=known_x0,
        known_noise=known_noise,
        x_prev=out,
        x0=x0_out,
        normals=normals,
        history=history,
        history_2=history_2,
        model_input_out=model_input_out,
        log_prob_out=log_prob_out,
        log_prob_reduction=log_prob_reduction,
    )
    return _through_operator(inputs, out) if traced or modes_active() else run_from_table(inputs)


def run(inputs: StepInputs, backend: str | None = None) -> Tensor:
    """Check the inputs and run them on the backend of that name, or on the first that can."""
    check_inputs(inputs)
    return _run_checked(inputs, backend)


def _run_checked(inputs: StepInputs, backend: str | None = None) -> Tensor:
    chosen = choose(inputs, backend)
    result = chosen.run(inputs)
    if chosen is not reference and not _is_inference_mode():
        increment_version(list(inputs.writes.values()))
    return result


def run_from_table(inputs: StepInputs) -> Tensor:
    """Do ``run`` for inputs with a table: on the device, or else with the row read from it."""
    check_inputs(inputs)
    if not triton_backend.unsupported_reasons(inputs):
        return _run_checked(inputs, "triton")
    table = inputs.coefficients
    assert isinstance(table, StepTable)
    assert inputs.index is not None  # checked: a table needs one
    rows = numbers_on_host("index", inputs.index.reshape(-1))
    if inputs.log_prob_out is not None:
        inputs = replace(inputs, min_std=table.min_std)
    if wrong := [row for row in rows if not 0 <= row < len(table.rows)]:
        raise ValueError(
            f"index must be at least 0 and less than the {len(table.rows)} rows of the table, got {wrong[0]}"
        )
    found = [table.coefficients(row) for row in rows]
    if inputs.row_per_sample:
        all_coefficients, scales = zip(*found, strict=True)
        if inputs.log_prob_out is not None and not all(row.has_density(table.min_std) for row in all_coefficients):
            raise ValueError(
                "log_prob_out of samples with rows of their own needs rows that have a density, got a table that skips some: "
                "make it without skip_quiet"
            )
        return run_per_sample(inputs, all_coefficients, scales, [inputs.noise_step + row for row in rows])
    coefficients, guidance_scale = found[0]
    return _run_row(
        replace(
            inputs,
            coefficients=coefficients,
            index=None,
            guidance_scale=None if inputs.model_output_uncond is None else guidance_scale,
            noise_step=(inputs.noise_step + rows[0]) & 0xFFFFFFFF,
        )
    )


def _run_row(inputs: StepInputs) -> Tensor:
    """Do ``run`` for a row of a table whose steps are checked to have a density, or to be skipped
    (``StepTable.of``): then the log-probability is 0."""
    log_prob, row = inputs.log_prob_out, inputs.coefficients
    assert isinstance(row, StepCoefficients)
    if log_prob is None or row.has_density(inputs.min_std):
        return run(inputs)
    x_prev = run(replace(inputs, log_prob_out=None, min_std=None))
    log_prob.zero_()
    return x_prev


def run_per_sample(
    inputs: StepInputs,
    coefficients: Sequence[StepCoefficients],
    guidance_scales: Sequence[float | None],
    noise_steps: Sequence[int],
) -> Tensor:
    """Do ``run`` for samples that are at different steps, by one kernel call per sample."""
    guided = inputs.model_output_uncond is not None
    x_prev = torch.empty_like(inputs.x_t) if inputs.x_prev is None else inputs.x_prev
    inputs = replace(inputs, x_prev=x_prev)
    each = zip(coefficients, guidance_scales, noise_steps, strict=True)
    steps = [(row, scale if guided else None, noise_step) for row, scale, noise_step in each]
    for i, step in enumerate(steps):  # check all of them before the first one writes
        check_inputs(inputs.sample(i, *step))
    for i, step in enumerate(steps):  # each view is made after the previous write, so that autograd sees that write
        _run_checked(inputs.sample(i, *step))
    return x_prev


def _through_operator(inputs: StepInputs, target: Tensor | None) -> Tensor:
    """Run the step as one operator of ``operators``, into ``target``, or into new memory if None.

    Differentiable inputs are left to the reference, which is traced itself.
    """
    tensors = [tensor for name, tensor in inputs.tensors if TENSORS[name].read]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    wrapped = not _is_dynamo_compiling() and any(is_wrapped(tensor) for tensor in tensors)  # torch.compile cannot ask
    if recorded or wrapped or takes_forward_derivatives(tensors):
        if isinstance(inputs.coefficients, StepTable):
            raise ValueError(
                "a step by a row of a table has no derivatives where it is traced, got tensors that record them: "
                "use ddim_step with a row's coefficients, or torch.no_grad()"
            )
        return run(inputs, "reference")
    x_prev = torch.empty_like(inputs.x_t) if target is None else target
    arguments = operators.arguments_of(inputs, x_prev)
    if isinstance(inputs.coefficients, StepTable):
        torch.ops.ddim_fast.step_from_table_(**arguments)
    else:
        torch.ops.ddim_fast.step_(**arguments)
    return x_prev


def choose(inputs: StepInputs, name: str | None = None, more: Iterable[Tensor] = ()):
    """Return the backend for checked inputs, and ``more`` tensors beside them: that of this name, or
    the first that can run them.

    Raises:
        ValueError: there is none, with the reason of each.
    """
    if name is not None:
        check_choice("backend", name, BACKENDS)
    reasons, more = {}, tuple(more)
    for backend in BACKENDS.values() if name is None else [BACKENDS[name]]:
        reasons[backend.name] = backend.unsupported_reasons(inputs, more)
        if not reasons[backend.name]:
            if name is None:
                _warn_if_slow(backend, inputs)
            return backend
    listed = "\n".join(f"  {backend}: {'; '.join(why)}" for backend, why in reasons.items())
    raise ValueError(f"no backend can run this step:\n{listed}")


def _warn_if_slow(backend, inputs: StepInputs) -> None:
    """Warn once for each kind of device that there is no kernel for it."""
    device = inputs.x_t.device.type
    if backend is not reference or device in _warned:
        return
    if (reason := _missing_kernel(device)) is not None:
        _warned.add(device)
        warnings.warn(f"ddim_fast runs its PyTorch reference, which is slower: {reason}", stacklevel=6)


def _missing_kernel(device: str) -> str | None:
    """Return why no kernel runs on a kind of device; None if one does, or nothing is computed there."""
    if device == "cpu":
        return cpu_step.missing_reason if cpu_step.extension is None else None
    if device == "cuda":
        return triton_backend.missing_reason()
    return None if device == "meta" else f"it has no kernel for {device}"


def normals(
    seeds: Tensor, shape: tuple[int, ...], step: int, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return normals of the noise standard, rounded to ``dtype``.

    They are ``(len(seeds), *shape)`` on the device of ``seeds``, ``(B,)`` int64.
    """
    if seeds.device.type == "cpu":
        return cpu_step.normals(seeds, shape, step, stream).to(dtype)
    # A step that adds noise to zeros.
    zeros = torch.zeros((len(seeds), *shape), device=seeds.device, dtype=torch.float32)
    z = ddim_step(zeros, zeros, _NOISE_ONLY, seeds=seeds, noise_step=step, noise_stream=stream)
    return z.to(dtype)


operators.register(run, run_from_table)
