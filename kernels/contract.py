"""What a DDIM step takes and returns, and every error it raises. Backends may rely on what is checked here."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import combinations
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
        x_prev = prev_x0 * x0 + prev_eps * eps + prev_history * x0_last + prev_noise * z

    (equation 12 of the DDIM paper, arXiv 2010.02502: the predicted x0, the direction pointing to x_t, and the noise. x0_last is
    the x0 of the step before, for a multistep form: arXiv 2211.01095.)

    Args:
        eps_0: not zero only where eps is derived again from the clipped x0.
        prev_noise: std_dev_t, the standard deviation of the noise that the step adds.
        clip: x0 is clipped to [-clip, clip]; infinity for no clipping.
        known_x0, known_noise: sqrt(alpha_bar_prev) and sqrt(1 - alpha_bar_prev): what brings a known x0 to the noise level of x_prev
            (equation 4 of the paper), for inpainting.
        prev_history: not zero only in a multistep form.

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
    known_x0: float = 0.0
    known_noise: float = 0.0
    prev_history: float = 0.0

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
    def columns(self) -> list[float]:
        """The fields, in order."""
        return [getattr(self, column.name) for column in fields(self)]

    @property
    def clipped(self) -> bool:
        return self.clip != math.inf

    @property
    def adds_noise(self) -> bool:
        return self.prev_noise != 0

    @property
    def adds_known_noise(self) -> bool:
        return self.known_noise != 0

    @property
    def reads_history(self) -> bool:
        return self.prev_history != 0

    @property
    def x0_total(self) -> float:
        """How much of x0 there is in x_prev, eps included."""
        return self.prev_x0 + self.prev_eps * self.eps_0

    @property
    def folded(self) -> tuple[float, float]:
        """(a, b) of ``x_prev = a * x_t + b * m + prev_history * x0_last + prev_noise * z``, the whole step where nothing is clipped."""
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
            "=15fI",
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
            self.known_x0,
            self.known_noise,
            self.prev_history,
            self.clipped,
        )

    def row(self, guidance_scale: float | None = None) -> tuple[float, ...]:
        """The row as the Triton kernel reads it from a table in device memory: ``ROW_WIDTH`` numbers, rounded to float32 as ``packed``."""
        columns = struct.unpack_from("=12f", self.packed)
        return (*columns, guidance_scale or 0.0, self.known_x0, self.known_noise, self.prev_history)

    @classmethod
    def from_row(cls, row: Sequence[float], clipped: bool) -> StepCoefficients:
        """Coefficients with the same ``packed`` bits as those that made the row."""
        fold_x, fold_m, noise, _, _, _, rest_x, rest_m, x0_x, x0_m, bound, total, _, known_x0, known_noise, history = (
            row
        )
        # x_prev = total * x0 + rest, whatever part of total came from eps.
        if not clipped:
            bound, rest_x, rest_m = math.inf, fold_x - total * x0_x, fold_m - total * x0_m
        result = cls(x0_x, x0_m, rest_x, rest_m, 0.0, total, 1.0, noise, bound, known_x0, known_noise, history)
        result.__dict__["packed"] = struct.pack("=15fI", *row[:12], known_x0, known_noise, history, clipped)
        return result


ROW_WIDTH = 16
"""float32 numbers of a row in a table in device memory: see ``StepCoefficients.row``."""
_GUIDANCE_COLUMN = 12

_FLOAT32_MAX = torch.finfo(torch.float32).max
_COLUMNS = (
    "x0_x", "x0_m", "eps_x", "eps_m", "eps_0", "prev_x0", "prev_eps", "prev_noise", "known_x0", "known_noise", "prev_history",
)  # fmt: skip


@dataclass(frozen=True)
class StepTable:
    """Rows of coefficients in device memory.

    A step reads one of them by a number that is in device memory, too: captured in a CUDA graph, or compiled, it runs as any step of
    a plan, and nothing about the step is baked in.

    Attributes:
        rows: ``(S, ROW_WIDTH)`` float32 on the device of the samples; columns as ``StepCoefficients.row`` gives them.
        clipped: whether the rows clip x0. All do, or none: it is compiled into the kernel.
        adds_noise, adds_known_noise: whether some row does.
        guided: whether the rows have a guidance scale: then a step needs ``model_output_uncond``, and otherwise has no use for it.
        reads_history: whether some row reads the x0 of the step before: then every step needs ``history``.
    """

    rows: Tensor
    clipped: bool
    adds_noise: bool
    adds_known_noise: bool
    guided: bool = False
    reads_history: bool = False

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH or rows.dtype != torch.float32 or not rows.is_contiguous():
            raise ValueError(
                f"a table has contiguous float32 rows (S, {ROW_WIDTH}), got {tuple(rows.shape)} of {rows.dtype} with strides "
                f"{rows.stride()}: make it with SamplingPlan.table() or StepTable.of()"
            )

    @classmethod
    def of(
        cls,
        steps: Sequence[StepCoefficients],
        device: torch.device | str = "cpu",
        guidance_scale: float | Sequence[float] | None = None,
    ) -> StepTable:
        """The table of these steps, copied to ``device``.

        Args:
            guidance_scale: one number for all steps, or one for each; None for steps without guidance.

        Raises:
            TypeError: something is not a ``StepCoefficients``.
            ValueError: there is no step, or some clip x0 and others do not, or a scale is not finite or missing.
        """
        if wrong := [step for step in steps if not isinstance(step, StepCoefficients)]:
            raise TypeError(
                f"a table is made of StepCoefficients, got a {type(wrong[0]).__name__}: "
                "for instance [step.coefficients for step in plan.steps], or plan.table()"
            )
        scales = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale] * len(steps)
        if len(scales) != len(steps):
            raise ValueError(
                f"guidance_scale must be one number, or one for each of the {len(steps)} steps, got {len(scales)}"
            )
        for scale in scales if guidance_scale is not None else ():
            _check_guidance_scale(scale)
        if len({step.clipped for step in steps}) != 1:
            raise ValueError(
                "the steps of a table must all clip x0, or none, and be at least one, got "
                f"{sum(step.clipped for step in steps)} of {len(steps)} that clip: make a table of each kind"
            )
        rows = [step.row(scale) for step, scale in zip(steps, scales, strict=True)]
        rows = torch.tensor(rows, dtype=torch.float32)
        noisy, known_noisy = any(step.adds_noise for step in steps), any(step.adds_known_noise for step in steps)
        reads_history = any(step.reads_history for step in steps)
        return cls(rows.to(device), steps[0].clipped, noisy, known_noisy, guidance_scale is not None, reads_history)

    def set_guidance_scale(self, guidance_scale: float) -> None:
        """Another guidance scale for every step, written in place: it holds for graphs that were captured with this table, too.

        Raises:
            TypeError, ValueError: the scale is not a finite number, or the table is one without guidance.
        """
        if not self.guided:
            raise ValueError(
                "a table without a guidance scale is for steps without guidance: make it with a scale first"
            )
        _check_guidance_scale(guidance_scale)
        self.rows[:, _GUIDANCE_COLUMN].fill_(guidance_scale)

    def prediction(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0_x, x0_m, clip, guidance scale) of a row, as numbers on the device: nothing waits."""
        row = self.rows.index_select(0, index)[0]
        return row[8], row[9], row[10], row[_GUIDANCE_COLUMN]

    def coefficients(self, index: int) -> tuple[StepCoefficients, float]:
        """A row's coefficients and guidance scale, on the host: waits for the device."""
        row = self.rows[index].tolist()
        return _from_row(tuple(row), self.clipped), row[_GUIDANCE_COLUMN]


@lru_cache(maxsize=4096)
def _from_row(row: tuple[float, ...], clipped: bool) -> StepCoefficients:
    return StepCoefficients.from_row(row, clipped)


PER_ELEMENT = ("x_t", "model_output", "model_output_uncond", "noise", "mask", "known_x0", "known_noise")
PER_SAMPLE = ("seeds", "thresholds")
WRITTEN = ("x_prev", "x0", "history")
NORMALS = ("exact", "fast")
"""Forms of in-register noise: the noise standard's bits, or on NVIDIA GPUs the hardware's approximations."""


@dataclass
class StepInputs:
    """The arguments of one step; see ``dispatch.ddim_step`` for what each is."""

    x_t: Tensor
    model_output: Tensor
    coefficients: StepCoefficients | StepTable
    index: Tensor | None = None  # which row of a table: one number, or one for each sample
    model_output_uncond: Tensor | None = None
    guidance_scale: float | None = None
    noise: Tensor | None = None
    seeds: Tensor | None = None
    noise_step: int = 0
    noise_stream: int = 0
    thresholds: Tensor | None = None
    mask: Tensor | None = None
    known_x0: Tensor | None = None
    known_noise: Tensor | None = None
    x_prev: Tensor | None = None
    x0: Tensor | None = None
    normals: str = "exact"
    history: Tensor | None = None  # read, where the row reads it, and written
    reads: list[tuple[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = [(name, t) for name in (*PER_ELEMENT, *PER_SAMPLE) if (t := getattr(self, name)) is not None]

    @property
    def adds_noise(self) -> bool:
        return self.coefficients.adds_noise

    @property
    def adds_known_noise(self) -> bool:
        return self.mask is not None and self.coefficients.adds_known_noise

    @property
    def writes(self) -> dict[str, Tensor]:
        return {name: t for name in WRITTEN if (t := getattr(self, name)) is not None}

    @property
    def reads_history(self) -> bool:
        return self.coefficients.reads_history

    @property
    def row_per_sample(self) -> bool:
        return self.index is not None and self.index.numel() != 1

    @property
    def makes_noise(self) -> bool:
        """Whether normals of the noise standard are needed, which depend on an element's index."""
        return self.seeds is not None and (
            (self.adds_noise and self.noise is None) or (self.adds_known_noise and self.known_noise is None)
        )

    def sample(
        self, i: int, coefficients: StepCoefficients, guidance_scale: float | None, noise_step: int
    ) -> StepInputs:
        """The inputs of sample ``i`` alone, with coefficients of its own."""
        own = {
            name: None if (t := getattr(self, name)) is None else t[i : i + 1]
            for name in (*PER_ELEMENT, *PER_SAMPLE, *WRITTEN)
        }
        return replace(
            self,
            **own,
            coefficients=coefficients,
            index=None,
            guidance_scale=guidance_scale,
            noise_step=noise_step & 0xFFFFFFFF,
        )


def check_inputs(inputs: StepInputs) -> None:
    """Raise TypeError or ValueError with the rule, the value received and the remedy, or return having touched nothing."""
    check_predictions(inputs)
    _check_noise(inputs)
    _check_thresholds(inputs)
    _check_mask(inputs)
    _check_history(inputs)
    written = inputs.writes
    for name, tensor in written.items():
        _check_like(name, tensor, inputs.x_t, same_dtype=True)
        _check_writable(name, tensor)
        for read_name, read in inputs.reads:
            same_allowed = name != "history" and read_name not in PER_SAMPLE
            _check_overlap(name, tensor, read_name, read, same_allowed)
    for (name, tensor), (other_name, other) in combinations(written.items(), 2):
        _check_overlap(other_name, other, name, tensor, same_allowed=False)


def check_predictions(inputs: StepInputs) -> None:
    """``check_inputs`` of what x0 is predicted from: the sample, the model's outputs, coefficients."""
    _check_sample(inputs.x_t)
    _check_coefficients(inputs)
    _check_like("model_output", inputs.model_output, inputs.x_t)
    if not inputs.model_output.dtype.is_floating_point:
        raise TypeError(f"model_output must be floating point, got {inputs.model_output.dtype}")
    _check_guidance(inputs)


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
        _check_uncond(inputs)
        if inputs.coefficients.guided != (inputs.model_output_uncond is not None):
            raise ValueError(
                "the table has a guidance scale, so a step needs model_output_uncond, got none: pass it, or make the table without"
                if inputs.coefficients.guided
                else "model_output_uncond needs a guidance scale, and the table has none: make it with plan.table(device, guidance_scale)"
            )
        return
    if (inputs.model_output_uncond is None) != (inputs.guidance_scale is None):
        have, lack = ("guidance_scale", "model_output_uncond")
        if inputs.guidance_scale is None:
            have, lack = lack, have
        raise ValueError(
            f"guidance needs both model_output_uncond and guidance_scale, got only {have}: pass {lack}, too, or neither"
        )
    _check_uncond(inputs)
    if inputs.guidance_scale is None:
        return
    _check_guidance_scale(inputs.guidance_scale)


def _check_guidance_scale(scale: object) -> None:
    if not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {scale!r}")
    if not abs(scale) <= _FLOAT32_MAX:
        raise ValueError(f"guidance_scale must be finite in float32, got {scale}")


def _check_uncond(inputs: StepInputs) -> None:
    if inputs.model_output_uncond is None:
        return
    _check_like("model_output_uncond", inputs.model_output_uncond, inputs.x_t)
    if inputs.model_output_uncond.dtype != inputs.model_output.dtype:
        raise TypeError(
            f"model_output_uncond must have the dtype of model_output, {inputs.model_output.dtype}, got {inputs.model_output_uncond.dtype}"
        )


def _check_noise(inputs: StepInputs) -> None:
    both = inputs.noise is not None and (inputs.mask is None or inputs.known_noise is not None)
    if both and inputs.seeds is not None:
        raise ValueError("a step takes its noise from one place: pass either noise or seeds, got both")
    if inputs.adds_noise and inputs.noise is None and inputs.seeds is None:
        raise ValueError(
            f"this step adds noise{_std_dev(inputs, 'prev_noise')}: pass noise, or seeds for the noise standard"
        )
    if inputs.noise is not None:
        _check_like("noise", inputs.noise, inputs.x_t, same_dtype=True)
    if inputs.normals not in NORMALS:
        raise ValueError(f"normals must be one of {', '.join(NORMALS)}, got {inputs.normals!r}")
    if inputs.seeds is None and not isinstance(inputs.coefficients, StepTable):
        return
    for name in ("noise_step", "noise_stream"):
        value = getattr(inputs, name)
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{name} must be in [0, 2**32), got {value}")
    if inputs.seeds is None:
        return
    _check_per_sample("seeds", inputs.seeds, torch.int64, inputs.x_t)
    n_elements = math.prod(inputs.x_t.shape[1:])
    if n_elements > MAX_ELEMENTS:
        raise ValueError(
            f"the noise standard serves samples of up to {MAX_ELEMENTS} elements, got {n_elements}: pass noise instead of seeds"
        )


def _std_dev(inputs: StepInputs, column: str) -> str:
    known = isinstance(inputs.coefficients, StepCoefficients)
    return f" (standard deviation {getattr(inputs.coefficients, column):.6g})" if known else ""


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


def _check_mask(inputs: StepInputs) -> None:
    if (inputs.mask is None) != (inputs.known_x0 is None):
        have, lack = ("known_x0", "mask") if inputs.mask is None else ("mask", "known_x0")
        raise ValueError(f"inpainting needs both mask and known_x0, got only {have}: pass {lack}, too, or neither")
    if inputs.mask is None:
        if inputs.known_noise is not None:
            raise ValueError("known_noise is the noise of known_x0, got no known_x0: pass mask and known_x0, too")
        return
    _check_like("mask", inputs.mask, inputs.x_t, same_dtype=True)
    _check_like("known_x0", inputs.known_x0, inputs.x_t, same_dtype=True)
    if inputs.known_noise is not None:
        _check_like("known_noise", inputs.known_noise, inputs.x_t, same_dtype=True)
    elif inputs.adds_known_noise and inputs.seeds is None:
        raise ValueError(
            f"known_x0 is brought to the noise level of x_prev{_std_dev(inputs, 'known_noise')}: "
            "pass known_noise, or seeds for the noise standard"
        )


def _check_history(inputs: StepInputs) -> None:
    if inputs.history is None:
        if inputs.reads_history:
            raise ValueError(
                "this step reads the x0 of the step before (prev_history), got no history: pass the tensor that the steps before wrote "
                "to, or take the steps of a plan with order=1"
            )
        return
    other = {"a row that adds noise": inputs.adds_noise, "mask and known_x0": inputs.mask is not None}
    if found := next((what for what in other if other[what]), None):
        raise ValueError(
            "a history is of a smooth trajectory, which fresh noise and a known picture put in leave, got history beside "
            f"{found}: leave history out"
        )


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
    if tensor.numel() == 0:
        return False
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
