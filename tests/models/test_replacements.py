"""Layers replaced by faster ones: the same predictions, whoever calls the layers and however often they are there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddim_fast as df
from ddim_fast.kernels import cpu_step
from ddim_fast.models import normalizations
from ddim_fast.models.normalizations import FastGroupNorm, FastGroupNormSiLU, FastSiLU, FusingSequential, GroupNormSiLU
from ddim_fast.models.replacements import REPLACEMENTS, with_replacements
from ddim_fast.models.unet import ResidualBlock

NORMALIZATIONS = REPLACEMENTS["group normalization and SiLU in one pass"]
NEAR = dict(rtol=0, atol=1e-5)


def normal(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def with_weights(layer):
    """With weights that are not those of a new layer."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=10 + i)
    return layer


def replaced(model):
    return with_replacements(model, NORMALIZATIONS)


def kinds(model):
    return {name: type(layer) for name, layer in model.named_modules() if name}


@pytest.fixture
def calls(monkeypatch):
    """What went to the kernels: group normalizations with and without SiLU, and SiLU."""
    names = []
    kernels = normalizations.normalization

    def norm(x, *rest, **options):
        names.append("norm, SiLU" if options["silu"] else "norm")
        return kernels.group_norm(x, *rest, **options)

    recording = type("Recording", (), {"group_norm": staticmethod(norm)})
    recording.silu = staticmethod(lambda x: names.append("SiLU") or kernels.silu(x))
    monkeypatch.setattr(normalizations, "normalization", recording)
    return names


# --- Normalization and SiLU as one layer ------------------------------------------------------------------------------


def test_the_layer_is_what_it_says():
    layer, x = with_weights(GroupNormSiLU(4, 16)), normal(2, 16, 5, 6)
    h = F.group_norm(x, 4, layer.weight, layer.bias)
    assert torch.equal(layer(x), F.silu(h))
    scale, shift = normal(2, 32).chunk(2, dim=1)
    expected = F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(layer(x, (scale, shift)), expected, rtol=1e-5, atol=1e-6)


def test_a_residual_block_is_what_it_was():
    block = with_weights(ResidualBlock(16, 32, 8, groups=4)).eval()
    x, embedding = normal(2, 16, 5, 6), normal(2, 8)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias)))
    scale, shift = block.condition(embedding)[:, :, None, None].chunk(2, dim=1)
    h = torch.addcmul(shift, F.group_norm(h, 4, block.norm2.weight, block.norm2.bias), 1 + scale)
    assert torch.equal(block(x, embedding), block.skip(x) + block.conv2(F.silu(h)))


def test_gradients_reach_everything():
    layer, rows = GroupNormSiLU(4, 16), normal(2, 32).requires_grad_()
    x = normal(2, 16, 5, 6).requires_grad_()
    for made in (layer, FastGroupNormSiLU(layer)):
        made(x, rows.chunk(2, dim=1)).square().sum().backward()
        for tensor in (x, rows, layer.weight, layer.bias):
            assert tensor.grad.abs().max() > 0
            tensor.grad = None


# --- Which inputs go to a kernel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pictures_with_channels_last_do(calls, mode):
    norm, fused, x = with_weights(nn.GroupNorm(4, 16)), with_weights(GroupNormSiLU(4, 16)), normal(2, 16, 5, 6)
    rows = normal(2, 32).chunk(2, dim=1)
    with mode():
        torch.testing.assert_close(FastGroupNorm(norm)(x), norm(x), **NEAR)
        torch.testing.assert_close(FastGroupNormSiLU(fused)(x), fused(x), **NEAR)
        torch.testing.assert_close(FastGroupNormSiLU(fused)(x, rows), fused(x, rows), **NEAR)
        torch.testing.assert_close(FastSiLU(nn.SiLU())(x), F.silu(x), **NEAR)
    assert calls == ["norm", "norm, SiLU", "norm, SiLU", "SiLU"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer, x: (layer.double(), x.double()), id="float64"),
        pytest.param(lambda layer, x: (layer.bfloat16(), x.bfloat16()), id="bfloat16"),
        pytest.param(lambda layer, x: (layer, x.flatten(2)), id="three dimensions"),
        pytest.param(lambda layer, x: (layer.to("meta"), x.to("meta")), id="meta"),
    ],
)
def test_others_go_to_torch(calls, change):
    for plain, fast in ((nn.GroupNorm(4, 16), FastGroupNorm), (GroupNormSiLU(4, 16), FastGroupNormSiLU)):
        with torch.no_grad():
            layer, x = change(with_weights(plain), normal(2, 16, 5, 6))
            got, expected = fast(layer)(x), layer(x)
            silu, expected_silu = FastSiLU(nn.SiLU())(x), F.silu(x)
        assert got.dtype == expected.dtype == x.dtype
        if x.device.type != "meta":
            assert torch.equal(got, expected)
            assert torch.equal(silu, expected_silu)
    assert calls == []


def test_without_channels_last_and_in_autocast_and_with_gradients_too(calls):
    layer, x = with_weights(nn.GroupNorm(4, 16)), normal(2, 16, 5, 6)
    fast = FastGroupNorm(layer)
    with torch.no_grad():
        assert torch.equal(fast(x.contiguous()), layer(x.contiguous()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), layer(x))
            assert torch.equal(FastSiLU(nn.SiLU())(x), F.silu(x))
    assert torch.equal(fast(x), layer(x))
    assert fast(x).requires_grad
    assert calls == []


# --- Models -----------------------------------------------------------------------------------------------------------


def test_pairs_are_computed_together_and_stay_layers_of_their_own(calls):
    model = nn.Sequential(
        nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1), nn.GroupNorm(2, 16), nn.SiLU(), nn.SiLU()
    )
    model, x = with_weights(model).eval(), normal(2, 16, 5, 6)
    made = replaced(model)
    assert type(made) is FusingSequential
    assert list(made.state_dict()) == list(model.state_dict())
    assert type(model) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), **NEAR)
        assert calls == ["norm, SiLU", "norm, SiLU", "SiLU"]
        # As guided-diffusion calls its layers: something comes between the two of a pair.
        h = made[0](x) * 2
        torch.testing.assert_close(made[1:](h), model[1:](model[0](x) * 2), **NEAR)
        assert calls[3:] == ["norm", "SiLU", "norm, SiLU", "SiLU"]
        for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(again(x), made(x))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.GroupNorm(4, 16), nn.Identity(), nn.SiLU()],
        [nn.SiLU(), nn.GroupNorm(4, 16)],
        [nn.GroupNorm(4, 16), nn.SiLU(inplace=True)],
        [nn.GroupNorm(4, 20), nn.SiLU()],
    ],
    ids=["apart", "the other way", "in place", "channels"],
)
def test_what_is_no_pair(layers, calls):
    model = nn.Sequential(*layers).eval()
    made, x = replaced(model), normal(2, getattr(layers[0], "num_channels", 16), 5, 6)
    assert type(made) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), **NEAR)
    assert "norm, SiLU" not in calls


class Own(nn.Sequential):
    """A class of one's own may do anything."""


class Shared(nn.Module):
    """One SiLU for everything, one normalization under two names, and a sequence that is there twice."""

    def __init__(self):
        super().__init__()
        self.silu = nn.SiLU()
        self.first = self.second = nn.GroupNorm(4, 16)
        self.block = nn.Sequential(nn.GroupNorm(2, 16), self.silu)
        self.again = self.block
        self.own = Own(nn.GroupNorm(8, 16), self.silu)

    def forward(self, x):
        return self.own(self.again(self.silu(self.second(self.block(self.first(x))))))


def test_shared_layers(calls):
    model, x = with_weights(Shared()).eval(), normal(2, 16, 5, 6)
    made = replaced(model)
    assert made.first is made.second
    assert made.block is made.again
    assert made.silu is made.block[1] is made.own[1]
    assert type(made.own) is Own
    assert type(model.first) is nn.GroupNorm
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), **NEAR)
    assert calls == ["norm", "norm, SiLU", "norm", "SiLU", "norm, SiLU", "norm", "SiLU"]


def test_hooks_are_still_called():
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.GroupNorm(4, 16), nn.SiLU()).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output.square())
    made, x = replaced(model), normal(2, 16, 5, 6)
    assert list(kinds(made).values()) == [FastGroupNorm, nn.SiLU, FastGroupNorm, FastSiLU]
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), **NEAR)


def test_nothing_to_replace(monkeypatch):
    assert replaced(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())) is None
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU())
    assert replaced(replaced(model)) is None, "once is enough"
    monkeypatch.setattr(cpu_step, "extension", None)
    monkeypatch.setattr(cpu_step, "missing_reason", "the C++ extension is not there", raising=False)
    assert replaced(model) is None


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::DeprecationWarning:torch.*")  # torch's own
def test_torch_compile_sees_no_break_and_gives_the_same_bits():
    model, x = Shared().eval(), normal(2, 16, 5, 6)
    made = replaced(model)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_the_model_that_ships(calls):
    model = df.load_model("fashion")
    made = replaced(model)
    norms = [layer for layer in made.modules() if isinstance(layer, nn.GroupNorm)]
    assert {type(layer) for layer in norms} == {FastGroupNorm, FastGroupNormSiLU}
    assert list(made.state_dict()) == list(model.state_dict())
    x, t = normal(2, 1, 28, 28), torch.tensor([10, 900])
    with torch.no_grad():
        torch.testing.assert_close(made(x, t), model(x, t), rtol=0, atol=5e-5)
    assert len(calls) >= 23
    assert "norm, SiLU" in calls


def test_diffusers(calls):
    diffusers = pytest.importorskip("diffusers", reason="the U-Net is one of diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    made, x = replaced(model), normal(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(made(x, 5).sample, model(x, 5).sample, rtol=0, atol=5e-5)
    resnets = [name for name in kinds(made) if name.endswith(("norm1", "norm2"))]
    assert {kinds(made)[name] for name in resnets} == {FastGroupNorm}
    assert min(calls.count("norm"), calls.count("SiLU")) > len(resnets) // 2, (
        "the others get channels first, from attention"
    )
