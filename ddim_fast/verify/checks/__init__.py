"""The checks. Each file registers its own; this is their order."""

from . import eta, flow, golden, levels, marginals, memory, noise, options, precision, safety, timesteps, update  # noqa: F401 (they register themselves)
from .base import CHECKS, Check, CheckFailedError, CheckSkippedError, Context, SubjectRaisedError, check

__all__ = ["CHECKS", "Check", "CheckFailedError", "CheckSkippedError", "Context", "SubjectRaisedError", "check"]
