"""The stand-in for CUDA graphs gives the bits of eager code where the code is honest, and shows what is not; the real one is in order."""

import gc
import itertools
import threading
import time

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import nn
from triton.runtime.interpreter import InterpretedFunction

import ddim_fast
from ddim_fast.gpu_lab.fake_cuda import NotCapturable
from ddim_fast.gpu_lab.replay import RecordedGraph, RecordedGraphs, ReplayError
from ddim_fast.kernels.contract import StepTable
from ddim_fast.kernels.dispatch import ddim_step, ddim_step_from_table
from ddim_fast.models.unet import SmallUNet
from ddim_fast.sampling.cuda_graphs import CaptureError, CudaGraphs

STEPS = 4


@pytest.fixture(autouse=True)
def _seeded():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


class Convnet(nn.Module):
    """A few operators of every sort: an allocation, views, in-place, several outputs, a number assigned, random numbers if asked."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.last, self.dropout = nn.Conv2d(8, 2, 3, padding=1), dropout

    def forward(self, x, t):
        h = self.norm(self.first(x)) + torch.sin(t.float())[:, None, None, None]
        h[:, 0, 0, 0] = 2.0
        h = torch.empty_like(h).copy_(h.relu_())
        values, _ = h.flatten(2).topk(3)
        return self.last(nn.functional.dropout(h + values.mean(2)[:, :, None, None], self.dropout, self.dropout > 0))


class Loop:
    """A sampling loop with its step's number on the device, or taken from Python."""

    def __init__(self, index_from="device", dropout=0.0):
        self.model = Convnet(dropout).requires_grad_(False)
        self.start = torch.randn(3, 2, 5, 5)
        self.x = self.start.clone()
        self.timesteps = torch.tensor([900, 600, 300, 0])[:, None].repeat(1, 3)
        self.scales = torch.rand(STEPS, 2)
        self.index, self.step_number = torch.zeros(1, dtype=torch.long), 0
        self.index_from = index_from

    def restart(self):
        self.x.copy_(self.start)
        self.index.zero_()
        self.step_number = 0

    def step(self):
        if self.index_from == "device":
            t, scale = self.timesteps.index_select(0, self.index)[0], self.scales.index_select(0, self.index)[0]
        else:
            t, scale = self.timesteps[self.step_number], self.scales[self.step_number]
        self.x.mul_(scale[0]).add_(self.model(self.x, t) * scale[1])
        self.index.add_(1)
        self.step_number += 1
        return self.x

    def eager(self):
        self.restart()
        return [self.step().clone() for _ in range(STEPS)]

    def replayed(self, graphs=None):
        self.restart()
        graph = (graphs or RecordedGraphs()).capture(self.step)
        states = []
        for _ in range(STEPS):
            graph.replay()
            states.append(self.x.clone())
        return states


def same(first, second):
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


# --- Honest and dishonest loops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
def test_a_loop_whose_index_is_on_the_device_replays_bit_for_bit(inference):
    with torch.inference_mode(inference):
        loop = Loop()
        assert all(same(loop.eager(), loop.replayed()))
        assert loop.index.item() == STEPS


@pytest.mark.parametrize("inference", [False, True])
def test_an_index_from_python_is_frozen_at_the_first_step(inference):
    with torch.inference_mode(inference):
        loop = Loop(index_from="python")
        assert same(loop.eager(), loop.replayed()) == [True, False, False, False]
        assert loop.step_number == 1


def test_a_branch_and_a_number_from_python_are_frozen():
    x, state = torch.zeros(3), {"scale": 2.0, "negative": False}

    def step():
        x.add_(-state["scale"] if state["negative"] else state["scale"])

    graph = RecordedGraphs().capture(step)
    state.update(scale=3.0, negative=True)
    graph.replay()
    assert torch.equal(x, torch.full((3,), 2.0))


def test_buffers_that_change_places_in_python_do_not_in_replays():
    buffers = [torch.zeros(2), torch.ones(2)]

    def step():
        torch.add(buffers[0], 1, out=buffers[1])
        buffers.reverse()

    first, second = buffers
    graph = RecordedGraphs().capture(step)
    graph.replay()
    graph.replay()
    assert (first.tolist(), second.tolist()) == ([0, 0], [1, 1])


def test_the_shipped_architecture_replays_bit_for_bit_from_inside_and_outside_inference_mode():
    model = SmallUNet(width=16).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / 20)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([5, 5])
    for inference in (False, True):
        with torch.inference_mode(inference):
            want = model(x, t)
            graph = RecordedGraphs().capture(lambda: model(x, t))
        graph.replay()
        assert torch.equal(graph.output, want)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_our_step_by_a_table_replays_to_what_planned_steps_give(eta):
    plan = ddim_fast.DDIMSampler(ddim_fast.NoiseSchedule.linear(), STEPS, eta=eta).plan()
    table = StepTable.of([step.coefficients for step in plan.steps], torch.device("cpu"), None)
    seeds, index, start = torch.tensor([3, 4, 5]), torch.zeros(1, dtype=torch.long), torch.randn(3, 2, 5, 5)
    model, x, want = nn.Conv2d(2, 2, 3, padding=1), start.clone(), start.clone()

    def step():
        ddim_step_from_table(x, model(x), table, index, seeds=seeds, out=x)
        index.add_(1)

    with torch.inference_mode():
        graph = RecordedGraphs().capture(step)
        for planned in plan.steps:
            ddim_step(want, model(want), planned.coefficients, seeds=seeds, noise_step=planned.index, out=want)
            graph.replay()
            assert torch.equal(x, want)


def test_random_numbers_are_new_in_each_replay_and_those_of_eager_code():
    loop = Loop(dropout=0.5)
    torch.manual_seed(1)
    want = loop.eager()
    torch.manual_seed(1)
    assert all(same(want, loop.replayed()))


# --- What a capture does and does not do ------------------------------------------------------------------------------


def test_a_capture_changes_no_tensor_and_no_generator():
    loop = Loop(dropout=0.5)
    before, generator = loop.x.clone(), torch.get_rng_state()
    RecordedGraphs().capture(loop.step)
    assert torch.equal(loop.x, before)
    assert loop.index.item() == 0
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_a_capture_made_holds_nothing_until_the_first_replay():
    x = torch.ones(3)
    graph = RecordedGraphs().capture(lambda: x + 1)
    assert graph.output.isnan().all()
    graph.replay()
    assert graph.output.tolist() == [2, 2, 2]
    x.fill_(5)
    address = graph.output.data_ptr()
    graph.replay()
    assert graph.output.tolist() == [6, 6, 6]
    assert graph.output.data_ptr() == address


def test_the_memory_of_a_graph_stays_alive_with_it_though_nobody_else_holds_it():
    x, out = torch.ones(1000), torch.empty(1000)
    graph = RecordedGraphs().capture(lambda: torch.add(x * 2, x * 3, out=out))  # the products are nobody's
    gc.collect()
    clutter = [torch.full((1000,), -1.0) for _ in range(50)]
    graph.replay()
    assert out.eq(5).all()
    del clutter


def test_a_callers_tensor_that_is_freed_is_missed_in_a_replay():
    x, held = torch.ones(3), [torch.ones(3)]
    graph = RecordedGraphs().capture(lambda: x.add_(held[0]))
    graph.replay()
    held.clear()
    with pytest.raises(ReplayError, match=r"12 bytes that were freed or moved.*change it in place"):
        graph.replay()


def test_a_callers_tensor_that_grew_is_missed_in_a_replay():
    x = torch.ones(3)
    graph = RecordedGraphs().capture(lambda: x[:3].add_(1))
    x.resize_(1_000_000)
    with pytest.raises(ReplayError):
        graph.replay()


def test_a_parameter_that_is_replaced_is_missed_in_a_replay():
    layer, x = nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2)
    graph = RecordedGraphs().capture(lambda: layer(x))
    layer.weight.copy_(torch.eye(2))
    layer.bias.zero_()
    graph.replay()
    assert graph.output.tolist() == [[1, 1]]
    layer.weight.data = torch.zeros(2, 2)
    with pytest.raises(ReplayError):
        graph.replay()


@pytest.mark.parametrize("inference", [False, True])
def test_the_launches_of_a_graph_are_listed_without_views_and_empty_memory(inference):
    x = torch.zeros(2, 3)
    with torch.inference_mode(inference):
        graph = RecordedGraphs().capture(lambda: torch.empty_like(x).view(-1).copy_(x.t().reshape(-1)).add_(1))
    assert graph.launches == ("aten::clone", "aten::copy_", "aten::add_.Tensor")


def _by_kinds():
    x, i = torch.arange(12.0).view(3, 4), torch.tensor([2, 0])
    yield "views and in-place", lambda: x[1:].t().mul_(2).add_(1)
    yield "an output that shares memory with itself", lambda: (x * 2).expand(2, 3, 4) + 1
    yield "out=", lambda: torch.mul(x, 3, out=torch.empty(3, 4))
    yield "several outputs", lambda: torch.sort(x, descending=True)
    yield "lists of tensors", lambda: torch._foreach_add([x, x * 2], 1.0)
    yield "lists in place", lambda: torch._foreach_add_([x, x[0]], 1.0)
    yield "indexing", lambda: x[i]
    yield "assignment by index", lambda: x.index_put_((i,), torch.ones(2, 4))
    yield "assignment of a number by a mask", lambda: x.__setitem__(x > 3, -1.0) or x
    yield "assignment of a number to a row", lambda: x.__setitem__(1, -1.0) or x
    yield "another layout", lambda: x.t().clone().mul_(2)
    yield "new on the device", lambda: torch.arange(3.0) + torch.full((3,), 2.0) + torch.zeros(3)
    yield "no elements", lambda: x[:0] + 1
    yield "no dimensions", lambda: x.sum()
    yield "half precision", lambda: (x.half() @ x.t().half()).float()
    yield "integers and truth", lambda: (x > 3).long().cumsum(0).bool()
    yield "complex numbers", lambda: torch.fft.rfft(x)
    yield "a split", lambda: [a + b for a, b in zip(*x.split(2, dim=1), strict=True)]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", [name for name, _ in _by_kinds()])
def test_every_kind_of_operator_replays_bit_for_bit(name, inference):
    with torch.inference_mode(inference):
        want = [dict(_by_kinds())[name]()]
        function = dict(_by_kinds())[name]
        graph = RecordedGraphs().capture(function)
        graph.replay()
        torch.testing.assert_close([graph.output], want, rtol=0, atol=0, equal_nan=True)


# --- What a capture refuses -------------------------------------------------------------------------------------------

REFUSED = {
    "item": (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
    "an if": (lambda x: 1 if x.sum() > 0 else 2, "aten::_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist"),
    "numpy": (lambda x: x.numpy(), "Tensor.numpy"),
    "asarray": (np.asarray, "Tensor.__array__"),
    "repr": (repr, "Tensor.__repr__"),
    "cpu": (lambda x: x.cpu(), "Tensor.cpu"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero"),
    "a mask": (lambda x: x[x > 0], "aten::index.Tensor"),
    "equal": (lambda x: torch.equal(x, x), "aten::equal"),
    "allclose": (lambda x: torch.allclose(x, x), "aten::allclose"),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), "aten::lift_fresh"),
    "a host array": (lambda x: x.add_(torch.from_numpy(np.ones(3, np.float32))), "aten::lift_fresh"),
    "a list as index": (lambda x: x[[0, 1]], "aten::lift_fresh"),
    "a generator": (lambda x: x.normal_(generator=torch.Generator()), "aten::normal_"),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_capture_refuses_is_refused_by_name_and_undone(name, inference):
    operation, operator = REFUSED[name]
    x = torch.ones(2, 3)
    with torch.inference_mode(inference), pytest.raises(NotCapturable) as caught:
        RecordedGraphs().capture(lambda: operation(x.add_(1)))
    assert caught.value.operator == operator
    assert caught.value.where.startswith(__file__)
    assert x.eq(1).all()


def test_a_registered_generator_draws_new_numbers_in_each_replay():
    generator, x = torch.Generator().manual_seed(5), torch.empty(3)
    want = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    graph = RecordedGraphs(generators=[generator]).capture(lambda: x.normal_(generator=generator))
    for row in want:
        graph.replay()
        assert torch.equal(x, row)


def test_an_error_in_the_captured_function_is_a_capture_error_and_is_undone():
    x = torch.ones(3)
    with pytest.raises(CaptureError, match="ZeroDivisionError") as caught:
        RecordedGraphs().capture(lambda: x.add_(1) is x and 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert x.eq(1).all()


def test_only_dense_tensors_are_recorded():
    with pytest.raises(CaptureError, match="dense tensors on the CPU"):
        RecordedGraphs().capture(lambda: torch.ones(2, 2).to_sparse())


def test_a_graph_holds_one_recording_until_it_is_reset():
    x, graph = torch.zeros(3), RecordedGraph()
    with pytest.raises(ReplayError, match="nothing captured"):
        graph.replay()
    with graph.recording():
        x.add_(1)
    with pytest.raises(RuntimeError, match="one recording"), graph.recording():
        pass
    graph.replay()
    graph.reset()
    with pytest.raises(ReplayError, match="nothing captured"):
        graph.replay()
    assert x.eq(1).all()
    with pytest.raises(RuntimeError, match="inside recording"):
        graph.record_call(print)


def test_warming_up_runs_for_real():
    x = torch.zeros(1)
    RecordedGraphs().warm_up(lambda: x.add_(1), 3)
    assert x.item() == 3


# --- Launches outside the dispatcher ----------------------------------------------------------------------------------


class Launcher:
    """As in a module that launches kernels: while ``launchers`` holds something, it is called instead."""

    launchers: list = []  # noqa: RUF012 (shared on purpose, as a module's list)

    @staticmethod
    def saxpy(out, x, tables, *, scale):
        np.copyto(out.detach().numpy(), out.numpy() + scale * x.numpy() + tables["shift"].numpy())

    @classmethod
    def launch(cls, *arguments, **options):
        (cls.launchers[-1] if cls.launchers else lambda f, *a, **o: f(*a, **o))(cls.saxpy, *arguments, **options)


def test_a_launch_outside_the_dispatcher_is_recorded_with_frozen_numbers_and_undone():
    out, x, shift, scale = torch.zeros(3), torch.ones(3), torch.zeros(3), [2.0]

    def step():
        Launcher.launch(out, x * 1, {"shift": shift}, scale=scale[0])
        x.add_(1)

    graph = RecordedGraphs([Launcher.launchers]).capture(step)
    assert (out.tolist(), x.tolist(), Launcher.launchers) == ([0, 0, 0], [1, 1, 1], [])
    assert graph.launches == ("aten::mul.Tensor", "ddim_fast::saxpy", "aten::add_.Tensor")
    scale[0] = 100.0
    shift.fill_(0.5)
    graph.replay()
    graph.replay()
    assert out.tolist() == [2.5 + 4.5] * 3


def test_a_recorded_launch_must_write_into_what_it_is_given():
    launchers, x = [], torch.ones(3)
    with pytest.raises(CaptureError, match=r"writes into tensors.*ddim_fast::clone"):
        RecordedGraphs([launchers]).capture(lambda: launchers[-1](torch.clone, x))
    assert launchers == []


def test_a_triton_kernel_is_recorded():
    def advance(x_ptr, by, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(x_ptr + at, tl.load(x_ptr + at) + by)

    kernel, x = InterpretedFunction(advance), torch.zeros(4)
    graph = RecordedGraphs().capture(lambda: kernel[(1,)](x, 2.0, SIZE=4))
    assert x.tolist() == [0] * 4
    assert graph.launches == ("triton::advance",)
    graph.replay()
    graph.replay()
    assert x.tolist() == [4] * 4


# --- The real backend, with torch.cuda watched ------------------------------------------------------------------------


class Watched:
    """torch.cuda as far as ``CudaGraphs`` uses it: it keeps a log, and fails where it is told to.

    As in torch up to 2.11, the generator stays in a capture that did not end. cuBLAS has one workspace a stream, in the ordinary pool
    or in that of the capture in which it was first needed.
    """

    def __init__(self, monkeypatch, end_fails=False, later_captures_fail=False):
        self.log, names = [], itertools.count()
        self.in_capture, self.generator_in_capture = None, False
        self.workspaces, self.freed = {}, []
        self.captures = 0
        self.segments = []  # of the allocator
        watched = self

        class Stream:
            def __init__(self, device=None):
                self.device, self.name = torch.device("cuda", 0), f"stream {next(names)}"

            def wait_stream(self, other):
                watched.log.append(f"{self.name} waits for {other.name}")

        self.default = self.current = Stream()

        class On:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, watched.current = watched.current, self.stream

            def __exit__(self, *error):
                watched.current = self.before

        class Graph:
            def __init__(self):
                self.workspaces = []

            def replay(self):
                watched.log.append(f"replay on {watched.current.name}")
                if any(workspace in watched.freed for workspace in self.workspaces):
                    raise RuntimeError("an illegal memory access was encountered")

            def reset(self):
                watched.log.append("reset")

        class Capture:
            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                watched.log.append(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")
                self.graph, self.on = graph, On(stream)

            def __enter__(self):
                self.on.__enter__()
                watched.captures += 1
                watched.in_capture, watched.generator_in_capture = self.graph, True

            def __exit__(self, *error):
                watched.in_capture = None
                # As torch.cuda.graph: the stream is not given back.
                if end_fails if watched.captures == 1 else later_captures_fail:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                watched.generator_in_capture = False
                self.on.__exit__()

        class Device:
            def __init__(self, device=None, devices=()):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *error):
                pass

        def set_stream(stream):
            watched.current = stream

        def end_pool(device, pool):
            watched.log.append(f"end pool {pool}")
            if not end_fails:
                raise RuntimeError("not recording to this pool")

        for name, value in {
            "Stream": Stream,
            "stream": On,
            "CUDAGraph": Graph,
            "graph": Capture,
            "device": Device,
            "set_stream": set_stream,
            "current_stream": lambda device=None: watched.current,
            "graph_pool_handle": lambda: (0, 7),
            "memory_snapshot": lambda: self.segments,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.random, "fork_rng", Device)
        monkeypatch.setattr(
            torch, "zeros", lambda *size, dtype=None, device=None: self.log.append(f"zeros on {self.current.name}")
        )
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda device, pool: self.log.append(f"release {pool}"), raising=False
        )

    def randn(self):
        if self.generator_in_capture and self.in_capture is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def matmul(self):
        pool = "ordinary" if self.in_capture is None else "the graph's"
        workspace = self.workspaces.setdefault(self.current.name, (pool, object()))
        if self.in_capture is not None:
            self.in_capture.workspaces.append(workspace)

    def clear_workspaces(self):
        """Free those in the ordinary pool. What was first needed in a capture lies in the graph's own."""
        self.freed += [each for each in self.workspaces.values() if each[0] == "ordinary"]
        self.workspaces.clear()


def test_a_warm_up_runs_on_a_side_stream_between_waits(monkeypatch):
    cuda = Watched(monkeypatch)
    CudaGraphs().warm_up(lambda: cuda.log.append(f"call on {cuda.current.name}"), 2)
    assert cuda.log == [
        "stream 1 waits for stream 0",
        "call on stream 1",
        "call on stream 1",
        "stream 0 waits for stream 1",
    ]
    assert cuda.current is cuda.default


def test_the_current_stream_waits_for_a_warm_up_that_failed(monkeypatch):
    cuda = Watched(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        CudaGraphs().warm_up(lambda: 1 / 0)
    assert cuda.log[-1] == "stream 0 waits for stream 1"
    assert cuda.current is cuda.default


def test_a_capture_is_on_the_warm_ups_stream_with_a_pool_of_its_own_and_replays_on_the_current_one(monkeypatch):
    cuda = Watched(monkeypatch)
    graphs = CudaGraphs()
    graphs.warm_up(lambda: None, 1)
    del cuda.log[:]
    graph = graphs.capture(lambda: cuda.log.append(f"call on {cuda.current.name}") or "output")
    assert cuda.log == ["capture on stream 1, pool (0, 7), thread_local", "call on stream 1"]
    assert cuda.current is cuda.default
    assert graph.output == "output"
    graph.replay()
    graph.reset()
    graph.reset()
    assert cuda.log[2:] == ["replay on stream 0", "reset"]
    assert graph.output is None
    with pytest.raises(RuntimeError, match="until it is reset"):
        graph.replay()


def test_graphs_of_one_pool_replay_one_after_the_other_on_whichever_stream(monkeypatch):
    cuda = Watched(monkeypatch)
    graphs, other_stream = CudaGraphs(), torch.cuda.Stream()
    pool = graphs.new_pool()
    first, second = graphs.capture(lambda: None, pool), graphs.capture(lambda: None, pool)
    apart = graphs.capture(lambda: None)
    del cuda.log[:]
    first.replay()
    second.replay()
    with torch.cuda.stream(other_stream):
        apart.replay()
        first.replay()
        first.replay()
    second.replay()
    assert cuda.log == [
        "replay on stream 0",
        "replay on stream 0",
        "replay on stream 1",
        "stream 1 waits for stream 0",
        "replay on stream 1",
        "replay on stream 1",
        "stream 0 waits for stream 1",
        "replay on stream 0",
    ]


def test_replays_of_one_pool_by_two_threads_do_not_come_between_a_wait_and_its_replay(monkeypatch):
    cuda = Watched(monkeypatch)
    graphs, streams = CudaGraphs(), [torch.cuda.Stream() for _ in range(2)]
    pool = graphs.new_pool()
    captured = [graphs.capture(lambda: None, pool) for _ in streams]
    here = threading.local()  # each thread has a current stream
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: here.stream)
    meeting = threading.Barrier(2)

    class Slow:
        def replay(self):
            time.sleep(0.001)
            cuda.log.append(f"replay on {here.stream.name}")

    def use(graph, stream):
        here.stream = stream
        graph._graph = Slow()
        meeting.wait()
        for _ in range(20):
            graph.replay()
            time.sleep(0)

    del cuda.log[:]
    threads = [threading.Thread(target=use, args=each) for each in zip(captured, streams, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = None
    for at, line in enumerate(cuda.log):
        if line.startswith("replay on "):
            name = line.removeprefix("replay on ")
            assert last in (None, name) or cuda.log[at - 1] == f"{name} waits for {last}"
            last = name


def test_the_bytes_of_a_pool_are_its_segments_whoever_made_them(monkeypatch):
    cuda = Watched(monkeypatch)
    graphs = CudaGraphs()
    pool = graphs.new_pool()
    assert pool.nbytes == 0
    for size in (100, 20):  # the second capture found room in what the first took, and needed more
        graphs.capture(
            lambda size=size: cuda.segments.extend(
                [{"segment_pool_id": (0, 7), "total_size": size}, {"segment_pool_id": (0, 0), "total_size": 5000}]
            ),
            pool,
        )
    assert pool.nbytes == 120


@pytest.mark.parametrize("end_fails", [False, True])
def test_a_failed_capture_tells_the_first_error_and_its_line_and_gives_stream_and_pool_back(monkeypatch, end_fails):
    cuda = Watched(monkeypatch, end_fails)

    error = RuntimeError(
        "CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"
    )

    def model():
        raise error  # the culprit

    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing at ") as caught:
        CudaGraphs().capture(lambda: model())
    assert "the culprit" in str(caught.value)
    assert f"{__file__}:" in str(caught.value)
    assert "Compile with" not in str(caught.value)
    assert "not permitted" in str(caught.value.__cause__)
    assert cuda.current is cuda.default
    given_back = ["reset", "end pool (0, 7)"] + ["release (0, 7)"] * end_fails
    assert cuda.log[1:] == [*given_back, "capture on stream 1, pool None, thread_local", "zeros on stream 1", "reset"]


def test_a_capture_that_only_fails_at_its_end_is_a_capture_error(monkeypatch):
    cuda = Watched(monkeypatch, end_fails=True)
    with pytest.raises(CaptureError, match="previous error during capture"):
        CudaGraphs().capture(lambda: None)
    assert cuda.current is cuda.default


def test_an_interrupt_in_a_capture_stays_an_interrupt(monkeypatch):
    cuda = Watched(monkeypatch, end_fails=True)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaGraphs().capture(interrupted)
    assert cuda.current is cuda.default


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_random_numbers_can_be_drawn_right_after_a_failed_capture(monkeypatch, error):
    cuda = Watched(monkeypatch, end_fails=True)

    def model():
        raise error("mine")

    with pytest.raises((CaptureError, KeyboardInterrupt)) as caught:
        CudaGraphs().capture(model)
    cuda.randn()
    assert "random numbers" not in str(caught.value)


def test_what_a_failed_capture_leaves_behind_is_said(monkeypatch):
    cuda = Watched(monkeypatch, end_fails=True, later_captures_fail=True)
    monkeypatch.delattr(torch._C, "_cuda_releasePool")
    with pytest.raises(
        CaptureError, match=r"this torch cannot free the capture's memory; the device's random numbers may fail"
    ):
        CudaGraphs().capture(lambda: None)
    with pytest.raises(RuntimeError, match="Offset increment"):
        cuda.randn()
    assert cuda.current is cuda.default


def test_a_graph_has_its_own_workspaces_which_nobody_frees_and_nobody_else_uses(monkeypatch):
    cuda = Watched(monkeypatch)
    graphs = CudaGraphs()
    graphs.warm_up(cuda.matmul)
    graph = graphs.capture(cuda.matmul)
    graphs.warm_up(cuda.matmul)  # on the same stream
    assert [pool for pool, _ in cuda.workspaces.values()] == ["ordinary"]
    torch._C._cuda_clearCublasWorkspaces()  # as a compilation with mode="reduce-overhead" does
    graph.replay()
    with pytest.raises(CaptureError):
        graphs.capture(lambda: (cuda.matmul(), 1 / 0))
    graphs.warm_up(cuda.matmul)
    assert [pool for pool, _ in cuda.workspaces.values()] == ["ordinary"]
