"""The cache of graphs between streams, between threads, and where memory is short."""

import threading

import pytest
import torch
from graph_models import Logged
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.sampling.capture import GraphCache

SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    prediction_type = "epsilon"

    def forward(self, x, t):
        return torch.tanh(x)


class Waits(Net):
    def __init__(self):
        super().__init__()
        EVENTS[self] = (threading.Event(), threading.Event())

    def forward(self, x, t):
        began, may_end = EVENTS[self]
        began.set()
        assert may_end.wait(60)
        return super().forward(x, t)


EVENTS = {}  # beside the models, whose attributes a key holds


@pytest.fixture
def backend():
    return Logged()


def cache_of(backend, **options):
    return GraphCache(backend=lambda device: backend, device_types=("cpu",), **options)


def sample(model, cache, batch=2, **options):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 2, graphs=cache)
    return s.sample(model, (batch, *SHAPE[1:]), seed=0, **{"capture": "loop"} | options)


def test_values_are_loaded_after_the_run_before_on_whichever_stream(backend):
    cache, model = cache_of(backend), Net()
    sample(model, cache)
    assert backend.log == ["replay on first", "fence on first of 8 tensors"]
    backend.stream = "second"
    del backend.log[:]
    sample(model, cache)
    cache.clear()
    assert backend.log == [
        "second waits for first",
        "replay on second",
        "fence on second of 8 tensors",
        "second waits for second",
        "reset",
    ]


def test_a_captured_run_waits_too(backend):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 2, graphs=cache_of(backend))
    with s.capture(Net(), SHAPE, capture="loop") as captured:
        captured.sample(seed=0)
        backend.stream = "second"
        captured.sample(seed=0)
    waits = [line for line in backend.log if "waits" in line or line == "reset"]
    assert waits == ["second waits for first", "second waits for second", "reset"]


def test_a_graph_that_was_given_up_while_in_use_is_freed_when_its_run_ends(backend):
    cache = cache_of(backend)
    sample(Net(), cache, capture="step", callback=lambda *a: cache.clear())
    assert backend.log[-1] == "reset"
    assert len(cache) == 0


def test_others_replay_while_one_thread_captures():
    cache, model, slow = cache_of(Replay()), Net(), Waits()
    expected = sample(model, cache)
    began, may_end = EVENTS[slow]
    first = threading.Thread(target=sample, args=(slow, cache))
    first.start()
    got = []
    second = threading.Thread(target=lambda: got.append(sample(model, cache)), daemon=True)
    try:
        assert began.wait(60)
        second.start()
        second.join(20)
        assert got
        assert torch.equal(got[0], expected)
    finally:
        may_end.set()
        first.join()
        second.join()
    assert len(cache) == 2


def test_a_full_memory_is_no_lasting_failure(backend):
    cache, model = cache_of(backend), Net()
    for batch in (1, 3):
        sample(model, cache, batch)
    backend.full = 1
    sample(model, cache, capture="auto")  # the other two made room
    assert cache.stats().graphs == 1
    assert cache.stats().evictions == 2
    backend.full = 2
    with pytest.warns(UserWarning, match="sampling without CUDA graphs: .*out of memory"):
        sample(model, cache, 1, capture="auto")
    assert cache.stats().graphs == 0
    sample(model, cache, 1, capture="auto")
    assert cache.stats().graphs == 1
    backend.full = 1
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sample(model, cache_of(backend))


def test_graphs_stay_within_a_budget_of_bytes(backend):
    model = Net()
    probe = cache_of(backend)
    sample(model, probe, 1)
    one = probe.stats().nbytes
    assert one > SHAPE[1] * SHAPE[2] * SHAPE[3] * 4
    cache = cache_of(backend, max_bytes=2 * one)
    for batch in (1, 2, 8):  # the last is over the budget alone
        sample(model, cache, batch)
    assert cache.stats().graphs == 1
    sample(model, cache, 8)
    assert cache.stats().hits == 1


def test_what_happened_is_shown(backend):
    cache = cache_of(backend, maxsize=1)
    for batch in (1, 1, 2):
        sample(Net() if batch == 2 else MODEL, cache, batch)
    s = cache.stats()
    assert (s.graphs, s.hits, s.misses, s.evictions) == (1, 1, 2, 1)
    assert s.capture_seconds > 0
    assert repr(cache).startswith("GraphCache(1 of 1 graphs, 0.0 MiB, 1 hits, 2 misses, 1 evictions, ")


MODEL = Net()
