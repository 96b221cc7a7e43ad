"""The step against everything else that computes it: seconds, ratios, and share of the bandwidth.

Ratios compare like with like: in place with in place, and all others with ours into a given buffer.
Bytes are those that the step must read and write, without the reads that the processor makes in
order to write. The share of the triad is (our bytes per second) / (the triad's), both measured in
the same rounds. The share without the call subtracts the time of a call on 16 elements from both.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from interleaved import Comparison
from step_case import VARIANTS, StepCase

SHAPES = [(1, 4, 64, 64), (64, 3, 32, 32), (64, 3, 256, 256)]
LARGEST = SHAPES[-1]
TITLE = "the step: time of other / ours, like with like; triad: share of its bandwidth (and without the call)"
QUICK = {("eta0", SHAPES[0]), ("eta0", SHAPES[1]), ("eta1", SHAPES[0])}


def _cases():
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            if shape == LARGEST and dtype != torch.float32:
                continue
            for variant in VARIANTS:
                quick = dtype == torch.float32 and (variant, shape) in QUICK
                names = variant, "x".join(map(str, shape)), str(dtype).removeprefix("torch.")
                yield pytest.param(variant, shape, dtype, marks=() if quick else pytest.mark.full, id="-".join(names))


@pytest.mark.parametrize(("variant", "shape", "dtype"), list(_cases()))
def test_step(variant, shape, dtype, settings, measure, benchmark, show):
    """Time one step, x_t to x_prev, per call."""
    case, tiny = StepCase(variant, shape, dtype), StepCase(variant, (1, 16), dtype)
    compiled, missing = case.compiled()
    ours = case.ours()
    contenders = {
        **ours,
        **case.other_backends(),
        **case.eager(),
        **compiled,
        **case.diffusers(),
        **case.triads(),
        **_tiny_calls(tiny),
    }

    def check(name, result):
        (tiny if name.startswith("16: ") else case).check(name.removeprefix("16: "), result)

    def prepare():
        case.prepare()
        tiny.prepare()

    options = {"time_limit": 8.0, "min_rounds": 8} if shape == LARGEST else {}
    group = f"step {case.elements} {str(dtype).removeprefix('torch.')}"
    pairs = _like_with_like(contenders)
    result = measure(group, contenders, check, baseline="ours out", pairs=pairs, prepare=prepare, **options)
    _record(benchmark, case, result, settings.threads, missing)
    show(TITLE, **_row(case, result, settings.threads, dtype))


def _tiny_calls(tiny: StepCase):
    """Return the same calls on 16 elements, which measure the cost of a call itself."""
    calls = {**tiny.ours(), **tiny.triads()}
    del calls["ours new"]
    return {f"16: {name}": call for name, call in calls.items()}


def _best(result: Comparison, prefix: str, in_place: bool) -> str | None:
    names = [n for n in result.rounds if n.startswith(prefix) and n.endswith("in place") == in_place]
    return min(names, key=result.seconds, default=None)


def _triad_shares(case: StepCase, result: Comparison, threads: int) -> dict[str, float]:
    """Return the shares of the single-threaded triad's bandwidth, with and without the call."""
    if "triad out" not in result.rounds or threads != 1:
        return {}
    shares = {}
    for way in ("in place", "out"):
        names = f"triad {way}", f"ours {way}", f"16: triad {way}", f"16: ours {way}"
        more_bytes = case.streams / 3
        shares[way] = more_bytes * result.ratio(names[0], to=names[1])
        shares[f"{way}, kernel"] = more_bytes * result.combine(lambda t, o, t16, o16: (t - t16) / (o - o16), *names)
    return shares


def _like_with_like(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return each other contender paired with ours: in place, or else into a buffer."""
    others = [name for name in names if not name.startswith(("ours", "16: "))]
    return [(name, "ours in place" if name.endswith("in place") else "ours out") for name in others]


def _record(benchmark, case: StepCase, result: Comparison, threads: int, missing: dict[str, str]) -> None:
    benchmark.extra_info.update(
        variant=case.name,
        shape="x".join(map(str, case.shape)),
        dtype=str(case.dtype).removeprefix("torch."),
        elements=case.elements,
        bytes=case.bytes,
        bytes_formula=case.bytes_formula,
        gigabytes_per_second={f"ours {w}": case.bytes / result.seconds(f"ours {w}") / 1e9 for w in ("in place", "out")},
        triad_share=_triad_shares(case, result, threads),
        missing=missing,
    )


def _row(case: StepCase, result: Comparison, threads: int, dtype: torch.dtype) -> dict[str, str]:
    def per_element(name):
        return f"{result.seconds(name) / case.elements * 1e9:.3f}"

    def ratio(name, to):
        return f"{result.ratio(name, to=to):.2f}" if name else "-"

    shares = _triad_shares(case, result, threads)
    share_texts = {
        f"triad {way}": f"{shares[way]:.2f} ({shares[way + ', kernel']:.2f})" if shares else "-"
        for way in ("in place", "out")
    }
    return {
        "variant": case.name,
        "shape": "x".join(map(str, case.shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "ns/el in place": per_element("ours in place"),
        "out": per_element("ours out"),
        "new": per_element("ours new"),
        "diffusers": ratio("diffusers", "ours out"),
        "eager": ratio("eager", "ours out"),
        "compile": ratio("torch.compile" if "torch.compile" in result.rounds else None, "ours out"),
        "compile in place": ratio(_best(result, "torch.compile", True), "ours in place"),
        "reference": ratio("backend reference" if "backend reference" in result.rounds else None, "ours out"),
        **share_texts,
        "spread": f"{100 * result.spread('ours out'):.0f}%",
    }
