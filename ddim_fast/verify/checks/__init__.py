"""The checks. Each module registers its own with ``base.check``; ``CHECKS`` has all of them by
name.

``judge`` holds a step against the oracle, ``densities`` a log-probability, ``compare`` two results of
a subject against each other, ``runs`` and ``noise`` what the checks of whole runs share.
"""

from . import (  # noqa: F401 (they register themselves)
    eta,
    flow,
    golden,
    levels,
    log_prob,
    marginals,
    memory,
    model_input,
    noise,
    options,
    precision,
    safety,
    timesteps,
    update,
)
from .base import (
    CHECKS,
    Check,
    CheckFailedError,
    CheckSkippedError,
    Context,
    NotApplicableError,
    SubjectRaisedError,
    check,
)

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailedError",
    "CheckSkippedError",
    "Context",
    "NotApplicableError",
    "SubjectRaisedError",
    "check",
]
