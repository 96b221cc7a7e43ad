"""The log-probability of a given x_prev, and the divergence of two model outputs: what training on
a sampler's steps evaluates. ``docs/LOG_PROB.md`` is their description.

Both are differentiable once. The backward pass saves the inputs alone, recomputes from them, and
writes each gradient in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import cpu_step, reference
from .coefficients import StepCoefficients
from .density import DIFFERENTIABLE, DensityInputs, check_density_inputs, new_gradients
from .dispatch import choose
from .fields import StepInputs
from .torch_internals import is_wrapped, modes_active, takes_forward_derivatives


def ddim_log_prob(
    x_prev: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    *,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    mask: Tensor | None = None,
    log_prob_reduction: str = "mean",
    min_std: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the log-probability of given samples under one stochastic step.

    This is log N(x_prev; mean, std_dev_t^2), where ``mean`` is what ``ddim_step`` computes before
    it adds ``prev_noise * z``. For the x_prev that ``ddim_step`` stored it has the bits that
    ``log_prob_out`` received, where the model's outputs have the same bits. It is differentiable,
    once, in ``model_output``, ``model_output_uncond`` and ``x_t``; x0 that is clipped has the
    subgradient of ``torch.clamp``.

    Args:
        x_prev: the samples that were taken, ``(B, ...)``, in the shape and dtype of ``x_t``.
        x_t, model_output, coefficients, model_output_uncond, guidance_scale: those of
            ``ddim_step``. The row reads no history.
        mask: that of ``ddim_step``, in the shape and dtype of ``x_t``: elements where it is not 0
            were given, at least in part, and do not count. A sample in which none counts has the
            log-probability 0.
        log_prob_reduction: over the elements of a sample: their "mean" (DDPO, Flow-GRPO), or their
            "sum", the logarithm of the joint density.
        min_std: the least standard deviation that the density is taken with (DPPO's
            ``min_logprob_denoising_std``). None for the step's own.
        backend: a name in ``BACKENDS``. If None, the first that can run it.

    Returns:
        ``(B,)`` float32; float64 for float64 samples.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the step adds no noise and there is no
            ``min_std``; or a gradient is asked for in ``x_prev`` or ``mask``.
    """
    constants = (coefficients, guidance_scale, log_prob_reduction, min_std)
    if backend is None and not torch.compiler.is_dynamo_compiling():
        found = _of_plain(constants, x_prev, mask, model_output, model_output_uncond, x_t)
        if found is not None:
            return found
    inputs = _inputs(constants, x_prev, mask, model_output, model_output_uncond, x_t)
    check_density_inputs(inputs, "log_prob_reduction")
    return _evaluate(inputs, backend)


def ddim_kl(
    x_t: Tensor,
    model_output: Tensor,
    model_output_ref: Tensor,
    coefficients: StepCoefficients,
    *,
    model_output_uncond: Tensor | None = None,
    model_output_ref_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    min_std: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the Kullback-Leibler divergence of one stochastic step from a reference model's.

    KL(N(mean, s^2), N(mean_ref, s^2)) = (mean - mean_ref)^2 / (2 s^2) for each element, with s =
    std_dev_t. It is differentiable, once, in ``model_output`` and ``model_output_uncond``.

    Args:
        x_t, model_output, coefficients, model_output_uncond, guidance_scale: those of
            ``ddim_step``. The row reads no history.
        model_output_ref, model_output_ref_uncond: the reference model's outputs for the same
            ``x_t``, in the shape and dtype of ``model_output``: constants.
        mask, min_std, backend: those of ``ddim_log_prob``.
        reduction: "mean" or "sum" over the elements of a sample.

    Returns:
        ``(B,)`` float32; float64 for float64 samples.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the step adds no noise and there is no
            ``min_std``; or a gradient is asked for in another tensor.
    """
    step = StepInputs(
        x_t, model_output, coefficients, model_output_uncond=model_output_uncond, guidance_scale=guidance_scale
    )
    inputs = DensityInputs(
        step,
        divergence=True,
        reference=model_output_ref,
        reference_uncond=model_output_ref_uncond,
        mask=mask,
        reduction=reduction,
        min_std=min_std,
    )
    check_density_inputs(inputs, "reduction")
    return _evaluate(inputs, backend)


def _of_plain(constants: tuple[Any, ...], x_prev: Any, mask: Any, *differentiable: Any) -> Tensor | None:
    """Return the log-probability of plain tensors on the CPU; None, having done nothing, for others
    and where something is wrong."""
    found = cpu_step.plain_density(*_in_order(constants, x_prev, mask, *differentiable))
    if found is None:
        return None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _PlainDensity.apply(found, constants, x_prev, mask, *differentiable)
    return found[0]


def _in_order(constants: tuple[Any, ...], x_prev: Any, mask: Any, model_output: Any, uncond: Any, x_t: Any) -> Any:
    """Return the arguments of ``cpu_step.plain_density``."""
    coefficients, guidance_scale, reduction, min_std = constants
    return x_prev, x_t, model_output, coefficients, uncond, guidance_scale, mask, reduction, min_std


def _inputs(
    constants: tuple[Any, ...], x_prev: Any, mask: Any, model_output: Any, uncond: Any, x_t: Any
) -> DensityInputs:
    coefficients, guidance_scale, reduction, min_std = constants
    step = StepInputs(x_t, model_output, coefficients, model_output_uncond=uncond, guidance_scale=guidance_scale)
    return DensityInputs(step, x_prev=x_prev, mask=mask, reduction=reduction, min_std=min_std)


def _evaluate(inputs: DensityInputs, backend: str | None) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.ddim_fast.density(*_arguments_of(inputs))[0]
    tensors = list(inputs.tensors.values())
    if any(is_wrapped(tensor) for tensor in tensors) or takes_forward_derivatives(tensors):
        return reference.density(inputs)  # in operations that torch transforms
    if modes_active():
        return torch.ops.ddim_fast.density(*_arguments_of(inputs))[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        step = inputs.step
        return _Density.apply(inputs, backend, step.model_output, step.model_output_uncond, step.x_t)
    return _forward(inputs, _choose(inputs, backend))[0]


def _choose(inputs: DensityInputs, backend: str | None = None) -> Any:
    return choose(inputs.step, backend, inputs.compared.values())


def _forward(inputs: DensityInputs, chosen: Any) -> tuple[Tensor, Tensor | None]:
    """Return the result by a chosen backend, and how many elements of each sample count, if not all
    do: ``(B,)`` each."""
    counts = None if inputs.mask is None else inputs.step.x_t.new_empty(len(inputs.step.x_t), dtype=inputs.dtype)
    return chosen.density(inputs, counts), counts


def _backward(inputs: DensityInputs, factors: Tensor, wanted: Sequence[bool], chosen: Any) -> dict[str, Tensor]:
    """Return the gradients of ``DIFFERENTIABLE`` that are wanted, by name."""
    if is_wrapped(factors):  # gradients of several results at once, such as is_grads_batched asks for
        of_one = _backward(inputs, inputs.step.x_t.new_ones(len(factors), dtype=inputs.dtype), wanted, chosen)
        return {name: (found.movedim(0, -1) * factors).movedim(-1, 0).to(found.dtype) for name, found in of_one.items()}
    gradients = new_gradients(inputs, wanted)
    chosen.density_backward(inputs, factors, gradients)
    return gradients


def _factors(inputs: DensityInputs, gradient: Tensor, counts: Tensor | None) -> Tensor:
    """Return what x_prev - mean (or mean_ref - mean) is multiplied by in the gradient of the mean:
    ``(B,)``."""
    factors = gradient * _factor(inputs.sign, inputs.scale, inputs.reduction, inputs.n_elements, counts)
    return factors / counts.clamp(min=1) if inputs.reduction == "mean" and counts is not None else factors


def _factor(sign: float, scale: float, reduction: str, n_elements: int, counts: Tensor | None) -> float:
    """Return the part of ``_factors`` that is the same for all samples."""
    factor = -2 * sign * scale
    return factor / max(n_elements, 1) if reduction == "mean" and counts is None else factor


# --- Autograd ---------------------------------------------------------------------------------------------------------


class _Density(torch.autograd.Function):
    """The log-density or divergence, by kernels that record nothing."""

    @staticmethod
    def forward(ctx: Any, inputs: DensityInputs, backend: str | None, *differentiable: Tensor | None) -> Tensor:
        ctx.chosen = _choose(inputs, backend)
        result, ctx.counts = _forward(inputs, ctx.chosen)
        tensors = inputs.tensors
        ctx.inputs = inputs.replaced(dict.fromkeys(tensors))  # without them: saved tensors are freed
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        inputs = ctx.inputs.replaced(dict(zip(ctx.names, ctx.saved_tensors, strict=True)))
        with torch.no_grad():
            factors = _factors(inputs, gradient, ctx.counts)
            gradients = _backward(inputs, factors, ctx.needs_input_grad[2:], ctx.chosen)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = {name: _Once.apply(found, gradient, *ctx.saved_tensors) for name, found in gradients.items()}
        return None, None, *(gradients.get(name) for name in DIFFERENTIABLE)


class _PlainDensity(torch.autograd.Function):
    """The same of plain tensors, in one call of C++ each way: at small sizes what Python does in
    ``_Density`` takes several times as long as the kernels."""

    @staticmethod
    def forward(ctx: Any, found: Any, constants: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        result, ctx.counts = found
        ctx.constants = constants
        ctx.save_for_backward(*tensors)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[4:]
        gradients: list[Tensor | None] = [
            torch.empty_like(tensor) if want else None for tensor, want in zip(tensors[2:], wanted, strict=True)
        ]
        arguments = _in_order(ctx.constants, *tensors)
        row, _, reduction, min_std = ctx.constants
        n_elements = tensors[0].numel() // len(gradient)
        factor = _factor(-1.0, row.scale_and_offset(min_std)[0], reduction, n_elements, ctx.counts)
        if cpu_step.plain_density_backward(*arguments, gradient, factor, ctx.counts, *gradients) is None:
            inputs = _inputs(ctx.constants, *tensors)
            with torch.no_grad():
                factors = _factors(inputs, gradient, ctx.counts)
                named = _backward(inputs, factors, wanted, _choose(inputs))
            gradients = [named.get(name) for name in DIFFERENTIABLE]
        if torch.is_grad_enabled():  # create_graph=True
            saved = [tensor for tensor in tensors if tensor is not None]
            gradients = [None if found is None else _Once.apply(found, gradient, *saved) for found in gradients]
        return None, None, None, None, *gradients


class _Once(torch.autograd.Function):
    """A gradient, which depends on tensors in a way that has no gradient in turn."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *depends_on: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "ddim_log_prob and ddim_kl are differentiable once, got a gradient of their gradient: "
            "use float64 formulas of torch's own, or torch.func, which runs them"
        )


# --- Operators, for torch.compile, make_fx and torch.export -----------------------------------------------------------

_TENSORS = ("x_t", "model_output", "model_output_uncond", "x_prev", "reference", "reference_uncond", "mask")
_NUMBERS = {
    "coefficients": "float[]",  # the fields of ``StepCoefficients``, in order
    "guidance_scale": "float?",
    "divergence": "bool",
    "reduction": "str",
    "min_std": "float?",
}
_ARGUMENTS = ", ".join(
    (
        *(f"Tensor{'' if name in ('x_t', 'model_output') else '?'} {name}" for name in _TENSORS),
        *(f"{kind} {name}" for name, kind in _NUMBERS.items()),
    )
)


def _arguments_of(inputs: DensityInputs) -> tuple[Any, ...]:
    tensors = inputs.tensors
    numbers = (inputs.row.columns, inputs.step.guidance_scale, inputs.divergence, inputs.reduction, inputs.min_std)
    return *(tensors.get(name) for name in _TENSORS), *numbers


def _inputs_of(values: Sequence[Any]) -> DensityInputs:
    given = dict(zip((*_TENSORS, *_NUMBERS), values, strict=True))
    step = StepInputs(
        given.pop("x_t"),
        given.pop("model_output"),
        StepCoefficients(*given.pop("coefficients")),
        model_output_uncond=given.pop("model_output_uncond"),
        guidance_scale=given.pop("guidance_scale"),
    )
    return DensityInputs(step, **given)


def _operator(*values: Any) -> tuple[Tensor, Tensor]:
    inputs = _inputs_of(values)
    result, counts = _forward(inputs, _choose(inputs))
    return result, inputs.step.x_t.new_empty(0, dtype=inputs.dtype) if counts is None else counts


def _fake_operator(*values: Any) -> tuple[Tensor, Tensor]:
    inputs = _inputs_of(values)
    x_t = inputs.step.x_t
    result = x_t.new_empty(len(x_t), dtype=inputs.dtype)
    return result, x_t.new_empty(0 if inputs.mask is None else len(x_t), dtype=inputs.dtype)


def _operator_backward(*values: Any) -> list[Tensor]:
    *arguments, factors, wanted = values
    inputs = _inputs_of(arguments)
    return list(_backward(inputs, factors, wanted, _choose(inputs)).values())


def _fake_operator_backward(*values: Any) -> list[Tensor]:
    *arguments, _, wanted = values
    return list(new_gradients(_inputs_of(arguments), wanted).values())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[: len(_TENSORS)], output[1])
    ctx.numbers = inputs[len(_TENSORS) :]


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, counts = ctx.saved_tensors
    arguments = (*tensors, *ctx.numbers)
    inputs = _inputs_of(arguments)
    wanted = [ctx.needs_input_grad[_TENSORS.index(name)] for name in DIFFERENTIABLE]
    factors = _factors(inputs, gradient, counts if inputs.mask is not None else None)
    found = iter(torch.ops.ddim_fast.density_backward(*arguments, factors, wanted))
    gradients = {name: next(found) for name, want in zip(DIFFERENTIABLE, wanted, strict=True) if want}
    return *(gradients.get(name) for name in _TENSORS), *(None for _ in _NUMBERS)


def _register() -> None:
    forward = torch.library.custom_op(
        "ddim_fast::density", _operator, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
    )
    forward.register_fake(_fake_operator)
    forward.register_autograd(_differentiate, setup_context=_save)
    backward = torch.library.custom_op(
        "ddim_fast::density_backward",
        _operator_backward,
        mutates_args=(),
        schema=f"({_ARGUMENTS}, Tensor factors, bool[] wanted) -> Tensor[]",
    )
    backward.register_fake(_fake_operator_backward)


_register()
