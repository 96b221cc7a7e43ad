"""Proof that a DDIM sampler is right, ours or anyone's, and that GPU code is, on machines without a GPU. Sampling needs nothing of it.

from ddim_fast.verify import verify

report = verify("diffusers:DDIMScheduler")
print(report.passed, [result.message for result in report.results])
"""

from typing import Any

_HOMES = {
    "Subject": "subjects.subject",
    "Report": "reports.report",
    "CheckResult": "reports.report",
    "Outcome": "reports.report",
    "verify": "run",
}
__all__ = ["CheckResult", "Outcome", "Report", "Subject", "verify"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the proofs on GPU code need none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
