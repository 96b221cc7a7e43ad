"""The settings of a set of samples, as JSON: two runs with equal settings write the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import nn

from .._version import __version__
from ..kernels import dispatch
from ..kernels.contract import StepCoefficients, StepInputs
from ..kernels.noise import NOISE_STANDARD_VERSION
from ..plans.path import NoisePath
from ..plans.schedules import NoiseSchedule
from ..sampler import DDIMSampler

LAYOUT_VERSION = 1
"""Of the directory: of its manifest, its shards' names and what they hold."""


def model_digest(model: Any) -> str:
    """Return the SHA-256 of a module's structure (its ``repr``), and its weights and buffers with
    names, dtypes and shapes.

    Raises:
        TypeError: the model is no ``nn.Module``, so that nothing of it can be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a model must be an nn.Module, whose weights identify it, got {type(model).__name__}: pass model_id, a text that "
            "changes whenever the model does"
        )
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def plan_settings(sampler: DDIMSampler, model: Any) -> dict[str, Any]:
    """Every field of the plan of a run, the schedule by its name and the SHA-256 of its
    ``alphas_cumprod``."""
    plan = sampler.plan(model)
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    settings: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }
    schedule: NoisePath = settings.pop("schedule")
    # Said where they are asked for only, so that sets from before there were such options can be
    # resumed.
    if plan.order == 1:
        del settings["order"]
    if plan.eps_residual is None:
        del settings["eps_residual"]
    if plan.model_timesteps == plan.timesteps:
        del settings["model_timesteps"]
    if plan.history_weights is None:
        del settings["history_weights"]
    else:
        settings["history_weights"] = [list(pair) for pair in plan.history_weights]
    settings["schedule"] = {
        "name": schedule.name,
        **({"num_train_timesteps": schedule.num_train_timesteps} if isinstance(schedule, NoiseSchedule) else {}),
        **schedule.parameters,
        "sha256": schedule.digest,
    }
    settings["thresholding"] = None if plan.thresholding is None else asdict(plan.thresholding)
    return settings


def environment(device: torch.device, dtype: torch.dtype, backend: str | None, threads: int) -> dict[str, Any]:
    """Return what else bits may depend on: versions, the processor, the number of threads, switches
    of torch."""
    x = torch.zeros(1, 4, device=device, dtype=dtype)
    step_backend = dispatch.choose(StepInputs(x, x, StepCoefficients(1, 0, 0, 1, 0, 1, 0, 0)), backend).name
    found = {
        "ddim_fast": __version__,
        "noise_standard": NOISE_STANDARD_VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
        "step_backend": step_backend,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    else:
        found |= {
            "device": device.type,
            "processor": _processor(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
        }
    return found


def _processor() -> str:
    """Return the processor's name: libraries choose their algorithms by it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def as_json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=1, sort_keys=True, allow_nan=False)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], there_is: str, here_is: str) -> list[str]:
    """Return a line for each setting whose two values differ, nested settings by their path."""
    one, other = _flat(json.loads(as_json(there))), _flat(json.loads(as_json(here)))
    missing = "nothing"
    return [
        f"{name}: {one.get(name, missing)} {there_is}, {other.get(name, missing)} {here_is}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name, missing) != other.get(name, missing)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
