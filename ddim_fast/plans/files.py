"""Timestep lists as small JSON files with their provenance: ``ddim-fast search`` writes them, every
sampler reads them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.atomic_files import write_atomically
from ..utils.brief import brief_fields
from ..utils.checks import check_choice, check_number, refuse
from ..utils.files import read_json
from .coefficients import PREDICTION_TYPES
from .history_weights import Rows, explicit_history_weights, histories_read, number_rows
from .path import NoisePath
from .schedules import NoiseSchedule
from .timestep_lists import explicit_model_timesteps, explicit_times, explicit_timesteps, number_list

FORMAT = "ddim_fast timesteps"
VERSION = 2
VERSION_IN_CONTINUOUS_TIME = 3
VERSION_WITH_COEFFICIENTS = 4
READABLE = (1, 2, 3, 4)
"""Version 1 has no ``model_timesteps``. Version 3 holds times of a path in continuous time: its
``num_train_timesteps`` is null. Version 4 has ``coefficients`` and ``prediction_type``, in either
kind of time."""
SUFFIX = ".json"


@dataclass(frozen=True)
class TimestepList:
    """Timesteps to visit, and what they were chosen for.

    Args:
        timesteps: strictly decreasing, each in [0, num_train_timesteps); or times, greater than 0.
        num_train_timesteps: T of the schedule that they count in; None for times of a path in
            continuous time.
        schedule_digest: of that schedule (``NoisePath.digest``); None where it does not matter.
        order: the order of the steps that they were chosen for.
        eps_residual: the mean squared error of the model's eps at each of them, for an analytic
            variance; None if it was not measured.
        provenance: how they were found, as JSON: method, model, samples, seeds, scores.
        model_timesteps: the timestep that the model is called with at each of them, in any order;
            None: the timesteps themselves. A sampler without such a distinction cannot use the list
            then.
        coefficients: a row (a, b, h_1, h_2) for each step, fitted to a model, with which x_prev = a
            x_t + b m + h_1 x0_last + h_2 x0_last_2, of the model's output m and the x0 that the two
            steps before predicted. None: the textbook's of the order, which is otherwise one more
            than the predictions that are read.
        prediction_type: what m is, as the coefficients have it: needed beside them.
    """

    timesteps: tuple[float, ...]
    num_train_timesteps: int | None
    schedule_digest: str | None = None
    order: int = 1
    eps_residual: tuple[float, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    model_timesteps: tuple[float, ...] | None = None
    coefficients: Rows | None = None
    prediction_type: str | None = None

    __repr__ = brief_fields

    def __post_init__(self) -> None:
        total, given = self.num_train_timesteps, self.timesteps
        visited = explicit_times(given) if total is None else explicit_timesteps(given, total)
        object.__setattr__(self, "timesteps", visited)
        if self.eps_residual is not None and len(self.eps_residual) != len(self.timesteps):
            raise ValueError(
                f"eps_residual must be one for each of the {len(self.timesteps)} timesteps, got {len(self.eps_residual)}"
            )
        if self.model_timesteps is not None:
            if total is None:
                checked = number_list("model_timesteps", self.model_timesteps)
            else:
                checked = explicit_model_timesteps(self.model_timesteps, len(self.timesteps), total)  # type: ignore[arg-type]
            object.__setattr__(self, "model_timesteps", checked)
        self._check_coefficients()

    def _check_coefficients(self) -> None:
        if self.coefficients is None:
            if self.prediction_type is not None:
                refuse("prediction_type belongs to coefficients", self.prediction_type, "leave it out without them")
            return
        rows = number_rows("coefficients", self.coefficients, 4)
        object.__setattr__(self, "coefficients", rows)
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.schedule_digest is None:
            refuse("coefficients are those of one noise schedule: schedule_digest must be given", None)
        order = 1 + histories_read(
            explicit_history_weights([row[2:] for row in rows], len(self.timesteps), "coefficients")
        )
        if self.order != order:
            refuse(f"order must be one more than the predictions that the coefficients read, {order}", self.order)

    def for_schedule(self, schedule: NoisePath, path: str = "the list") -> tuple[float, ...]:
        """Return the timesteps for a sampler with this schedule. Warn if the schedule is another
        one of the same length: the list works there, but was not chosen for it.

        Raises:
            ValueError: they were made for another number of training timesteps, or for another kind
                of path.
        """
        total = schedule.num_train_timesteps if isinstance(schedule, NoiseSchedule) else None
        if total != self.num_train_timesteps or (total is None and self.schedule_digest not in (None, schedule.digest)):
            ours, theirs = (
                "times of another path in continuous time" if n is None else f"{n} training timesteps"
                for n in (self.num_train_timesteps, total)
            )
            raise ValueError(f"{path} is for {ours}, got a schedule with {theirs}: search again with this schedule")
        if self.schedule_digest not in (None, schedule.digest):
            if self.coefficients is not None:
                raise ValueError(
                    f"{path} holds coefficients, which are those of one noise schedule, got another one of the same length: "
                    "search again with this schedule"
                )
            warnings.warn(
                f"{path} was made for another noise schedule of the same length: its timesteps are used as they are",
                stacklevel=4,
            )
        return self.timesteps

    @property
    def _version(self) -> int:
        """The first version that has all of this."""
        if self.coefficients is not None:
            return VERSION_WITH_COEFFICIENTS
        return VERSION if self.num_train_timesteps is not None else VERSION_IN_CONTINUOUS_TIME

    def content(self) -> dict[str, Any]:
        """Return what a file of it holds, as JSON."""
        return {
            "format": FORMAT,
            "version": self._version,
            "timesteps": list(self.timesteps),
            "model_timesteps": None if self.model_timesteps is None else list(self.model_timesteps),
            "num_train_timesteps": self.num_train_timesteps,
            "schedule_sha256": self.schedule_digest,
            "order": self.order,
            "eps_residual": None if self.eps_residual is None else list(self.eps_residual),
            **(
                {}
                if self.coefficients is None
                else {"prediction_type": self.prediction_type, "coefficients": [list(row) for row in self.coefficients]}
            ),
            "provenance": dict(self.provenance),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        # Lists of numbers on a line each, for people.
        lines = ",\n".join(f' "{name}": {_one_line(value)}' for name, value in self.content().items())
        write_atomically(Path(path).resolve(), f"{{\n{lines}\n}}\n".encode())

    @classmethod
    def of_content(cls, found: Any, name: str) -> TimestepList:
        """Return the list with the content of a file.

        Args:
            name: what to call it in errors, such as the file's path.

        Raises:
            ValueError: it is no such content; the message says what is wrong with it.
        """
        if not isinstance(found, Mapping) or found.get("format") != FORMAT:
            raise ValueError(
                f'{name} must be an object with "format": "{FORMAT}", as ddim-fast search writes it, got {str(found)[:80]}'
            )
        if found.get("version") not in READABLE:
            raise ValueError(
                f"{name} must have version {' or '.join(map(str, READABLE))}, got {found.get('version')!r}: "
                "make it again with this ddim_fast, or update ddim_fast"
            )
        provenance, digest = found.get("provenance", {}), found.get("schedule_sha256")
        if not isinstance(provenance, Mapping):
            refuse(f"provenance in {name} must be an object", provenance)
        if not isinstance(digest, (str, type(None))):
            refuse(f"schedule_sha256 in {name} must be a text", digest)
        try:
            result = cls(
                tuple(found["timesteps"]),
                found["num_train_timesteps"],
                digest,
                found.get("order", 1),
                _numbers(found.get("eps_residual")),
                provenance,
                found.get("model_timesteps"),
                found.get("coefficients"),
                found.get("prediction_type"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no list of timesteps: {error}") from None
        if result.order not in (1, 2) and result.coefficients is None:
            raise ValueError(f"{name} must have order 1 or 2, got {result.order!r}")
        return result


def read_timesteps(path: str | os.PathLike[str]) -> TimestepList:
    """Return the list in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such list; the message says what is wrong with it.
    """
    try:
        found = read_json(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of timesteps {path}: make one with ddim-fast search") from None
    return TimestepList.of_content(found, str(path))


def _one_line(value: Any) -> str:
    indent = 1 if isinstance(value, Mapping) else None
    return json.dumps(value, indent=indent, allow_nan=False).replace("\n", "\n ")


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(check_number("eps_residual", value, at_least=0) for value in values)
