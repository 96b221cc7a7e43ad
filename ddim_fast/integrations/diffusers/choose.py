"""The fast scheduler for whatever scheduler a pipeline has."""

from __future__ import annotations

from typing import Any

from diffusers import SchedulerMixin

from ...utils.checks import refuse


def fast_scheduler(scheduler: Any) -> Any:
    """Return the drop-in for a scheduler of diffusers, with its config.

    >>> pipe.scheduler = fast_scheduler(pipe.scheduler)

    It is a new one, as ``from_config`` makes it: call ``set_timesteps`` again, as pipelines do. One
    that is a drop-in already is returned as it is.

    Raises:
        TypeError: it is no scheduler of diffusers.
        ValueError: its class has no drop-in. (A subclass of a class that has one may compute
            something else, and has none.)
    """
    fast = _drop_ins()
    if type(scheduler) in fast.values():
        return scheduler
    if not isinstance(scheduler, SchedulerMixin):
        refuse("scheduler must be one of diffusers", scheduler, "pass pipe.scheduler", TypeError)
    if type(scheduler) not in fast:
        names = ", ".join(sorted(original.__name__ for original in fast))
        raise ValueError(
            f"scheduler must be of a class that has a drop-in ({names}), got {type(scheduler).__name__}: keep it, or change to "
            "one of these with from_config"
        )
    original: Any = scheduler
    return fast[type(scheduler)].from_config(original.config)


def _drop_ins() -> dict[type, Any]:
    """Return the drop-in of each class of diffusers that has one: every class listed in this
    package that starts with Fast, and the class of diffusers that it extends."""
    from .. import diffusers as package

    classes = [getattr(package, name) for name in package.__all__ if name.startswith("Fast")]
    return {next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.")): cls for cls in classes}
