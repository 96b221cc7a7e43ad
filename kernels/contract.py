"""What a DDIM step takes and returns, and every error it raises. Backends may rely on what is checked here."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real

import torch
from torch import Tensor

from .noise import MAX_ELEMENTS


@dataclass(frozen=True)
class StepCoefficients:
    """One row of the tableau: a step as data.

    Every prediction type is linear in the noisy sample ``x_t`` and the model's output ``m``, so these numbers are all that a step is::

        x0     = clip(x0_x * x_t + x0_m * m)
        eps    = eps_x * x_t + eps_m * m + eps_0 * x0
        x_prev = prev_x0 * x0 + prev_eps * eps + prev_noise * z

    (equation 12 of the DDIM paper, arXiv 2010.02502: the predicted x0, the direction pointing to x_t, and the noise.)

    Args:
        eps_0: not zero only where eps is derived again from the clipped x0.
        prev_noise: std_dev_t, the standard deviation of the noise that the step adds.
        clip: x0 is clipped to [-clip, clip]; infinity for no clipping.

    Raises:
        ValueError: a coefficient is not a finite float32 number, or ``clip`` is not positive.
    """

    x0_x: float
    x0_m: float
    eps_x: float
    eps_m: float
    eps_0: float
    prev_x0: float
    prev_eps: float
    prev_noise: float
    clip: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.clip <= _FLOAT32_MAX and self.clip != math.inf:
            raise ValueError(f"clip must be positive and within float32 (infinity for no clipping), got {self.clip}")
        columns = {name: getattr(self, name) for name in _COLUMNS}
        columns |= dict(zip(("folded x_t", "folded m"), self.folded, strict=True)) | {"x0 in x_prev": self.x0_total}
        for name, value in columns.items():
            if not abs(value) <= _FLOAT32_MAX:
                raise ValueError(
                    f"every coefficient of a step must be finite in float32, got {name} = {value}: "
                    "this timestep has no such prediction (with alpha_bar_t = 0, use v_prediction or sample)"
                )

    @property
    def clipped(self) -> bool:
        return self.clip != math.inf

    @property
    def x0_total(self) -> float:
        """How much of x0 there is in x_prev, eps included."""
        return self.prev_x0 + self.prev_eps * self.eps_0

    @property
    def folded(self) -> tuple[float, float]:
        """(a, b) of ``x_prev = a * x_t + b * m + prev_noise * z``, which is the whole step where nothing is clipped."""
        return (
            self.x0_total * self.x0_x + self.prev_eps * self.eps_x,
            self.x0_total * self.x0_m + self.prev_eps * self.eps_m,
        )

    @cached_property
    def packed(self) -> bytes:
        """The row as the C++ kernel reads it: ``Coefficients`` of csrc/step.h, each rounded once from float64, and a flag."""
        total, (fold_x, fold_m) = self.x0_total, self.folded
        bound = self.clip if self.clipped else 0.0
        return struct.pack(
            "=12fI",
            fold_x,
            fold_m,
            self.prev_noise,
            total * self.x0_x,
            total * self.x0_m,
            abs(total) * bound,
            self.prev_eps * self.eps_x,
            self.prev_eps * self.eps_m,
            self.x0_x,
            self.x0_m,
            bound,
            total,
            self.clipped,
        )


_FLOAT32_MAX = torch.finfo(torch.float32).max
_COLUMNS = ("x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps", "prev_noise")


@dataclass
class StepInputs:
    """The arguments of one step; see ``dispatch.ddim_step`` for what each is."""

    x_t: Tensor
    model_output: Tensor
    coefficients: StepCoefficients
    model_output_uncond: Tensor | None = None
    guidance_scale: float | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    noise_step: int = 0
    noise_stream: int = 0
    thresholds: Tensor | None = None
    x_prev: Tensor | None = None
    x0: Tensor | None = None
    reads: list[tuple[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        named = ("x_t", "model_output", "model_output_uncond", "noise", "seeds", "thresholds")
        self.reads = [(name, t) for name in named if (t := getattr(self, name)) is not None]

    @property
    def adds_noise(self) -> bool:
        return self.coefficients.prev_noise != 0


def check_inputs(inputs: StepInputs) -> None:
    """Raise TypeError or ValueError with the rule, the value received and the remedy, or return having touched nothing."""
    _check_sample(inputs.x_t)
    if not isinstance(inputs.coefficients, StepCoefficients):
        raise TypeError(
            f"coefficients must be a StepCoefficients, got {type(inputs.coefficients).__name__}: take a row of a SamplingPlan"
        )
    _check_like("model_output", inputs.model_output, inputs.x_t)
    if not inputs.model_output.dtype.is_floating_point:
        raise TypeError(f"model_output must be floating point, got {inputs.model_output.dtype}")
    _check_guidance(inputs)
    _check_noise(inputs)
    _check_thresholds(inputs)
    for name in ("x_prev", "x0"):
        if (written := getattr(inputs, name)) is not None:
            _check_like(name, written, inputs.x_t, same_dtype=True)
            _check_writable(name, written)
            for read_name, read in inputs.reads:
                _check_overlap(name, written, read_name, read, same_allowed=read_name not in ("seeds", "thresholds"))
    if inputs.x_prev is not None and inputs.x0 is not None:
        _check_overlap("x0", inputs.x0, "x_prev", inputs.x_prev, same_allowed=False)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}: call .to_dense()")


def _check_sample(x_t: Tensor) -> None:
    _check_tensor("x_t", x_t)
    if not x_t.dtype.is_floating_point:
        raise TypeError(f"x_t must be floating point, got {x_t.dtype}: convert it, for instance with .float()")
    if x_t.element_size() < 2:
        raise TypeError(
            f"x_t must have at least 16 bits an element, got {x_t.dtype}: convert it, for instance with .bfloat16()"
        )
    if x_t.ndim < 1:
        raise ValueError("x_t must have a batch dimension, got a tensor with none: use x_t.unsqueeze(0)")


def _check_like(name: str, value: Tensor, x_t: Tensor, same_dtype: bool = False) -> None:
    _check_tensor(name, value)
    if value.shape != x_t.shape:
        raise ValueError(
            f"{name} must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(value.shape)}{_shape_hint(value, x_t)}"
        )
    if value.device != x_t.device:
        raise ValueError(
            f"{name} must be on the device of x_t, {x_t.device}, got {value.device}: move it with .to({str(x_t.device)!r})"
        )
    if same_dtype and value.dtype != x_t.dtype:
        raise TypeError(f"{name} must have the dtype of x_t, {x_t.dtype}, got {value.dtype}")


def _shape_hint(value: Tensor, x_t: Tensor) -> str:
    twice = x_t.ndim > 1 and value.ndim == x_t.ndim and value.shape[1] == 2 * x_t.shape[1]
    if twice and value.shape[2:] == x_t.shape[2:]:
        return ": if the second half of the channels is a learned variance, pass the first, model_output[:, :C]"
    return ""


def _check_guidance(inputs: StepInputs) -> None:
    if (inputs.model_output_uncond is None) != (inputs.guidance_scale is None):
        have, lack = ("guidance_scale", "model_output_uncond")
        if inputs.guidance_scale is None:
            have, lack = lack, have
        raise ValueError(
            f"guidance needs both model_output_uncond and guidance_scale, got only {have}: pass {lack}, too, or neither"
        )
    if inputs.model_output_uncond is None:
        return
    _check_like("model_output_uncond", inputs.model_output_uncond, inputs.x_t)
    if inputs.model_output_uncond.dtype != inputs.model_output.dtype:
        raise TypeError(
            f"model_output_uncond must have the dtype of model_output, {inputs.model_output.dtype}, got {inputs.model_output_uncond.dtype}"
        )
    if not isinstance(inputs.guidance_scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {inputs.guidance_scale!r}")
    if not abs(inputs.guidance_scale) <= _FLOAT32_MAX:
        raise ValueError(f"guidance_scale must be finite in float32, got {inputs.guidance_scale}")


def _check_noise(inputs: StepInputs) -> None:
    if inputs.noise is not None and inputs.seeds is not None:
        raise ValueError("a step takes its noise from one place: pass either noise or seeds, got both")
    if inputs.adds_noise and inputs.noise is None and inputs.seeds is None:
        raise ValueError(
            f"this step adds noise (std_dev_t = {inputs.coefficients.prev_noise:.6g}): pass noise, or seeds for the noise standard"
        )
    if inputs.noise is not None:
        _check_like("noise", inputs.noise, inputs.x_t, same_dtype=True)
    if inputs.seeds is None:
        return
    _check_per_sample("seeds", inputs.seeds, torch.int64, inputs.x_t)
    for name in ("noise_step", "noise_stream"):
        value = getattr(inputs, name)
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{name} must be in [0, 2**32), got {value}")
    n_elements = math.prod(inputs.x_t.shape[1:])
    if n_elements > MAX_ELEMENTS:
        raise ValueError(
            f"the noise standard serves samples of up to {MAX_ELEMENTS} elements, got {n_elements}: pass noise instead of seeds"
        )


def _check_per_sample(name: str, value: Tensor, dtype: torch.dtype, x_t: Tensor) -> None:
    _check_tensor(name, value)
    if value.shape != x_t.shape[:1]:
        raise ValueError(
            f"{name} must have one entry per sample, shape {tuple(x_t.shape[:1])}, got {tuple(value.shape)}"
        )
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.device != x_t.device:
        raise ValueError(f"{name} must be on the device of x_t, {x_t.device}, got {value.device}")


def _check_thresholds(inputs: StepInputs) -> None:
    if inputs.thresholds is None:
        return
    if not inputs.coefficients.clipped:
        raise ValueError(
            "thresholds scale x0 into [-clip, clip]: they need coefficients with a finite clip, got clip = inf"
        )
    _check_per_sample("thresholds", inputs.thresholds, torch.float32, inputs.x_t)
    # Elsewhere than on the CPU, looking would wait for the device.
    if inputs.thresholds.device.type == "cpu" and bool((inputs.thresholds <= 0).any()):
        raise ValueError(f"thresholds must be positive, got {inputs.thresholds.min().item()}")


def _check_writable(name: str, written: Tensor) -> None:
    if _overlaps_itself(written):
        raise ValueError(
            f"{name} is written to, so its elements must not share memory, got an expanded or self-overlapping tensor "
            f"of shape {tuple(written.shape)} and strides {written.stride()}: use .contiguous()"
        )
    if written.requires_grad and written.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{name} is written to and must not require gradients: detach it, or work under torch.inference_mode()"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether some dimension steps over less than the dimensions inside it span (as-strided views that interleave count, too)."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += (size - 1) * stride if size > 0 else 0
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last, of a tensor's memory."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _check_overlap(name: str, written: Tensor, other_name: str, other: Tensor, same_allowed: bool) -> None:
    """Refuse memory that is shared other than element for element."""
    if written.numel() == 0 or other.numel() == 0 or written.device != other.device or written.device.type == "meta":
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
