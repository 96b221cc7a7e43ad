"""The shipped model: what it promises whatever its weights are. No number of the weights is pinned, as they may be retrained."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ddim_fast
from ddim_fast.models.protocol import output_tensor
from ddim_fast.models.shipped import SHIPPED, WEIGHTS, ShippedModel, load_shipped_model
from ddim_fast.models.unet import SmallUNet, timestep_embedding
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler

SHAPES = {"fashion": ((1, 28, 28), 10), "scenes": ((3, 32, 32), 6)}


@pytest.fixture(scope="module")
def model():
    return load_shipped_model("fashion")


def pictures(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 1, 28, 28))).float()


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_every_model_is_tested():
    assert SHAPES.keys() == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_in_eval_mode_and_frozen(name):
    model = load_shipped_model(name)
    assert isinstance(model, ShippedModel)
    assert not any(module.training for module in model.modules())
    parameters = list(model.parameters())
    assert parameters
    assert not any(p.requires_grad for p in parameters)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and p.isfinite().all() for p in parameters)
    assert not model(torch.zeros(1, *model.sample_shape), torch.tensor([3])).requires_grad


@pytest.mark.parametrize("name", SHIPPED)
def test_it_says_what_the_sampler_needs_to_know(name):
    card, model, (shape, classes) = SHIPPED[name], load_shipped_model(name), SHAPES[name]
    assert model.prediction_type == card.prediction_type == "v_prediction"
    assert model.clip_sample_range is card.clip_sample_range is None
    assert tuple(model.sample_shape) == shape
    assert model.num_classes == len(model.class_names) == len(set(model.class_names)) == classes
    assert model.unet.num_classes == classes
    assert model.schedule == NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    samples = DDIMSampler(model.schedule, 3).sample(model, (2, *shape), seed=0)
    assert samples.shape == (2, *shape)
    assert samples.isfinite().all()


def test_loading_twice_gives_two_models_with_the_same_output(model):
    again = load_shipped_model("fashion")
    assert again is not model
    x, t = pictures(2), torch.tensor([7, 900])
    assert torch.equal(again(x, t), model(x, t))
    theirs = {p.data_ptr() for p in again.parameters()}
    assert not theirs & {p.data_ptr() for p in model.parameters()}


def test_loading_draws_no_random_numbers():
    before = torch.get_rng_state()
    load_shipped_model("fashion")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cifar", "", "fashion.safetensors", "../fashion", "FASHION"])
def test_an_unknown_model_is_refused(name):
    with pytest.raises(ValueError, match=f"fashion, got {name!r}|one of fashion.*{name!r}"):
        load_shipped_model(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_are_small_and_match_the_network(name):
    path, model = WEIGHTS / f"{name}.safetensors", load_shipped_model(name)
    assert path.stat().st_size < 5_000_000
    parameters = sum(p.numel() for p in model.parameters())
    assert path.stat().st_size >= 2 * parameters  # they are all there, in half precision at least


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_can_be_loaded_in_another_dtype(model, dtype):
    other = load_shipped_model("fashion", dtype=dtype)
    x, t = pictures(2), torch.tensor([7, 900])
    y = other(x.to(dtype), t, torch.tensor([1, 2]))
    assert y.dtype == dtype
    expected = model(x, t, torch.tensor([1, 2]))
    allowed = 1e-4 if dtype == torch.float64 else 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=allowed * float(expected.abs().max()))


def test_it_loads_without_the_repository_on_the_path(tmp_path):
    code = (
        "import torch, ddim_fast as df\n"
        "m = df.load_model('fashion')\n"
        "s = df.DDIMSampler(df.NoiseSchedule.linear(), 2)\n"
        "x = s.sample(m, (2, 1, 28, 28), seed=5)\n"
        "assert x.shape == (2, 1, 28, 28) and x.isfinite().all()\n"
        "print('sum', repr(float(x.double().sum())))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    here = DDIMSampler(NoiseSchedule.linear(), 2).sample(load_shipped_model(), (2, 1, 28, 28), seed=5)
    assert float(found.stdout.split()[1]) == pytest.approx(float(here.double().sum()), abs=0.05)
    assert Path(ddim_fast.__file__).is_relative_to(WEIGHTS.parent)


# --- Output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_output_has_the_shape_of_the_input(model, count):
    x = pictures(count)
    y = model(x, torch.full((count,), 500), torch.zeros(count, dtype=torch.long))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    assert torch.equal(output_tensor(y, x), y)


def test_it_is_deterministic_and_leaves_its_input_alone(model):
    x, t, labels = pictures(3), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 9])
    before = x.clone()
    first = model(x, t, labels)
    torch.manual_seed(1)
    assert torch.equal(model(x, t, labels), first)
    assert torch.equal(x, before)


def test_each_sample_is_predicted_on_its_own(model):
    x, t, labels = pictures(4), torch.tensor([0, 100, 500, 999]), torch.tensor([3, 10, 0, 9])
    together = model(x, t, labels)
    for i in range(4):
        alone = model(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_the_class_and_the_timestep_change_the_output(model):
    x = pictures(1).expand(11, -1, -1, -1).contiguous()
    by_label = model(x, torch.full((11,), 300), torch.arange(11))
    by_time = model(x, torch.arange(0, 1000, 91), torch.zeros(11, dtype=torch.long))
    for outputs in (by_label, by_time):
        for i in range(11):
            for j in range(i):
                assert float((outputs[i] - outputs[j]).abs().max()) > 1e-3, (i, j)


def test_unconditional_is_the_label_num_classes(model):
    x, t = pictures(3), torch.tensor([0, 500, 999])
    without = model(x, t)
    assert torch.equal(model(x, t, class_labels=torch.full((3,), model.num_classes)), without)
    assert torch.equal(model(x, t, **model.unconditional({"class_labels": torch.tensor([1, 2, 3])})), without)
    assert model.unconditional({"class_labels": None, "other": 2}) == {"class_labels": None, "other": 2}
    assert model.unconditional({"other": 2}) == {"class_labels": None, "other": 2}
    assert not torch.equal(model(x, t, class_labels=torch.tensor([1, 2, 3])), without)


def test_a_batch_of_any_size_is_exported(model):
    x, t, labels = pictures(4), torch.full((4,), 5), torch.arange(4)
    exported = torch.export.export(model, (x, t, labels), dynamic_shapes=({0: torch.export.Dim("batch")},) * 3).module()
    torch.testing.assert_close(exported(x[:3], t[:3], labels[:3]), model(x[:3], t[:3], labels[:3]))


def test_a_label_outside_the_classes_is_refused(model):
    with pytest.raises(ValueError, match=r"class_labels must be .* from 0 to 9 \(10: no class\), got 11"):
        model(pictures(1), torch.tensor([5]), torch.tensor([11]))


def test_it_predicts_v_better_than_nothing_does(model):
    """Almost pure noise: v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 is then minus the picture, and dark at the border in all
    of Fashion-MNIST, where -1 is black: so the corner of the predicted x0 is well below 0."""
    t = torch.full((8,), 990)
    a = torch.tensor(model.schedule.alpha_bar(990))
    x = pictures(8)
    x0 = a.sqrt() * x - (1 - a).sqrt() * model(x, t)
    assert float(x0[:, 0, :2, :2].mean()) < -0.7
    assert float(x0.abs().max()) < 3


def test_samples_about_fill_the_range_of_pictures_and_follow_the_guidance(model):
    sampler = DDIMSampler(model.schedule, 8)
    labels = torch.tensor([1, 8])
    plain = sampler.sample(model, (2, 1, 28, 28), seed=0, conditioning={"class_labels": labels})
    assert plain.shape == (2, 1, 28, 28)
    # Not clipped on the way, samples pass the range of pictures by a little.
    assert float(plain.abs().max()) < 1.3
    assert float(plain.max()) > 0.2
    assert float(plain[:, 0, :2, :2].mean()) < -0.8  # dark corners
    guided = sampler.sample(model, (2, 1, 28, 28), seed=0, conditioning={"class_labels": labels}, guidance_scale=3.0)
    assert float((guided - plain).abs().max()) > 0.05
    nothing = sampler.sample(model, (2, 1, 28, 28), seed=0, conditioning={"class_labels": labels}, guidance_scale=0.0)
    torch.testing.assert_close(nothing, sampler.sample(model, (2, 1, 28, 28), seed=0), rtol=1e-3, atol=1e-3)


# --- The U-Net --------------------------------------------------------------------------------------------------------


def test_a_new_network_predicts_zero_and_learns():
    """Its last layer starts at zero; after one step every parameter that a picture and a label can reach has a gradient."""
    torch.manual_seed(0)
    unet = SmallUNet(width=16, embedding_dim=32)
    assert unet.training
    x, t, labels = pictures(4), torch.tensor([1, 50, 500, 999]), torch.tensor([0, 3, 9, 10])
    assert (unet(x, t, labels) == 0).all()
    with torch.no_grad():  # off the zeros that residual branches start with, which stop gradients
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x.requires_grad_()
    unet(x, t, labels).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert (x.grad.abs().flatten(1).max(dim=1).values > 0).all()
    unused = [i for i in range(11) if i not in labels.tolist()]
    assert (unet.label_embedding.weight.grad[unused] == 0).all()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    unet = SmallUNet(width=16, embedding_dim=32)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    x, t = pictures(8), torch.arange(8) * 100
    losses = []
    for _ in range(12):
        loss = (unet(x, t) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(in_channels=3, num_classes=2),
        dict(width=16, multiplier=4, blocks=1),
        dict(patch=1),
        dict(embedding_dim=48),
    ],
    ids=str,
)
def test_its_config_builds_it_again(config):
    unet = SmallUNet(**config)
    again = SmallUNet(**unet.config)
    again.load_state_dict(unet.state_dict())
    assert again.config == unet.config
    x = torch.zeros(2, config.get("in_channels", 1), 28, 28)
    assert unet(x, torch.tensor([1, 2])).shape == x.shape


def test_a_scalar_timestep_serves_the_whole_batch(model):
    x = pictures(3)
    assert torch.equal(model.unet(x, 400), model(x, torch.full((3,), 400)))
    assert torch.equal(model.unet(x, torch.tensor(400)), model(x, torch.full((3,), 400)))


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_the_timestep_embedding_is_the_formula(dim):
    """cos(t w_k), then sin(t w_k), w_k = 10000^(-k / (dim / 2)): written out in float64."""
    t = [0, 1, 17, 500, 999]
    got = timestep_embedding(torch.tensor(t), dim)
    assert got.shape == (5, dim)
    assert got.dtype == torch.float32
    for i, time in enumerate(t):
        angles = [time * 10000 ** (-k / (dim // 2)) for k in range(dim // 2)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        # An angle up to 999 held in float32 is off by up to some 1e-4.
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=0, atol=2e-4)
    half = timestep_embedding(torch.tensor([3.5]), dim, max_period=100.0)
    assert float(half[0, -1]) == pytest.approx(math.sin(3.5 * 100 ** (-(dim // 2 - 1) / (dim // 2))), abs=1e-6)
