"""CUDA graphs for the denoisers of any pipeline of diffusers, in whatever loop it has."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from ...kernels.torch_internals import compiled_by
from ...sampling.capture import GraphCache
from ...sampling.graphed_forward import ForwardStats, GraphedForward
from ...utils.checks import refuse
from . import internals
from .denoisers import denoisers_of, timestep_on_device

if TYPE_CHECKING:
    from typing_extensions import Self


def graph_denoiser(
    pipe: Any,
    *,
    names: Iterable[str] | None = None,
    graphs: GraphCache | None = None,
    strict: bool = False,
    vouched: bool = False,
) -> GraphedDenoisers:
    """Replay CUDA graphs in place of the forward of a pipeline's denoisers.

    The first call with given shapes, dtypes and plain values warms up and captures; later ones copy
    their arguments in, replay, and return copies of the outputs: the bits of a call without graphs.
    Where a call cannot be captured, it runs without a graph, with one warning that says why.

    >>> with graph_denoiser(pipe):
    ...     images = pipe(prompt).images

    Args:
        pipe: a pipeline of diffusers, or one of its modules.
        names: which of its modules, such as ``("unet", "controlnet")``; None for all denoisers.
        graphs: where graphs are kept, ``GraphCache(maxsize=..., max_bytes=...)``. None: a cache of
            their own, of eight graphs.
        strict: raise ``CaptureError`` where a call would run without a graph.
        vouched: capture what ``DDIMSampler.sample(capture="step")`` captures and "auto" does not,
            such as adapters of peft: what its Python code does beside what the key sees is the
            caller's to know.

    Returns:
        A handle with ``restore()``, ``clear()`` and ``stats()``, which is a context manager.

    Raises:
        TypeError: ``pipe`` is neither a pipeline nor a module.
        ValueError: there is no such module, no denoiser, or one that has graphs already; one that
            is compiled in place.
    """
    wanted = None if names is None else _checked_names(names)
    if graphs is not None and not isinstance(graphs, GraphCache):
        refuse("graphs must be a GraphCache, or None for one of its own", graphs, kind=TypeError)
    modules = denoisers_of(pipe, wanted)
    for name, module in modules.items():
        forward = vars(module).get("forward")
        if isinstance(forward, GraphedForward) and forward.is_open and forward.module is module:
            raise ValueError(
                f"a denoiser gets graphs once, got {name}, which has some: restore() what graph_denoiser returned, or "
                f"{name}.forward.restore()"
            )
        compiler = compiled_by(module)
        if compiler is not None and "forward" not in compiler.attributes:
            raise ValueError(
                f"graphs are made outside of what is compiled, got {name}, which .compile() compiled in place: compile its blocks "
                f"(compile_repeated_blocks), or set it to torch.compile({name})"
            )
    return GraphedDenoisers(modules, GraphCache() if graphs is None else graphs, strict, vouched)


def _checked_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        refuse("names must be several, such as ('unet', 'controlnet')", names, f"names=({names!r},)", TypeError)
    checked = tuple(names)
    if not checked or not all(isinstance(name, str) for name in checked):
        refuse(
            "names must be those of modules of the pipeline, at least one", checked, "leave it out for all denoisers"
        )
    return checked


class GraphedDenoisers:
    """The denoisers of a pipeline that replay graphs, until ``restore()``.

    Attributes:
        graphs: the cache that keeps their graphs.
    """

    def __init__(self, modules: dict[str, nn.Module], graphs: GraphCache, strict: bool, vouched: bool):
        self.graphs = graphs
        self._forwards: dict[str, GraphedForward] = {}
        own: dict[nn.Module, GraphedForward] = {}  # one for a module that has two names
        for name, module in modules.items():
            if module not in own:
                arranged, context = timestep_on_device(module), internals.attention_backend
                own[module] = GraphedForward(module, graphs, name, strict, vouched, arranged, context)
            self._forwards[name] = own[module]
        with ExitStack() as undo:
            for forward in own.values():
                undo.callback(forward.restore)
                forward.put_in_place()
            undo.pop_all()  # all are in place

    def stats(self) -> dict[str, ForwardStats]:
        """Return what each denoiser's graphs are and did: their number and bytes, calls that were
        replays, captures, and calls without a graph by the reason."""
        return {name: forward.stats() for name, forward in self._forwards.items()}

    def clear(self) -> None:
        """Free all graphs of these denoisers, and forget what was refused: calls are captured anew,
        for instance after a change that graphs cannot see."""
        for forward in self._forwards.values():
            forward.clear()

    def restore(self) -> None:
        """Free all graphs of these denoisers, and give them their forwards back. Restoring again
        does nothing.

        Hooks that replaced a forward afterwards stay where they are.
        """
        with ExitStack() as each:  # to the end, whatever one of them raises
            for forward in self._forwards.values():
                each.callback(forward.restore)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"GraphedDenoisers({'; '.join(map(_described, *zip(*self.stats().items(), strict=True)))})"


def _described(name: str, s: ForwardStats) -> str:
    without = sum(s.fallbacks.values())
    return f"{name}: {s.graphs} graphs, {s.nbytes / 2**20:.1f} MiB, {s.hits} replays, {s.misses} captures" + (
        f", {without} calls without a graph" if without else ""
    )
