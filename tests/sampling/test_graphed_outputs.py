"""What a replay returns, and what it would not: gradients, subclasses, tensors on the host, outputs that differ from call to call."""

import contextlib

import pytest
import torch
from graph_models import Base
from graphed import SHAPE, Net, check, graphed, same, x_of
from torch import nn

from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.sampling.capture import GraphCache


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
    assert forward.stats().graphs == 2  # with gradients enabled, and without
    assert torch.equal(got, forward.eager(x_of()))


class ByMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 3, 1)]  # of which ``parameters()`` knows nothing

    def forward(self, x, how="branches"):
        if how == "branches":
            return x * 2 if torch.is_grad_enabled() else x * 3
        with torch.enable_grad() if how == "enables" else contextlib.nullcontext():
            return self.layers[0](x)


def test_a_module_sees_whether_gradients_are_enabled():
    module = ByMode()
    graphed(module)
    for seed in range(2):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                same(module(x_of(seed)), x_of(seed) * (2 if enabled else 3))
        with torch.inference_mode():
            assert torch.equal(module(x_of(seed)), x_of(seed) * 3)
    assert (module.forward.stats().graphs, module.forward.stats().hits) == (2, 4)


@pytest.mark.parametrize(("how", "enabled"), [("plain", True), ("enables", False)])
def test_gradients_of_what_no_parameter_shows_are_not_lost(how, enabled):
    module = ByMode()
    graphed(module)
    with (
        torch.set_grad_enabled(enabled),
        pytest.warns(UserWarning, match="records no gradients, got a call whose output requires some"),
    ):
        output = module(x_of(), how=how)
    output.sum().backward()
    assert module.layers[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        check(module, x_of(), how="plain", graphs=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, of itself
def test_forward_mode_derivatives_are_left_to_eager():
    module = Net().requires_grad_(False)
    graphed(module)
    with pytest.warns(UserWarning, match="forward-mode derivatives"):
        _, derivative = torch.func.jvp(module, (x_of(),), (torch.ones(SHAPE),))
    assert derivative.abs().sum() > 0


class Subclass(torch.Tensor):
    pass


NUMBERS = {"calls": 0}


class Returns(Base):
    """What it returns differs from call to call, or is nothing that a replay fills."""

    def forward(self, x, what):
        NUMBERS["calls"] += 1
        y = self.conv(x)
        return {
            "a number": lambda: (y, NUMBERS["calls"]),
            "a structure": lambda: (y, [y]) if NUMBERS["calls"] % 2 else (y, (y,)),
            "a layout": lambda: y.mT if NUMBERS["calls"] % 2 else y,
            "one tensor": lambda: (y, y) if NUMBERS["calls"] % 2 else (y, y[:]),
            "a subclass": lambda: y.as_subclass(Subclass),
            "a sparse tensor": lambda: y.to_sparse(),
        }[what]()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        *(
            (what, "got .* in (one call and|the next call)")
            for what in ("a number", "a structure", "a layout", "one tensor")
        ),
        ("a subclass", "returns plain, dense tensors and plain values, .* got a Subclass"),
        ("a sparse tensor", "returns plain, dense tensors and plain values, .* got a Tensor"),
    ],
)
def test_outputs_that_a_replay_would_not_return_are_refused(what, reason):
    module = Returns()
    forward = graphed(module)
    NUMBERS["calls"] = 0
    with torch.no_grad(), pytest.warns(UserWarning, match=reason):
        got = module(x_of(), what)
    NUMBERS["calls"] -= 1
    with torch.no_grad():
        expected = forward.eager(x_of(), what)
    assert type(got) is type(expected)
    assert str(got) == str(expected)
    assert forward.stats().graphs == 0


class OnTheHost(nn.Module):
    def forward(self, x):
        return x * 2, torch.zeros(2, device="cpu")


def test_a_tensor_on_the_host_is_not_returned_by_a_replay():
    with fake_cuda() as device:
        module = OnTheHost()
        forward = graphed(module, GraphCache(backend=lambda where: FakeGraphs(device)))
        with torch.no_grad(), pytest.warns(UserWarning, match="on the device of its arguments, cuda.*, got one on cpu"):
            module(torch.empty(SHAPE, device="cuda"))
        assert forward.stats().graphs == 0
