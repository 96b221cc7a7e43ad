"""The checks in a process of their own: a subject that crashes, exits or hangs loses one check, not
all of them.

with IsolatedSubject("diffusers:DDIMScheduler", timeout=60) as subject:
    results = [subject.run(one) for one in choose_checks(None, full=False)]
report = subject.report(results)

One process runs all checks, since importing torch takes seconds; after a crash or a timeout, a new
one continues. It is a new interpreter rather than a ``multiprocessing`` child, which would run the
caller's main module again and write to the caller's terminal.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..utils.checks import check_integer, check_number
from ..utils.extras import missing
from .checks import CHECKS, Check
from .reports.report import CheckResult, Outcome, Report
from .run import prepared_subject, report_of, result_of, run_check
from .subjects.backends import Backend, EmulatedTriton, reasons_against

TIMEOUTS = {False: 300.0, True: 1800.0}
"""Seconds for one check, in the quick set (False) and the full one (True)."""

STARTING = 120.0
"""The least seconds that a subject has to be imported."""

_MOST_OUTPUT = 16 << 20  # bytes kept of what a process writes
_SHOWN_LINES, _SHOWN_WIDTH = 30, 200
_TICK = 0.1  # s


class SubjectRefusedError(Exception):
    """The subject does not exist or could not be imported; the message says why."""


class _EndedError(Exception):
    """The process can run no more checks; the message says how it ended."""


@dataclass(frozen=True)
class _Job:
    """The first message to the process."""

    subject: str
    device: str
    full: bool
    seed: int
    eta_scales: str | None
    arithmetic: str | None
    schedule: str | None
    prediction_type: str | None


# --- The caller's side ------------------------------------------------------------------------------------------------


class IsolatedSubject:
    """A subject in a process of its own, as a context manager: leaving it ends the process.

    Args:
        name: a backend, or ``"module:attribute"``, which only that process imports.
        timeout: seconds for each check, ``TIMEOUTS`` by default. Importing the subject may take as
            long, and at least ``STARTING``.
        full, seed, device, eta_scales, arithmetic, schedule, prediction_type: as for ``verify``.

    Raises, when entered:
        SubjectRefusedError: the subject does not exist, or its import failed, crashed or took too
            long.
    """

    def __init__(
        self,
        name: str,
        *,
        full: bool = False,
        seed: int = 0,
        device: str = "cpu",
        eta_scales: str | None = None,
        arithmetic: str | None = None,
        schedule: str | None = None,
        prediction_type: str | None = None,
        timeout: float | None = None,
    ):
        seed = check_integer("seed", seed, at_least=0)
        self.name = name
        self.timeout = TIMEOUTS[full] if timeout is None else check_number("timeout", timeout, above=0)
        self._job = _Job(name, device, full, seed, eta_scales, arithmetic, schedule, prediction_type)
        self._process: subprocess.Popen | None = None
        self._empty: Report | None = None

    def __enter__(self) -> IsolatedSubject:
        self._start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end()

    def run(self, one: Check) -> CheckResult:
        """Run one check. The outcome is "error" where the process did not survive it."""
        began = time.perf_counter()
        try:
            if self._process is None:
                self._start()
            self._written_before = os.fstat(self._output.fileno()).st_size
            try:
                self._pipe.send(one.name)
            except OSError:
                raise _EndedError(self._how_it_ended()) from None
            return self._receive(self.timeout)
        except _EndedError as error:
            self._end()
            message = f"the subject's process {error}"
        except SubjectRefusedError as error:
            message = f"after an earlier crash the subject could not be imported again: {error}"
        return result_of(one, Outcome.ERROR, message, seconds=time.perf_counter() - began, code=self._command(one))

    def report(self, results: Sequence[CheckResult], **more: Any) -> Report:
        """Return these results as a report on the subject; ``more`` are further fields of the
        report."""
        assert self._empty is not None, "the subject must be entered first"
        return replace(self._empty, results=tuple(results), **more)

    def _command(self, one: Check) -> str:
        job = self._job
        options = {"checks": [one.name], "full": job.full, "seed": job.seed, "device": job.device}
        options |= {name: getattr(job, name) for name in ("eta_scales", "arithmetic", "schedule", "prediction_type")}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
        return f"from ddim_fast.verify import verify\n\nverify({self.name!r}, {given})  # ends this process, or hangs"

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (closed by _end); appended to, so that it can be truncated
        self._written_before = 0
        command = f"import sys; sys.path[:] = {sys.path!r}; from ddim_fast.verify import isolate; isolate.serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C goes to the caller only, and the subject's own children end with it
        )
        theirs.close()
        try:
            self._pipe.send(self._job)
            answer = self._receive(max(self.timeout, STARTING))
        except (_EndedError, OSError) as error:
            ended = error if isinstance(error, _EndedError) else self._how_it_ended()
            self._end()
            raise SubjectRefusedError(f"the process that imports {self.name!r} {ended}") from None
        except BaseException:
            self._end()
            raise
        if isinstance(answer, str):
            self._end()
            raise SubjectRefusedError(answer)
        self._empty = answer

    def _receive(self, timeout: float) -> Any:
        """Return the process's next answer.

        Raises:
            _EndedError: the process ended, or took too long.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while True:
            try:
                if self._pipe.poll(_TICK):
                    return self._pipe.recv()
            except Exception:  # the end of the pipe, or something that is not an answer
                raise _EndedError(self._how_it_ended()) from None
            if self._process.poll() is not None and not self._pipe.poll():
                raise _EndedError(self._how_it_ended())
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    self._process.send_signal(signal.SIGUSR1)  # it writes its traceback, see serve
                    time.sleep(3 * _TICK)
                raise _EndedError(f"did not answer within {timeout:g} s and was ended.{self._last_words()}")
            if os.fstat(self._output.fileno()).st_size > _MOST_OUTPUT:
                os.ftruncate(self._output.fileno(), 0)
                self._written_before = 0

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(20 * _TICK)
        except subprocess.TimeoutExpired:
            return f"closed the pipe that it answers through and was ended.{self._last_words()}"
        if status < 0:
            number = -status
            name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
            why = " (often: no memory was left)" if number == signal.SIGKILL else ""
            return f"was ended by {name}: {signal.strsignal(number)}{why}.{self._last_words()}"
        return f"ended itself with status {status}, as os._exit does.{self._last_words()}"

    def _last_words(self) -> str:
        self._output.seek(self._written_before)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if line and not line.startswith("Extension modules:")][-_SHOWN_LINES:]
        if not lines:
            return " It wrote nothing."
        return "\n".join([" It wrote last:", *(f"  {line[:_SHOWN_WIDTH]}" for line in lines)])

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._pipe.close()
        self._output.close()


# --- The process ------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Run the checks whose names arrive through the pipe with this descriptor."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _end_with_parent()
    pipe = Connection(descriptor)
    job: _Job = pipe.recv()
    try:
        subject = prepared_subject(
            job.subject, job.device, job.eta_scales, job.arithmetic, job.schedule, job.prediction_type
        )
        if reasons := _reasons_against(subject, job.device):
            raise ValueError(f"the backend {job.subject} does not run here: {'; '.join(reasons)}")
    except BaseException as error:  # the subject's module may raise anything, even SystemExit
        known = isinstance(error, (ValueError, TypeError))
        pipe.send(str(error) if known else f"importing {job.subject!r} raised {type(error).__name__}: {error}")
        return
    pipe.send(report_of(subject, (), full=job.full, seed=job.seed, device=job.device))
    while True:
        try:
            one = CHECKS[pipe.recv()]
        except EOFError:
            return
        try:
            result = run_check(one, subject, job.full, job.seed, torch.device(job.device))
        except BaseException as error:
            result = result_of(one, Outcome.ERROR, f"the subject raised {type(error).__name__}: {error}")
        _send(pipe, result)


def _send(pipe: Connection, result: CheckResult) -> None:
    try:
        pipe.send(result)
    except Exception:  # a detail that cannot be pickled
        pipe.send(replace(result, details={str(name): repr(value) for name, value in result.details.items()}))


def _reasons_against(subject: Any, device: str) -> list[str]:
    """Return why a backend cannot run here; nothing for other subjects."""
    if isinstance(subject, EmulatedTriton):
        found = importlib.util.find_spec("triton") is not None
        return [] if found else [missing("the emulated GPU", ["triton"], "triton")]
    if not isinstance(subject, Backend):
        return []
    return reasons_against(subject.backend, device)


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies, even if it hangs."""
    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
