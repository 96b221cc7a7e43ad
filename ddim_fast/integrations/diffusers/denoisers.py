"""The denoisers of diffusers' pipelines: which they are, and how they take a timestep."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.torch_internals import module_inside
from ...utils.checks import refuse

NAMES = ("unet", "transformer", "transformer_2", "controlnet", "prior", "decoder")
"""What pipelines call their denoisers. Others are found by their classes."""
_FOLDERS = tuple(f"diffusers.models.{name}." for name in ("unets", "transformers", "controlnets"))

TIMESTEP_FROM_HOST = (
    "ControlNetModel",
    "ControlNetUnionModel",
    "ControlNetXSAdapter",
    "I2VGenXLUNet",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "PriorTransformer",
    "SparseControlNetModel",
    "UNet1DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNet3DConditionModel",
    "UNetControlNetXSModel",
    "UNetMotionModel",
    "UNetSpatioTemporalConditionModel",
)
"""Classes that first make a tensor on the device of a ``timestep`` that is a number or a tensor on
the host, and read it nowhere else: an int as int64."""


def denoisers_of(pipe: Any, names: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline, by their names.

    Args:
        pipe: a pipeline of diffusers, or a module, which is its own denoiser.
        names: which of the pipeline's modules; None for all that are denoisers.

    Raises:
        TypeError: it is neither.
        ValueError: it has no module of such a name, or no denoiser.
    """
    if isinstance(pipe, nn.Module):
        if names is not None:
            refuse("names tells the modules of a pipeline apart, and a module has none", names, "leave names out")
        return {type(pipe).__name__: pipe}
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        refuse("pipe must be a pipeline of diffusers, or a torch.nn.Module", pipe, "for instance pipe.unet", TypeError)
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    if names is None:
        found = {name: part for name, part in modules.items() if name in NAMES or _is_denoiser(part)}
        if not found:
            raise ValueError(
                f"pipe must have a denoiser, got a {type(pipe).__name__} with {_listed(modules)}: name the modules that run in "
                "each step, names=(...)"
            )
        return found
    for name in names:
        if name not in modules:
            raise ValueError(
                f"names must be of modules that the pipeline has, got {name!r}, and it has {_listed(modules)}: name one of these"
            )
    return {name: modules[name] for name in names}


def _listed(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(modules) or "no modules"


def _is_denoiser(module: nn.Module) -> bool:
    return any(kind.__module__.startswith(_FOLDERS) for kind in type(module_inside(module)).__mro__)


def timestep_on_device(module: nn.Module) -> Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]] | None:
    """Return what gives the arguments of a call with its timestep on the device, as the module
    itself begins; None for a module that does not."""
    inner = module_inside(module)
    owner: Any = next(kind for kind in type(inner).__mro__ if "forward" in vars(kind))
    if owner.__name__ not in TIMESTEP_FROM_HOST or not owner.__module__.startswith("diffusers."):
        return None
    place = list(inspect.signature(owner.forward).parameters).index("timestep") - 1  # without self

    def arranged(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        is_positional = len(args) > place
        given = args[place] if is_positional else kwargs.get("timestep")
        sample = args[0] if args else next(iter(kwargs.values()), None)
        moved = _moved(given, sample)
        if moved is given:
            return args, kwargs
        if is_positional:
            return (*args[:place], moved, *args[place + 1 :]), kwargs
        return args, {**kwargs, "timestep": moved}

    return arranged


def _moved(timestep: Any, sample: Any) -> Any:
    if not isinstance(sample, Tensor):
        return timestep
    if isinstance(timestep, int):
        return torch.tensor(timestep, dtype=torch.int64, device="cpu").to(sample.device)
    if isinstance(timestep, Tensor) and timestep.ndim == 0 and timestep.device.type == "cpu":
        return timestep.to(sample.device)
    return timestep
