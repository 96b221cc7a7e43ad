"""What options can be, by name. The tables that these names are of need torch, which takes seconds
to import; ``tests/commands/test_choices.py`` holds the two together."""

from __future__ import annotations

SHIPPED = ("fashion", "scenes")
"""Of ``models.shipped``."""
BACKENDS = ("cpu", "triton", "reference")
"""Of ``kernels.dispatch``."""
CAPTURE_MODES = ("auto", "loop", "step", "off")
"""Of ``sampling.capture_mode``."""

SPACINGS = ("leading", "trailing", "linspace", "uniform", "quad", "log_snr", "karras", "cosine", "beta")
"""Of ``plans.timesteps``."""
CONTINUOUS_SPACINGS = ("uniform", "trailing", "linspace", "karras", "exponential", "beta", "log_snr")
"""Of ``plans.continuous``."""
SCHEDULES = (
    *("linear", "scaled_linear", "cosine", "squaredcos_cap_v2", "sigmoid", "quad", "const", "jsd"),
    *("flow", "edm", "vp", "ve", "trigonometric"),
)
"""Of ``plans.named``."""

PAPER = "std_dev"
ETA_SCALES = ("std_dev", "variance", "flow_grpo", "cps")
OF_EQUATION_16 = ("std_dev", "variance")
"""Of ``plans.eta``."""

FORMATS = ("safetensors", "npz", "webdataset")
"""Of ``generation.formats``."""
SHARD_SIZE, COMPUTE_BATCH_SIZE = 512, 16
"""Of ``generation.run``."""

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow", "score", "edm")
"""Of ``plans.coefficients``."""

CLOSED_FORM = "closed-form"
"""The model of ``tradeoff.ClosedForm``, by name."""

RACED_METRICS = ("frechet", "distance", "wasserstein")
"""Those of ``tradeoff.results.METRICS`` that a race has targets of."""
