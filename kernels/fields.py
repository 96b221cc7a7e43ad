"""The tensors and numbers of one step, each declared once, with the rules that hold for it.

``StepInputs`` is the table: one field per argument of a step, in order. Checks (contract.py),
memory layouts (layout.py), operator schemas (operators.py) and both launchers (cpu_step.py,
triton_step.py) read the rules from it. Tests compare it with csrc/ and with the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .coefficients import StepCoefficients, StepTable


@dataclass(frozen=True)
class TensorRule:
    """What holds for one tensor of a step.

    Attributes:
        dtype: its dtype; or the name of the tensor whose dtype it shares; or None for any
            floating-point dtype.
        per_sample: its shape is ``(B,)``. Otherwise it has the shape of ``x_t``.
        read, written: whether a step reads it, and whether it writes it.
        in_place: if written: it may be one of the tensors with the shape of ``x_t`` that are only
            read, element for element. Otherwise it shares memory with no other tensor.
        argument: what callers name it, where that is not the field's name.
    """

    dtype: torch.dtype | str | None = "x_t"
    per_sample: bool = False
    read: bool = True
    written: bool = False
    in_place: bool = False
    argument: str | None = None


@dataclass(frozen=True)
class NumberRule:
    """What holds for one number of a step.

    Attributes:
        schema: its type in the schema of a torch operator.
        in_table: it is a column of a ``StepTable``, so a step from a table has no such argument.
    """

    schema: str
    in_table: bool = False


def _tensor(**rule: Any) -> Mapping[str, Any]:
    return {"rule": TensorRule(**rule)}


def _number(schema: str, in_table: bool = False) -> Mapping[str, Any]:
    return {"rule": NumberRule(schema, in_table)}


@dataclass(eq=False)
class StepInputs:
    """The arguments of one step; ``dispatch.ddim_step`` says what each means.

    ``index`` says which row of a table a step reads: one number, or one for each sample. It is None
    exactly where ``coefficients`` is a single row.
    """

    x_t: Tensor = field(metadata=_tensor(dtype=None))
    model_output: Tensor = field(metadata=_tensor(dtype=None))
    coefficients: StepCoefficients | StepTable
    index: Tensor | None = None
    _: KW_ONLY
    model_output_uncond: Tensor | None = field(default=None, metadata=_tensor(dtype="model_output"))
    guidance_scale: float | None = field(default=None, metadata=_number("float?", in_table=True))
    noise: Tensor | None = field(default=None, metadata=_tensor())
    seeds: Tensor | None = field(default=None, metadata=_tensor(dtype=torch.int64, per_sample=True))
    noise_step: int = field(default=0, metadata=_number("SymInt"))
    noise_stream: int = field(default=0, metadata=_number("SymInt"))
    thresholds: Tensor | None = field(default=None, metadata=_tensor(dtype=torch.float32, per_sample=True))
    mask: Tensor | None = field(default=None, metadata=_tensor())
    known_x0: Tensor | None = field(default=None, metadata=_tensor())
    known_noise: Tensor | None = field(default=None, metadata=_tensor())
    x_prev: Tensor | None = field(
        default=None, metadata=_tensor(read=False, written=True, in_place=True, argument="out")
    )
    x0: Tensor | None = field(
        default=None, metadata=_tensor(read=False, written=True, in_place=True, argument="x0_out")
    )
    normals: str = field(default="exact", metadata=_number("str"))
    history: Tensor | None = field(default=None, metadata=_tensor(written=True))
    history_2: Tensor | None = field(default=None, metadata=_tensor(written=True))
    model_input_out: Tensor | None = field(
        default=None, metadata=_tensor(dtype=None, read=False, written=True, in_place=True)
    )
    log_prob_out: Tensor | None = field(
        default=None, metadata=_tensor(dtype=torch.float32, per_sample=True, read=False, written=True)
    )
    log_prob_reduction: str = field(default="mean", metadata=_number("str"))
    min_std: float | None = field(default=None, metadata=_number("float?", in_table=True))
    reads: list[tuple[str, Tensor]] = field(init=False)
    """The tensors that are given and only read, by name."""

    def __post_init__(self) -> None:
        self.reads = self._given(READ_ONLY)

    def _given(self, names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name in names if (tensor := getattr(self, name)) is not None]

    @property
    def writes(self) -> dict[str, Tensor]:
        """The tensors that are given and written, by name."""
        return dict(self._given(WRITTEN))

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors that are given, by name."""
        return self._given(tuple(TENSORS))

    @property
    def adds_noise(self) -> bool:
        return self.coefficients.adds_noise

    @property
    def adds_known_noise(self) -> bool:
        return self.mask is not None and self.coefficients.adds_known_noise

    @property
    def reads_history(self) -> bool:
        return self.coefficients.reads_history

    @property
    def reads_history_2(self) -> bool:
        return self.coefficients.reads_history_2

    @property
    def row_per_sample(self) -> bool:
        return self.index is not None and self.index.numel() != 1

    @property
    def generates_noise(self) -> bool:
        """Whether normals of the noise standard are needed, which depend on an element's index."""
        return self.seeds is not None and (
            (self.adds_noise and self.noise is None) or (self.adds_known_noise and self.known_noise is None)
        )

    def sample(
        self, i: int, coefficients: StepCoefficients, guidance_scale: float | None, noise_step: int
    ) -> StepInputs:
        """Return the inputs of sample ``i`` alone, with these coefficients."""
        alone: dict[str, Any] = {name: tensor[i : i + 1] for name, tensor in self.tensors}
        return replace(
            self,
            **alone,
            coefficients=coefficients,
            index=None,
            guidance_scale=guidance_scale,
            noise_step=noise_step & 0xFFFFFFFF,
        )


_RULES = {declared.name: declared.metadata["rule"] for declared in fields(StepInputs) if "rule" in declared.metadata}
TENSORS: dict[str, TensorRule] = {name: rule for name, rule in _RULES.items() if isinstance(rule, TensorRule)}
NUMBERS: dict[str, NumberRule] = {name: rule for name, rule in _RULES.items() if isinstance(rule, NumberRule)}
ARGUMENTS: dict[str, str] = {name: rule.argument or name for name, rule in TENSORS.items()}
"""What callers name each tensor: the words of every error."""
PER_ELEMENT = tuple(name for name, rule in TENSORS.items() if not rule.per_sample)
"""Names of the tensors with the shape of ``x_t``: the order of ``kPerElement`` in csrc/step.h."""
PER_SAMPLE = tuple(name for name, rule in TENSORS.items() if rule.per_sample)
WRITTEN = tuple(name for name, rule in TENSORS.items() if rule.written)
READ_ONLY = tuple(name for name in (*PER_ELEMENT, *PER_SAMPLE) if not TENSORS[name].written)
