"""A run that its owner captured: no key, no cache, memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from ..models.protocol import Model
from ..plans.plan import SamplingPlan
from .capture import GraphCache
from .captured_loop import CapturedLoop, Job
from .loop import Trajectory
from .options import Options, ReplayKeywords, check_keywords, shows_keywords
from .run import prepare, take_steps, warn_of_result

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_RANDOMNESS = ("seed", "seeds", "generator")


class CapturedRun:
    """A sampler's run with one model, shape and set of options, as a CUDA graph.

    Whoever holds it vouches for the model: what its Python code did when it was captured is what
    every replay does, with the weights where they were then (changed in place, they are followed).

    >>> with sampler.capture(model, (4, 4, 64, 64), device="cuda") as captured:
    ...     images = captured.sample(seed=0)

    Args:
        options: those of every call, where it does not say otherwise.
        graphs: whose backend captures; nothing is kept there.

    Raises:
        CaptureError: the model cannot be captured.
        TypeError, ValueError: an argument breaks a rule, or nothing can be captured there.
    """

    def __init__(
        self, plan: SamplingPlan, model: Model, shape: Sequence[int] | None, options: Options, graphs: GraphCache
    ):
        if options.execution.capture == "off":
            raise ValueError("a captured run is captured by 'step' or 'loop', got capture='off': use sample")
        if options.execution.capture == "auto":
            options = options.replace(capture="step")
        self._options = options
        if all(getattr(options.noise, name) is None for name in _RANDOMNESS):
            options = options.replace(seed=0)  # nothing is drawn from torch's generator to capture
        self._plan, self._model, self._graphs = plan, model, graphs
        self._in_use = threading.Lock()
        job = prepare(plan, model, shape, options, graphs)
        self._shape = job.loop.shape
        self._mode, self._key = job.mode, job.key()
        self._captured: CapturedLoop | None = graphs.capture_apart(job)

    @shows_keywords(ReplayKeywords)
    def sample(self, **changes: Unpack[ReplayKeywords]) -> Tensor | Trajectory:
        """Draw samples by replays.

        Args:
            changes: values that differ from those of ``DDIMSampler.capture``; seed, seeds and
                generator replace one another. Shapes, dtypes and plain values of conditioning are
                those that were captured.

        Returns:
            As ``DDIMSampler.sample``.

        Raises:
            TypeError, ValueError: as ``DDIMSampler.sample``, or a change is not one of values.
            RuntimeError: it was closed, or is in use by another thread or by its own callback.
        """
        check_keywords("a captured run", ReplayKeywords, changes)
        given: Mapping[str, Any] = changes
        if any(name in given for name in _RANDOMNESS):
            given = {**dict.fromkeys(_RANDOMNESS), **given}
        options = self._options.replace(**given)
        job = prepare(self._plan, self._model, self._shape, options, self._graphs)
        if job.key() != self._key:
            raise ValueError(
                "a captured run takes new values of what it was captured with, got another shape, dtype, option or plain value, or one "
                f"tensor in other places, among {', '.join(changes) or 'what torch was set to'}: capture another run for it"
            )
        result = take_steps(job, self._using(job), options)
        if options.observation.check_finite:  # nothing is checked unasked
            warn_of_result(result, job, self._model, options, self._graphs)
        return result

    @contextmanager
    def _using(self, job: Job) -> Iterator[CapturedLoop]:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "a captured run is used by one at a time, got a call while another is running: capture one for each"
            )
        try:
            if self._captured is None:
                raise RuntimeError("a captured run can be used until it is closed, got one that was: capture it again")
            try:
                self._captured.load(job)
                yield self._captured
            finally:
                self._captured.finish()
        finally:
            self._in_use.release()

    def close(self) -> None:
        """Free the graph and its memory. Closing again does nothing.

        Raises:
            RuntimeError: it is in use.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("a captured run is closed when nobody uses it, got close() while it is running")
        try:
            if self._captured is not None:
                self._captured.reset()
            self._captured = None
        finally:
            self._in_use.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a captured run is memory of one device and process, which is neither copied nor pickled, got {self!r}: capture "
            "another with sampler.capture(...)"
        )

    def __repr__(self) -> str:
        state = "closed" if self._captured is None else f"one graph for {'a step' if self._mode == 'step' else 'all'}"
        return f"CapturedRun(shape={tuple(self._shape)}, {self._plan.num_inference_steps} steps, {state})"
