"""A scheduler that takes a file of ``ddim-fast search``: by ``set_timesteps``, or in its config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ...plans.files import TimestepList
from ...utils.checks import refuse
from .config_fields import add_config_fields
from .solver_file import SolverFile, is_file, solver_of
from .solver_path import SolverPath


class TakesFiles:
    """A scheduler that takes files; mixed in before the original class."""

    config: Any
    _solver: SolverFile | None = None
    """The file whose steps are taken; None: those of ``timesteps``."""

    def _path_of_files(self) -> SolverPath:
        """Return the path that files must be for.

        Raises:
            ValueError: a file's steps do not go with this config.
        """
        raise NotImplementedError

    def _solver_file(self, found: TimestepList, name: str) -> SolverFile:
        return SolverFile(found, name, self._path_of_files())

    def _keep_solver(self, solver: Any) -> None:
        """Put the content of a file into the config, where it is saved with a pipeline."""
        if solver is not None:
            found, name = solver_of(solver)
            self._solver_file(found, name)  # its errors now
            self.register_to_config(solver=found.content())  # type: ignore[attr-defined]  # the original's

    def _kept_solver(self, num_inference_steps: int | None) -> SolverFile | None:
        """Return the file that the config holds, or None.

        Raises:
            ValueError: it has another number of steps.
        """
        kept = getattr(self.config, "solver", None)
        if kept is None:
            return None
        found, name = solver_of(kept)
        count = len(found.timesteps)
        if num_inference_steps != count:
            refuse(
                f"num_inference_steps must be {count}, those of the solver in the scheduler's config",
                num_inference_steps,
                f"pass num_inference_steps={count}, or make the scheduler with solver=None",
            )
        return self._solver_file(found, name)


def with_solver(original: type) -> Any:
    """Return the ``__init__`` of a drop-in that takes files: the original's, with the config field
    ``solver``."""

    @add_config_fields(original)
    def init(self: Any, *args: Any, solver: Any = None, **kwargs: Any) -> None:
        original.__init__(self, *args, **kwargs)  # type: ignore[misc]  # of a class, not of an instance
        self._keep_solver(solver)

    return init


TAKERS = (
    "FastDDIMScheduler of models trained with betas, FastFlowMatchEulerDiscreteScheduler of flow matching, "
    "FastEDMEulerScheduler of EDM"
)
"""The drop-ins to take with a file, for errors: one for each path."""
FILE_ARGUMENTS = ("timesteps", "sigmas")
"""Where ``set_timesteps`` of a scheduler takes a file."""


def given_to(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """Return the arguments of ``set_timesteps`` by name, among them a file even where the original
    has no such argument; None where there are others that it does not have."""
    files = {name: kwargs.pop(name) for name in FILE_ARGUMENTS if is_file(kwargs.get(name))}
    try:
        return signature.bind_partial(*args, **kwargs).arguments | files
    except TypeError:
        return None


def refuse_files(scheduler: Any, given: Mapping[str, Any]) -> None:
    """Raise ValueError if a scheduler whose steps a file does not have is given one."""
    for name in FILE_ARGUMENTS:
        if is_file(given.get(name)):
            refuse(
                f"{name} must be no file of ddim-fast search for {type(scheduler).__name__}, whose steps are others than a file has",
                given[name],
                f"make another scheduler with from_config(scheduler.config): {TAKERS}",
            )


def without_files(original: type) -> Callable[..., None]:
    """Return the ``set_timesteps`` of a class, which refuses files."""
    of_original = original.set_timesteps  # type: ignore[attr-defined] # each of diffusers' has one
    signature = inspect.signature(of_original)

    @functools.wraps(of_original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_files(self, given_to(signature, self, *args, **kwargs) or {})
        of_original(self, *args, **kwargs)

    return set_timesteps
