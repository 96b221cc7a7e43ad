"""A step as data: the columns of its row of coefficients, one row, and a table of rows in device
memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields
from enum import IntEnum
from functools import cached_property, lru_cache
from numbers import Real

import torch
from torch import Tensor

from ..utils.brief import brief_fields
from ..utils.transfer import to_device
from .gaussian import check_min_std, has_density, scale_and_offset


class Column(IntEnum):
    """The float32 numbers of a row, in the order in which both kernels read them.

    All but those ``ONLY_IN_TABLE`` are ``Coefficients`` of csrc/step.h, which says what each does.
    Without clipping the kernels read ``FOLD_X`` and ``FOLD_M``, with it ``CLIP_X`` to ``REST_M``.
    A new one comes last: then the others stay where they are, and so do compiled kernels.
    """

    FOLD_X = 0
    FOLD_M = 1
    NOISE = 2
    CLIP_X = 3
    CLIP_M = 4
    CLIP_BOUND = 5
    REST_X = 6
    REST_M = 7
    X0_X = 8
    X0_M = 9
    X0_BOUND = 10
    CLIP_SCALE = 11
    KNOWN_X0 = 12
    KNOWN_NOISE = 13
    HISTORY = 14
    GUIDANCE_SCALE = 15  # only in a table: the C++ kernel gets it beside the row
    HISTORY_2 = 16
    INPUT_SCALE = 17
    LOG_PROB_SCALE = 18  # only in a table, both: see gaussian.py
    LOG_PROB_OFFSET = 19


ONLY_IN_TABLE = (Column.GUIDANCE_SCALE, Column.LOG_PROB_SCALE, Column.LOG_PROB_OFFSET)
"""Columns that the C++ kernel gets beside the row."""
ROW_WIDTH = 32
"""Number of columns of a row in a table, zeros after those of ``Column``: a power of two, so that
the address of a row is a shift and not a product of 64 bits."""

LARGEST_SCALE = 2.0**64
"""The most that a threshold scales x0 by: half of float32's exponents, so that neither the scaled
coefficients nor their products overflow on the way to a result within bounds."""

_PACKED = struct.Struct(f"={len(Column) - len(ONLY_IN_TABLE)}fI")  # ``Coefficients``, then whether x0 is clipped
_PADDING = (0.0,) * (ROW_WIDTH - len(Column))
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class StepCoefficients:
    """One row of the tableau: a step as data.

    Every prediction type is linear in the noisy sample ``x_t`` and the model's output ``m``, so
    these numbers define a step completely::

        x0     = clip(x0_x * x_t + x0_m * m)
        eps    = eps_x * x_t + eps_m * m + eps_0 * x0
        x_prev = prev_x0 * x0 + prev_eps * eps + prev_history * x0_last + prev_history_2 * x0_last_2
                 + prev_noise * z

    (Equation 12 of the DDIM paper, arXiv 2010.02502: the predicted x0, the direction pointing to
    x_t, and the noise. x0_last is the x0 of the previous step, and x0_last_2 that of the step
    before it, for a multistep solver: arXiv 2211.01095.)

    Args:
        eps_0: nonzero only where eps is re-derived from the clipped x0.
        prev_noise: std_dev_t, the standard deviation of the noise that the step adds.
        clip: x0 is clipped to [-clip, clip]; infinity for no clipping.
        known_x0, known_noise: sqrt(alpha_bar_prev) and sqrt(1 - alpha_bar_prev): they bring a known
            x0 to the noise level of x_prev (equation 4 of the paper), for inpainting.
        prev_history, prev_history_2: nonzero only in a multistep solver; the second from the third
            order on.
        input_scale: what the model's next input is multiplied by: ``model_input_out`` of
            ``ddim_step`` is input_scale * x_prev.

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
    prev_history_2: float = 0.0
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip <= _FLOAT32_MAX and self.clip != math.inf:
            raise ValueError(f"clip must be positive and within float32 (infinity for no clipping), got {self.clip}")
        values = {name: getattr(self, name) for name in _FINITE}
        values |= dict(zip(("folded x_t", "folded m"), self.folded, strict=True)) | {"x0 in x_prev": self.x0_total}
        for name, value in values.items():
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

    def has_density(self, min_std: float | None = None) -> bool:
        """Return whether x_prev has a density: the step adds noise, or the density has a least
        standard deviation."""
        return has_density(self.prev_noise, min_std)

    @property
    def reads_history(self) -> bool:
        return self.prev_history != 0

    @property
    def reads_history_2(self) -> bool:
        return self.prev_history_2 != 0

    @property
    def x0_total(self) -> float:
        """The coefficient of x0 in x_prev, its part in eps included."""
        return self.prev_x0 + self.prev_eps * self.eps_0

    @property
    def folded(self) -> tuple[float, float]:
        """(a, b) of the whole step where nothing is clipped.

        ``x_prev = a * x_t + b * m + prev_history * x0_last + prev_history_2 * x0_last_2 +
        prev_noise * z``.
        """
        return (
            self.x0_total * self.x0_x + self.prev_eps * self.eps_x,
            self.x0_total * self.x0_m + self.prev_eps * self.eps_m,
        )

    @cached_property
    def packed(self) -> bytes:
        """The row as the C++ kernel reads it: ``Coefficients`` of csrc/step.h, and a flag.

        Each number is rounded once, from float64.
        """
        total, (fold_x, fold_m) = self.x0_total, self.folded
        bound = self.clip if self.clipped else 0.0
        return _PACKED.pack(  # in the order of Column
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
            self.prev_history_2,
            self.input_scale,
            self.clipped,
        )

    def scale_and_offset(self, min_std: float | None = None, exact: bool = False) -> tuple[float, float]:
        """Return (scale, offset) of ``gaussian``: of the standard deviation as kernels read it, in
        float32, or of the ``exact`` one."""
        std = self.prev_noise if exact else _PACKED.unpack(self.packed)[Column.NOISE]
        return scale_and_offset(std, min_std)

    def row(self, guidance_scale: float | None = None, min_std: float | None = None) -> tuple[float, ...]:
        """Return the row of a table, as the Triton kernel reads it: ``ROW_WIDTH`` float32 numbers."""
        *row, _ = _PACKED.unpack(self.packed)
        row.insert(Column.GUIDANCE_SCALE, guidance_scale or 0.0)
        density = self.scale_and_offset(min_std) if self.has_density(min_std) else (0.0, 0.0)
        return (*row, *density, *_PADDING)

    @classmethod
    def from_row(cls, row: Sequence[float], clipped: bool) -> StepCoefficients:
        """Return coefficients with the same ``packed`` bits as those that made the row."""
        fold_x, fold_m, total = row[Column.FOLD_X], row[Column.FOLD_M], row[Column.CLIP_SCALE]
        packed = [row[column] for column in Column if column not in ONLY_IN_TABLE]
        x0_x, x0_m = row[Column.X0_X], row[Column.X0_M]
        # x_prev = total * x0 + rest: it does not matter which part of total came from eps.
        if clipped:
            bound, rest_x, rest_m = row[Column.X0_BOUND], row[Column.REST_X], row[Column.REST_M]
        else:
            bound, rest_x, rest_m = math.inf, fold_x - total * x0_x, fold_m - total * x0_m
        return _CoefficientsOfRow(
            x0_x=x0_x,
            x0_m=x0_m,
            eps_x=rest_x,
            eps_m=rest_m,
            eps_0=0.0,
            prev_x0=total,
            prev_eps=1.0,
            prev_noise=row[Column.NOISE],
            clip=bound,
            known_x0=row[Column.KNOWN_X0],
            known_noise=row[Column.KNOWN_NOISE],
            prev_history=row[Column.HISTORY],
            prev_history_2=row[Column.HISTORY_2],
            input_scale=row[Column.INPUT_SCALE],
            packed_row=_PACKED.pack(*packed, clipped),
        )


_FINITE = tuple(column.name for column in fields(StepCoefficients) if column.name != "clip")


@dataclass(frozen=True)
class _CoefficientsOfRow(StepCoefficients):
    """Coefficients recovered from a row of a table, which was rounded already: it is not rounded
    again."""

    packed_row: InitVar[bytes] = field(kw_only=True)

    def __post_init__(self, packed_row: bytes) -> None:
        super().__post_init__()
        object.__setattr__(self, "packed", packed_row)


@dataclass(frozen=True, eq=False)
class StepTable:
    """Rows of coefficients in device memory.

    A step reads one of them by an index that is in device memory, too. So one captured or compiled
    step runs as any step of a plan: nothing about the step is baked in. A table is equal to itself
    alone, as a tensor in a set is.

    Attributes:
        rows: ``(S, ROW_WIDTH)`` float32 on the device of the samples; columns as in ``Column``.
        clipped: whether the rows clip x0. All do, or none: it is compiled into the kernel.
        adds_noise, adds_known_noise: whether some row does.
        guided: whether the rows have a guidance scale. A step needs ``model_output_uncond`` if so,
            and does not take it otherwise.
        reads_history: whether some row reads the x0 of the previous step: then every step needs
            ``history``.
        reads_history_2: the same of the step before it, and ``history_2``.
        all_have_density: whether every row has a density, which ``log_prob_out`` needs; those that
            ``of`` was told to skip aside.
        min_std: the least standard deviation of the densities, or None.
    """

    rows: Tensor
    clipped: bool
    adds_noise: bool
    adds_known_noise: bool
    guided: bool = False
    reads_history: bool = False
    reads_history_2: bool = False
    all_have_density: bool = False
    min_std: float | None = None

    __repr__ = brief_fields

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.ndim != 2 or rows.shape[1] != ROW_WIDTH or rows.dtype != torch.float32 or not rows.is_contiguous():
            raise ValueError(
                f"a table has contiguous float32 rows (S, {ROW_WIDTH}), got {tuple(rows.shape)} of {rows.dtype} with strides "
                f"{rows.stride()}: make it with SamplingPlan.table() or StepTable.of()"
            )

    @cached_property
    def needs(self) -> bytes:
        """What a step of the table needs beside its samples, in the form of ``StepCoefficients.packed``:
        columns that no row reads are zero."""
        read = {
            Column.NOISE: self.adds_noise,
            Column.HISTORY: self.reads_history,
            Column.HISTORY_2: self.reads_history_2,
        }
        columns = (float(read.get(column, False)) for column in Column if column not in ONLY_IN_TABLE)
        return _PACKED.pack(*columns, self.clipped)

    @classmethod
    def of(
        cls,
        steps: Sequence[StepCoefficients],
        device: torch.device | str = "cpu",
        guidance_scale: float | Sequence[float] | None = None,
        min_std: float | None = None,
        skip_quiet: bool = False,
    ) -> StepTable:
        """Return the table of these steps, copied to ``device``.

        Args:
            guidance_scale: one number for all steps, or one for each; None for steps without
                guidance.
            min_std: the least standard deviation that ``log_prob_out`` of
                ``ddim_step_from_table`` is taken with. None for the steps' own, which then must all
                be above 0 where log-probabilities are asked for.
            skip_quiet: whether steps without a density may be among them: their log-probability
                is then 0. For steps that all samples take together.

        Raises:
            TypeError: something is not a ``StepCoefficients``.
            ValueError: there are no steps, some clip x0 and others do not, a scale is not finite or
                missing, or ``min_std`` is not positive.
        """
        if wrong := [step for step in steps if not isinstance(step, StepCoefficients)]:
            raise TypeError(
                f"a table is made of StepCoefficients, got a {type(wrong[0]).__name__}: "
                "for instance [step.coefficients for step in plan.steps], or plan.table()"
            )
        scales: list[float | None]
        scales = list(guidance_scale) if isinstance(guidance_scale, Sequence) else [guidance_scale] * len(steps)
        if len(scales) != len(steps):
            raise ValueError(
                f"guidance_scale must be one number, or one for each of the {len(steps)} steps, got {len(scales)}"
            )
        for scale in scales if guidance_scale is not None else ():
            check_guidance_scale(scale)
        if len({step.clipped for step in steps}) != 1:
            raise ValueError(
                "the steps of a table must all clip x0, or none, and be at least one, got "
                f"{sum(step.clipped for step in steps)} of {len(steps)} that clip: make a table of each kind"
            )
        check_min_std(min_std)
        rows = [step.row(scale, min_std) for step, scale in zip(steps, scales, strict=True)]
        return cls(
            rows=to_device(torch.tensor(rows, dtype=torch.float32, device="cpu"), device),
            clipped=steps[0].clipped,
            adds_noise=any(step.adds_noise for step in steps),
            adds_known_noise=any(step.adds_known_noise for step in steps),
            guided=guidance_scale is not None,
            reads_history=any(step.reads_history for step in steps),
            reads_history_2=any(step.reads_history_2 for step in steps),
            all_have_density=skip_quiet or all(step.has_density(min_std) for step in steps),
            min_std=min_std,
        )

    def set_guidance_scale(self, guidance_scale: float) -> None:
        """Set the guidance scale of every step, in place: graphs captured with this table read it,
        too.

        Raises:
            TypeError, ValueError: the scale is not a finite number, or the table has no guidance.
        """
        if not self.guided:
            raise ValueError(
                "a table without a guidance scale is for steps without guidance: make it with a scale first"
            )
        check_guidance_scale(guidance_scale)
        self.rows[:, Column.GUIDANCE_SCALE].fill_(guidance_scale)

    def prediction(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a row's (x0_x, x0_m, clip, guidance scale) on the device, without waiting for it."""
        row = self.rows.index_select(0, index)[0]
        return row[Column.X0_X], row[Column.X0_M], row[Column.X0_BOUND], row[Column.GUIDANCE_SCALE]

    def coefficients(self, index: int) -> tuple[StepCoefficients, float]:
        """Return a row's coefficients and guidance scale on the host: waits for the device."""
        row = self.rows[index].tolist()
        return _from_row(tuple(row), self.clipped), row[Column.GUIDANCE_SCALE]


@lru_cache(maxsize=4096)
def _from_row(row: tuple[float, ...], clipped: bool) -> StepCoefficients:
    return StepCoefficients.from_row(row, clipped)


def check_guidance_scale(scale: float | None) -> None:
    """Raise TypeError or ValueError unless the scale is a finite float32 number."""
    if not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {scale!r}")
    if not abs(float(scale)) <= _FLOAT32_MAX:
        raise ValueError(f"guidance_scale must be finite in float32, got {scale}")
