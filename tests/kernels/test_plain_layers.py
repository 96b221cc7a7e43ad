"""Layers on plain tensors, one call of C++: the bits and the layout of the operators, and what is left to these."""

import pytest
import torch
from layouts import PICTURE_LAYOUTS
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_fast.kernels import convolution, cpu_step, normalization
from ddim_fast.kernels.convolution import convolve, transformed_weights
from ddim_fast.kernels.normalization import group_norm

pytestmark = [
    pytest.mark.usefixtures("nan_memory"),
    pytest.mark.skipif(cpu_step.extension is None, reason="the C++ extension is missing"),
]
INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []


def normal(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def convolution_of(x, out_channels=32, bias=True):
    weights = transformed_weights(normal(out_channels, x.shape[1], 3, 3, seed=1))
    return convolve, torch.ops.ddim_fast.convolve, [x, weights, normal(out_channels, seed=2) if bias else None]


def normalization_of(x, scaled=True, weighted=True, silu=True):
    batch, channels = x.shape[:2]
    weight, bias = (normal(channels, seed=seed) if weighted else None for seed in (1, 2))
    rows = normal(batch, 2 * channels, seed=3).chunk(2, dim=1) if scaled else (None, None)

    def call(x, groups, weight, bias, eps, scale, shift, silu):
        return group_norm(x, groups, weight, bias, eps, scale=scale, shift=shift, silu=silu)

    return call, torch.ops.ddim_fast.group_norm, [x, 4, weight, bias, 1e-5, *rows, silu]


LAYERS = {"convolution": convolution_of, "normalization": normalization_of}
per_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture
def taken(monkeypatch):
    """Whether each plain call answered."""
    answers = []

    def watch(call):
        def watched(*arguments):
            found = call(*arguments)
            answers.append(found is not None)
            return found

        return watched

    for module, name in ((convolution, "plain_convolution"), (normalization, "plain_normalization")):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    return answers


def assert_alike(result, expected):
    assert torch.equal(result, expected)
    assert (result.dtype, result.stride(), type(result)) == (expected.dtype, expected.stride(), torch.Tensor)
    assert not result.requires_grad


CASES = {
    "convolution": lambda x: convolution_of(x),
    "without a bias": lambda x: convolution_of(x, 48, bias=False),
    "normalization": lambda x: normalization_of(x),
    "alone": lambda x: normalization_of(x, scaled=False, weighted=False, silu=False),
    "scaled": lambda x: normalization_of(x, weighted=False, silu=False),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (3, 32, 5, 6), (2, 48, 1, 9), (5, 32, 14, 14)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_and_the_layout_are_the_operators(case, shape, mode, taken, select, threads):
    call, operator, arguments = CASES[case](normal(*shape))
    with mode():
        for isa in INSTRUCTION_SETS:
            select(isa)
            for count in (1, 3):
                threads(count)
                assert_alike(call(*arguments), operator(*arguments))
    assert taken == [True] * 2 * len(INSTRUCTION_SETS)


@per_layer
def test_parameters_are_plain(layer, taken):
    call, operator, arguments = layer(normal(2, 16, 5, 6))
    given = [nn.Parameter(a) if isinstance(a, torch.Tensor) and a.is_leaf else a for a in arguments]
    with torch.no_grad():
        assert_alike(call(*given), operator(*arguments))
    assert taken == [True]


@per_layer
def test_the_result_outlives_what_it_was_made_from(layer, taken):
    call, operator, arguments = layer(normal(2, 16, 5, 6))
    with torch.no_grad():
        expected, result = operator(*arguments), call(*arguments)
        arguments[0].fill_(7)
        again = result * 1
        del arguments
        assert torch.equal(result, expected)
        assert torch.equal(again, expected)
    assert taken == [True]


@per_layer
@pytest.mark.parametrize("layout", PICTURE_LAYOUTS)
def test_layouts(layer, layout, taken):
    call, operator, arguments = layer(normal(3, 16, 6, 7))
    arguments[0] = PICTURE_LAYOUTS[layout](arguments[0])
    with torch.no_grad():
        assert_alike(call(*arguments), operator(*arguments))
    assert taken == [layout == "channels last"]


# --- What is left to the operators ------------------------------------------------------------------------------------


class Own(torch.Tensor):
    """A class of one's own may do anything."""


OTHERS = {
    "of a class of its own": lambda t: t.as_subclass(Own),
    "negated": torch._neg_view,
    "meta": lambda t: t.to("meta"),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
}


def plain_call(layer):
    return cpu_step.extension.convolve_plain if layer is convolution_of else cpu_step.extension.normalize_plain


@per_layer
@pytest.mark.parametrize("other", OTHERS)
def test_other_tensors(layer, other):
    plain = plain_call(layer)
    _, _, arguments = layer(normal(2, 16, 5, 6))
    with torch.no_grad():
        assert plain(*arguments) is not None
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                changed = [*arguments[:index], OTHERS[other](argument), *arguments[index + 1 :]]
                assert plain(*changed) is None, index


def every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


WRONG = {
    "convolution": [
        (0, lambda x: x.double()), (0, lambda x: x[:, :8]), (0, lambda x: x[0]), (0, lambda x: x[:0]), (0, lambda x: 3),
        (0, lambda x: x.new_empty(2, 16, 0, 5)), (0, lambda x: None), (0, lambda x: normal(2, 32, 5, 6)),
        (1, lambda w: w.double()), (1, lambda w: w[:9]), (1, lambda w: w[0]), (1, lambda w: w[:, :, :8]), (1, lambda w: w[..., :8]),
        (1, lambda w: w[:, :0]), (1, lambda w: None), (1, every_second), (1, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)),
        (2, lambda b: b.double()), (2, lambda b: b[:16]), (2, lambda b: b[:, None]), (2, every_second), (2, lambda b: 0),
    ],
    "normalization": [
        (0, lambda x: x.double()), (0, lambda x: x[:, :8]), (0, lambda x: x[0]), (0, lambda x: x[:0]), (0, lambda x: normal(2, 24, 5, 6)),
        (0, lambda x: x[:1]), (1, lambda g: 0), (1, lambda g: -4), (1, lambda g: 3), (1, lambda g: 4.0), (1, lambda g: 2**80),
        (2, lambda w: w.double()), (2, lambda w: w[:8]), (2, every_second), (3, lambda b: b[:, None]), (3, lambda b: 0),
        (4, lambda e: -1e-5), (4, lambda e: float("nan")), (4, lambda e: float("inf")), (4, lambda e: None),
        (5, lambda s: s[:1]), (5, lambda s: s[:, :8]), (5, every_second), (6, lambda s: s.double()), (6, lambda s: s[0]),
    ],
}  # fmt: skip


@per_layer
def test_what_is_wrong_or_lies_elsewhere_is_left_to_the_operator(layer):
    """Without an error, which would come up later, in code that has nothing to do with it."""
    name = "convolution" if layer is convolution_of else "normalization"
    plain = plain_call(layer)
    for number, (index, change) in enumerate(WRONG[name]):
        _, _, arguments = layer(normal(2, 16, 5, 6))
        arguments[index] = change(arguments[index])
        with torch.no_grad():
            assert plain(*arguments) is None, (number, index)
    with pytest.raises(TypeError, match="this takes"):
        plain(1)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


@per_layer
def test_who_watches_operators_sees_one(layer, taken):
    call, operator, arguments = layer(normal(2, 16, 5, 6))
    with torch.no_grad(), Watching() as watching:
        call(*arguments)
    assert [name for name in watching.names if "ddim_fast" in name] == [str(operator.default)]
    assert taken == [False]


@per_layer
def test_gradients_and_forward_derivatives_are_the_operators_affair(layer, taken):
    call, _, arguments = layer(normal(2, 16, 5, 6))
    call(*arguments)
    with torch.no_grad(), forward_ad.dual_level():
        call(*arguments)
    assert taken == [False, False]


@per_layer
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")  # torch's own
def test_a_trace_has_the_operator(layer):
    call, operator, arguments = layer(normal(2, 16, 5, 6))
    x, rest = arguments[0], arguments[1:]
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: call(x, *rest), (x,), check_trace=False)
        other = normal(2, 16, 5, 6, seed=9)
        assert torch.equal(traced(other), operator(other, *rest))
    assert "ddim_fast" in str(traced.graph)


@per_layer
def test_a_batch_of_torch_func_is_not_read_past_its_wrapper(layer):
    """An example of vmap, or a functionalized tensor, is no memory of its own."""
    _, _, arguments = layer(normal(2, 16, 5, 6))
    many = torch.stack([arguments[0], arguments[0] + 1])
    plain, found = plain_call(layer), []

    def one(x):
        found.append(plain(x, *arguments[1:]))
        return x

    with torch.no_grad():
        torch.func.vmap(one)(many)
        torch.func.functionalize(one)(arguments[0])
    assert found == [None, None]
