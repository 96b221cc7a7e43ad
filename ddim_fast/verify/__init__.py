"""The correctness harness: it verifies DDIM samplers, ours or anyone's, against the papers.
Sampling does not need it.

from ddim_fast.verify import verify

report = verify("diffusers:DDIMScheduler")
print(report.passed, [result.message for result in report.results])

Its rooms, top to bottom; imports only point down: ``run`` and ``isolate`` (verify a subject, here
or in a process of its own), ``reports``, ``checks``, ``subjects``, ``truth``.
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
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
