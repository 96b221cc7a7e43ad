"""What a plan asks of a noise schedule: the path that samples take from noise to clean data.

``schedules.NoiseSchedule`` (discrete timesteps, variance preserving) is one; the classes of
``continuous`` are the others. Everything above this file sees no more of them than this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .coefficients import PREDICTION_TYPES, Prediction
from .levels import AnyLevel


class NoisePath(ABC):
    """A path x_t = alpha_t x0 + sigma_t eps, with what a model is told on it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call it in messages and records."""

    @property
    def default_prediction_type(self) -> str:
        """What a model on this path predicts, where neither it nor its user says."""
        return "epsilon"

    @property
    @abstractmethod
    def default_spacing(self) -> str:
        """How timesteps are chosen, where the user does not say."""

    @property
    @abstractmethod
    def time_dtype(self) -> torch.dtype:
        """The dtype of the timesteps that a model is called with."""

    @property
    @abstractmethod
    def after_last(self) -> float:
        """The timestep of clean data, after the last step."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that the levels depend on: what tells one path from
        another in files."""

    @property
    def parameters(self) -> dict[str, Any]:
        """What tells a path from others with the same digest, as JSON: which times it visits, what
        a model is told."""
        return {}

    def serves_models_of(self, other: NoisePath) -> bool:
        """Return whether a model that was trained on the other path is told the same on this one at
        the same levels. Which times are visited does not matter."""
        return self.digest == other.digest

    @property
    @abstractmethod
    def spacings(self) -> tuple[str, ...]:
        """The names by which its timesteps can be chosen."""

    @abstractmethod
    def level(self, t: float) -> AnyLevel:
        """Return the noise level at timestep ``t``.

        Raises:
            IndexError, ValueError: there is no such timestep.
        """

    @abstractmethod
    def check_model_timesteps(self, model_timesteps: tuple[float, ...], num_inference_steps: int) -> None:
        """Raise ValueError unless these are timesteps that a model can be told, one for each step."""

    def model_time(self, t: float) -> float:
        """Return what the model is told at timestep ``t``."""
        return t

    def input_scale(self, t: float) -> float:
        """Return what x_t is multiplied by before the model sees it (EDM's c_in)."""
        return 1.0

    def initial_std_dev(self, t: float) -> float:
        """Return the standard deviation of the noise that sampling starts from at timestep ``t``."""
        return 1.0

    def prediction(self, prediction_type: str, level: AnyLevel) -> Prediction:
        """Return what a model's output means at this level."""
        return PREDICTION_TYPES[prediction_type](level)
