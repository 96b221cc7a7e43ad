"""The options of one run, as small frozen records.

People type flat keywords (``sample(model, shape, seed=0, guidance_scale=2.0)``). Here they are
grouped into records, which the methods of the sampler hand on as one ``Options``. To add an option,
add a field to a record, and its keyword to the methods that take it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from ..kernels.contract import NORMALS
from ..utils.checks import check_choice, refuse
from ..utils.suggestions import did_you_mean
from .guidance import GuidanceScale
from .loop import Density, Timing

if TYPE_CHECKING:
    from typing_extensions import Self

Callback = Callable[[int, Any, Tensor, Tensor], Any]
"""``callback(step, t, x_t, x0)``: the number of the step, its timestep, the noisy samples that the
model saw, and the x0 predicted from them. The run stops early if it returns True."""

# For type checkers; a test holds them to the tuples that are checked against.
Normals = Literal["exact", "fast"]
Capture = Literal["auto", "loop", "step", "off"]
LogProbReduction = Literal["mean", "sum"]


class Noise(NamedTuple):
    """Where the randomness of a run comes from."""

    seed: int | None = None
    seeds: Sequence[int] | Tensor | None = None
    generator: torch.Generator | None = None
    x_T: Tensor | None = None  # noqa: N815 (the paper's name)
    normals: str = "exact"


class Guidance(NamedTuple):
    """What the model is conditioned on, and what steers its output."""

    conditioning: Mapping[str, Any] | None = None
    guidance_scale: GuidanceScale | None = None
    unconditional_conditioning: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0
    cond_fn: Callable[..., Tensor] | None = None


class KnownRegion(NamedTuple):
    """The part of a picture that inpainting keeps."""

    mask: Tensor | None = None
    known_x0: Tensor | None = None


class Execution(NamedTuple):
    """Where and how a run is computed."""

    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    model_dtype: torch.dtype | None = None
    backend: str | None = None
    capture: str = "auto"
    reuse_output: bool = False


class Observation(NamedTuple):
    """What the caller sees of a run while it lasts, and of its states afterwards."""

    progress: bool = False
    callback: Callback | None = None
    return_trajectory: bool = False
    timing: Timing | None = None
    check_finite: bool | None = None

    @property
    def wants_states(self) -> bool:
        """Whether each step has to keep what the model saw and predicted."""
        return self.callback is not None or self.return_trajectory


class Options(NamedTuple):
    """All options of a run."""

    noise: Noise = Noise()
    guidance: Guidance = Guidance()
    known_region: KnownRegion = KnownRegion()
    execution: Execution = Execution()
    observation: Observation = Observation()
    density: Density = Density()

    def replace(self, **keywords: Any) -> Self:
        """Return these options with other values for some of the flat keywords."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in keywords.items():
            groups.setdefault(_GROUP_OF[name], {})[name] = value
        return self._replace(**{group: getattr(self, group)._replace(**own) for group, own in groups.items()})


_DEFAULTS = Options()
_GROUP_OF = {option: group for group, record in _DEFAULTS._asdict().items() for option in record._fields}
_ORDER = list(_GROUP_OF)


# The flat keywords of each method of the sampler, for type checkers, ``help`` and the check of
# names. ``return_trajectory`` is a parameter of the methods themselves, since it decides what they
# return.


class ConditioningKeywords(TypedDict, total=False):
    conditioning: Mapping[str, Any] | None
    guidance_scale: GuidanceScale | None
    unconditional_conditioning: Mapping[str, Any] | None


class InvertKeywords(ConditioningKeywords, total=False):
    """Keywords of ``invert``."""

    progress: bool
    check_finite: bool | None
    backend: str | None


class ReconstructKeywords(ConditioningKeywords, total=False):
    """Keywords of ``reconstruct``."""

    progress: bool
    check_finite: bool | None
    backend: str | None


class ParallelKeywords(ConditioningKeywords, total=False):
    """Keywords of ``sample_parallel``."""

    seed: int | None
    seeds: Sequence[int] | Tensor | None
    x_T: Tensor | None
    device: str | torch.device
    dtype: torch.dtype
    progress: bool
    check_finite: bool | None
    backend: str | None


class RunKeywords(ConditioningKeywords, total=False):
    """Keywords of every method that takes steps one after the other."""

    seed: int | None
    seeds: Sequence[int] | Tensor | None
    generator: torch.Generator | None
    guidance_rescale: float
    cond_fn: Callable[..., Tensor] | None
    model_dtype: torch.dtype | None
    progress: bool
    timing: Timing | None
    check_finite: bool | None
    backend: str | None
    normals: Normals
    capture: Capture


class RolloutKeywords(RunKeywords, total=False):
    """Keywords of ``rollout``: those of ``sample`` for a whole run, and the density's."""

    x_T: Tensor | None
    mask: Tensor | None
    known_x0: Tensor | None
    device: str | torch.device
    dtype: torch.dtype
    log_prob_reduction: LogProbReduction
    min_std: float | None


class InpaintKeywords(RunKeywords, total=False):
    """Keywords of ``inpaint``: those of ``sample``, without what the known picture says itself."""

    callback: Callback | None
    reuse_output: bool


class EditKeywords(InpaintKeywords, total=False):
    """Keywords of ``img2img`` and ``interpolate``: those of ``sample``, without what their start
    says itself."""

    mask: Tensor | None
    known_x0: Tensor | None


class SampleKeywords(EditKeywords, total=False):
    """Keywords of ``sample``."""

    x_T: Tensor | None
    device: str | torch.device
    dtype: torch.dtype


class ReplayKeywords(ConditioningKeywords, total=False):
    """Keywords of ``CapturedRun.sample``: those of ``sample`` that a captured run takes anew."""

    seed: int | None
    seeds: Sequence[int] | Tensor | None
    generator: torch.Generator | None
    x_T: Tensor | None
    mask: Tensor | None
    known_x0: Tensor | None
    progress: bool
    callback: Callback | None
    timing: Timing | None
    reuse_output: bool


def _check_callback(name: str, value: object) -> None:
    if value is not None and not callable(value):
        refuse("callback must be callable as callback(step, t, x_t, x0)", value, kind=TypeError)


def _check_timing(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Timing):
        refuse("timing must be a Timing, to which seconds are added", value, kind=TypeError)


def _check_finite(name: str, value: object) -> None:
    if value is not None and not isinstance(value, bool):
        refuse("check_finite must be True, False or None", value, kind=TypeError)


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "callback": _check_callback,
    "timing": _check_timing,
    "check_finite": _check_finite,
    "normals": partial(check_choice, choices=NORMALS),
}
"""The rules of options that need nothing but their value: of those that are left out, none is asked."""


def check_keywords(method: str, accepted: type, keywords: Mapping[str, Any]) -> None:
    """Check that a method has each of these keywords, and what their values alone can break.

    Args:
        method: the name of the method that was called, for the error.
        accepted: the TypedDict of its keywords.

    Raises:
        TypeError, ValueError: it has no such keyword, or a value breaks a rule.
    """
    names = accepted.__optional_keys__  # type: ignore[attr-defined]  # every TypedDict has it
    for name, value in keywords.items():
        if name not in names:
            remedy = did_you_mean(name, sorted(names)) or f"it takes {', '.join(sorted(names))}"
            if "conditioning" in names:
                remedy += f'; what the model takes goes into conditioning={{"{name}": ...}}'
            raise TypeError(f"{method} has no keyword {name!r}, got {name}={value!r:.60}: {remedy}")
        if name in _CHECKS:
            _CHECKS[name](name, value)


def options_of(method: str, accepted: type, keywords: Mapping[str, Any], return_trajectory: bool = False) -> Options:
    """Group the flat keywords of a call into ``Options``.

    Raises:
        TypeError, ValueError: as ``check_keywords``, whose arguments these are.
    """
    check_keywords(method, accepted, keywords)
    groups: dict[str, dict[str, Any]] = {"observation": {"return_trajectory": True}} if return_trajectory else {}
    for name, value in keywords.items():
        groups.setdefault(_GROUP_OF[name], {})[name] = value
    return Options(**{group: type(getattr(_DEFAULTS, group))(**own) for group, own in groups.items()})


_Method = TypeVar("_Method", bound=Callable[..., Any])


def shows_keywords(accepted: type) -> Callable[[_Method], _Method]:
    """Let ``help`` and ``inspect.signature`` show the flat keywords in place of ``**options``."""

    def decorate(method: _Method) -> _Method:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        flat = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(getattr(_DEFAULTS, _GROUP_OF[name]), name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in sorted(accepted.__annotations__.items(), key=lambda item: _ORDER.index(item[0]))
        ]
        method.__signature__ = signature.replace(parameters=[*own, *flat])  # type: ignore[attr-defined]  # a function takes any attribute
        return method

    return decorate
