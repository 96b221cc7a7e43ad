"""What options can be, by name. The tables that these names are of need torch, which takes seconds
to import; ``tests/commands/test_choices.py`` holds the two together."""

from __future__ import annotations

from typing import get_args

from ..plans import words

SHIPPED = ("fashion", "scenes")
"""Of ``models.shipped``."""
BACKENDS = ("cpu", "triton", "reference")
"""Of ``kernels.dispatch``."""
CAPTURE_MODES = ("auto", "loop", "step", "off")
"""Of ``sampling.capture_mode``."""

SPACINGS = get_args(words.DiscreteSpacing)
CONTINUOUS_SPACINGS = get_args(words.ContinuousSpacing)
SCHEDULES = get_args(words.ScheduleName)

PAPER = "std_dev"
ETA_SCALES = get_args(words.EtaScales)
OF_EQUATION_16 = ("std_dev", "variance")
"""Of ``plans.eta``."""

FORMATS = ("safetensors", "npz", "webdataset")
"""Of ``generation.formats``."""
SHARD_SIZE, COMPUTE_BATCH_SIZE = 512, 16
"""Of ``generation.run``."""

PREDICTION_TYPES = get_args(words.PredictionType)

CLOSED_FORM = "closed-form"
"""The model of ``tradeoff.ClosedForm``, by name."""

RACED_METRICS = ("frechet", "distance", "wasserstein")
"""Those of ``tradeoff.results.METRICS`` that a race has targets of."""
