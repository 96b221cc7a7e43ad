"""Calls of a module with graphs that run without one: what is refused, why, and as if nobody had tried."""

import types
import warnings

import pytest
import torch
from graph_models import REFUSED, Base, Elsewhere, StepCache
from graphed import COUNTS, SHAPE, Net, cache_of, check, graphed, same, x_of
from torch import nn

import ddim_fast as df
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.sampling import capture, contents
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.sampling.graphed_forward import UNUSED_GRAPHS

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
        assert [warning.filename.endswith(("test_graphed_refusals.py", "graph_models.py")) for warning in caught] == [
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
    def forward(self, x, kept=None, named=None, uncounted=None, others=None):
        if kept is not None:
            kept.append(x) if isinstance(kept, list) else kept.add_(1)
        if others is not None:
            others[0] = others[0] * 2
        if uncounted is not None:
            uncounted.data.add_(1)
        if named is not None:
            named.pop("scale")
        return self.conv(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {"kept": [torch.ones(2)]}, "changes a list or dictionary among x, kept"),
        (lambda: {"kept": torch.ones(2)}, "writes to kept"),
        (lambda: {"uncounted": torch.ones(2)}, "writes to uncounted"),
        (lambda: {"others": [torch.ones(2)]}, "changes a list or dictionary among x, others"),
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


class Subclass(torch.Tensor):
    pass


def test_writes_to_large_arguments_are_counted(monkeypatch):
    monkeypatch.setattr(contents, "MOST_BYTES", 0)
    module, kept = Writes(), torch.ones(2)
    graphed(module)
    with torch.no_grad(), pytest.warns(UserWarning, match="writes to kept"):
        module(x_of(), kept=kept)
    assert kept.tolist() == [2, 2]


class Odd(Base):
    def forward(self, x, what=None, how="item"):
        if how == "item":
            return x * x.abs().max().item()
        return {"object": types.SimpleNamespace(sample=x), "raises": None}[how] if how == "object" else x[100]


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((x_of(),), {}, r"_local_scalar_dense.*at .*test_graphed_refusals.py:\d+, in forward: `return x \* x.abs"),
        ((x_of(),), {"how": "object"}, "returns plain, dense tensors and plain values, .* got a SimpleNamespace"),
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
        with torch.no_grad(), pytest.warns(UserWarning, match=reason):
            module(scale=torch.ones((), device="cpu"), x=torch.empty(SHAPE, device="cuda"))
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
    assert forward.stats().hits == 1
    check(module, x_of(0, (1, 3, 8, 8)), scale=1.0)  # and other calls go on
    assert forward.stats().misses == UNUSED_GRAPHS + 1
    for n in range(UNUSED_GRAPHS):  # one was of use, so others are tried; it goes on when these are given up
        check(module, x_of(), scale=50.0 + n)
    check(module, x_of(), scale=1.0)
    assert (forward.stats().misses, forward.stats().hits) == (2 * UNUSED_GRAPHS + 1, 2)


def test_numbers_whose_graphs_are_used_again_are_not_given_up():
    module = Net()
    forward = graphed(module, cache_of(maxsize=2))
    for n in range(3 * UNUSED_GRAPHS):
        for _ in range(2):
            check(module, x_of(), scale=1.0 + n)
    assert forward.stats().misses == 3 * UNUSED_GRAPHS
    assert forward.stats().graphs == 2


class Told(Base):
    """A module that cannot be captured: it makes a tensor of the number that it is told."""

    def forward(self, x, t):
        COUNTS["calls"] += 1
        return self.conv(x) * torch.tensor([t], dtype=torch.float64)


def test_a_number_that_cannot_be_captured_is_not_tried_for_ever():
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


def test_a_number_that_cannot_be_captured_is_no_more_worth_a_try_for_being_given_twice():
    module = Told()
    graphed(module)
    COUNTS.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(20):
            module(x_of(), float(n))
            module(x_of(), float(n))
    assert COUNTS["calls"] == 2 * 20 + 4 * UNUSED_GRAPHS
