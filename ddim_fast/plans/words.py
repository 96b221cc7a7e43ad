"""The words that arguments take, for type checkers and editors. Tests hold each to the table that
says what its words do."""

from __future__ import annotations

from typing import Literal

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "score", "edm"]
"""What a model's output means: a key of ``plans.coefficients.PREDICTION_TYPES``."""

DiscreteSpacing = Literal["leading", "trailing", "linspace", "uniform", "quad", "log_snr", "karras", "cosine", "beta"]
"""How timesteps are chosen: a key of ``plans.timesteps.SPACINGS``."""

ContinuousSpacing = Literal["uniform", "trailing", "linspace", "karras", "exponential", "beta", "log_snr"]
"""How times are chosen: a key of ``plans.continuous.CONTINUOUS_SPACINGS``."""

Spacing = DiscreteSpacing | ContinuousSpacing

EtaScales = Literal["std_dev", "variance", "flow_grpo", "cps"]
"""What eta means: a key of ``plans.eta.ETA_SCALES``."""

ScheduleName = Literal[
    "linear",
    "scaled_linear",
    "cosine",
    "squaredcos_cap_v2",
    "sigmoid",
    "quad",
    "const",
    "jsd",
    "flow",
    "edm",
    "vp",
    "ve",
    "trigonometric",
]
"""A schedule: a key of ``plans.named.ALL_SCHEDULES``."""
