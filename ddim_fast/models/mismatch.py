"""Warn of a model that is sampled otherwise than it was trained: a few people mean it, most do not,
and the samples are wrong without an error."""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from ..plans.path import NoisePath
from ..utils.warn import warn_caller
from .protocol import Model

_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_RANDOM = (*_DROPS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def warn_of_schedule(model: Model, schedule: NoisePath) -> None:
    """Warn where a model says that it was trained with another schedule than that of the sampler."""
    stated = getattr(model, "schedule", None)
    if stated is schedule or not isinstance(stated, NoisePath):
        return
    if stated == schedule or _serves(schedule, stated):
        return
    warn_caller(
        f"the sampler's schedule should be the one that the model was trained with, model.schedule = {stated!r:.120}, got "
        f"{schedule!r:.120}, with which its samples will be wrong: use DDIMSampler(model.schedule, ...)"
    )


@lru_cache(maxsize=64)
def _serves(schedule: NoisePath, stated: NoisePath) -> bool:
    return schedule.serves_models_of(stated)


def warn_of_training(model: Model) -> None:
    """Warn of a module in training mode with layers that then are random, or change."""
    if not getattr(model, "training", False) or not isinstance(model, nn.Module):
        return
    for module in model.modules():
        if module.training and isinstance(module, _RANDOM) and getattr(module, "p", 1) > 0:
            name = next(name for name, other in model.named_modules() if other is module)
            where = f"{type(module).__name__} in {name!r}" if name else type(module).__name__
            effect = (
                "drops at random" if isinstance(module, _DROPS) else "depends on the batch and changes its statistics"
            )
            warn_caller(
                f"a model should be sampled in evaluation mode, got one in training mode, whose {where} {effect}: "
                "call model.eval()"
            )
            return
