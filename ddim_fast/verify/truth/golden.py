"""The recorded runs: every state of a DDIM sampler for given samples, model outputs and noise.

``golden_trajectories.json`` beside this file is written by ``tools/golden_trajectories.py`` from
the float64 oracle alone. It is versioned: changing a recorded number makes a new version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.checks import refuse
from .cases import Setting

GOLDEN_VERSION = 1
"""The version of the recorded numbers."""

PATH = Path(__file__).with_name("golden_trajectories.json")


@dataclass(frozen=True, eq=False)
class GoldenRun:
    """A complete run.

    Args:
        name: how it differs from the simplest run.
        setting: with explicit timesteps; ``timestep_spacing`` and ``num_inference_steps`` give the
            same ones, unless ``irregular``.
        eta_scales: what eta multiplies, see ``Subject``.
        quick: whether it belongs to the quick set, which together uses every option of a sampler.
        irregular: whether its timesteps follow no spacing.
        alpha_bars: one for each timestep, then that of clean data: ``(S + 1,)``.
        x_T, model_outputs, noise, states: float64, ``(B, C)`` and ``(S, B, C)``; ``states[i]`` is
            x_prev of step i.
    """

    name: str
    setting: Setting
    eta_scales: str
    quick: bool
    irregular: bool
    alpha_bars: np.ndarray
    x_T: np.ndarray  # noqa: N815 (the paper's)
    model_outputs: np.ndarray
    noise: np.ndarray
    states: np.ndarray


@lru_cache
def golden_runs() -> tuple[GoldenRun, ...]:
    """Return the recorded runs of this version.

    Raises:
        ValueError: the file has another version.
    """
    return runs_of(json.loads(PATH.read_text()))


def runs_of(data: dict[str, Any]) -> tuple[GoldenRun, ...]:
    """Return the runs of a file's contents, see ``golden_runs``."""
    if data.get("version") != GOLDEN_VERSION:
        refuse(
            f"the recorded runs must be of version {GOLDEN_VERSION}",
            data.get("version"),
            f"take {PATH.name} and this code from the same release",
        )
    return tuple(_run(entry, data["inputs"]) for entry in data["runs"])


def _run(entry: dict[str, Any], inputs: dict[str, Any]) -> GoldenRun:
    states = np.array(entry["states"], np.float64)
    setting = Setting(**entry["setting"] | {"timesteps": tuple(entry["setting"]["timesteps"])})
    return GoldenRun(
        entry["name"],
        setting,
        entry["eta_scales"],
        entry["quick"],
        entry["irregular"],
        np.array(entry["alpha_bars"], np.float64),
        np.array(inputs["x_T"], np.float64),
        np.array(inputs["model_outputs"], np.float64)[: len(states)],
        np.array(inputs["noise"], np.float64)[: len(states)],
        states,
    )
