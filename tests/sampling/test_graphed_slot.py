"""The slot of a module's forward, and who else is there: threads, streams, captures and traces of others, hooks, copies."""

import copy
import gc
import inspect
import pickle
import threading
import types
import weakref

import pytest
import torch
from graph_models import Base, Logged
from graphed import SHAPE, Net, cache_of, check, graphed, x_of
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ddim_fast as df
from ddim_fast.sampling.forward_slot import KeptForward
from ddim_fast.sampling.graphed_forward import ForwardStats
from ddim_fast.sampling.model_state import ModelState

# --- threads, streams, memory ---------------------------------------------------------------------------------------------------------


EVENTS = weakref.WeakKeyDictionary()


class Slow(Net):
    def forward(self, x, **more):
        began, may_end = EVENTS.get(self, (None, None))
        if began is not None:
            began.set()
            assert may_end.wait(60)
        return super().forward(x, **more)


def test_a_thread_that_comes_while_another_captures_uses_its_graph():
    module = Slow()
    forward = graphed(module)
    EVENTS[module] = began, may_end = threading.Event(), threading.Event()
    got = []

    def call():
        with torch.no_grad():
            got.append(module(x_of()))

    threads = [threading.Thread(target=call) for _ in range(2)]
    threads[0].start()
    assert began.wait(60)
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join()
    assert torch.equal(*got)
    assert forward.stats().misses == 1


def test_a_graph_in_use_by_another_thread_is_done_without_and_that_is_no_warning(monkeypatch):
    module = Net()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    ((_, captured),) = forward._graphs._captured.values()
    captured.busy = True
    check(module, x_of(1), graphs=1)
    captured.busy = False
    check(module, x_of(1), graphs=1)
    assert forward.stats().fallbacks == {
        "a graph is replayed by one at a time, got a call while another was using it": 1
    }


def test_arguments_are_loaded_after_the_replay_before_on_whichever_stream():
    backend, module = Logged(), Net()
    forward = graphed(module, cache_of(backend))
    check(module, x_of(), torch.ones(2))
    backend.stream = "second"
    check(module, x_of(), torch.ones(2))
    forward.restore()
    assert backend.log == [
        "replay on first",
        "fence on first of 3 tensors",
        "second waits for first",
        "replay on second",
        "fence on second of 3 tensors",
        "second waits for second",
        "reset",
    ]


def test_a_full_memory_frees_idle_graphs_and_is_no_lasting_failure():
    backend, module = Logged(), Net()
    forward = graphed(module, cache_of(backend))
    check(module, x_of())
    backend.full = 1
    check(module, x_of(0, (1, 3, 8, 8)), graphs=1)
    backend.full = 2
    with torch.no_grad(), pytest.warns(UserWarning, match="out of memory"):
        module(x_of())
    check(module, x_of(), graphs=1)
    assert forward.stats().misses == 3


def test_a_graph_that_a_run_ended_badly_with_is_not_in_use_for_ever(monkeypatch):
    backend, module = Logged(), Net()
    forward = graphed(module, cache_of(backend))
    check(module, x_of())

    def fails(tensors):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(backend, "fence", fails)
    with torch.no_grad(), pytest.raises(RuntimeError, match="the device is gone"):
        module(x_of())
    monkeypatch.undo()
    check(module, x_of(1), graphs=1)
    assert forward.stats().fallbacks == {}


def test_what_is_restored_while_another_thread_captures_keeps_no_graph():
    module, cache = Slow(), cache_of()
    forward = graphed(module, cache)
    EVENTS[module] = began, may_end = threading.Event(), threading.Event()
    got = []

    def call():
        with torch.no_grad():
            got.append(module(x_of()))

    thread = threading.Thread(target=call)
    thread.start()
    assert began.wait(60)
    forward.restore()
    may_end.set()
    thread.join()
    with torch.no_grad():
        assert torch.equal(got[0], module(x_of()))
    assert (len(cache), cache.stats().nbytes) == (0, 0)


def test_graphs_stay_within_their_number_and_bytes():
    module = Net()
    forward = graphed(module, cache_of(maxsize=2))
    for n in (1, 2, 3, 1):
        check(module, x_of(0, (n, 3, 8, 8)))
    assert (forward.stats().graphs, forward.stats().misses) == (2, 4)
    one = forward.stats().nbytes // 4  # of one and of three samples
    assert one == 2 * 3 * 8 * 8 * 4  # an argument and an output
    forward.restore()
    forward = graphed(module, cache_of(max_bytes=2 * one))
    for n in (1, 1, 2):
        check(module, x_of(0, (n, 3, 8, 8)))
    assert (forward.stats().graphs, forward.stats().nbytes) == (1, 2 * one)


def test_two_modules_in_one_cache_have_their_own_graphs():
    cache, modules = cache_of(), [Net(), Net()]
    modules[1].conv.weight.data.mul_(2)
    forwards = [graphed(module, cache) for module in modules]
    for _ in range(2):
        for module in modules:
            check(module, x_of(), graphs=1)
    forwards[0].clear()
    assert [forward.stats().graphs for forward in forwards] == [0, 1]


def test_a_module_that_nobody_holds_is_let_go_of():
    module = Net()
    graphed(module)
    check(module, x_of())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


# --- within others' captures and traces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "step", "loop"])
def test_in_a_captured_loop_it_is_part_of_that(mode):
    module = Base()
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache_of())
    expected = s.sample(module, SHAPE, seed=0, capture="off")
    forward = graphed(module)
    for _ in range(2):
        assert torch.equal(s.sample(module, SHAPE, seed=0, capture=mode), expected)
    assert s.graphs.stats().graphs == 1
    assert forward.stats() == type(forward.stats())()
    assert torch.equal(s.sample(module, SHAPE, seed=0, capture="off"), expected)
    assert forward.stats().misses == 1


def test_a_module_in_a_module_is_part_of_the_outer_ones_graph():
    inner, outer = Net(), nn.Sequential()
    outer.append(inner)
    forwards = [graphed(inner), graphed(outer)]
    expected = Net()
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(outer(x_of(seed)), expected(x_of(seed)))
    assert [forward.stats().graphs for forward in forwards] == [0, 1]
    check(inner, x_of())
    assert forwards[0].stats().graphs == 1


def test_what_somebody_else_captures_gets_the_eager_call(monkeypatch):
    module = Net()
    forward = graphed(module)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check(module, x_of(), graphs=0)
    assert forward.stats().fallbacks == {}


def test_who_watches_operators_sees_those_of_the_eager_forward():
    module = Net()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as expected:
            forward.eager(x_of())
        with FlopCounterMode(display=False) as counted:
            module(x_of())
        assert counted.get_total_flops() == expected.get_total_flops() > 0
        traced = make_fx(lambda x: module(x))(x_of())
        assert torch.equal(traced(x_of(1)), forward.eager(x_of(1)))
        traced = make_fx(lambda x: module(x), tracing_mode="fake", _allow_non_fake_inputs=True)(x_of())
        assert torch.equal(traced(x_of(1)), forward.eager(x_of(1)))
    assert forward.stats() == ForwardStats(1, forward.stats().nbytes, 0, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of what it traces with
def test_a_trace_of_torchscript_sees_the_eager_forward():
    module = Net()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    with torch.no_grad():
        traced = torch.jit.trace(module, x_of(), check_trace=False)
        assert torch.equal(traced(x_of(1)), forward.eager(x_of(1)))
    assert forward.stats().hits == 0


def test_torch_compile_sees_the_eager_forward():
    module = Base()
    forward = graphed(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x_of(), None), forward.eager(x_of(), None))
    assert forward.stats() == type(forward.stats())()


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own
def test_a_module_that_torch_compile_wrapped_is_captured_from_outside():
    def backend(graph, inputs):
        return graph.forward

    backend.get_compiler_config = lambda: {"triton.cudagraphs": False}
    compiled = torch.compile(Base(), backend=backend)
    forward = graphed(compiled, vouched=True)
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(compiled(x_of(seed), None), Base()(x_of(seed), None))
    assert forward.stats().graphs == 1
    forward.restore()
    with torch.no_grad():
        assert torch.equal(compiled(x_of(), None), Base()(x_of(), None))


# --- the slot ---------------------------------------------------------------------------------------------------------------------------


def hooked(module):
    """As accelerate does: what was in the slot is kept beside, and called by what stands there now."""
    module._old_forward, calls = module.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return module._old_forward(*args, **kwargs)

    module.forward = forward
    return calls


def unhooked(module):
    module.forward = module._old_forward
    del module._old_forward


def test_the_slot_is_given_back_as_it_was():
    module = Net()
    forward = graphed(module)
    assert inspect.signature(module.forward) == inspect.signature(Net().forward)
    check(module, x_of(), graphs=1)
    for _ in range(2):
        forward.restore()
        assert "forward" not in vars(module)
        assert len(forward._graphs) == 0
    with torch.no_grad():
        assert torch.equal(module(x_of()), Net()(x_of()))


def test_hooks_that_came_before_are_called_refused_and_left():
    module = Net()
    calls = hooked(module)
    hook = module.forward
    forward = graphed(module)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="the model has its forward replaced, as hooks that move weights do"),
    ):
        module(x_of())
    assert calls == [1]
    forward.restore()
    assert vars(module)["forward"] is hook
    forward = graphed(module, vouched=True)
    check(module, x_of(), graphs=1)
    calls.clear()
    check(module, x_of(1), graphs=1)
    assert calls == [1]  # of the check's own eager call: a replay calls nothing


def test_hooks_that_came_after_are_stood_aside_for_and_taken_away_in_any_order():
    module = Net()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    calls = hooked(module)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="hooks that replace a forward come before its graphs, got one"),
    ):
        assert torch.equal(module(x_of()), forward.eager(x_of()))
    assert calls == [1]
    unhooked(module)
    check(module, x_of(), graphs=1)  # where it was
    hooked(module)
    forward.restore()
    with torch.no_grad():
        module(x_of())
    unhooked(module)  # brings back what was restored, which does nothing
    before = forward.stats()
    with torch.no_grad():
        assert torch.equal(module(x_of()), Net()(x_of()))
    assert forward.stats() == before
    assert before.graphs == 0
    assert ModelState(module).doubt is None
    again = graphed(module)
    check(module, x_of(), graphs=1)
    again.restore()
    assert "forward" not in vars(module)


def test_the_classes_own_method_in_the_slot_is_nothing_to_refuse():
    """accelerate leaves it there when it takes its hooks away."""
    module = Net()
    module.forward = module.forward
    assert ModelState(module).doubt is None
    graphed(module)
    check(module, x_of(), graphs=1)
    module.forward = types.MethodType(Base.forward, module)
    assert ModelState(module).doubt is not None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_module_computes_the_same_without_graphs(copied):
    module = Net()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    other = copied(module)
    assert type(vars(other)["forward"]) is KeptForward
    assert vars(other)["forward"].module is other
    with torch.no_grad():
        assert torch.equal(other(x_of()), module(x_of()))
        other.conv.weight.data.mul_(2)
        assert not torch.equal(other(x_of()), module(x_of()))
    assert ModelState(other).doubt is None
    assert forward.stats().graphs == 1
