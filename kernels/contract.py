"""Check the arguments of a DDIM step: every error it raises. Backends may rely on what is checked
here."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from ..utils.checks import check_choice, check_integer
from .coefficients import ROW_WIDTH, Column, StepCoefficients, StepTable, check_guidance_scale
from .fields import ARGUMENTS, PER_ELEMENT, TENSORS, StepInputs, TensorRule
from .gaussian import REDUCTIONS, check_density
from .noise import MAX_ELEMENTS
from .torch_internals import has_no_memory, is_recorded_apart, is_view_of_leaf, is_wrapped, transform_level

__all__ = [
    "NORMALS", "ROW_WIDTH", "Column", "StepCoefficients", "StepInputs", "StepTable", "check_inputs", "check_predictions",
]  # fmt: skip

NORMALS = ("exact", "fast")
"""Forms of in-register noise: the noise standard's bits, or the approximations of NVIDIA GPUs."""


def check_inputs(inputs: StepInputs) -> None:
    """Raise TypeError or ValueError with the rule, the value given and the remedy, or return.

    Nothing is written either way.
    """
    check_predictions(inputs)
    _check_noise(inputs)
    _check_thresholds(inputs)
    _check_mask(inputs)
    _check_history(inputs)
    _check_log_prob(inputs)
    written = inputs.writes
    for name, tensor in written.items():
        check_writable(ARGUMENTS[name], tensor, inputs)
        for read_name, read in inputs.reads:
            same_allowed = TENSORS[name].in_place and read_name in PER_ELEMENT
            check_overlap(ARGUMENTS[name], tensor, ARGUMENTS[read_name], read, same_allowed)
    for (name, tensor), (other_name, other) in combinations(written.items(), 2):
        check_overlap(ARGUMENTS[other_name], other, ARGUMENTS[name], tensor, same_allowed=False)


def check_predictions(inputs: StepInputs) -> None:
    """Check each tensor by its rule in ``fields``, the coefficients, and guidance.

    Dynamic thresholds need no more: x0 is predicted from these.
    """
    _check_sample(inputs.x_t)
    _check_coefficients(inputs)
    _check_tensor("model_output", inputs.model_output)
    for name, tensor in inputs.tensors:
        check_field(ARGUMENTS[name], tensor, inputs, TENSORS[name])
    _check_guidance(inputs)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}: call .to_dense()")
    if value.is_nested:
        raise TypeError(f"{name} must be a tensor with one shape, got a nested one: use torch.nested.to_padded_tensor")


def _check_sample(x_t: Tensor) -> None:
    _check_tensor("x_t", x_t)
    if not x_t.dtype.is_floating_point:
        raise TypeError(f"x_t must be floating point, got {x_t.dtype}: convert it, for instance with .float()")
    _check_width("x_t", x_t)
    if x_t.ndim < 1:
        raise ValueError("x_t must have a batch dimension, got a tensor with none: use x_t.unsqueeze(0)")


def _check_width(name: str, tensor: Tensor) -> None:
    """Raise TypeError for numbers of 8 bits, which a step's results do not fit into."""
    if tensor.element_size() < 2:
        raise TypeError(
            f"{name} must have at least 16 bits an element, got {tensor.dtype}: convert it, for instance with .bfloat16()"
        )


def check_field(name: str, value: Tensor, inputs: StepInputs, rule: TensorRule) -> None:
    """Check one tensor of a step, which callers name ``name``, by its rule in ``fields``."""
    _check_tensor(name, value)
    x_t = inputs.x_t
    if rule.per_sample and value.shape != x_t.shape[:1]:
        raise ValueError(
            f"{name} must have one entry per sample, shape {tuple(x_t.shape[:1])}, got {tuple(value.shape)}"
        )
    if not rule.per_sample and value.shape != x_t.shape:
        raise ValueError(
            f"{name} must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(value.shape)}{_shape_hint(value, x_t)}"
        )
    if value.device != x_t.device:
        raise ValueError(
            f"{name} must be on the device of x_t, {x_t.device}, got {value.device}: move it with .to({str(x_t.device)!r})"
        )
    if rule.dtype is None:
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if rule.written:
            _check_width(name, value)
    elif isinstance(rule.dtype, str):
        if value.dtype != (wanted := getattr(inputs, rule.dtype).dtype):
            raise TypeError(f"{name} must have the dtype of {rule.dtype}, {wanted}, got {value.dtype}")
    elif value.dtype != rule.dtype:
        raise TypeError(f"{name} must be {rule.dtype}, got {value.dtype}")


def _shape_hint(value: Tensor, x_t: Tensor) -> str:
    twice = x_t.ndim > 1 and value.ndim == x_t.ndim and value.shape[1] == 2 * x_t.shape[1]
    if twice and value.shape[2:] == x_t.shape[2:]:
        return ": if the second half of the channels is a learned variance, pass the first, model_output[:, :C]"
    return ""


def _check_coefficients(inputs: StepInputs) -> None:
    coefficients, index = inputs.coefficients, inputs.index
    if index is not None and not isinstance(coefficients, StepTable):
        raise TypeError(
            f"table must be a StepTable, got {type(coefficients).__name__}: take one of SamplingPlan.table()"
        )
    if isinstance(coefficients, StepCoefficients):
        return
    if index is None or not isinstance(coefficients, StepTable):
        raise TypeError(
            f"coefficients must be a StepCoefficients, got {type(coefficients).__name__}: take a row of a SamplingPlan"
        )
    _check_tensor("index", index)
    if index.dtype != torch.int64 or (index.numel() != 1 and index.shape != inputs.x_t.shape[:1]):
        raise ValueError(
            f"index must be one int64 number, or one for each of the {len(inputs.x_t)} samples, got {tuple(index.shape)} of {index.dtype}"
        )
    for name, tensor in {"index": index, "the table": coefficients.rows}.items():
        if tensor.device != inputs.x_t.device:
            raise ValueError(
                f"{name} must be on the device of x_t, {inputs.x_t.device}, got {tensor.device}: make it there"
            )


def _check_guidance(inputs: StepInputs) -> None:
    if isinstance(inputs.coefficients, StepTable):
        if inputs.coefficients.guided != (inputs.model_output_uncond is not None):
            raise ValueError(
                "the table has a guidance scale, so a step needs model_output_uncond, got none: pass it, or make the table without"
                if inputs.coefficients.guided
                else "model_output_uncond needs a guidance scale, and the table has none: make it with plan.table(device, guidance_scale)"
            )
        return
    _check_both("guidance", inputs, "model_output_uncond", "guidance_scale")
    if inputs.guidance_scale is not None:
        check_guidance_scale(inputs.guidance_scale)


def _check_both(what: str, inputs: StepInputs, *names: str) -> None:
    """Check that both of two arguments are given, or neither."""
    given = [name for name in names if getattr(inputs, name) is not None]
    if len(given) == 1:
        (missing,) = set(names) - set(given)
        raise ValueError(
            f"{what} needs both {' and '.join(names)}, got only {given[0]}: pass {missing}, too, or neither"
        )


def _check_noise(inputs: StepInputs) -> None:
    both = inputs.noise is not None and (inputs.mask is None or inputs.known_noise is not None)
    if both and inputs.seeds is not None:
        raise ValueError("a step takes its noise from one place: pass either noise or seeds, got both")
    if inputs.adds_noise and inputs.noise is None and inputs.seeds is None:
        raise ValueError(
            f"this step adds noise{_std_dev(inputs, 'prev_noise')}: pass noise, or seeds for the noise standard"
        )
    check_choice("normals", inputs.normals, NORMALS)
    if inputs.seeds is None and not isinstance(inputs.coefficients, StepTable):
        return
    for name in ("noise_step", "noise_stream"):
        check_integer(name, getattr(inputs, name), at_least=0, at_most=0xFFFFFFFF)
    n_elements = math.prod(inputs.x_t.shape[1:])
    if inputs.seeds is not None and n_elements > MAX_ELEMENTS:
        raise ValueError(
            f"the noise standard serves samples of up to {MAX_ELEMENTS} elements, got {n_elements}: pass noise instead of seeds"
        )


def _std_dev(inputs: StepInputs, column: str) -> str:
    known = isinstance(inputs.coefficients, StepCoefficients)
    return f" (standard deviation {getattr(inputs.coefficients, column):.6g})" if known else ""


def _check_thresholds(inputs: StepInputs) -> None:
    if inputs.thresholds is None:
        return
    if not inputs.coefficients.clipped:
        raise ValueError(
            "thresholds scale x0 into [-clip, clip]: they need coefficients with a finite clip, got clip = inf"
        )
    # On a GPU, looking at the values would wait for the device.
    known = inputs.thresholds.device.type == "cpu" and not is_wrapped(inputs.thresholds)
    if known and bool((inputs.thresholds <= 0).any()):
        raise ValueError(f"thresholds must be positive, got {inputs.thresholds.min().item()}")


def _check_mask(inputs: StepInputs) -> None:
    _check_both("inpainting", inputs, "mask", "known_x0")
    if inputs.mask is None and inputs.known_noise is not None:
        raise ValueError("known_noise is the noise of known_x0, got no known_x0: pass mask and known_x0, too")
    if inputs.adds_known_noise and inputs.known_noise is None and inputs.seeds is None:
        raise ValueError(
            f"known_x0 is brought to the noise level of x_prev{_std_dev(inputs, 'known_noise')}: "
            "pass known_noise, or seeds for the noise standard"
        )


def _check_history(inputs: StepInputs) -> None:
    if inputs.history is None and inputs.reads_history:
        raise ValueError(
            "this step reads the x0 of the previous step (prev_history), got no history: pass the tensor that the "
            "previous steps wrote to, or use a plan with order=1"
        )
    if inputs.history_2 is None and inputs.reads_history_2:
        raise ValueError(
            "this step reads the x0 of the step before the previous one (prev_history_2), got no history_2: pass the "
            "tensor that the previous steps wrote to"
        )
    if inputs.history_2 is not None and inputs.history is None:
        raise ValueError(
            "history_2 receives what history holds, got history_2 without history: pass history, too, or neither"
        )


def _check_log_prob(inputs: StepInputs) -> None:
    check_choice("log_prob_reduction", inputs.log_prob_reduction, REDUCTIONS)
    if inputs.log_prob_out is None:
        if inputs.min_std is not None:
            raise ValueError(
                f"min_std is the least standard deviation of log_prob_out, got {inputs.min_std} without log_prob_out: "
                "pass that, too, or neither"
            )
        return
    if isinstance(inputs.coefficients, StepCoefficients):
        check_density(inputs.coefficients.prev_noise, inputs.min_std)
    elif not inputs.coefficients.all_have_density:
        raise ValueError(
            "log_prob_out needs a table whose steps all add noise, got one with steps that add none and no min_std: "
            "leave those steps out of the table, or make it with min_std, the least standard deviation of the densities, "
            "or with skip_quiet"
        )


def check_writable(name: str, written: Tensor, inputs: StepInputs) -> None:
    """Raise ValueError where torch would refuse to write what is computed from ``inputs`` to the
    argument ``name``."""
    if written.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} is written to outside of torch.inference_mode(), got a tensor that was made inside: use .clone(), "
            "or make it under torch.no_grad()"
        )
    if overlaps_itself(written):
        raise ValueError(
            f"{name} is written to, so its elements must not share memory, got an expanded or self-overlapping tensor "
            f"of shape {tuple(written.shape)} and strides {written.stride()}: use .contiguous()"
        )
    if torch.compiler.is_dynamo_compiling():  # which cannot ask for what follows, and writes nothing yet
        return
    if has_no_memory(written):
        raise ValueError(
            f"{name} is written to, so it must have memory, got zeros that torch knows without any: use torch.zeros"
        )
    _check_recorded(name, written, inputs)
    if transform_level(written) < max(transform_level(tensor) for _, tensor in inputs.tensors):
        raise ValueError(
            f"{name} is written to inside a torch.func transform, so it must be one of the transform's own tensors, got "
            "one from outside, which cannot be changed in place there: pass it through the transform, or leave it out"
        )


def _check_recorded(name: str, written: Tensor, inputs: StepInputs) -> None:
    """Raise ValueError where autograd would record the write, and cannot."""
    if not torch.is_grad_enabled():
        return
    if written.requires_grad and (written.is_leaf or is_view_of_leaf(written)):
        raise ValueError(
            f"{name} is written to and must not require gradients, got a leaf that does, or a view of one: detach it, or "
            "work under torch.no_grad()"
        )
    recorded = written.requires_grad or any(
        tensor.requires_grad for other, tensor in inputs.tensors if TENSORS[other].read
    )
    if recorded and is_recorded_apart(written):
        raise ValueError(
            f"{name} is written to while gradients are recorded, got a view that autograd does not follow (one of several "
            "that unbind, split or chunk returned, or one made under torch.no_grad()): index its base instead, as in "
            "base[0], or work under torch.no_grad()"
        )


def numbers_on_host(name: str, tensor: Tensor) -> list[int]:
    """Return the numbers in a checked tensor: waits for its device.

    Raises:
        ValueError: it is inside a ``torch.func`` transform that hides them.
    """
    try:
        return tensor.tolist()
    except RuntimeError:
        if not is_wrapped(tensor):
            raise
    try:
        return tensor.numpy().tolist()  # of a functionalized tensor
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be the same for all samples of a torch.func transform, got one of its tensors: "
            "call the step without the transform, or with a fixed one"
        ) from error


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether some dimension's stride is less than the span of the dimensions inside it.

    Interleaved ``as_strided`` views count as overlapping, too.
    """
    if tensor.numel() == 0:
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride if size > 0 else 0
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte, and one past the last, of a tensor's memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def check_overlap(name: str, written: Tensor, other_name: str, other: Tensor, same_allowed: bool) -> None:
    """Raise ValueError where memory is shared other than element for element."""
    if written.numel() == 0 or other.numel() == 0 or written.device != other.device or written.device.type == "meta":
        return
    if is_wrapped(written) or is_wrapped(other):  # inside a torch.func transform, where torch's own copy_ writes
        return
    (begin, end), (other_begin, other_end) = _span(written), _span(other)
    if end <= other_begin or other_end <= begin:
        return
    alike = written.stride() == other.stride() and written.dtype == other.dtype
    if alike and begin == other_begin and same_allowed:
        return
    if alike and written.stride(0) > 0:
        # Views such as buffer[:, :C] and buffer[:, C:] interleave without touching.
        row = (end - begin) // written.element_size() - (written.shape[0] - 1) * written.stride(0)
        offset = abs(begin - other_begin) // written.element_size() % written.stride(0)
        if row <= offset and offset + row <= written.stride(0):
            return
    raise ValueError(
        f"{name} is written while {other_name} is read, so they must be the same elements or share no memory, "
        f"got tensors that overlap partly: pass a separate {name}"
        if same_allowed
        else f"{name} and {other_name} must not share memory, got tensors that overlap: pass a separate {name}"
    )
