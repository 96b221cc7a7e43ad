"""Which training timesteps a sampler visits: always exactly as many as were asked for, in
decreasing order.

A spacing is a function that says where on the real line the timesteps should lie, and one entry of
``SPACINGS``; ``distinct_timesteps`` then makes integers of the positions, moving them as little as
it can. Most conventions in use give a wrong count, a repeated timestep or t = -1 for some counts.
Where a convention works, the list here is the same; where it does not, the function's docstring
says what replaces it.

Sources: DDIM (Song et al. 2020, arXiv 2010.02502, appendix D.2) and its repository, improved DDPM
(arXiv 2102.09672), guided-diffusion, diffusers' schedulers, Lin et al. 2023 (arXiv 2305.08891,
table 2), EDM (Karras et al. 2022, arXiv 2206.00364, eq. 5).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..utils.checks import check_choice, check_integer, check_number
from .schedules import NoiseSchedule
from .timestep_lists import explicit_model_timesteps, explicit_timesteps, integer_list
from .words import DiscreteSpacing

__all__ = [
    "SPACINGS",
    "SpacingRequest",
    "distinct_timesteps",
    "explicit_model_timesteps",
    "explicit_timesteps",
    "respaced_timesteps",
    "select_timesteps",
]


@dataclass(frozen=True)
class SpacingRequest:
    """What a spacing may ask about; every field is checked before a spacing sees it.

    Attributes:
        num_inference_steps: S, how many timesteps to place; 1 <= S <= T.
        num_train_timesteps: T.
        steps_offset: how far ``leading`` is moved up; 0 <= steps_offset < T.
        schedule: for spacings that depend on the noise; its length is T.
        rho: the exponent of ``karras``; finite, > 0.
    """

    num_inference_steps: int
    num_train_timesteps: int
    steps_offset: int = 0
    schedule: NoiseSchedule | None = None
    rho: float = 7.0


def select_timesteps(
    num_inference_steps: int,
    num_train_timesteps: int,
    spacing: DiscreteSpacing = "leading",
    *,
    steps_offset: int = 0,
    schedule: NoiseSchedule | None = None,
    rho: float = 7.0,
) -> tuple[int, ...]:
    """Choose S = ``num_inference_steps`` of the T = ``num_train_timesteps`` timesteps.

    Args:
        num_inference_steps: 1 <= S <= T.
        num_train_timesteps: T >= 1.
        spacing: a key of ``SPACINGS``. Only ``trailing``, ``log_snr``, ``karras``, ``cosine`` and
            ``beta`` always start at T - 1.
        steps_offset: added to every timestep of ``leading``, 0 <= steps_offset < T; the other
            spacings do not use it.
        schedule: needed by ``log_snr``, ``karras`` and ``cosine``; of length T.
        rho: the exponent of ``karras``, finite and > 0; the other spacings do not use it.

    Returns:
        S distinct integers in [0, T-1], decreasing.

    Raises:
        TypeError: a count or ``steps_offset`` is no int, ``rho`` no number, or ``schedule`` no
            NoiseSchedule.
        ValueError: an argument is out of range, the spacing is unknown, or it needs a schedule and
            there is none.
    """
    check_choice("spacing", spacing, SPACINGS, "for a list of your own use explicit_timesteps")
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, at_least=1)
    request = SpacingRequest(
        check_integer("num_inference_steps", num_inference_steps, at_least=1, at_most=num_train_timesteps),
        num_train_timesteps,
        check_integer("steps_offset", steps_offset, at_least=0, at_most=num_train_timesteps - 1),
        _check_schedule(schedule, spacing, num_train_timesteps),
        check_number("rho", rho, above=0, remedy="7.0 is usual"),
    )
    return distinct_timesteps(SPACINGS[spacing](request), num_train_timesteps)


# --- Spacings: each gives S positions on the real line, in any order ------------------------------------------------


def leading(request: SpacingRequest) -> np.ndarray:
    """0, k, 2k, ... with k = T // S, plus ``steps_offset``: diffusers' default, float64 of shape
    (S,).

    An offset that would carry the last timestep past T - 1 is lowered to the largest that does not:
    the stride stays even.
    """
    stride = request.num_train_timesteps // request.num_inference_steps
    positions = stride * np.arange(request.num_inference_steps, dtype=np.float64)
    return positions + min(request.steps_offset, request.num_train_timesteps - 1 - positions[-1])


def trailing(request: SpacingRequest) -> np.ndarray:
    """T, T - T/S, T - 2T/S, ... down to T/S, rounded, minus 1: diffusers' "trailing", float64 of
    shape (S,).

    The float ``arange`` of the convention sometimes counts one position too many, near 0, hence t =
    -1: it is cut off.
    """
    stride = request.num_train_timesteps / request.num_inference_steps
    positions = np.arange(request.num_train_timesteps, 0, -stride)[: request.num_inference_steps]
    # Rounded before the subtraction: ties go to the even position, not to the even timestep.
    return np.round(positions) - 1


def linspace(request: SpacingRequest) -> np.ndarray:
    """Evenly from 0 to T - 1, both visited: diffusers' "linspace", float64 of shape (S,). One step
    is t = 0."""
    return np.linspace(0, request.num_train_timesteps - 1, request.num_inference_steps)


def uniform(request: SpacingRequest) -> np.ndarray:
    """floor(i T / S): the original DDIM repository's "uniform" mended, float64 of shape (S,).

    The original strides by T // S, which gives exactly S timesteps only where S divides T. There
    this is the same list; elsewhere it keeps the original's lowest timestep, 0, and spreads the
    rest over the range as evenly as integers can.
    """
    indices = np.arange(request.num_inference_steps)
    return (indices * request.num_train_timesteps // request.num_inference_steps).astype(np.float64)


def quad(request: SpacingRequest) -> np.ndarray:
    """Evenly in sqrt(t) up to sqrt(0.8 T), squared, rounded down: the original DDIM repository's
    "quad", float64 of shape (S,).

    With many steps the positions near 0 repeat; they are then moved apart by the least total
    change.
    """
    roots = np.linspace(0, np.sqrt(request.num_train_timesteps * 0.8), request.num_inference_steps)
    return np.floor(roots**2)


def log_snr(request: SpacingRequest) -> np.ndarray:
    """Evenly in log(alpha_bar / (1 - alpha_bar)) from t = T - 1 to t = 0, float64 of shape (S,).
    One step is t = T - 1."""
    snr = _finite_log_snr(request.schedule)
    return _timesteps_of_log_snr(np.linspace(snr[-1], snr[0], request.num_inference_steps), snr)


def karras(request: SpacingRequest) -> np.ndarray:
    """Evenly in the noise-to-signal ratio sqrt((1 - alpha_bar) / alpha_bar) to the power 1 / rho
    (EDM, eq. 5), float64 of shape (S,).

    rho = 1 is even in the ratio itself, and rho → ∞ tends to ``log_snr``. One step is t = T - 1.
    """
    snr = _finite_log_snr(request.schedule)
    # The ratio is exp(-log_snr / 2). Divided by its largest value it cannot overflow, whatever rho
    # and the schedule. A smallest ratio that underflows has log_snr = inf, which is past the last
    # timestep and so is it.
    fraction = np.linspace(0, 1, request.num_inference_steps)
    with np.errstate(divide="ignore", under="ignore", over="ignore"):
        root = np.log1p(fraction * np.expm1(-(snr[0] - snr[-1]) / 2 / request.rho))
        return _timesteps_of_log_snr(snr[-1] - 2 * (request.rho * root), snr)


def cosine(request: SpacingRequest) -> np.ndarray:
    """The noise levels that the cosine schedule visits evenly (arXiv 2102.09672), whatever the
    model's own, float64 of shape (S,).

    There sqrt(alpha_bar) is the cosine of an angle that grows evenly: evenly in arctan sqrt((1 -
    alpha_bar) / alpha_bar), from t = T - 1 to t = 0. One step is t = T - 1.
    """
    snr = _finite_log_snr(request.schedule)
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        first, last = np.arctan(np.exp(-snr[[-1, 0]] / 2))
        wanted = -2 * np.log(np.tan(np.linspace(first, last, request.num_inference_steps)))
    wanted[-1], wanted[0] = snr[0], snr[-1]  # exactly, where an angle comes too near to a right one, or to none
    return _timesteps_of_log_snr(wanted, snr)


def beta(request: SpacingRequest) -> np.ndarray:
    """Quantiles of a Beta(0.6, 0.6) distribution over the range: denser at both ends, float64 of
    shape (S,).

    Lee et al. 2024, "Beta Sampling is All You Need" (arXiv 2407.12173): the early steps decide the
    picture's outline, the last its detail. From t = T - 1 to t = 0; one step is t = T - 1.
    """
    last = request.num_train_timesteps - 1
    if request.num_inference_steps == 1:
        return np.array([last], dtype=np.float64)
    return last * beta_quantiles(np.linspace(0, 1, request.num_inference_steps), 0.6)


def beta_quantiles(p: np.ndarray, concentration: float) -> np.ndarray:
    """Return quantiles of Beta(a, a) to about 1e-7: with x = sin(angle)^2 its density is (sin cos)^(2a -
    1), which is bounded for a >= 1/2."""
    # Squeezed towards the ends, where the density turns vertical.
    angles = np.pi / 4 * (1 - np.cos(np.linspace(0, np.pi, 20_001)))
    middles = (angles[1:] + angles[:-1]) / 2
    mass = (np.sin(middles) * np.cos(middles)) ** (2 * concentration - 1) * np.diff(angles)
    cumulative = np.concatenate([[0.0], np.cumsum(mass)])
    return np.sin(np.interp(p, cumulative / cumulative[-1], angles)) ** 2


SPACINGS: dict[str, Callable[[SpacingRequest], np.ndarray]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "uniform": uniform,
    "quad": quad,
    "log_snr": log_snr,
    "karras": karras,
    "cosine": cosine,
    "beta": beta,
}
"""Spacings by name: each takes a ``SpacingRequest`` and returns S real positions, not necessarily
whole or distinct."""

_NEEDS_SCHEDULE = ("log_snr", "karras", "cosine")


def distinct_timesteps(positions: Sequence[float] | np.ndarray, num_train_timesteps: int) -> tuple[int, ...]:
    """Round positions to S distinct integers in [0, T-1] by the least total change.

    Positions are rounded to the nearest integer, ties to even as NumPy does. Where the result is
    distinct and within range, it is returned; otherwise the answer has the smallest possible sum of
    |timestep - rounded position|.

    Args:
        positions: shape (S,), 1 <= S <= T, finite, in any order.
        num_train_timesteps: T >= 1.

    Returns:
        S distinct integers in [0, T-1], decreasing.

    Raises:
        TypeError: ``num_train_timesteps`` is no int.
        ValueError: ``positions`` is not 1-D, is empty, holds NaN or infinity, or is longer than T.
    """
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, at_least=1)
    positions = np.asarray(positions, dtype=np.float64)
    if positions.ndim != 1 or not 1 <= positions.size <= num_train_timesteps:
        raise ValueError(
            f"positions must be 1-D and hold 1 to num_train_timesteps = {num_train_timesteps} values, got shape "
            f"{positions.shape}: pass one position per step"
        )
    if not np.isfinite(positions).all():
        bad = positions[~np.isfinite(positions)][0]
        raise ValueError(f"positions must be finite, got {bad}: remove NaN and infinity")
    # Clipping first changes no optimum: the answer is in range whatever it is, so an excess only
    # adds a constant.
    rounded = np.clip(np.round(np.sort(positions)), 0, num_train_timesteps - 1).astype(np.int64)
    if (np.diff(rounded) > 0).all():
        return tuple(rounded[::-1].tolist())
    # y strictly increasing in [0, T-1] is the same as y_i - i non-decreasing in [0, T-S].
    rank = np.arange(rounded.size)
    gaps = np.clip(_nearest_non_decreasing((rounded - rank).tolist()), 0, num_train_timesteps - rounded.size)
    return tuple((gaps + rank)[::-1].tolist())


def _nearest_non_decreasing(values: list[int]) -> list[int]:
    """The non-decreasing integers with the least sum of absolute differences from ``values``
    (isotonic L1 regression).

    One pass keeps in a heap the kinks of the cost of ending at a given value; the largest kink is
    the best end so far. A second pass, backwards, lowers each best end to its successor's. Clipping
    the answer to an interval leaves it best among the answers within that interval.
    """
    kinks: list[int] = []  # negated: heapq keeps the smallest first
    best_ends = []
    for value in values:
        heapq.heappush(kinks, -value)
        if -kinks[0] > value:
            heapq.heapreplace(kinks, -value)
        best_ends.append(-kinks[0])
    for index in reversed(range(len(values) - 1)):
        best_ends[index] = min(best_ends[index], best_ends[index + 1])
    return best_ends


def _finite_log_snr(schedule: NoiseSchedule | None) -> np.ndarray:
    """The schedule's log-SNR, an infinite end (alpha_bar of exactly 0 or 1) replaced by a straight
    line from its neighbours."""
    assert schedule is not None  # ``select_timesteps`` has checked that
    values = np.array(schedule.log_snr)
    finite = np.flatnonzero(np.isfinite(values))
    if finite.size < 2:  # T <= 3 and nothing to continue from: only the order is known
        return -np.arange(values.size, dtype=np.float64)
    if finite[0] == 1:
        values[0] = 2 * values[1] - values[2]
    if finite[-1] == values.size - 2:
        values[-1] = 2 * values[-2] - values[-3]
    return values


def _timesteps_of_log_snr(wanted: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """Real-valued timesteps at which ``snr``, linear between timesteps, has the wanted values."""
    return np.interp(wanted, snr[::-1], np.arange(snr.size - 1, -1, -1, dtype=np.float64))


# --- Lists that are written rather than chosen ----------------------------------------------------------------------


def respaced_timesteps(
    respacing: str | Sequence[int] | np.ndarray | Tensor, num_train_timesteps: int, *, name: str = "respacing"
) -> tuple[int, ...]:
    """Timesteps of a respacing string in the notation of improved-diffusion and guided-diffusion.

    - ``"ddimN"``: N timesteps 0, k, 2k, ... with the smallest stride k that gives exactly N below
      T. The original fails where no stride does, for most N; here those N are spaced as ``uniform``
      does, floor(i T / N).
    - ``"10,15,20"`` or ``[10, 15, 20]``: the range is cut into as many sections, as equal as
      integers allow, the longer ones first. Each is given its own count, evenly spaced, both ends
      visited (a count of 1: its first timestep). A count may be 0 where another is not.

    Args:
        respacing: such a string, or the sections' counts.
        num_train_timesteps: T >= 1.
        name: what errors call ``respacing``.

    Returns:
        As many distinct integers in [0, T-1] as the notation asks for, decreasing.

    Raises:
        TypeError: ``respacing`` is neither a string nor a list of ints.
        ValueError: the string cannot be read, N is not in 1 ... T, a count exceeds its section, or
            all counts are 0.
    """
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, at_least=1)
    if not isinstance(respacing, str):
        return _sectioned_timesteps(integer_list(name, respacing), num_train_timesteps, name)
    if match := re.fullmatch(r"ddim([0-9]{1,18})", respacing):
        return _ddim_timesteps(int(match[1]), num_train_timesteps)
    if re.fullmatch(r"\s*[0-9]{1,18}\s*(,\s*[0-9]{1,18}\s*)*", respacing):
        return _sectioned_timesteps([int(count) for count in respacing.split(",")], num_train_timesteps, name)
    raise ValueError(
        f"{name} must be 'ddim' and a count, or counts separated by commas, got {respacing!r}: "
        "write for example 'ddim50' or '10,15,20'"
    )


def _ddim_timesteps(count: int, num_train_timesteps: int) -> tuple[int, ...]:
    count = check_integer("the count of 'ddimN'", count, at_least=1, at_most=num_train_timesteps)
    # A longer stride never gives more timesteps, so the shortest one that gives at most N is the
    # only one to try.
    stride = -(-num_train_timesteps // count)
    strided = range(0, num_train_timesteps, stride)
    if len(strided) == count:
        return tuple(reversed(strided))
    return distinct_timesteps(uniform(SpacingRequest(count, num_train_timesteps)), num_train_timesteps)


def _sectioned_timesteps(counts: list[int], num_train_timesteps: int, name: str) -> tuple[int, ...]:
    if not counts or max(counts) < 1:
        raise ValueError(f"{name} must ask for at least one timestep, got {counts}: write for example '10,15,20'")
    size, longer = divmod(num_train_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        end = start + size + (index < longer)
        if not 0 <= count <= end - start:
            raise ValueError(
                f"section {index} of {num_train_timesteps} timesteps in {len(counts)} sections holds {end - start}, so "
                f"its count must lie in [0, {end - start}], got {count}: lower it or use fewer sections"
            )
        timesteps += _section(start, end, count)
        start = end
    return tuple(reversed(timesteps))


def _section(start: int, end: int, count: int) -> list[int]:
    """``count`` timesteps of [start, end), evenly, ends included; a stride of 1 or more never
    repeats one."""
    stride = (end - 1 - start) / (count - 1) if count > 1 else 1.0
    # The original adds the stride up instead of multiplying, which settles some ties differently:
    # so does this.
    positions = np.cumsum([0.0] + [stride] * (count - 1))[:count]
    return [start + int(position) for position in np.round(positions)]


# --- Checks ---------------------------------------------------------------------------------------------------------


def _check_schedule(schedule: Any, spacing: str, num_train_timesteps: int) -> NoiseSchedule | None:
    if schedule is None:
        if spacing in _NEEDS_SCHEDULE:
            raise ValueError(
                f"spacing {spacing!r} places timesteps by the signal-to-noise ratio, got schedule=None: "
                "pass schedule=NoiseSchedule.linear() or your own"
            )
        return None
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {schedule!r}: use make_schedule to build one")
    if schedule.num_train_timesteps != num_train_timesteps:
        raise ValueError(
            f"schedule must have num_train_timesteps = {num_train_timesteps} timesteps, got one of "
            f"{schedule.num_train_timesteps}: pass num_train_timesteps=schedule.num_train_timesteps"
        )
    return schedule
