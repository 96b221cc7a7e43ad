"""Convolutions with a quarter of the products: against float64, equal bits, memory, operators, and models that are made of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import PICTURE_LAYOUTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ddim_fast as df
from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.convolution import convolve, transformed_weights, unsupported_reasons
from ddim_fast.models import convolutions
from ddim_fast.models.convolutions import WinogradConv2d
from ddim_fast.models.replacements import REPLACEMENTS, with_replacements
from ddim_fast.sampling import optimize

pytestmark = pytest.mark.usefixtures("nan_memory")

WINOGRAD = "convolutions by Winograd's minimal filtering"
INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
per_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)

ALLOWED = 70
"""Float32 eps, times ``size_of``: 3 times 23.3, the largest error in 2500 cases drawn like those of ``test_any_shape``, and the same for
every instruction set. A wrong coefficient makes thousands of it. (Inputs of mostly zeros, which are not drawn, reached 63.)"""


def with_winograd(model):
    return with_replacements(model, REPLACEMENTS[WINOGRAD])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(batch, in_channels, out_channels, height, width, bias=True, seed=0):
    """An input, a filter and a bias."""
    made = normal(batch, in_channels, height, width, seed=seed), normal(out_channels, in_channels, 3, 3, seed=seed + 1)
    return (*made, normal(out_channels, seed=seed + 2) if bias else None)


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def size_of(x, weight, bias):
    """What an image's errors in a channel are measured by: of the convolution of magnitudes, the largest; at its edge and around it, too,
    since products for a tile are made of all that its patch and its filter have."""
    around = F.conv2d(x.double().abs(), weight.double().abs(), padding=2).amax((2, 3), keepdim=True)
    return around if bias is None else around + bias.double().abs()[:, None, None]


def fast(x, weight, bias):
    return convolve(x, transformed_weights(weight), bias)


def assert_near(result, x, weight, bias):
    assert result.dtype == torch.float32
    expected = exact(x, weight, bias)
    assert result.shape == expected.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not result.isnan().any(), "something was not written"
    wrong = (result.double() - expected).abs() > ALLOWED * torch.finfo(torch.float32).eps * size_of(x, weight, bias)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, the first at {wrong.nonzero()[0].tolist()}"


# --- Against float64 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads_wanted", [1, 2])
@per_instruction_set
def test_any_shape(isa, threads_wanted, select, threads):
    select(isa)
    threads(threads_wanted)
    channels, sides = st.integers(1, 7).map(lambda k: 16 * k), st.integers(1, 14)

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(st.builds(case, st.integers(0, 5), channels, channels, sides, sides, st.booleans(), st.integers(0, 99)))
    def run(arguments):
        assert_near(fast(*arguments), *arguments)

    run()


@per_instruction_set
@pytest.mark.parametrize(
    ("channels", "tiles"),
    # A block is 120 tiles with 16 channels each way, 24 with 112; rows are multiplied by 4 at a time, and by more where they can.
    [(16, n) for n in (1, 3, 4, 5, 23, 24, 25, 119, 120, 121, 250)] + [(112, n) for n in (4, 23, 24, 25, 49)],
)
def test_any_number_of_tiles(isa, channels, tiles, select):
    select(isa)
    arguments = case(1, channels, channels, 4, 4 * tiles - 1)
    assert_near(fast(*arguments), *arguments)


@per_instruction_set
@pytest.mark.parametrize("out_channels", range(16, 129, 16))
def test_any_number_of_output_channels(isa, out_channels, select):
    """Each number of vectors of columns, however wide vectors are."""
    select(isa)
    arguments = case(2, 16, out_channels, 7, 8)
    assert_near(fast(*arguments), *arguments)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 2), (0, 2), (2, 1)])
def test_each_element_of_a_filter(place):
    """A filter of one element moves the picture: nothing else can be mistaken for it."""
    x, weight = normal(1, 16, 9, 10), torch.zeros(16, 16, 3, 3)
    weight[:, :, place[0], place[1]] = torch.eye(16)
    moved = F.pad(x, (1, 1, 1, 1))[:, :, place[0] : place[0] + 9, place[1] : place[1] + 10]
    torch.testing.assert_close(fast(x, weight, None), moved, rtol=0, atol=2e-5)


def test_weights_are_transformed_in_float64():
    """The points 0, 1, -1, 2, -2 and infinity of each filter as a polynomial, each times what the other transforms leave out;
    the filters of sixteen output channels beside one another."""
    weight = normal(48, 32, 3, 3)
    points, factors = [0, 1, -1, 2, -2], [1 / 4, -1 / 6, -1 / 6, 1 / 24, 1 / 24]
    to_points = torch.tensor([[f * p**k for k in range(3)] for p, f in zip(points, factors, strict=True)] + [[0, 0, 1]])
    to_points = to_points.double()
    expected = (to_points @ weight.double() @ to_points.T).permute(2, 3, 1, 0).reshape(36, 32, 48)
    expected = torch.stack([expected[:, :, first : first + 16] for first in (0, 16, 32)], dim=1)
    got = transformed_weights(weight.requires_grad_())
    assert not got.requires_grad
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-7)


# --- Equal bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 32, 48, 9, 10), (3, 112, 112, 13, 7), (2, 16, 16, 50, 50)], ids=str)
def test_a_sample_does_not_depend_on_what_is_around_it(shape, select, threads):
    x, weight, bias = case(*shape)
    expected = fast(x, weight, bias)
    for isa in INSTRUCTION_SETS:
        select(isa)
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(fast(x, weight, bias), expected), (isa, count)
            for i in (0, len(x) - 1):
                assert torch.equal(fast(x[i : i + 1], weight, bias)[0], expected[i]), (isa, count, i)
            assert torch.equal(fast(x.flip(0), weight, bias).flip(0), expected)


def test_nothing_is_left_of_earlier_ones():
    """Memory between the transforms is kept from one to the next."""
    x, weight, bias = case(1, 16, 32, 5, 7)
    expected = fast(x, weight, bias)
    fast(torch.full((4, 48, 30, 30), math.nan), normal(48, 48, 3, 3), None)
    assert torch.equal(fast(x, weight, bias), expected)


# --- Memory -----------------------------------------------------------------------------------------------------------


@per_instruction_set
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 1, 1), (2, 16, 48, 3, 9), (1, 32, 16, 8, 8), (3, 112, 16, 5, 13)], ids=str
)
def test_nothing_beside_is_read_or_written(isa, shift, with_bias, shape, select):
    """Each lies in memory full of NaN, the result in memory full of a number; not at a multiple of a vector, either."""
    select(isa)
    batch, _, out_channels, height, width = shape
    x, weight, bias = case(*shape, bias=with_bias)
    keep = []

    def place(values, around=math.nan):
        keep.append(torch.full((values.numel() + 80,), around))
        keep[-1][32 + shift : 32 + shift + values.numel()] = values.flatten()
        return keep[-1][32 + shift :].data_ptr()

    result = torch.full((batch, height, width, out_channels), -77.0)
    addresses = place(x.permute(0, 2, 3, 1)), place(transformed_weights(weight)), place(bias) if with_bias else 0
    address = place(result, around=-77.0)
    before = [tensor.clone() for tensor in keep[:-1]]
    cpu_step.extension.convolve(*addresses, address, batch, height, width, x.shape[1], out_channels, 1)
    buffer, body = keep[-1], slice(32 + shift, 32 + shift + result.numel())
    assert (buffer[: body.start] == -77).all()
    assert (buffer[body.stop :] == -77).all()
    assert_near(buffer[body].view_as(result).permute(0, 3, 1, 2), x, weight, bias)
    for tensor, copied in zip(keep, before, strict=False):
        assert torch.equal(tensor.nan_to_num(nan=-77), copied.nan_to_num(nan=-77))


@pytest.mark.parametrize("layout", PICTURE_LAYOUTS)
def test_layouts(layout):
    x, weight, bias = case(3, 32, 16, 6, 7)
    x = PICTURE_LAYOUTS[layout](x)
    before, strides = x.clone(), x.stride()
    result = fast(x, weight, bias)
    assert_near(result, before, weight, bias)
    assert torch.equal(x, before)
    assert x.stride() == strides


def test_layouts_of_weights_and_bias():
    x, weight, bias = case(2, 32, 16, 6, 7)
    weights = transformed_weights(weight)
    expected = convolve(x, weights, bias)
    assert torch.equal(convolve(x, weights, bias.repeat_interleave(2)[::2]), expected)
    assert torch.equal(convolve(x, weights, torch._neg_view(-bias)), expected)
    assert torch.equal(convolve(x, weights.transpose(1, 2).contiguous().transpose(1, 2), bias), expected)
    assert torch.equal(convolve(x, torch._neg_view(-weights), bias), expected)


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4), (2, 16, 4, 0)], ids=str)
def test_nothing_of_nothing(shape):
    assert fast(torch.empty(shape), normal(32, 16, 3, 3), None).shape == (shape[0], 32, *shape[2:])


# --- NaN and infinity -------------------------------------------------------------------------------------------------


@per_instruction_set
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 4), (4, 3), (5, 5), (8, 9)], ids=str)
def test_what_is_not_finite_goes_where_it_belongs(isa, bad, place, select):
    """To the outputs that a direct convolution gives it to; it may spread in their tiles, and to no other."""
    select(isa)
    x, weight, bias = case(3, 16, 16, 9, 10)
    clean = fast(x, weight, bias)
    x[1, 5, place[0], place[1]] = bad
    result = fast(x, weight, bias)
    assert not result[~exact(x, weight, bias).isfinite()].isfinite().any()
    spoilt = torch.zeros(3, 16, 12, 12, dtype=torch.bool)
    for top in (0, 4, 8):
        for left in (0, 4, 8):
            patch = top - 1 <= place[0] <= top + 4 and left - 1 <= place[1] <= left + 4
            spoilt[1, :, top : top + 4, left : left + 4] = patch
    spoilt = spoilt[:, :, :9, :10]
    assert torch.equal(result[~spoilt], clean[~spoilt])
    assert clean.isfinite().all()


def test_nan_in_weights_and_bias_stays_in_its_channel():
    x, weight, bias = case(2, 16, 32, 5, 6)
    clean, ruined, missing = fast(x, weight, bias), weight.clone(), bias.clone()
    ruined[7, 3, 1, 1] = missing[9] = math.nan
    for channel, result in ((7, fast(x, ruined, bias)), (9, fast(x, weight, missing))):
        assert result[:, channel].isnan().all()
        result[:, channel] = clean[:, channel]
        assert torch.equal(result, clean)


# --- The operator -----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments():
    x, weight, bias = case(2, 16, 32, 6, 7)
    return x, transformed_weights(weight), bias


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_operator_keeps_what_it_declares(arguments, with_bias, memory_format):
    x, weights, bias = arguments
    operator = torch.ops.ddim_fast.convolve.default
    torch.library.opcheck(operator, (x.contiguous(memory_format=memory_format), weights, bias if with_bias else None))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_sees_no_break_and_gives_the_same_bits(arguments, backend):
    x, weights, bias = arguments
    layer = WinogradConv2d(nn.Conv2d(32, 16, 3, padding=1))
    layer.requires_grad_(False)

    def function(x):
        return layer(convolve(x * 1, weights, bias)).to(layer.weight.dtype) + 1

    with torch.inference_mode():
        got = torch.compile(function, fullgraph=True, backend=backend)(x)
        assert torch.equal(got, function(x))


def test_fake_tensors_pass(arguments):
    real = convolve(*arguments)
    with FakeTensorMode() as mode:
        result = convolve(*(mode.from_tensor(tensor) for tensor in arguments))
    assert (result.shape, result.dtype, result.stride()) == (real.shape, real.dtype, real.stride())
    assert convolve(*(tensor.to("meta") for tensor in arguments)).shape == real.shape


RULE_X = r"x must be float32 \(B, 16, H, W\) to fit the weights, got "
RULE_WEIGHTS = r"weights must be float32 \(36, out_channels / 16, in_channels, 16\) with multiples of 16 channels, got "
RULE_BIAS = r"bias must be float32 \(32,\), got "


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (0, lambda x: x.double(), RULE_X + r"torch.float64 \(2, 16, 6, 7\)"),
        (0, lambda x: x[:, :15], RULE_X + r"torch.float32 \(2, 15, 6, 7\)"),
        (0, lambda x: x.repeat(1, 2, 1, 1), RULE_X + r"torch.float32 \(2, 32, 6, 7\)"),
        (0, lambda x: x[..., None], RULE_X + r"torch.float32 \(2, 16, 6, 7, 1\)"),
        (1, lambda w: w.double(), RULE_WEIGHTS + r"torch.float64 \(36, 2, 16, 16\)"),
        (1, lambda w: w[:9], RULE_WEIGHTS + r"torch.float32 \(9, 2, 16, 16\)"),
        (1, lambda w: w[0], RULE_WEIGHTS + r"torch.float32 \(2, 16, 16\)"),
        (1, lambda w: w[:, :, :8], RULE_WEIGHTS + r"torch.float32 \(36, 2, 8, 16\)"),
        (1, lambda w: w[..., :8], RULE_WEIGHTS + r"torch.float32 \(36, 2, 16, 8\)"),
        (1, lambda w: w.transpose(1, 2).flatten(2), RULE_WEIGHTS + r"torch.float32 \(36, 16, 32\)"),
        (2, lambda b: b.double(), RULE_BIAS + r"torch.float64 \(32,\)"),
        (2, lambda b: b[:16], RULE_BIAS + r"torch.float32 \(16,\)"),
        (2, lambda b: b[:, None], RULE_BIAS + r"torch.float32 \(32, 1\)"),
    ],
)
def test_errors_name_the_rule_and_the_value(arguments, index, wrong, said):
    """What is wrong would be read, or written, beyond its end."""
    changed = list(arguments)
    changed[index] = wrong(changed[index])
    with pytest.raises(ValueError, match=said):
        convolve(*changed)


# --- Which convolutions -----------------------------------------------------------------------------------------------


class Own(nn.Conv2d):
    """A class of one's own may do anything."""


def conv(in_channels=16, out_channels=32, kernel_size=3, padding=1, cls=nn.Conv2d, **options):
    torch.manual_seed(0)
    return cls(in_channels, out_channels, kernel_size, padding=padding, **options)


def with_forward(convolution):
    convolution.forward = lambda x: x
    return convolution


def with_hook(name):
    made = conv()
    getattr(made, name)(lambda module, *values: None)
    return made


@pytest.mark.parametrize(
    ("convolution", "said"),
    [
        (conv(stride=2), "stride is (2, 2), not (1, 1)"),
        (conv(stride=(1, 2)), "stride is (1, 2), not (1, 1)"),
        (conv(padding=0), "padding is (0, 0), not (1, 1)"),
        (conv(padding="same"), "padding is same, not (1, 1)"),
        (conv(dilation=2), "dilation is (2, 2), not (1, 1)"),
        (conv(groups=2), "groups is 2, not 1"),
        (conv(padding_mode="circular"), "padding_mode is circular, not zeros"),
        (conv(kernel_size=5), "kernel_size is (5, 5), not (3, 3)"),
        (conv(kernel_size=(3, 1)), "kernel_size is (3, 1), not (3, 3)"),
        (conv(in_channels=17), "in_channels is 17, not a multiple of 16"),
        (conv(out_channels=8), "out_channels is 8, not a multiple of 16"),
        (conv(dtype=torch.float64), "its weights are torch.float64 on cpu, not float32 on cpu"),
        (conv(dtype=torch.bfloat16), "its weights are torch.bfloat16 on cpu, not float32 on cpu"),
        (conv(device="meta"), "its weights are torch.float32 on meta, not float32 on cpu"),
        (conv(cls=nn.Conv1d), "it is a Conv1d, not an nn.Conv2d"),
        (conv(cls=nn.ConvTranspose2d), "it is a ConvTranspose2d, not an nn.Conv2d"),
        (conv(cls=Own), "it is a Own, not an nn.Conv2d"),
        (nn.Linear(16, 16), "it is a Linear, not an nn.Conv2d"),
        (with_hook("register_forward_hook"), "it has hooks, or its own forward, which would not be called"),
        (with_hook("register_forward_pre_hook"), "it has hooks, or its own forward, which would not be called"),
        (with_forward(conv()), "it has hooks, or its own forward, which would not be called"),
    ],
)
def test_reasons(convolution, said):
    assert unsupported_reasons(convolution) == [said]
    assert with_winograd(nn.Sequential(copy.deepcopy(convolution))) is None


def test_all_reasons_are_said():
    assert len(unsupported_reasons(conv(15, 15, 1, 0, stride=2, groups=3, dtype=torch.float64))) == 7


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"in_channels": 112, "out_channels": 16}], ids=str)
def test_no_reasons(options):
    assert unsupported_reasons(conv(**options)) == []


def test_without_the_extension_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "the C++ extension is not there", raising=False)
    assert unsupported_reasons(conv()) == ["the C++ extension is not there"]
    assert with_winograd(nn.Sequential(conv())) is None


# --- A layer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs that went to the kernel."""
    shapes = []
    monkeypatch.setattr(convolutions, "convolve", lambda x, *rest: shapes.append(tuple(x.shape)) or convolve(x, *rest))
    return shapes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_uses_the_kernel(calls, mode, bias):
    plain, x = conv(bias=bias), normal(2, 16, 5, 6)
    with mode():
        got = WinogradConv2d(plain)(x)
    assert calls == [(2, 16, 5, 6)]
    assert_near(got, x, plain.weight.detach(), plain.bias.detach() if bias else None)


def test_a_layer_gives_gradients_where_they_are_wanted(calls):
    plain = conv()
    layer = WinogradConv2d(copy.deepcopy(plain))
    inputs = [normal(2, 16, 5, 6).requires_grad_() for _ in range(2)]
    for model, x in zip((plain, layer), inputs, strict=True):
        model(x).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
    assert calls == []


def test_a_layer_leaves_to_the_convolution_what_the_kernel_cannot(calls):
    layer, long = WinogradConv2d(conv()), WinogradConv2d(conv()).double()
    x = normal(2, 16, 5, 6)
    with torch.no_grad():
        assert torch.equal(layer(x[0]), nn.Conv2d.forward(layer, x[0]))
        assert torch.equal(long(x.double()), nn.Conv2d.forward(long, x.double()))
        for model, wrong in ((layer, x.double()), (long, x)):
            with pytest.raises(RuntimeError, match="should be the same"):  # torch's words
                model(wrong)
        with pytest.raises(RuntimeError, match=r"to have 16 channels|expected input"):
            long(x[:, :15].double())
    assert calls == []


def test_a_layer_is_a_convolution_for_all_who_ask():
    plain = conv()
    layer = WinogradConv2d(plain)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert isinstance(layer, nn.Conv2d)
    assert repr(layer).replace("WinogradConv2d", "Conv2d") == repr(plain)
    assert not WinogradConv2d(plain.eval()).training
    assert torch.equal(copy.deepcopy(layer).points, layer.points)
    assert set(layer.state_dict()) == {"weight", "bias"}


# --- A model ----------------------------------------------------------------------------------------------------------


def exchanged_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, WinogradConv2d)]


def test_the_shipped_model(calls):
    model = df.load_model("fashion")
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    made = with_winograd(model)
    assert len(exchanged_in(made)) == 21
    x, t, labels = normal(3, 1, 28, 28), torch.tensor([10, 500, 990]), torch.tensor([0, 5, 9])
    with torch.inference_mode():
        expected, got = model(x, t, class_labels=labels), made(x, t, class_labels=labels)
    assert 21 <= len(calls) <= 63
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert exchanged_in(model) == []
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in made.state_dict().values()}
    assert made.prediction_type == model.prediction_type


def test_a_model_without_such_convolutions():
    assert with_winograd(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Linear(4, 4))) is None
    assert with_winograd(nn.ReLU()) is None


def test_a_model_that_is_a_convolution():
    model, x = conv(), normal(2, 16, 5, 6)
    made = with_winograd(model)
    assert type(made) is WinogradConv2d
    assert type(model) is nn.Conv2d
    assert made.weight is not model.weight
    assert with_winograd(made) is None  # once is enough
    with torch.inference_mode():
        assert_near(made.eval()(x), x, model.weight.detach(), model.bias.detach())


class Twice(nn.Module):
    """One convolution under two names, in a module that is there twice; and a second one inside of another."""

    def __init__(self):
        super().__init__()
        self.first = self.second = conv(16, 16)
        self.block = nn.Sequential(conv(16, 16), nn.ReLU())
        self.again = self.block
        self.nothing = None

    def forward(self, x):
        return self.again(self.second(self.block(self.first(x))))


def test_modules_that_are_there_twice(calls):
    model, x = Twice().requires_grad_(False), normal(2, 16, 5, 6)
    made = with_winograd(model)
    assert made.first is made.second
    assert made.block is made.again
    assert exchanged_in(made) == ["first", "block.0"]
    assert made.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.first.weight.is_contiguous()
    with torch.inference_mode():
        got, expected = made(x), model(x)
    assert len(calls) == 4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_hooks_are_still_called():
    model = nn.Sequential(conv(16, 16), conv(16, 16)).requires_grad_(False)
    model[0].register_forward_hook(lambda module, inputs, output: output + 100)
    made, x = with_winograd(model), normal(1, 16, 5, 6)
    assert exchanged_in(made) == ["1"]
    with torch.inference_mode():
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)


# --- Where a model is optimized ---------------------------------------------------------------------------------------

SHAPE = (3, 2, 8, 8)


class Small(nn.Module):
    prediction_type = "epsilon"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = conv(2, 16), conv(16, 16), conv(16, 2)

    def forward(self, x, t):
        h = self.first(x.to(self.first.weight.dtype)) + t[:, None, None, None] / 1000
        return self.last(torch.tanh(self.middle(h.to(self.middle.weight.dtype))))


@pytest.fixture
def optimized(monkeypatch):
    """``optimize`` where Winograd's way and channels last take these times, of what is without them; nothing else makes a difference."""
    model, sampler = Small().eval().requires_grad_(False), df.DDIMSampler(df.NoiseSchedule.linear(), 6)

    def run(seconds, tolerance, channels_last=1.0):
        # channels last, this, reduced precision, whole runs
        left = iter([(1.0, channels_last), (1.0, seconds), (1.0, 1.0), (1.0, seconds)])

        def in_turn(*calls, rounds):
            for call in calls:
                call()
            return list(next(left))

        monkeypatch.setattr(optimize, "_in_turn", in_turn)
        fast = sampler.optimize(model, SHAPE, compile=False, tolerance=tolerance)
        assert list(left) == []
        assert exchanged_in(model) == []
        return fast

    return run


def test_optimize_takes_what_is_faster(optimized, calls):
    made = optimized(0.5, 2 / 255)
    assert made.gain.ways == (WINOGRAD,)
    assert exchanged_in(made.fast) == ["middle"]
    assert 0 < made.gain.largest_change <= 1e-4
    assert made.gain.times_faster == 2
    calls.clear()
    sampler = df.DDIMSampler(df.NoiseSchedule.linear(), 6)
    got, expected = (sampler.sample(m, SHAPE, seed=3) for m in (made, made.model))
    assert calls == [(3, 16, 8, 8)] * 6
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert optimized(0.98, 2 / 255).gain.ways == ()


def test_optimize_drops_what_moves_samples_too_far(optimized):
    moved = optimized(0.5, 1.0).gain.largest_change
    for tolerance, taken in ((moved, True), (moved * 0.99, False), (0.0, False)):
        made = optimized(0.5, tolerance)
        assert bool(made.gain.ways) == taken, tolerance
        assert made.gain.largest_change == (moved if taken else 0)
        assert (made.fast is made.model) != taken
    # What was found before it stays.
    both = optimized(0.5, 1.0, channels_last=0.5)
    assert both.gain.ways == ("channels last", WINOGRAD)
    one = optimized(0.5, both.gain.largest_change * 0.99, channels_last=0.5)
    assert one.gain.ways == ("channels last",)
    assert one.gain.largest_change < both.gain.largest_change


def test_weights_of_five_dimensions_stay_as_they_are():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.deep = nn.Conv2d(16, 16, 3, padding=1), nn.Conv3d(2, 3, 3)

    model = Both()
    made = with_winograd(model)
    assert made.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made.deep.weight, model.deep.weight)
    assert made.deep.weight.is_contiguous()


def test_autocast_is_the_convolutions_own():
    layer = WinogradConv2d(nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(1, 16, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_model_that_asks_for_the_kind_of_a_layer():
    class Routing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(2, 16, 3, padding=1), conv(16, 16), nn.Conv2d(16, 2, 3, padding=1)])

        def forward(self, x, t):
            for layer in self.layers:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, t)
            return x

    model = Routing().eval().requires_grad_(False)
    made, x = with_winograd(model), normal(2, 2, 8, 8)
    assert exchanged_in(made) == ["layers.1"]
    with torch.inference_mode():
        torch.testing.assert_close(made(x, 5), model(x, 5), rtol=0, atol=1e-4)


def test_without_the_extension_the_operator_says_so(monkeypatch, arguments):
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "the C++ extension is not there", raising=False)
    with pytest.raises(RuntimeError, match="the C\\+\\+ extension is not there"):
        convolve(*arguments)
