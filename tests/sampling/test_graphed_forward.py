"""A module's calls as replays: eager's bits, a graph a signature, nothing stale, and the slot of its forward given back. Graphs are the
recorded stand-in on the CPU, which freezes pointers and Python's numbers as a CUDA graph does."""

import copy
import gc
import inspect
import pickle
import threading
import types
import warnings
import weakref
from collections import Counter

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from graph_models import REFUSED, SWITCHES, Adapted, Base, Elsewhere, Logged, StepCache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.sampling import capture
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.sampling.forward_slot import KeptForward
from ddim_fast.sampling.graphed_forward import UNUSED_GRAPHS, GraphedForward
from ddim_fast.sampling.model_state import ModelState
from ddim_fast.sampling.static_tensors import fill, static_like

SHAPE = (2, 3, 8, 8)


def cache_of(backend=None, **options):
    return GraphCache(backend=lambda device: Replay() if backend is None else backend, device_types=("cpu",), **options)


def graphed(module, cache=None, **options):
    """The module, with graphs in its slot."""
    forward = GraphedForward(module, cache_of() if cache is None else cache, "net", **options)
    forward.put_in_place()
    return forward


def x_of(seed=0, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a, b):
    """The same types, shapes, layouts and bits, however nested."""
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert type(a) is type(b)
        same(list(a.items()), list(b.items()))
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b


@torch.no_grad()
def check(module, *args, graphs=None, **kwargs):
    """A call has eager's bits, without a warning."""
    forward = vars(module)["forward"]
    expected = forward.eager(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(module(*args, **kwargs), expected)
    assert graphs is None or forward.stats().graphs == graphs
    return expected


COUNTS = Counter()  # where no key looks


class Net(Base):
    """It uses everything that it is given, however nested, and returns what it is told to."""

    def forward(self, x, t=None, more=(), added=None, scale=1.0, flag=False, returns="tensor"):
        COUNTS["calls"] += 1
        y = torch.tanh(self.conv(x)) * scale
        if t is not None:
            y = y + t.view(-1, 1, 1, 1).to(y.dtype) / 1000
        for tensor in more:
            y = y + tensor
        if added is not None:
            y = y * added["embeds"]["text"].mean() + added["ids"][0].to(y.dtype)
        y = -y if flag else y
        return RETURNS[returns](self, x, y)


RETURNS = {
    "tensor": lambda module, x, y: y,
    "tuple": lambda module, x, y: (y,),
    "nested": lambda module, x, y: {"out": [y, (y, y.sum())], "name": "a", "none": None},
    "output": lambda module, x, y: UNet2DOutput(sample=y),
    "view": lambda module, x, y: y[:, 1:],
    "channels last": lambda module, x, y: y.to(memory_format=torch.channels_last),
    "expanded": lambda module, x, y: y[:1].expand(4, -1, -1, -1),
    "argument": lambda module, x, y: x,
    "weight": lambda module, x, y: module.conv.weight,
}


# --- eager's bits, a graph a signature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", RETURNS)
def test_what_is_returned_has_eagers_structure_layout_and_bits_in_memory_of_its_own(returns):
    module = Net()
    forward = graphed(module)
    kept = []
    for seed in range(3):
        expected = check(module, x_of(seed), returns=returns, graphs=1)
        with torch.no_grad():
            kept.append((module(x_of(seed), returns=returns), copy.deepcopy(expected)))
    for got, expected in kept:
        same(got, expected)
    assert (forward.stats().hits, forward.stats().misses) == (5, 1)


def test_a_tensor_that_is_returned_twice_is_one():
    module = Net()
    graphed(module)
    with torch.no_grad():
        (first, (second, _)) = module(x_of(), returns="nested")["out"]
    assert first is second


CALLS = {
    "shape": ((x_of(),), {}),
    "batch": ((x_of(0, (3, 3, 8, 8)),), {}),
    "dtype of another": ((x_of(), torch.tensor([1, 2])), {}),
    "dtype": ((x_of(), torch.tensor([1.0, 2.0])), {}),
    "by keyword": ((), {"x": x_of(), "t": torch.tensor([1.0, 2.0])}),
    "layout": ((x_of().to(memory_format=torch.channels_last),), {}),
    "a view": ((x_of(0, (2, 6, 8, 8))[:, ::2],), {}),
    "expanded": ((x_of(0, (1, 3, 8, 8)).expand(SHAPE),), {}),
    "a tuple": ((x_of(),), {"more": (x_of(1), x_of(2))}),
    "a longer tuple": ((x_of(),), {"more": (x_of(1), x_of(2), x_of(3))}),
    "a list": ((x_of(),), {"more": [x_of(1), x_of(2)]}),
    "a dictionary": ((x_of(),), {"added": {"embeds": {"text": x_of(3)}, "ids": [torch.tensor(3)]}}),
    "an int": ((x_of(),), {"scale": 1}),
    "a float": ((x_of(),), {"scale": 1.0}),
    "another number": ((x_of(),), {"scale": 2.0}),
    "true": ((x_of(),), {"flag": True}),
    "false": ((x_of(),), {"flag": False}),
    "one": ((x_of(),), {"flag": 1}),
    "text": ((x_of(),), {"returns": "tuple"}),
    "nothing": ((torch.empty(0, 3, 8, 8),), {}),
}


def test_each_signature_has_one_graph_and_every_value_is_followed():
    module = Net()
    graphed(module, cache_of(maxsize=len(CALLS)))
    for _ in range(2):
        for args, kwargs in CALLS.values():
            check(module, *args, **kwargs)
    assert module.forward.stats().graphs == len(CALLS)
    assert module.forward.stats().misses == len(CALLS)
    for args, kwargs in CALLS.values():  # new values
        args = [arg * 2 for arg in args]
        kwargs = {name: value * 2 if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        check(module, *args, **kwargs)
    assert module.forward.stats().misses == len(CALLS)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129]), min_size=1, max_size=3),
    st.permutations([0, 1, 2]),
    st.sampled_from([slice(None), slice(None, None, 2), slice(1, None)]),
    st.booleans(),
)
def test_a_static_tensor_has_the_layout_and_the_values(sizes, order, part, expands):
    tensor = torch.arange(max(1, torch.Size(sizes).numel()), dtype=torch.float32)[: torch.Size(sizes).numel()].view(
        sizes
    )
    tensor = tensor.permute([i for i in order if i < len(sizes)])[part]
    if expands:
        tensor = tensor[None].expand(3, *tensor.shape)
    static = static_like(tensor)
    fill(static, tensor)
    same(static, tensor)
    assert static.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_where_elements_share_memory_otherwise_a_static_tensor_is_dense():
    tensor = torch.arange(5.0).as_strided((3, 3), (1, 1))
    static = static_like(tensor)
    fill(static, tensor)
    assert torch.equal(static, tensor)
    assert static.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    module = Net().to(dtype)
    graphed(module)
    for seed in range(2):
        check(module, x_of(seed, dtype=dtype), graphs=1)


def test_extreme_values_are_followed():
    module = Net()
    graphed(module)
    for value in (0.0, -0.0, 1e38, -1e38, 1e-40):
        check(module, torch.full(SHAPE, value), graphs=1)
    for value in (float("inf"), float("nan")):
        with torch.no_grad():
            assert (
                module(torch.full(SHAPE, value)).isnan().any()
                == module.forward.eager(torch.full(SHAPE, value)).isnan().any()
            )


# --- nothing is stale ---------------------------------------------------------------------------------------------------------------


CHANGES = {
    "a value in place": (lambda m: m.conv.weight.data.mul_(2), 1),
    "weights elsewhere": (lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.detach() * 2)), 2),
    "a dtype": (lambda m: m.double(), 2, torch.float64),
    "an attribute": (lambda m: setattr(m, "gain_of", 2.0), 2),
    "a hook": (lambda m: m.conv.register_forward_hook(lambda module, args, output: 2 * output), 2),
    "the mode": (lambda m: m.train(not m.training), 2),
    "a class": (lambda m: setattr(type(m), "of_class", 3.0), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_module_is_seen_between_calls(name):
    class Changed(Net):
        of_class, gain_of = 1.0, 1.0

        def forward(self, x, **more):
            return super().forward(x, **more) * self.gain_of * self.of_class

    module = Changed()
    forward = graphed(module)
    check(module, x_of(), graphs=1)
    change, graphs, *dtype = CHANGES[name]
    change(module)
    options = {"dtype": dtype[0]} if dtype else {}
    for seed in range(2):
        check(module, x_of(seed, **options), graphs=graphs)
    forward.clear()
    assert forward.stats().graphs == 0
    check(module, x_of(**options), graphs=1)


@pytest.mark.parametrize("name", SWITCHES)
def test_outputs_are_those_of_the_adapter_that_is_on(name):
    module = Net()
    module.conv = Adapted(module.conv)
    graphed(module)
    before = check(module, x_of(), graphs=1)
    SWITCHES[name](module.conv)
    for _ in range(2):
        assert not torch.equal(check(module, x_of(), graphs=2), before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another autocast": lambda: torch.autocast("cpu", torch.float16),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_around_a_call_have_graphs_of_their_own(name):
    """Autocast frees its copies of weights when it ends: a graph has its own."""
    module = Net()
    graphed(module)
    for _ in range(3):
        check(module, x_of(), graphs=None)
        with SETTINGS[name]():
            check(module, x_of())
            check(module, x_of(1))
    assert module.forward.stats().graphs == 2
    assert module.forward.stats().misses == 2
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_a_captured_loop_survives_the_end_of_autocast_too(mode):
    s, model = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache_of()), Base()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            expected = s.sample(model, SHAPE, seed=0, capture="off")
            assert torch.equal(s.sample(model, SHAPE, seed=0, capture=mode), expected)
    assert s.graphs.stats().misses == 1


def test_inside_and_outside_of_inference_mode():
    module = Net()
    graphed(module)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            got = module(x_of()) if inside else check(module, x_of())
        assert got.is_inference() == inside
        check(module, x_of(), graphs=1)


def test_nothing_global_changes():
    module = Net()
    graphed(module)
    torch.manual_seed(5)
    before = (
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_cache_enabled(),
    )
    with torch.no_grad():
        module(x_of())
        module(x_of())
    after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_cache_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- gradients --------------------------------------------------------------------------------------------------------------------------


def test_where_gradients_are_taken_a_call_is_eager_and_without_any_it_is_a_replay():
    module = Net()
    forward = graphed(module)
    with pytest.warns(
        UserWarning, match=r"net without CUDA graphs, for x \(2, 3, 8, 8\) float32: a replay records no gradients"
    ):
        output = module(x_of())
    output.sum().backward()
    assert module.conv.weight.grad.abs().sum() > 0
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="a replay records no gradients"):
        assert module(x_of().requires_grad_(), scale=2.0).requires_grad
    got = module(x_of())  # gradients are on, and nobody asks for any
    assert not got.requires_grad
    with torch.no_grad():
        assert not module(x_of().requires_grad_()).requires_grad
    assert forward.stats().graphs == 1
    assert torch.equal(got, forward.eager(x_of()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of itself
def test_forward_mode_derivatives_are_left_to_eager():
    module = Net().requires_grad_(False)
    graphed(module)
    with pytest.warns(UserWarning, match="forward-mode derivatives"):
        _, derivative = torch.func.jvp(module, (x_of(),), (torch.ones(SHAPE),))
    assert derivative.abs().sum() > 0


# --- what is refused ------------------------------------------------------------------------------------------------------------------

REPLACES = ("a replaced forward",)  # tested below


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in REPLACES])
def test_what_capture_auto_refuses_is_refused_once_with_the_signature_and_the_reason(name, monkeypatch):
    make, reason = REFUSED[name]
    module = make()
    forward = graphed(module)
    x, t = x_of(), torch.tensor([1, 2])
    if "compile" in reason:
        reason = "compiled in place"
    with torch.no_grad():
        expected = forward.eager(x, t)
        with pytest.warns(
            UserWarning, match=rf"net without CUDA graphs, for x \(2, 3, 8, 8\) float32, t .*: .*{reason}"
        ) as caught:
            assert torch.equal(module(x, t), expected)
        assert [warning.filename.endswith(("test_graphed_forward.py", "graph_models.py")) for warning in caught] == [
            True
        ]
        made = []
        monkeypatch.setattr(capture, "ModelState", lambda *args: made.append(args))
        for _ in range(3):
            assert torch.equal(check(module, x, t, graphs=0), expected)
        assert made == []  # the module was not looked through again
    assert list(forward.stats().fallbacks.values()) == [4]
    forward.clear()
    assert forward.stats().fallbacks == {}
    monkeypatch.undo()
    forward.restore()
    strict = graphed(module, strict=True)
    with torch.no_grad(), pytest.raises(CaptureError, match=reason):
        module(x, t)
    assert len(strict.stats().fallbacks) == 1


FOLLOWED = [
    name
    for name, (_, reason) in REFUSED.items()
    if name not in (*REPLACES, "a wrapper of tensors") and "compile" not in reason
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_the_caller_vouches_for_is_captured(name):
    module = REFUSED[name][0]()
    graphed(module, vouched=True)
    for seed in range(2):
        check(module, x_of(seed), torch.tensor([1, 2]), graphs=1)


def test_what_is_vouched_for_again_is_captured():
    module = Base()
    graphed(module)
    module.peft_config = {}
    with pytest.warns(UserWarning, match="adapters of peft"), torch.no_grad():
        module(x_of(), None)
    check(module, x_of(), None, graphs=0)
    del module.peft_config
    check(module, x_of(), None, graphs=1)


@pytest.mark.parametrize("make", [lambda: StepCache(2), Elsewhere])
def test_a_module_whose_calls_differ_is_not_tried_again(make):
    module = make()
    forward = graphed(module)
    with (
        pytest.warns(UserWarning, match="replays one call of the model for all, so each must do the same"),
        torch.no_grad(),
    ):
        module(x_of(), None)
    captures = []
    forward._graphs.backend_of(torch.device("cpu")).warm_up = captures.append
    with torch.no_grad():
        module(x_of(), None)
    assert captures == []
    assert list(forward.stats().fallbacks.values()) == [2]


class Dropped(Base):
    def __init__(self, where):
        super().__init__()
        self.dropout = nn.Dropout(0.5) if where == "module" else None

    def forward(self, x):
        y = self.conv(x)
        return nn.functional.dropout(y, 0.5, self.training) if self.dropout is None else self.dropout(y)


@pytest.mark.parametrize("where", ["module", "function"])
def test_random_numbers_are_drawn_by_eager_calls_only(where):
    module = Dropped(where)
    graphed(module)
    torch.manual_seed(0)
    with (
        pytest.warns(UserWarning, match=r"dropout is a dropout in training mode|the model draws random numbers"),
        torch.no_grad(),
    ):
        got = module(x_of())
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(got, module.forward.eager(x_of()))
    module.eval()
    check(module, x_of(), graphs=1)


def test_a_module_that_writes_to_its_buffers_is_refused():
    module = nn.Sequential(nn.BatchNorm2d(3))
    graphed(module)
    with (
        pytest.warns(UserWarning, match=r"0.running_mean is written to in each call|0.num_batches_tracked is"),
        torch.no_grad(),
    ):
        module(x_of())
    module.eval()
    check(module, x_of(), graphs=1)


class Writes(Base):
    def forward(self, x, kept=None, named=None):
        if kept is not None:
            kept.append(x) if isinstance(kept, list) else kept.add_(1)
        if named is not None:
            named.pop("scale")
        return self.conv(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {"kept": [torch.ones(2)]}, "changes a list or dictionary among x, kept"),
        (lambda: {"kept": torch.ones(2)}, "writes to kept"),
        (lambda: {"named": {"scale": 1.0}}, "changes a list or dictionary among x, named"),
    ],
)
def test_arguments_that_a_call_changes_are_changed_once_by_an_eager_call(make, reason):
    module = Writes()
    graphed(module)
    expected, got = make(), make()
    with torch.no_grad():
        module.forward.eager(x_of(), **expected)
        with pytest.warns(UserWarning, match=f"leaves its arguments as they are, got one that {reason}"):
            module(x_of(), **got)
    same(got, expected)


class Odd(Base):
    def forward(self, x, what=None, how="item"):
        if how == "item":
            return x * x.abs().max().item()
        return {"object": types.SimpleNamespace(sample=x), "raises": None}[how] if how == "object" else x[100]


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((x_of(),), {}, r"_local_scalar_dense.*at .*test_graphed_forward.py:\d+, in forward: `return x \* x.abs"),
        ((x_of(),), {"how": "object"}, "returns tensors and plain values, .* got a SimpleNamespace"),
        ((x_of(),), {"what": {1, 2}}, "what of a captured graph must be tensors and plain values .* got a set"),
        ((x_of(), [1, object()]), {}, r"what\[1\] of a captured graph must be .* got a object"),
        ((x_of().as_subclass(Subclass),), {}, "must be plain, dense tensors, got x of type Subclass"),
        ((x_of(), x_of().to_sparse()), {}, "must be plain, dense tensors, got what of type Tensor, torch.sparse_coo"),
    ],
)
def test_a_call_that_cannot_be_a_graph_is_eager_and_the_reason_names_its_place(args, kwargs, reason):
    module = Odd()
    forward = graphed(module)
    expected = forward.eager(*args, **kwargs)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"(?s){reason}") as caught:
        got = [module(*args, **kwargs) for _ in range(2)]
    assert len(caught) == 1
    assert str(got[1]) == str(got[0]) == str(expected)
    assert forward.stats().graphs == 0
    assert list(forward.stats().fallbacks.values()) == [2]


def test_the_modules_own_error_is_the_callers():
    module = Odd()
    graphed(module)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="IndexError|index 100"),
        pytest.raises(IndexError, match="index 100"),
    ):
        module(x_of(), how="raises")


def test_without_a_device_that_has_graphs_calls_are_eager_or_an_error():
    module = Net()
    forward = graphed(module, GraphCache())
    with torch.no_grad(), pytest.warns(UserWarning, match=r"net .*: graphs are made on cuda, got arguments on cpu"):
        assert torch.equal(module(x_of()), forward.eager(x_of()))
    forward.restore()
    graphed(module, GraphCache(), strict=True)
    with torch.no_grad(), pytest.raises(CaptureError, match="graphs are made on cuda, got arguments on cpu"):
        module(x_of())


class Scaled(nn.Module):
    def forward(self, x, scale):
        return x * scale


def test_a_number_on_the_host_beside_tensors_on_the_device_is_refused():
    """A kernel would read it at capture, and never again."""
    reason = "scale of a captured graph must be on the device of the samples, cuda"
    with fake_cuda() as device:
        cache = GraphCache(backend=lambda where: FakeGraphs(device))
        module = Scaled()
        graphed(module, cache)
        with torch.no_grad(), pytest.warns(UserWarning, match=reason):
            module(torch.empty(SHAPE, device="cuda"), torch.ones((), device="cpu"))
        s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache)
        call = dict(shape=SHAPE, seed=0, device="cuda", conditioning={"scale": torch.ones((), device="cpu")})
        with pytest.raises(TypeError, match="conditioning of a captured graph must be on the device of the samples"):
            s.sample(lambda x, t, scale: x * scale, capture="step", **call)


# --- numbers of Python ------------------------------------------------------------------------------------------------------------------


def test_a_number_that_differs_in_each_call_is_given_up_and_named_once():
    module = Net()
    forward = graphed(module)
    with torch.no_grad():
        for n in range(UNUSED_GRAPHS):
            check(module, x_of(), scale=1.0 + n)
        COUNTS.clear()
        with pytest.warns(
            UserWarning, match=r"a number is a constant of its graph.*got scale = 1.0, 2.0, 3.0, 4.0, 9.0, and no graph"
        ):
            module(x_of(), scale=9.0)
        for n in range(20):
            check(module, x_of(), scale=10.0 + n)
    assert COUNTS["calls"] == 1 + 2 * 20  # eager calls: of the module, and of the check
    assert forward.stats().misses == UNUSED_GRAPHS
    check(module, x_of(), scale=1.0)  # what is there is used
    check(module, x_of(0, (1, 3, 8, 8)), scale=1.0)  # and other calls go on
    assert forward.stats().misses == UNUSED_GRAPHS + 1


def test_numbers_whose_graphs_are_used_again_are_not_given_up():
    module = Net()
    forward = graphed(module, cache_of(maxsize=2))
    for n in range(3 * UNUSED_GRAPHS):
        for _ in range(2):
            check(module, x_of(), scale=1.0 + n)
    assert forward.stats().misses == 3 * UNUSED_GRAPHS
    assert forward.stats().graphs == 2


def test_a_number_that_cannot_be_captured_is_not_tried_for_ever():
    class Told(Base):
        def forward(self, x, t):
            COUNTS["calls"] += 1
            return self.conv(x) * torch.tensor([t], dtype=torch.float64)

    module = Told()
    graphed(module)
    COUNTS.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(20):
            module(x_of(), float(n))
    assert COUNTS["calls"] <= 20 + 4 * UNUSED_GRAPHS
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x_of(), 77.0)


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
    with torch.no_grad():
        assert torch.equal(module(x_of()), Net()(x_of()))
    assert forward.stats().graphs == 0
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
