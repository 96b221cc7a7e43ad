"""Adapters for schedulers, steps and samplers of any origin: the choice of one for an object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ...integrations.named_schedulers import NamedScheduler, is_scheduler, named_scheduler
from ...kernels.dispatch import BACKENDS
from ...utils.checks import refuse
from ...utils.import_string import import_string
from ..truth.cases import Setting
from .backends import backend_subject
from .functions import SamplerFunction, StepFunction, parameters
from .schedulers import Scheduler, SigmaScheduler, sigma_form
from .subject import FEATURES, Subject, with_new_features


class Adapter(NamedTuple):
    """A form that a subject may have, how to recognise it, and how to make a ``Subject`` of it."""

    form: str
    recognises: Callable[[Any], bool]
    make: Callable[[Any, str | None], Subject]


def _is_step(value: Any) -> bool:
    names = parameters(value) if callable(value) else ()
    return StepFunction.path_by_parameters(names) is not None


def _is_sampler(value: Any) -> bool:
    return callable(value) and parameters(value)[:1] == ("model",)


def _scheduler(value: Any, name: str | None, options: Mapping[str, Any] | None = None) -> Subject:
    make = value if inspect.isclass(value) else type(value)
    kind = Scheduler if sigma_form(make) is None else SigmaScheduler
    if make is value:
        return kind(value, dict(options or {}), name=name)
    given = {k: v for k, v in dict(getattr(value, "config", {})).items() if not k.startswith("_")}
    varied = kind(make).config(Setting()) if kind is Scheduler else ()
    return kind(make, {k: v for k, v in given.items() if k not in varied})


ADAPTERS = (
    Adapter("a Subject of ddim_fast.verify", lambda v: isinstance(v, Subject), lambda v, name: v),
    Adapter("a subclass of it", lambda v: inspect.isclass(v) and issubclass(v, Subject), lambda v, name: v()),
    Adapter("a scheduler: a class, or an object, with set_timesteps and step", is_scheduler, _scheduler),
    Adapter(
        "a scheduler with options: module:Class?option=value&option=value",
        lambda v: isinstance(v, NamedScheduler),
        lambda v, name: _scheduler(v.make, name, v.options),
    ),
    Adapter(
        "a step: step(x_t, model_output, alpha_bar_t, alpha_bar_prev, ...), or with t, t_prev or sigma_t, sigma_prev",
        _is_step,
        StepFunction,
    ),
    Adapter("a sampler: sample(model, x_T, ...)", _is_sampler, SamplerFunction),
)
"""The adapters; the first that recognises an object takes it."""


def subject_of(value: Any, device: torch.device | str = "cpu") -> Subject:
    """Return the subject for the name of a backend, ``"module:attribute"``, or an object of any
    form in ``ADAPTERS``.

    Raises:
        ValueError: there is no such backend, module or attribute.
        TypeError: the object has none of the forms.
    """
    name = None
    if isinstance(value, str):
        if value in BACKENDS:
            return backend_subject(value, device)
        name, value = value, _imported(value)
    for adapter in ADAPTERS:
        if adapter.recognises(value):
            return with_new_features(adapter.make(value, name))
    forms = "\n".join(f"  {adapter.form}" for adapter in ADAPTERS)
    refuse(f"a subject must be a backend ({', '.join(BACKENDS)}) or one of\n{forms}", value, kind=TypeError)


def _imported(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        refuse(
            f"a subject must be a backend ({', '.join(BACKENDS)}) or module:attribute, such as diffusers:DDIMScheduler",
            name,
        )
    return named_scheduler(name, "the subject") if "?" in name else import_string(name, "the subject")


__all__ = ["ADAPTERS", "FEATURES", "SamplerFunction", "Scheduler", "SigmaScheduler", "StepFunction", "subject_of"]
