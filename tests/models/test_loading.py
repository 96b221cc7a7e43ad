"""Models from files, against the objects that were saved, and against diffusers' own loop."""

import contextlib
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from damaged_files import DEEP, VALUES, damaged, reads_or_names_the_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ddim_fast
from ddim_fast.models.loading import LoadedModel, _read_scheduler, load_model_from
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler

LINEAR = NoiseSchedule.linear()
# torch 2.10 warns of the buffers of its own archives.
READS_EXPORTED = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


class Net(nn.Module):
    """A small network, and one that dropout would change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(self.conv(x) * (0.5 + t.view(-1, 1, 1, 1) / 1000)))


class Labelled(Net):
    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x) + y.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- diffusers --------------------------------------------------------------------------------------------------------


def tiny_unet(**config):
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "dropout": 0.3,
        **config,
    }
    return seeded(lambda: UNet2DModel(**config))


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def save_pipeline(path, unet, scheduler, **options):
    unet.save_pretrained(path / "unet", **options)
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", type(unet).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


SCHEDULERS = {
    "DDPMScheduler": {},
    "DDIMScheduler": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
    "PNDMScheduler": {"num_train_timesteps": 200, "beta_end": 0.1, "prediction_type": "epsilon", "steps_offset": 1},
    "DDIMParallelScheduler": {"clip_sample_range": 0.7, "set_alpha_to_one": False, "prediction_type": "sample"},
    "DPMSolverMultistepScheduler": {"trained_betas": [0.001, 0.01, 0.02, 0.05, 0.1], "num_train_timesteps": 5},
    "EulerDiscreteScheduler": {"beta_start": 0.002, "timestep_spacing": "trailing"},
    "DDPMParallelScheduler": {"beta_schedule": "sigmoid", "clip_sample": False},
    "UniPCMultistepScheduler": {
        "num_train_timesteps": 300,
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
}


DDIM_FIELDS = (
    "num_train_timesteps",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_samples_as_diffusers_does(name, unet, tmp_path):
    """The loop is diffusers' DDIMScheduler with the configuration of the one that was saved, and alpha_bar in float64."""
    import diffusers

    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    model = load_model_from(save_pipeline(tmp_path, unet, scheduler), dtype=torch.float64)
    assert isinstance(model, LoadedModel)
    assert model.sample_shape == (3, 8, 8)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    # The square roots, since near zero terminal SNR rounding leaves diffusers' alpha_bar few digits.
    theirs = np.sqrt(scheduler.alphas_cumprod.double().numpy())
    allowed = 100 * torch.finfo(torch.float32).eps
    np.testing.assert_allclose(np.sqrt(model.schedule.alphas_cumprod), theirs, rtol=0, atol=allowed)

    # What the saved scheduler has no field for is off, as in its own steps, and not DDIM's default.
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    off = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}
    ddim = diffusers.DDIMScheduler(
        **{**off, **{key: config[key] for key in DDIM_FIELDS if key in config}}, trained_betas=[0.5] * len(theirs)
    )
    ddim.alphas_cumprod = torch.from_numpy(model.schedule.alphas_cumprod.copy())
    ddim.final_alpha_cumprod = torch.tensor(1.0) if ddim.config.set_alpha_to_one else ddim.alphas_cumprod[0]
    steps, eta = 5, 0.7
    ddim.set_timesteps(steps)
    network, x_T, generator = tiny_unet().double(), noise(2, 3, 8, 8).double(), torch.Generator().manual_seed(4)
    x = x_T
    for t in ddim.timesteps:
        x = ddim.step(network(x, t).sample, t, x, eta=eta, generator=generator).prev_sample
    sampler = DDIMSampler(model.schedule, steps, eta, **model.sampler_options)
    assert list(sampler.timesteps) == ddim.timesteps.tolist()
    got = sampler.sample(model, x_T=x_T, generator=torch.Generator().manual_seed(4))
    allowed = 1e4 * torch.finfo(torch.float64).eps  # full loops of a network
    torch.testing.assert_close(got, x, rtol=0, atol=allowed * float(x.abs().max()))


def test_thresholding_is_handed_on(unet, tmp_path):
    import diffusers

    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.7)
    model = load_model_from(save_pipeline(tmp_path, unet, scheduler))
    assert model.clip_sample_range is None  # diffusers thresholds instead of clipping
    sampler = DDIMSampler(model.schedule, 5, **model.sampler_options)
    assert (sampler.dynamic_thresholding_ratio, sampler.sample_max_value) == (0.9, 1.7)
    assert sampler.plan(model).clip_sample_range == 1.0


def test_defaults_are_those_of_the_scheduler_class(unet, tmp_path):
    """A file may leave out what has a default: DDPM clips, and the others have no clipping; Euler's timesteps are "linspace"."""
    import diffusers

    for name, clip_range, options in (
        ("DDPMScheduler", 1.0, {"timestep_spacing": "leading", "steps_offset": 0}),
        ("PNDMScheduler", None, {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": False}),
        ("EulerDiscreteScheduler", None, {"timestep_spacing": "linspace", "steps_offset": 0}),
    ):
        path = save_pipeline(tmp_path, unet, getattr(diffusers, name)())
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
        model = load_model_from(path)
        assert model.clip_sample_range == clip_range
        assert model.sampler_options == options
        assert model.prediction_type == "epsilon"
        assert model.schedule == NoiseSchedule.linear()


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_a_bare_model(unet, tmp_path, dtype):
    unet.save_pretrained(tmp_path)
    model = load_model_from(str(tmp_path), dtype=dtype)
    assert (model.schedule, model.prediction_type, model.clip_sample_range) == (None, None, None)
    assert model.sampler_options == {}
    expected_dtype = dtype or torch.float32
    assert {p.dtype for p in model.parameters()} == {expected_dtype}
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    got = model(x.to(expected_dtype), t)
    allowed = 300 * max(torch.finfo(expected_dtype).eps, torch.finfo(torch.float32).eps) * float(x.abs().max())
    torch.testing.assert_close(got.float(), unet(x, t).sample, rtol=0, atol=allowed)
    if dtype is None:
        assert torch.equal(got, unet(x, t).sample)


def test_conditioning_reaches_the_network(tmp_path):
    from diffusers import DDIMScheduler, UNet2DConditionModel

    config = {
        "sample_size": (8, 6),
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 4,
        "cross_attention_dim": 6,
        "attention_head_dim": 2,
    }
    unet = seeded(lambda: UNet2DConditionModel(**config))
    model = load_model_from(save_pipeline(tmp_path, unet, DDIMScheduler(clip_sample=False)))
    assert model.sample_shape == (4, 8, 6)
    x, t, text = noise(2, 4, 8, 6), torch.tensor([3, 900]), noise(2, 5, 6)
    assert torch.equal(model(x, t, encoder_hidden_states=text), unet(x, t, text).sample)
    sampler = DDIMSampler(model.schedule, 2, **model.sampler_options)
    got = sampler.sample(model, x_T=x, conditioning={"encoder_hidden_states": text})
    assert not torch.equal(got, sampler.sample(model, x_T=x, conditioning={"encoder_hidden_states": 0 * text}))


def test_what_stable_diffusion_xl_needs_beside_text_is_named(tmp_path):
    from tiny_pipelines import stable_diffusion_xl

    unet = stable_diffusion_xl()[0].unet
    unet.save_pretrained(tmp_path)
    model = pickle.loads(pickle.dumps(load_model_from(tmp_path)))
    x, t, text = noise(2, 4, 8, 8), torch.tensor([3, 900]), noise(2, 5, 16)
    added = {"text_embeds": noise(2, 16), "time_ids": torch.zeros(2, 6)}
    for passed, received in ((None, "got None"), ({"time_ids": added["time_ids"]}, r"got \['time_ids'\]")):
        rule = (
            rf"needs conditioning added_cond_kwargs, a dict of text_embeds and time_ids, {received}: pass conditioning="
        )
        with pytest.raises(ValueError, match=rule):
            model(x, t, encoder_hidden_states=text, added_cond_kwargs=passed)
    got = model(x, t, encoder_hidden_states=text, added_cond_kwargs=added)
    assert torch.equal(got, unet(x, t, text, added_cond_kwargs=added).sample)


def test_a_learned_variance_is_left_out(tmp_path):
    twice = tiny_unet(out_channels=6, sample_size=None)
    twice.save_pretrained(tmp_path)
    model = load_model_from(tmp_path)
    assert model.sample_shape is None
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(model(x, t), twice(x, t).sample[:, :3])


def test_pickled_weights_need_trust(unet, tmp_path):
    from diffusers import DDIMScheduler

    path = save_pipeline(tmp_path, unet, DDIMScheduler(), safe_serialization=False)
    with pytest.raises(ValueError, match=r"got only diffusion_pytorch_model\.bin .* trust_pickle=True"):
        load_model_from(path)
    model = load_model_from(path, trust_pickle=True)
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(model(x, t), unet(x, t).sample)


def test_the_network_is_never_asked(unet, tmp_path, monkeypatch):
    from diffusers import DDIMScheduler

    path = save_pipeline(tmp_path, unet, DDIMScheduler())

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    load_model_from(path)


# --- Errors of directories --------------------------------------------------------------------------------------------


def test_weights_are_found_by_the_names_that_diffusers_gives_them(unet, tmp_path):
    from diffusers import DDIMScheduler

    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    expected = unet(x, t).sample
    cases = [
        {"variant": "fp16"},
        {"variant": "non_ema", "safe_serialization": False},
        {"max_shard_size": "8KB"},
        {"max_shard_size": "8KB", "variant": "fp16"},
        {"max_shard_size": "8KB", "variant": "fp16", "safe_serialization": False},
    ]
    for number, options in enumerate(cases):
        path = save_pipeline(tmp_path / str(number), unet, DDIMScheduler(), **options)
        variant = options.get("variant")
        assert len(list((path / "unet").iterdir())) > (2 if "max_shard_size" in options else 1)
        if options.get("safe_serialization") is False:
            with pytest.raises(ValueError, match=r"got only \S+\.bin in .*trust_pickle=True"):
                load_model_from(path, variant=variant)
        for load in (load_model_from, ddim_fast.load_model):
            model = load(path, trust_pickle="safe_serialization" in options, variant=variant)
            assert torch.equal(model(x, t), expected)
        if variant is not None:
            looked_for = rf"in diffusion_pytorch_model\.safetensors, got none in .*pass variant='{variant}'"
            with pytest.raises(ValueError, match=looked_for):
                load_model_from(path, trust_pickle=True)
        with pytest.raises(ValueError, match=r"in diffusion_pytorch_model\.other\.safetensors, got none in"):
            load_model_from(path, variant="other")


def test_of_two_variants_the_one_that_is_named_is_loaded(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    other = tiny_unet()
    with torch.no_grad():
        other.conv_in.weight += 1
    other.save_pretrained(tmp_path, variant="ema")
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(load_model_from(tmp_path)(x, t), unet(x, t).sample)
    assert torch.equal(load_model_from(tmp_path, variant="ema")(x, t), other(x, t).sample)


def test_weights_beside_those_of_something_else(unet, tmp_path):
    from safetensors.torch import save_file

    unet.save_pretrained(tmp_path, safe_serialization=False)
    save_file({"lora": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"got only diffusion_pytorch_model\.bin in .*trust_pickle=True"):
        load_model_from(tmp_path)
    x, t = noise(2, 3, 8, 8), torch.tensor([3, 900])
    assert torch.equal(load_model_from(tmp_path, trust_pickle=True)(x, t), unet(x, t).sample)


@pytest.mark.parametrize("variant", ["", "../fp16", "fp16.safetensors", "a/b", 16])
def test_a_variant_is_a_word(unet, tmp_path, variant):
    unet.save_pretrained(tmp_path)
    with pytest.raises(TypeError if variant == 16 else ValueError, match="variant must be a word such as fp16"):
        load_model_from(tmp_path, variant=variant)


def test_a_variant_is_for_directories(tmp_path):
    for load in (
        lambda: ddim_fast.load_model("fashion", variant="fp16"),
        lambda: load_model_from(save_torchscript(Net(), tmp_path / "m.pt"), trust_pickle=True, variant="fp16"),
    ):
        with pytest.raises(ValueError, match="got 'fp16': leave it out for a model that is no such directory"):
            load()


@pytest.mark.parametrize("name", ["FastDDIMScheduler", "FastDDIMParallelScheduler", "FastDDIMInverseScheduler"])
def test_a_pipeline_that_was_saved_with_our_schedulers(unet, tmp_path, name):
    import diffusers

    from ddim_fast.integrations import diffusers as ours

    options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    got, wanted = (
        load_model_from(save_pipeline(tmp_path / of.__name__, unet, getattr(of, of_name)(**options)))
        for of, of_name in ((ours, name), (diffusers, name.removeprefix("Fast")))
    )
    assert got.schedule == wanted.schedule
    for setting in ("prediction_type", "clip_sample_range", "sampler_options", "sample_shape"):
        assert getattr(got, setting) == getattr(wanted, setting)
    # Every drop-in for DDIM is tried here.
    assert {n for n in ours.__all__ if n.startswith("FastDDIM")} == {
        f"Fast{n}" for n in ("DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler")
    }


@pytest.fixture
def pipeline(unet, tmp_path):
    from diffusers import DDIMScheduler

    return save_pipeline(tmp_path, unet, DDIMScheduler())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"unet": None}, "without unet: scheduler"),
        ("model_index.json", {"scheduler": None}, "without scheduler: unet"),
        ("unet/config.json", {"_class_name": "UNet1DModel"}, "one of UNet2DModel, .*got _class_name = 'UNet1DModel'"),
        ("unet/config.json", {"_class_name": None}, "got _class_name = None"),
        ("unet/config.json", {"block_out_channels": [16]}, "may be damaged or incomplete|got none that fit"),
        ("unet/config.json", {"layers_per_block": 2}, "must be those of its config.json, got none that fit"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "_class_name = 'LCMScheduler'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type in .* must be .*got 'flow'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, None),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule = 'laplace'"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "got use_flow_sigmas = True",
        ),
    ],
)
def test_what_cannot_be_honoured_is_named(pipeline, file, changes, message):
    edit(pipeline / file, **changes)
    if message is None:  # the edit itself is no error
        assert load_model_from(pipeline).schedule == NoiseSchedule.cosine()
        return
    with pytest.raises(ValueError, match=message):
        load_model_from(pipeline)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "scheduler",
            {"num_train_timesteps": "1000"},
            "num_train_timesteps in .* must be an integer in .*, got '1000'",
        ),
        ("scheduler", {"num_train_timesteps": -5}, "num_train_timesteps in .* got -5"),
        ("scheduler", {"num_train_timesteps": 10**12}, r"in \[1, 1000000\], got 1000000000000"),
        ("scheduler", {"trained_betas": "evil"}, "trained_betas in .* must be a list of numbers, got 'evil'"),
        ("scheduler", {"trained_betas": [0.1, "x"]}, "a number of trained_betas in .* got 'x'"),
        ("scheduler", {"trained_betas": [0.1, 2]}, r"must give a noise schedule: betas .*got betas\[1\] = 2"),
        ("scheduler", {"beta_end": "0.02"}, "beta_end in .* must be a finite number, got '0.02'"),
        ("scheduler", {"beta_schedule": ["linear"]}, "beta_schedule"),
        ("scheduler", {"prediction_type": ["epsilon"]}, r"prediction_type in .* must be .*got \['epsilon'\]"),
        ("scheduler", {"timestep_spacing": 5}, "timestep_spacing in .* must be one of .*got 5"),
        ("scheduler", {"steps_offset": "x"}, "steps_offset in .* must be an integer, .*got 'x'"),
        ("scheduler", {"clip_sample": "yes"}, "clip_sample in .* must be true or false, got 'yes'"),
        ("scheduler", {"clip_sample_range": "1"}, "clip_sample_range in .* must be a finite number.*got '1'"),
        ("scheduler", {"thresholding": True, "sample_max_value": []}, r"sample_max_value in .* got \[\]"),
        ("unet", {"sample_size": "8"}, "sample_size in .* must be an integer, at least 1, got '8'"),
        ("unet", {"sample_size": [8, 8, 8]}, r"sample_size in .* got \[8, 8, 8\]"),
        ("unet", {"in_channels": "3"}, "in_channels in .* must be an integer, at least 1, got '3'"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(pipeline, file, changes, message):
    edit(pipeline / {"scheduler": "scheduler/scheduler_config.json", "unet": "unet/config.json"}[file], **changes)
    with pytest.raises(ValueError, match=message):
        load_model_from(pipeline)


SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
SETTINGS += ("timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr", "clip_sample")
SETTINGS += ("clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "_class_name")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_scheduler_of_any_settings_samples_or_is_named(tmp_path, data):
    """What is accepted makes a sampler: nothing is left for its arguments to refuse."""
    from diffusers import DDIMScheduler

    config = dict(DDIMScheduler().config)
    changes = data.draw(st.dictionaries(st.sampled_from(SETTINGS), st.sampled_from(VALUES), max_size=3))

    def read(path):
        stated = _read_scheduler(path)
        steps = min(3, stated["schedule"].num_train_timesteps)
        DDIMSampler(stated["schedule"], steps, **stated["sampler_options"])

    content = json.dumps({**config, **changes}).encode()
    content = data.draw(st.one_of(st.just(content), damaged(content), st.sampled_from(DEEP)))
    reads_or_names_the_file(read, tmp_path / "scheduler_config.json", content)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    broken = tiny_unet()
    with torch.no_grad():
        broken.conv_out.bias[1] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(
        ValueError, match=r"must be finite, got NaN or infinity in conv_out\.bias of .*as torch\.float32"
    ):
        load_model_from(tmp_path / "nan")
    with torch.no_grad():
        broken.conv_out.bias[1] = 1e5
    broken.save_pretrained(tmp_path / "large")
    load_model_from(tmp_path / "large")
    with pytest.raises(ValueError, match=r"in conv_out\.bias of .* as torch\.float16: .* beyond that dtype"):
        load_model_from(tmp_path / "large", dtype=torch.float16)
    net = seeded(Net)
    net.conv.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"in conv\.bias of"):
        load_model_from(save_torchscript(net, tmp_path / "net.pt"), trust_pickle=True)


def test_a_model_that_needs_further_channels_is_refused(tmp_path):
    tiny_unet(in_channels=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in_channels = 5 and out_channels = 3"):
        load_model_from(tmp_path)


def test_damaged_directories(pipeline):
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a safetensors file, and is none, or damaged"):
        load_model_from(pipeline)
    weights.unlink()
    with pytest.raises(
        ValueError, match=r"must hold its weights as \.safetensors, in diffusion_pytorch_model\.safetensors, got none"
    ):
        load_model_from(pipeline)
    (pipeline / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON, and is not: Expecting"):
        load_model_from(pipeline)
    (pipeline / "unet" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_model_from(pipeline)
    (pipeline / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"must hold scheduler_config\.json, got none at"):
        load_model_from(pipeline)
    (pipeline / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"directory must be diffusers', with a model_index\.json"):
        load_model_from(pipeline)


@pytest.mark.parametrize("world", ["meta", torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("named", ["pipeline", "model"])
def test_a_directory_gives_the_same_model_whatever_the_callers_defaults(pipeline, named, world):
    path = pipeline if named == "pipeline" else pipeline / "unet"
    expected = ddim_fast.load_model(path)
    before = torch.get_default_dtype()
    try:
        if isinstance(world, torch.dtype):
            torch.set_default_dtype(world)
        with torch.device(world) if world == "meta" else contextlib.nullcontext():
            got = ddim_fast.load_model(path)
            assert torch.get_default_dtype() == (before if world == "meta" else world)
    finally:
        torch.set_default_dtype(before)
    tensors, wanted = got.state_dict(), expected.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert (tensor.device, tensor.dtype) == (torch.device("cpu"), wanted[name].dtype), name
        assert torch.equal(tensor, wanted[name]), name
    buffers = dict(expected.named_buffers())  # those that are not saved, too
    for name, tensor in got.named_buffers():
        assert (tensor.device, tensor.dtype) == (buffers[name].device, buffers[name].dtype), name
        assert torch.equal(tensor, buffers[name]), name
    assert got.schedule == expected.schedule
    assert got.sampler_options == expected.sampler_options
    x, t = noise(2, *expected.sample_shape), torch.tensor([3, 700])
    assert torch.equal(got(x, t), expected(x, t))


def test_diffusers_is_missing(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        load_model_from(pipeline)


def test_archives_need_no_diffusers():
    code = "import sys, ddim_fast.models.loading\nassert 'diffusers' not in sys.modules\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


# --- Archives ---------------------------------------------------------------------------------------------------------


def trusted(path, **options):
    return load_model_from(path, trust_pickle=True, **options)


def save_torchscript(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def save_exported(module, path, batch=3, dynamic=False, extra=()):
    inputs = (noise(batch, 2, 4, 4), torch.arange(batch), *extra)
    shapes = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in inputs) if dynamic else None
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("name", ["model.pt", "model.ts", "model"])
def test_torchscript(tmp_path, name):
    net = seeded(Net)
    model = trusted(save_torchscript(seeded(Net).train(), tmp_path / name))
    x, t = noise(3, 2, 4, 4), torch.tensor([3, 500, 900])
    assert torch.equal(model(x, t), net(x, t))  # without dropout: in eval mode
    assert not any(p.requires_grad for p in model.parameters())
    assert (model.prediction_type, model.schedule, model.sample_shape) == (None, None, None)
    sampler = DDIMSampler(LINEAR, 4)
    assert torch.equal(sampler.sample(model, x_T=x), sampler.sample(net, x_T=x))
    model.prediction_type = "v_prediction"
    v = DDIMSampler(LINEAR, 4, prediction_type="v_prediction")
    assert torch.equal(sampler.sample(model, x_T=x), v.sample(net, x_T=x))


def test_torchscript_in_another_dtype_and_with_conditioning(tmp_path):
    net, y = seeded(Labelled).double(), torch.tensor([0.1, 0.2, 0.3])
    model = trusted(save_torchscript(seeded(Labelled), tmp_path / "model.pt"), dtype=torch.float64)
    x, t = noise(3, 2, 4, 4, dtype=torch.float64), torch.tensor([3, 500, 900])
    assert torch.equal(model(x, t, y=y), net(x, t, y=y))


@READS_EXPORTED
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_programs(tmp_path, dynamic):
    net = seeded(Net)
    model = trusted(save_exported(net, tmp_path / "model.pt2", dynamic=dynamic)).eval()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for batch in (3, 5) if dynamic else (3,):
        x, t = noise(batch, 2, 4, 4), torch.arange(batch)
        assert torch.equal(model(x, t), net(x, t))
        sampler = DDIMSampler(LINEAR, 4, 1.0)
        assert torch.equal(sampler.sample(model, x_T=x, seed=0), sampler.sample(net, x_T=x, seed=0))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "the oldest pickle": lambda model: pickle.loads(pickle.dumps(model, 0)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": by_torch_save,
}


@READS_EXPORTED
@pytest.mark.parametrize("save", [save_torchscript, save_exported])
@pytest.mark.parametrize("way", COPIES)
def test_archives_are_copied_and_pickled_with_their_weights_as_they_are(tmp_path, save, way):
    model = trusted(save(seeded(Net), tmp_path / "model"))
    model.prediction_type = "v_prediction"
    for parameter in model.parameters():
        parameter.mul_(0.5)
    expected = DDIMSampler(LINEAR, 3).sample(model, (3, 2, 4, 4), seed=0)
    again = COPIES[way](model)
    assert again.prediction_type == "v_prediction"
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(DDIMSampler(LINEAR, 3).sample(again, (3, 2, 4, 4), seed=0), expected)


def test_exported_programs_say_which_shapes_they_take(tmp_path):
    model = trusted(save_exported(seeded(Net), tmp_path / "model.pt2"))
    with pytest.raises(ValueError, match=r"x \(3, 2, 4, 4\), t \(3,\), got x \(5, 2, 4, 4\) and t \(5,\): sample in"):
        DDIMSampler(LINEAR, 4).sample(model, (5, 2, 4, 4), seed=0)
    with pytest.raises(RuntimeError, match="should be the same"):  # no matter of shapes
        model(noise(3, 2, 4, 4, dtype=torch.float64), torch.arange(3))


@READS_EXPORTED
def test_exported_programs_with_conditioning(tmp_path):
    net, y = seeded(Labelled), torch.tensor([0.1, 0.2, 0.3])
    inputs = (noise(3, 2, 4, 4), torch.arange(3))
    torch.export.save(torch.export.export(net, inputs, {"y": y}), tmp_path / "model.pt2")
    model = trusted(tmp_path / "model.pt2")
    assert torch.equal(model(*inputs, y=y), net(*inputs, y=y))


def test_exported_programs_cannot_be_changed(tmp_path, monkeypatch):
    path = save_exported(seeded(Net), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"got dtype=torch\.float16: leave dtype out"):
        trusted(path, dtype=torch.float16)
    monkeypatch.setattr("ddim_fast.models.loading.usable_device", torch.device)  # stands for another device
    with pytest.raises(ValueError, match="exported for, cpu, got device='meta': pass device='cpu'"):
        trusted(path, device="meta")


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])
    return path


def without(path, part):
    """The archive with one of its files emptied."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, b"" if name.endswith(part) else content)
    return path


def saved(path, content):
    torch.save(content, path)
    return path


def written(path, content=b"no archive"):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: saved(d / "weights.pt", Net().state_dict()), r"is a pickle .*load_state_dict\(torch\.load\("),
        (lambda d: saved(d / "module.pt2", [1, 2]), "is a pickle"),
        (lambda d: written(d / "notes.txt"), "must be a TorchScript archive, .* is none, or damaged"),
        (lambda d: written(d / "empty.pt", b""), "is none, or damaged"),
        (lambda d: written(d / "w.safetensors"), "weights without a network: name the diffusers directory"),
        (lambda d: truncated(save_torchscript(Net(), d / "cut.pt")), "is none, or damaged"),
        (lambda d: truncated(save_exported(Net(), d / "cut.pt2")), "is none, or damaged"),
        (lambda d: without(save_torchscript(Net(), d / "a.pt"), "data.pkl"), "cannot load the TorchScript archive"),
        (lambda d: without(save_exported(Net(), d / "a.pt2"), "model.json"), "cannot load the torch.export archive"),
    ],
    ids=[
        "state_dict",
        "pickle",
        "text",
        "empty",
        "safetensors",
        "cut_torchscript",
        "cut_export",
        "no_data",
        "no_graph",
    ],
)
def test_files_that_are_no_model(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        trusted(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_compiled_packages_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/data/aotinductor/model/model.so", "")
    with pytest.raises(ValueError, match="aoti_load_package"):
        load_model_from(tmp_path / "model.pt2")


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"got .*missing, which does not exist: download a model from a hub first"
    ):
        load_model_from(tmp_path / "missing")
    with pytest.raises(ValueError, match="got 'gpu'"):
        load_model_from(tmp_path, device="gpu")
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        load_model_from(tmp_path, dtype=torch.int64)


# --- Code that would run ------------------------------------------------------------------------------------------------


class Exploit:
    """A pickle that writes a marker, or whatever the call is, while it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def with_member(path, part, content):
    """The archive with one of its files replaced, or added."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in files if name.endswith(part)] or [f"{next(iter(files)).partition('/')[0]}/{part}"]
    files |= dict.fromkeys(names, content)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def exploit_bytes(marker, how):
    """A pickle by itself, of torch's two formats or Python's."""
    buffer = io.BytesIO()
    if how == "pickle":
        buffer.write(pickle.dumps(Exploit(marker)))
    else:
        torch.save(Exploit(marker), buffer, _use_new_zipfile_serialization=how == "zip")
    return buffer.getvalue()


ARCHIVES = {
    "sample inputs": lambda path, marker: with_member(
        save_exported(Net(), path), "data/sample_inputs/model.pt", exploit_bytes(marker, "zip")
    ),
    "constants": lambda path, marker: with_member(
        save_torchscript(Net(), path), "constants.pkl", exploit_bytes(marker, "pickle")
    ),
    "attributes": lambda path, marker: with_member(
        save_torchscript(Net(), path), "data.pkl", exploit_bytes(marker, "pickle")
    ),
    "zip": lambda path, marker: written(path, exploit_bytes(marker, "zip")),
    "legacy": lambda path, marker: written(path, exploit_bytes(marker, "legacy")),
    "pickle": lambda path, marker: written(path, exploit_bytes(marker, "pickle")),
    "objects": lambda path, marker: numpy_objects(path, marker),
}


def numpy_objects(path, marker):
    with open(path, "wb") as file:
        np.savez(
            file, samples=np.array([Exploit(marker)], dtype=object), arr_0=np.array([Exploit(marker)], dtype=object)
        )
    return path


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_the_exploits_are_real(tmp_path):
    for how in ("zip", "legacy", "pickle"):
        content = io.BytesIO(exploit_bytes(tmp_path / how, how))
        pickle.load(content) if how == "pickle" else torch.load(content, weights_only=False).close()
        assert (tmp_path / how).exists()
    with contextlib.suppress(ValueError):
        trusted(ARCHIVES["sample inputs"](tmp_path / "m.pt2", tmp_path / "export"))
    assert (tmp_path / "export").exists()


@pytest.mark.parametrize("archive", ARCHIVES)
def test_no_archive_runs_without_trust_whatever_its_name(tmp_path, archive):
    original = ARCHIVES[archive](tmp_path / "original", tmp_path / "marker")
    for name in ("m.pt", "m.pt2", "m.ts", "m.pth", "m.ckpt", "m.bin", "m.pkl", "m.npz", "m.npy", "m.safetensors", "m"):
        path = written(tmp_path / name, original.read_bytes())
        for load in (load_model_from, ddim_fast.load_model):
            with pytest.raises(ValueError, match=r"trust_pickle=True|is a pickle|weights without a network|is none"):
                load(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("archive", [*ARCHIVES, "module"])
def test_no_command_runs_a_file_without_trust(tmp_path, archive, monkeypatch):
    from click.testing import CliRunner

    from ddim_fast.cli import main

    monkeypatch.chdir(tmp_path)
    make = ARCHIVES.get(archive, lambda path, marker: save_torchscript(seeded(Net), path))
    path = make(tmp_path / "m.npz", tmp_path / "marker")
    (tmp_path / "x.safetensors").write_bytes(path.read_bytes())
    (tmp_path / "x.png").write_bytes(path.read_bytes())
    model = ["--model", str(path)]
    commands = [
        ["sample", *model],
        ["img2img", "m.npz", *model],
        ["inpaint", "m.npz", "--keep", "left", *model],
        ["interpolate", *model],
        ["reconstruct", "m.npz", *model],
        ["generate", "-n", "4", "--out", "set", *model],
        ["search", "--steps", "3", *model],
        ["tradeoff", "--out", "study", *model],
        *(["img2img", name] for name in ("m.npz", "x.safetensors", "x.png")),
    ]
    for words in commands:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 1, words
        assert result.output.startswith("Error: "), words
        assert isinstance(result.exception, SystemExit), words
    assert not (tmp_path / "marker").exists()


def test_no_part_of_a_directory_runs_without_trust(pipeline, tmp_path):
    marker, unet = tmp_path / "marker", pipeline / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    intact = weights.read_bytes()
    for how in ("zip", "legacy", "pickle"):
        weights.write_bytes(exploit_bytes(marker, how))
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors must be a safetensors file"):
            load_model_from(pipeline)
    weights.unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(exploit_bytes(marker, "zip"))
    with pytest.raises(ValueError, match="trust_pickle=True"):
        load_model_from(pipeline)
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("diffusion_pytorch_model.bin", "../evil.safetensors", "/evil.safetensors", 3):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
        with pytest.raises(ValueError, match=r"must be a \.safetensors in the same directory"):
            load_model_from(pipeline)
    index.unlink()
    weights.write_bytes(intact)
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    names = ("os.system", "evil_module.Evil", "evil_module", "__import__", "FlaxUNet2DConditionModel", ["UNet2DModel"])
    for file in ("unet/config.json", "scheduler/scheduler_config.json"):
        original = (pipeline / file).read_text()
        for name in names:
            edit(pipeline / file, _class_name=name, auto_map={"AutoModel": "evil_module.Evil"})
            with pytest.raises(ValueError, match="got _class_name = "):
                load_model_from(pipeline)
        (pipeline / file).write_text(original)
    edit(pipeline / "unet/config.json", quantization_config={"quant_method": "torchao", "quant_type": "evil"})
    with pytest.raises(ValueError, match="got a quantization_config in"):
        load_model_from(pipeline)
    assert not marker.exists()


# --- What needs no loading --------------------------------------------------------------------------------------------


def test_compiled_modules_and_callables_are_models():
    net, sampler, x = seeded(Net), DDIMSampler(LINEAR, 3), noise(3, 2, 4, 4)
    expected = sampler.sample(net, x_T=x)
    assert torch.equal(sampler.sample(torch.compile(net, backend="eager"), x_T=x), expected)
    assert torch.equal(sampler.sample(lambda x, t: net(x, t), x_T=x), expected)


def test_one_function_loads_what_ships_and_what_does_not(tmp_path):
    assert isinstance(ddim_fast.load_model(), ddim_fast.models.shipped.ShippedModel)
    assert ddim_fast.load_model("fashion", dtype=torch.float16).unet is not None
    with pytest.raises(
        FileNotFoundError, match=r"one of those that ship \(fashion, scenes\), or the path .*, got 'hat'"
    ):
        ddim_fast.load_model("hat")
    with pytest.raises(ValueError, match="a directory must be diffusers'"):
        ddim_fast.load_model(tmp_path)
