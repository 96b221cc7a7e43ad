"""Group normalization and SiLU of channels-last pictures: against float64, equal bits, memory, operators."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layouts import PICTURE_LAYOUTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddim_fast.kernels import cpu_step
from ddim_fast.kernels.normalization import group_norm, silu, unsupported_reasons, unsupported_silu_reasons

pytestmark = pytest.mark.usefixtures("nan_memory")

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = cpu_step.extension.instruction_sets() if cpu_step.extension is not None else []
per_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
EPS = torch.finfo(torch.float32).eps
SMALLEST = 2.0**-149
"""Above 0, in float32."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(batch, channels, height, width, seed=0, mean=0.0, deviation=1.0):
    """A picture, and a weight and a bias."""
    x = normal(batch, channels, height, width, seed=seed) * deviation + mean
    return x, normal(channels, seed=seed + 1), normal(channels, seed=seed + 2)


def exact(x, groups, weight, bias, eps=1e-5, scale=None, shift=None, silu=False):
    """The definition, in float64, and the deviation of each element from its mean, in standard deviations."""
    grouped = x.double().unflatten(1, (groups, -1))
    deviation = grouped - grouped.mean((2, 3, 4), keepdim=True)
    normalized = deviation / (deviation.square().mean((2, 3, 4), keepdim=True) + eps).sqrt()
    y = normalized = normalized.flatten(1, 2)
    if weight is not None:
        y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    if scale is not None:
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y, normalized


def size_of(x, groups, weight, bias, scale=None, shift=None, eps=1e-5):
    """What errors are measured by: the magnitudes that are added up to an element of the result."""
    size = exact(x, groups, None, None, eps)[1].abs() + 1
    if weight is not None:
        size = size * weight.double().abs()[:, None, None] + bias.double().abs()[:, None, None]
    if scale is not None:
        size = size * (1 + scale.double()[:, :, None, None]).abs() + shift.double().abs()[:, :, None, None]
    return size


def assert_near(result, x, groups, weight, bias, allowed=4, **options):
    expected, _ = exact(x, groups, weight, bias, **options)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    options.pop("silu", None)
    wrong = (result.double() - expected).abs() > allowed * EPS * size_of(x, groups, weight, bias, **options)
    assert not (wrong | result.isnan()).any(), (
        f"{int(wrong.sum())} of {wrong.numel()} are wrong; {int(result.isnan().sum())} NaN"
    )


# --- Group normalization against float64 ------------------------------------------------------------------------------


@per_instruction_set
@pytest.mark.parametrize("then_silu", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups"),
    [(c, g) for c in (16, 32, 48, 96) for g in {1, 8, c}] + [(96, 32), (80, 5), (64, 4)],
)
def test_any_groups(isa, channels, groups, then_silu, select):
    select(isa)
    for width in (1, 7):
        x, weight, bias = case(2, channels, 5, width, seed=width)
        assert_near(group_norm(x, groups, weight, bias, silu=then_silu), x, groups, weight, bias, silu=then_silu)


@per_instruction_set
@pytest.mark.parametrize("pixels", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000])
def test_any_number_of_pixels(isa, pixels, select):
    select(isa)
    x, weight, bias = case(3, 32, 1, pixels)
    assert_near(group_norm(x, 8, weight, bias), x, 8, weight, bias)


@pytest.mark.parametrize("then_silu", [False, True])
def test_scale_and_shift(then_silu):
    x, weight, bias = case(3, 48, 6, 7)
    rows = normal(3, 96, seed=9)
    scale, shift = rows.chunk(2, dim=1)
    options = dict(scale=scale, shift=shift, silu=then_silu)
    result = group_norm(x, 3, weight, bias, **options)
    assert_near(result, x, 3, weight, bias, **options)
    apart = dict(scale=scale.t().contiguous().t(), shift=shift.repeat(1, 2)[:, ::2].contiguous(), silu=then_silu)
    apart["shift"].copy_(shift)
    assert torch.equal(group_norm(x, 3, weight, bias, **apart), result)
    assert torch.equal(group_norm(x, 3, weight, bias, scale=torch.zeros(3, 48)), group_norm(x, 3, weight, bias))


def test_without_weights():
    x, _, _ = case(2, 16, 3, 4)
    assert_near(group_norm(x, 4), x, 4, None, None)
    assert_near(group_norm(x, 4, eps=0.5), x, 4, None, None, eps=0.5)


@per_instruction_set
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e4, 3e-30])
def test_a_constant_has_no_variance(isa, value, select):
    select(isa)
    weight, bias = normal(32), normal(32, seed=1)
    result = group_norm(torch.full((2, 32, 13, 11), value), 8, weight, bias)
    assert torch.equal(result, bias[:, None, None].expand_as(result))


@per_instruction_set
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, -1e6])
def test_a_large_mean_costs_no_precision(isa, mean, select):
    """Where PyTorch's own error grows with the mean, by a thousand times and more."""
    select(isa)
    x, weight, bias = case(2, 32, 14, 14, mean=mean)
    result = group_norm(x, 8, weight, bias)
    assert_near(result, x, 8, weight, bias)
    expected, _ = exact(x, 8, weight, bias)
    ours, theirs = ((r.double() - expected).square().mean().sqrt() for r in (result, F.group_norm(x, 8, weight, bias)))
    assert ours <= 1.5 * theirs


def test_numbers_very_far_out_and_very_small_ones():
    x, weight, bias = case(2, 16, 8, 8)
    x[0, 3, 2, 2] = 1e6
    x[1] *= 1e-18
    assert_near(group_norm(x, 4, weight, bias, eps=0.0), x, 4, weight, bias, eps=0.0)


@per_instruction_set
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(isa, bad, select):
    select(isa)
    x, weight, bias = case(3, 48, 9, 10)
    clean = group_norm(x, 8, weight, bias, silu=True)
    x[1, 7, 3, 4] = bad
    result = group_norm(x, 8, weight, bias, silu=True)
    assert result[1, 6:12].isnan().all()
    result[1, 6:12] = clean[1, 6:12]
    assert torch.equal(result, clean)


# --- SiLU -------------------------------------------------------------------------------------------------------------


def exact_silu(x):
    """In float64, whose own exponential is right to 1e-16, in the form that keeps the digits of both signs."""
    x = x.double()
    e = torch.exp(-x.abs())
    return torch.where(x < 0, x * e, x) / (1 + e)


def units(result, expected):
    """The error in units of the last place that an exact result has in float32."""
    _, exponent = torch.frexp(expected)
    unit = torch.ldexp(torch.ones_like(expected), (exponent - 24).clamp(min=-149))
    return (result.double() - expected).abs() / unit


@per_instruction_set
def test_silu_is_within_units_in_the_last_place(isa, select):
    """Of every exponent and both signs, and closely where its parts meet; down to where the result is subnormal, and 0."""
    select(isa)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(-120, 120, 300_001), torch.linspace(-2, 2, 100_001)])
    x = x[x.isfinite()]
    worst = units(silu(x), exact_silu(x))
    assert worst.max() <= 3, f"{float(worst.max()):.2f} at {float(x[worst.argmax()])}"


@per_instruction_set
def test_silu_of_special_numbers(isa, select):
    select(isa)
    tiny = [SMALLEST, -SMALLEST, 2.0**-126, -(2.0**-126), 2.0**-127 - SMALLEST]
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, largest, -largest, 100.0, -100.0, -1e30, *tiny])
    expected = exact_silu(x)
    expected[3] = expected[6] = expected[9] = -0.0
    result = silu(x)
    assert result[4].isnan()
    rest = torch.arange(len(x)) != 4
    assert torch.equal(result[:4], expected[:4].float())
    assert torch.equal(result.signbit()[rest], expected.signbit()[rest])
    assert (units(result, expected)[rest][4:] <= 1).all()


@per_instruction_set
@pytest.mark.parametrize("n", [0, 1, 3, 15, 16, 17, 127, 128, 129, 40_001])
def test_silu_of_any_size(isa, n, select, threads):
    select(isa)
    threads(3)
    x = normal(n)
    assert (units(silu(x), exact_silu(x)) <= 3).all()


def test_the_polynomial_is_the_one_that_is_fitted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("silu_polynomial", ROOT / "tools" / "silu_polynomial.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sys.modules.pop("noise_polynomials", None)
    fitted, error = tool.coefficients()
    source = (ROOT / "kernels" / "csrc" / "normalization.inl").read_text()
    held = re.search(r"kExpOfMinus\[\] = \{([^}]*)\}", source).group(1).split(", ")
    assert [float.fromhex(text.rstrip("f")) for text in held] == [float.fromhex(text.rstrip("f")) for text in fitted]
    assert error < 2**-27


# --- Equal bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 48, 9, 10), (3, 320, 6, 7), (2, 16, 80, 80)], ids=str)
def test_a_sample_does_not_depend_on_what_is_around_it(shape, select, threads):
    x, weight, bias = case(*shape)
    groups = 16 if shape[1] != 320 else 32
    expected = group_norm(x, groups, weight, bias, silu=True)
    apart = silu(group_norm(x, groups, weight, bias))
    assert torch.equal(apart, expected), "SiLU in the same pass has other bits"
    for isa in INSTRUCTION_SETS:
        select(isa)
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(group_norm(x, groups, weight, bias, silu=True), expected), (isa, count)
            assert torch.equal(silu(group_norm(x, groups, weight, bias)), expected), (isa, count)
            for i in (0, len(x) - 1):
                assert torch.equal(group_norm(x[i : i + 1], groups, weight, bias, silu=True)[0], expected[i])


# --- Memory -----------------------------------------------------------------------------------------------------------


@per_instruction_set
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("shape", [(1, 16, 1), (2, 48, 27), (3, 112, 65)], ids=str)
def test_nothing_beside_is_read_or_written(isa, shift, shape, select):
    """Each lies in memory full of NaN, the result in memory full of a number; not at a multiple of a vector, either."""
    select(isa)
    batch, channels, pixels = shape
    x, weight, bias = case(batch, channels, 1, pixels)
    keep = []

    def place(values, around=math.nan):
        keep.append(torch.full((values.numel() + 80,), around))
        keep[-1][32 + shift : 32 + shift + values.numel()] = values.flatten()
        return keep[-1][32 + shift :].data_ptr()

    rows = normal(batch, channels, seed=5)
    inputs = (place(x.permute(0, 2, 3, 1)), place(weight), place(bias), place(rows), channels, place(rows), channels)
    body = slice(32 + shift, 32 + shift + x.numel())
    address = place(torch.full((x.numel(),), -77.0), around=-77.0)
    cpu_step.extension.normalize(*inputs, address, batch, pixels, channels, channels // 4, 1e-5, True, 1)
    made = [keep[-1]]
    source = place(x)
    address = place(torch.full((x.numel(),), -77.0), around=-77.0)
    cpu_step.extension.silu(source, address, x.numel(), 1)
    made.append(keep[-1])
    for buffer in made:
        assert (buffer[: body.start] == -77).all()
        assert (buffer[body.stop :] == -77).all()
    result = made[0][body].view(batch, 1, pixels, channels).permute(0, 3, 1, 2)
    assert_near(result, x, channels // 4, weight, bias, scale=rows, shift=rows, silu=True)
    assert torch.equal(made[1][body], silu(x).flatten())


@pytest.mark.parametrize("layout", PICTURE_LAYOUTS)
def test_layouts(layout):
    x, weight, bias = case(3, 32, 6, 7)
    x = PICTURE_LAYOUTS[layout](x)
    before, strides = x.clone(), x.stride()
    assert_near(group_norm(x, 8, weight, bias), before, 8, weight, bias)
    result = silu(x)
    assert (units(result, exact_silu(before)) <= 3).all()
    assert result.stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before)
    assert x.stride() == strides
    assert torch.equal(
        group_norm(x, 8, weight.repeat_interleave(2)[::2], torch._neg_view(-bias)), group_norm(x, 8, weight, bias)
    )


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)], ids=str)
def test_nothing_of_nothing(shape):
    x = torch.empty(shape)
    assert group_norm(x, 4).shape == silu(x).shape == shape


# --- The operators ----------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments():
    x, weight, bias = case(2, 16, 6, 7)
    return x, 4, weight, bias, 1e-5, normal(2, 16), normal(2, 16, seed=1), True


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_operators_keep_what_they_declare(arguments, memory_format):
    x, *rest = arguments
    x = x.contiguous(memory_format=memory_format)
    torch.library.opcheck(torch.ops.ddim_fast.group_norm.default, (x, *rest))
    torch.library.opcheck(torch.ops.ddim_fast.group_norm.default, (x, 4, None, None, 1e-5, None, None, False))
    torch.library.opcheck(torch.ops.ddim_fast.silu.default, (x,))


@pytest.mark.parametrize("layout", PICTURE_LAYOUTS)
def test_fake_tensors_pass(layout, arguments):
    x = PICTURE_LAYOUTS[layout](case(3, 32, 6, 7)[0])
    for function in (silu, lambda x: group_norm(x, 8, silu=True)):
        real = function(x)
        with FakeTensorMode() as mode:
            result = function(mode.from_tensor(x))
        assert (result.shape, result.dtype, result.stride()) == (real.shape, real.dtype, real.stride())
        assert function(x.to("meta")).shape == real.shape


RULE_X = r"x must be float32 \(B, C, H, W\) with C a multiple of 16, got "


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (0, lambda x: x.double(), RULE_X + r"torch.float64 \(2, 16, 6, 7\): use torch.nn.functional.group_norm"),
        (0, lambda x: x[:, :15], RULE_X + r"torch.float32 \(2, 15, 6, 7\)"),
        (0, lambda x: x[:, :0], RULE_X + r"torch.float32 \(2, 0, 6, 7\)"),
        (0, lambda x: x[0], RULE_X + r"torch.float32 \(16, 6, 7\)"),
        (1, lambda g: 3, "groups must be a divisor of the 16 channels, got 3"),
        (1, lambda g: 0, "groups must be a divisor of the 16 channels, got 0"),
        (1, lambda g: -4, "groups must be a divisor of the 16 channels, got -4"),
        (2, lambda w: w[:8], r"weight must be float32 \(16,\), got torch.float32 \(8,\)"),
        (3, lambda b: b.double(), r"bias must be float32 \(16,\), got torch.float64 \(16,\)"),
        (4, lambda e: -1.0, "eps must be a finite number, at least 0, got -1"),
        (4, lambda e: math.nan, "eps must be a finite number, at least 0, got nan"),
        (5, lambda s: s[:1], r"scale must be float32 \(2, 16\), got torch.float32 \(1, 16\)"),
        (6, lambda s: s[:, :, None], r"shift must be float32 \(2, 16\), got torch.float32 \(2, 16, 1\)"),
    ],
)
def test_errors_name_the_rule_and_the_value(arguments, index, wrong, said):
    """What is wrong would be read, or written, beyond its end."""
    changed = list(arguments)
    changed[index] = wrong(changed[index])
    with pytest.raises(ValueError, match=said):
        torch.ops.ddim_fast.group_norm(*changed)


def test_silu_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"x must be float32, got torch.bfloat16: use torch.nn.functional.silu"):
        silu(torch.zeros(3, dtype=torch.bfloat16))


def test_without_the_extension_the_operators_say_so(monkeypatch, arguments):
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "the C++ extension is not there", raising=False)
    for call in (lambda: silu(arguments[0]), lambda: group_norm(arguments[0], 4)):
        with pytest.raises(RuntimeError, match="the C\\+\\+ extension is not there"):
            call()
    assert unsupported_reasons(nn.GroupNorm(4, 16)) == ["the C++ extension is not there"]
    assert unsupported_silu_reasons(nn.SiLU()) == ["the C++ extension is not there"]


# --- Which layers -----------------------------------------------------------------------------------------------------


class Own(nn.GroupNorm):
    """A class of one's own may do anything."""


def with_hook(layer):
    layer.register_forward_hook(lambda module, *values: None)
    return layer


def with_forward(layer):
    layer.forward = lambda x: x
    return layer


HOOKS = "it has hooks, or its own forward, which would not be called"


@pytest.mark.parametrize(
    ("layer", "reasons"),
    [
        (nn.GroupNorm(4, 16), []),
        (nn.GroupNorm(16, 96, affine=False, eps=1.0), []),
        (nn.GroupNorm(4, 20), ["num_channels is 20, not a multiple of 16"]),
        (nn.GroupNorm(4, 16, dtype=torch.float64), ["its weights are torch.float64 on cpu, not float32 on cpu"]),
        (nn.GroupNorm(4, 16, device="meta"), ["its weights are torch.float32 on meta, not float32 on cpu"]),
        (nn.BatchNorm2d(16), ["it is a BatchNorm2d, not an nn.GroupNorm"]),
        (Own(4, 16), ["it is a Own, not an nn.GroupNorm"]),
        (with_hook(nn.GroupNorm(4, 16)), [HOOKS]),
        (with_forward(nn.GroupNorm(4, 20)), ["num_channels is 20, not a multiple of 16", HOOKS]),
    ],
)
def test_reasons_of_normalizations(layer, reasons):
    assert unsupported_reasons(layer) == reasons


@pytest.mark.parametrize(
    ("layer", "reasons"),
    [
        (nn.SiLU(), []),
        (nn.SiLU(inplace=True), ["it works in place"]),
        (nn.ReLU(), ["it is a ReLU, not an nn.SiLU"]),
        (with_hook(nn.SiLU()), [HOOKS]),
    ],
)
def test_reasons_of_silu(layer, reasons):
    assert unsupported_silu_reasons(layer) == reasons
