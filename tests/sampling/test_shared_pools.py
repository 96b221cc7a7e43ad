"""Graphs that share memory: what that breaks where a rule is broken, and that the cache keeps the rules."""

import gc
import threading

import pytest
import torch
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.recorded_pool import RecordedPool
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError

SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    """A model with several intermediate results."""

    prediction_type = "epsilon"

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x, t):
        wide = torch.cat([x, x * 2, x + self.shift], dim=1)
        return torch.tanh(wide).flatten(2).cumsum(1)[:, : x.shape[1]].reshape(x.shape) / 4


def cache_of(backend=None, **options):
    backend = Replay() if backend is None else backend
    return GraphCache(backend=lambda device: backend, device_types=("cpu",), **options)


def sample(model, cache, batch=2, mode="step", seed=0, **options):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, 1.0, graphs=cache)
    return s.sample(model, (batch, *SHAPE[1:]), seed=seed, capture=mode, **options)


# --- What the stand-in shows ------------------------------------------------------------------------------------------


def halves(x):
    """What takes memory on the way, and returns new memory."""
    return (x * 2 + 1) / 2


def addresses(graph):
    return {
        memory.storage().data_ptr() for node in graph._nodes for _, place in node.results for memory in [place.memory]
    }


def test_graphs_of_one_pool_get_the_same_addresses():
    backend, pool, x = Replay(), RecordedPool(), torch.ones(100)
    out = torch.empty(100)
    graphs = [backend.capture(lambda: out.copy_(halves(x)), pool) for _ in range(3)]
    assert addresses(graphs[0]) == addresses(graphs[1]) == addresses(graphs[2])
    assert pool.nbytes == 3 * 400  # the three results of halves; once, not three times
    assert not addresses(backend.capture(lambda: out.copy_(halves(x)))) & addresses(graphs[0])
    for graph in graphs:
        out.zero_()
        graph.replay()
        assert out.eq(1.5).all()


def test_a_larger_need_takes_new_memory_and_a_smaller_one_finds_room():
    backend, pool, out = Replay(), RecordedPool(), torch.empty(())
    sizes = []
    for n in (100, 10, 200):
        x = torch.ones(n)
        backend.capture(lambda x=x: out.copy_((x * 2).sum()), pool)
        sizes.append(pool.nbytes)
    assert sizes == [404, 404, 404 + 800]


def test_what_is_held_after_a_capture_is_not_given_to_the_next():
    backend, pool, x = Replay(), RecordedPool(), torch.ones(100)
    first = backend.capture(lambda: halves(x), pool)
    second = backend.capture(lambda: halves(x + 1), pool)
    first.replay()
    second.replay()
    assert first.output.eq(1.5).all()  # replays in the order of the captures
    assert second.output.eq(2.5).all()


def test_what_an_earlier_graph_does_overwrites_the_result_of_a_later_one():
    """The reason for results outside of the pool."""
    backend, pool, x = Replay(), RecordedPool(), torch.ones(100)
    first = backend.capture(lambda: halves(x), pool)
    second = backend.capture(lambda: x + 1.5, pool)
    second.replay()
    assert second.output.eq(2.5).all()
    first.replay()
    assert not second.output.eq(2.5).all()


@pytest.mark.parametrize("shared", [False, True])
def test_replays_that_overlap_are_wrong_in_one_pool_and_right_in_two(shared):
    """The reason for an order of replays."""
    backend, pools = Replay(), [RecordedPool(), RecordedPool()]
    xs, outs = [torch.full((100,), float(i)) for i in range(2)], [torch.empty(100) for _ in range(2)]
    graphs = [
        backend.capture(lambda x=x, out=out: out.copy_(halves(x)), pools[0 if shared else i])
        for i, (x, out) in enumerate(zip(xs, outs, strict=True))
    ]
    for _ in zip(*(graph.replaying() for graph in graphs), strict=True):  # a launch of each in turn
        pass
    right = [bool(out.eq(x + 0.5).all()) for x, out in zip(xs, outs, strict=True)]
    assert right == [not shared, True]
    for x, out, graph in zip(xs, outs, graphs, strict=True):
        graph.replay()
        assert out.eq(x + 0.5).all()


def test_memory_that_was_given_up_is_free_for_the_next_capture():
    backend, pool, x = Replay(), RecordedPool(), torch.ones(100)
    first, stays = backend.capture(lambda: halves(x), pool), backend.capture(lambda: x.add_(0), pool)
    first.reset()
    gc.collect()
    before = pool.nbytes
    second = backend.capture(lambda: halves(x), pool)
    assert pool.nbytes == before
    second.replay()
    assert second.output.eq(1.5).all()
    stays.reset()
    second.reset()
    with pytest.raises(RuntimeError, match="ends with its last graph"):
        backend.capture(lambda: halves(x), pool)


def test_a_capture_that_fails_leaves_the_pool_to_the_others():
    backend, pool, x = Replay(), RecordedPool(), torch.ones(3)
    graph = backend.capture(lambda: halves(x), pool)
    with pytest.raises(CaptureError):
        backend.capture(lambda: halves(x).sum().item(), pool)
    graph.replay()
    assert graph.output.eq(1.5).all()
    backend.capture(lambda: halves(x), pool)


# --- The cache ----------------------------------------------------------------------------------------------------------


def pools(cache):
    return [shared for found in cache._pools._pools.values() for shared in found]


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_graphs_of_a_cache_share_a_pool_and_replay_in_any_order(mode):
    cache, apart = cache_of(), [cache_of(), cache_of(), cache_of()]
    models = [Net(), Net(0.5), Net(1.0)]
    expected = [sample(model, None, 1 + i, "off") for i, model in enumerate(models)]
    for i in (2, 0, 1, 0, 2, 2, 1, 0):
        assert torch.equal(sample(models[i], cache, 1 + i, mode), expected[i]), i
    for i, own in enumerate(apart):
        sample(models[i], own, 1 + i, mode)
    assert [len(shared.users) for shared in pools(cache)] == [3]
    together, alone = pools(cache)[0].pool.nbytes, [pools(own)[0].pool.nbytes for own in apart]
    assert max(alone) <= together < 1.1 * max(alone)
    assert together < 0.7 * sum(alone)


def test_what_is_counted_is_each_loops_tensors_and_the_pool_once():
    cache = cache_of()
    for batch in (3, 2, 1):
        sample(Net(), cache, batch)
    own = sum(captured.nbytes for _, captured in cache._captured.values())
    assert cache.stats().nbytes == own + pools(cache)[0].pool.nbytes
    cache.clear()
    assert cache.stats().nbytes == 0
    assert pools(cache) == []


def test_a_run_in_a_callback_captures_in_a_pool_of_its_own():
    cache, outer, inner = cache_of(), Net(), Net(0.5)
    expected = sample(outer, None, mode="off"), sample(inner, None, 3, "off")
    found = []
    got = sample(outer, cache, callback=lambda *a: found.append(sample(inner, cache, 3)) and None)
    assert torch.equal(got, expected[0])
    assert all(torch.equal(each, expected[1]) for each in found)
    assert [len(shared.users) for shared in pools(cache)] == [1, 1]


def test_a_run_in_a_callback_that_replays_from_the_same_pool_is_right():
    cache, outer, inner = cache_of(), Net(), Net(0.5)
    expected = sample(outer, None, mode="off"), sample(inner, None, 3, "off")
    sample(outer, cache)
    sample(inner, cache, 3)
    assert [len(shared.users) for shared in pools(cache)] == [2]
    found = []
    got = sample(outer, cache, callback=lambda *a: found.append(sample(inner, cache, 3)) and None)
    assert torch.equal(got, expected[0])
    assert len(found) == 3
    assert all(torch.equal(each, expected[1]) for each in found)


def test_a_captured_run_has_memory_of_its_own():
    cache = cache_of()
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, 1.0, graphs=cache)
    expected = sample(Net(), None, mode="off")
    with s.capture(Net(), SHAPE, device="cpu") as captured:
        sample(Net(), cache)
        assert torch.equal(captured.sample(seed=0), expected)
        cache.clear()
        assert torch.equal(captured.sample(seed=0), expected)


def test_a_pool_lives_until_a_capture_in_it_is_over():
    """Its last graph is given up meanwhile: by another thread, or by what the model calls."""
    cache, first = cache_of(), Net()

    calls = []

    class Clears(Net):
        def forward(self, x, t):
            calls.append(x)
            cache.clear()  # in the warm-up and in the capture
            return super().forward(x, t)

    sample(first, cache)
    pool = pools(cache)[0].pool
    last = next(captured for _, captured in cache._captured.values())
    expected = sample(Net(), None, 3, "off")
    assert torch.equal(sample(Clears(), cache, 3), expected)
    assert len(calls) > 2
    assert len(cache) == 1
    assert [shared.pool for shared in pools(cache)] == [pool]
    with pytest.raises(Exception, match="nothing captured"):
        last._graph.replay()
    cache.clear()
    assert pools(cache) == []


def test_a_pool_that_failed_its_only_capture_is_not_used_again():
    cache = cache_of()

    class Waits(Net):
        def forward(self, x, t):
            return x * float(x.mean())

    with pytest.raises(CaptureError):
        sample(Waits(), cache)
    assert pools(cache) == []
    assert torch.equal(sample(Net(), cache), sample(Net(), None, mode="off"))


def test_a_pool_that_a_failed_capture_left_open_is_given_to_no_other_graph():
    cache = cache_of()
    sample(Net(), cache)
    pools(cache)[0].pool.usable = False
    sample(Net(), cache, 3)
    assert [len(shared.users) for shared in pools(cache)] == [1, 1]


def test_two_threads_at_once_capture_in_pools_of_their_own(monkeypatch):
    cache, models = cache_of(), [Net(), Net(0.5)]
    expected = [sample(model, None, mode="off") for model in models]
    meeting, got = threading.Barrier(2, timeout=60), [None, None]

    def run(i):
        got[i] = sample(models[i], cache, callback=lambda step, *a: meeting.wait() and None if step == 0 else None)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [len(shared.users) for shared in pools(cache)] == [1, 1]


def test_a_budget_is_kept_after_a_graph_that_was_over_it():
    """The memory of a large graph stays in the pool that it shares: later graphs take another."""
    probe = cache_of()
    sample(Net(), probe, 2)
    cache = cache_of(max_bytes=3 * probe.stats().nbytes)
    sample(Net(), cache, 40)
    for batch in (1, 2, 1):
        sample(Net(), cache, batch)
    assert cache.stats().nbytes <= cache.max_bytes
    assert cache.stats().graphs == 3
