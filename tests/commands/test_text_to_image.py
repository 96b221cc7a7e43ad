"""Directories of text-to-image pipelines: what is drawn is what the pipeline itself draws of the same latents."""

import json
import shutil

import numpy as np
import pytest
import tiny_pipelines
import torch
from commands.test_cli import load, run
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ddim_fast import DDIMSampler, sample_seeds
from ddim_fast.kernels.dispatch import normals
from ddim_fast.kernels.noise import NoiseStream
from ddim_fast.models.text_to_image import load_text_to_image
from ddim_fast.utils import pictures

WORDS = ["<|startoftext|>", "<|endoftext|>", *(letter for letter in "abcdefghij"), *(f"{x}</w>" for x in "abcdefghij")]
TEXT = dict(intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=50, max_position_embeddings=8,
            bos_token_id=0, eos_token_id=1)  # fmt: skip
FEW = ("--steps", 3, "--threads", 1, "--quiet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory, tokenizer):
    pipeline, _ = tiny_pipelines.stable_diffusion()
    pipeline.register_modules(tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("sd") / "pipeline"
    pipeline.save_pretrained(path)
    return path, pipeline


@pytest.fixture(scope="module")
def stable_diffusion_xl(tmp_path_factory, tokenizer):
    pipeline, _ = tiny_pipelines.stable_diffusion_xl(DDIMScheduler, **tiny_pipelines.STABLE_DIFFUSION_SCHEDULER)
    torch.manual_seed(1)
    encoders = [
        kind(CLIPTextConfig(**TEXT, hidden_size=8, projection_dim=16))
        for kind in (CLIPTextModel, CLIPTextModelWithProjection)
    ]
    names = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=True))
    pipeline.register_modules(tokenizer=tokenizer, tokenizer_2=tokenizer, **names)
    path = tmp_path_factory.mktemp("sdxl") / "pipeline"
    pipeline.save_pretrained(path)
    return path, pipeline


def initial_latents(path, prompts, count):
    """The noise that a run of the command starts from."""
    model = load_text_to_image(path, prompts)
    seeds = torch.from_numpy(sample_seeds(5, count))
    return normals(seeds, model.sample_shape, 0, NoiseStream.INITIAL)


@pytest.mark.parametrize(("kind", "negative"), [("stable_diffusion", "d e"), ("stable_diffusion_xl", None)])
def test_sample_draws_what_the_pipeline_draws(kind, negative, request, tmp_path):
    path, pipeline = request.getfixturevalue(kind)
    prompts = ["a b c", "f"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    words += [] if negative is None else ["--negative-prompt", negative]
    run("sample", "--model", path, *words, *FEW, "-n", 2, "--guidance", 4, "--seed", 5, "--spacing", "leading",
        "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png", "--files", tmp_path / "each")  # fmt: skip
    expected = pipeline(
        prompts, negative_prompt=None if negative is None else [negative] * 2, num_inference_steps=3, guidance_scale=4.0,
        latents=initial_latents(path, prompts, 2), output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    got = load(tmp_path / "s.npz")
    assert got["labels"].tolist() == [0, 1]
    np.testing.assert_allclose(got["samples"], expected.numpy(), atol=2e-4)
    decoded = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    files = sorted((tmp_path / "each").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png"]
    for file, picture in zip(files, pictures.to_uint8(decoded.detach()), strict=True):
        with Image.open(file) as image:
            assert np.abs(np.asarray(image).astype(int) - picture).max() <= 1
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.width > 2 * 84


def test_without_labels_guidance_leads_from_the_negative_prompt_to_itself(stable_diffusion):
    model = load_text_to_image(stable_diffusion[0], ["a b", "c"], "d")
    shape, negative = (2, *model.sample_shape), {"class_labels": torch.tensor([2, 2])}
    sampler = DDIMSampler(model.schedule, 2)
    assert model.unconditional({"class_labels": torch.tensor([0, 1])})["class_labels"].tolist() == [2, 2]
    unguided = sampler.sample(model, shape, seed=3, conditioning=negative)
    with pytest.warns(UserWarning, match="guidance needs what the model is guided to"):
        torch.testing.assert_close(sampler.sample(model, shape, seed=3, guidance_scale=4.0), unguided)


def test_pictures_are_encoded_and_decoded(stable_diffusion, tmp_path):
    path, pipeline = stable_diffusion
    Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8)).save(tmp_path / "in.png")
    words = ("--model", path, "--prompt", "a", *FEW, "--save", tmp_path / "s.npz", "--out", tmp_path / "g.png")
    run("inpaint", tmp_path / "in.png", "--keep", "left", *words)
    latents = pipeline.vae.encode(torch.full((1, 3, 16, 16), 200 / 127.5 - 1)).latent_dist.mode()
    latents = latents.detach() * pipeline.vae.config.scaling_factor
    model, mask = load_text_to_image(path, ["a"]), torch.zeros(latents.shape[2:])
    mask[:, : mask.shape[1] // 2] = 1
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64)}
    sampler = DDIMSampler(model.schedule, 3, **model.sampler_options)
    expected = sampler.inpaint(model, latents, mask, seed=0, conditioning=labels)
    np.testing.assert_allclose(load(tmp_path / "s.npz")["samples"], expected, atol=1e-5)
    with Image.open(tmp_path / "g.png") as grid:  # the kept half of the picture, and black
        assert grid.getpixel((6 + 5, 26 + 6 + 5))[0] > 60
        assert grid.getpixel((6 + 79, 26 + 6 + 5)) == (0, 0, 0)
    run("img2img", tmp_path / "in.png", tmp_path / "s.npz", *words)
    assert load(tmp_path / "s.npz")["samples"].shape == (2, *latents.shape[1:])
    run("interpolate", "--model", path, "--prompt", "a", *FEW, "--frames", 2, "-n", 1, "--out", tmp_path / "g.png")


def test_a_set_of_prompts_is_made_and_resumed_with_the_same_prompts_only(stable_diffusion, tmp_path):
    words = ("generate", "--model", stable_diffusion[0], "--steps", 2, "-n", 3, "--out", tmp_path / "set", "--quiet")
    run(*words, "--prompt", "a b", "--prompt", "c")
    run(*words, "--prompt", "a b", "--prompt", "c", "--resume")
    latents = load_file(tmp_path / "set" / "samples-000000.safetensors")["samples"]
    assert latents.shape == (3, 4, 8, 8)
    run(*words[:-2], tmp_path / "pictures", "--quiet", "--prompt", "a b", "--prompt", "c", "--format", "npz")
    decoded = load_text_to_image(stable_diffusion[0], ["a b", "c"]).decode(latents)
    written = load(tmp_path / "pictures" / "samples-000000.npz")["arr_0"]
    assert np.array_equal(written, pictures.to_uint8(decoded))
    assert "model" in run(*words, "--prompt", "a b", "--prompt", "d", "--resume", code=1)


def test_what_a_prompt_needs_is_said(stable_diffusion, tmp_path, monkeypatch):
    path, pipeline = stable_diffusion
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    StableDiffusionPipeline(
        **{**pipeline.components, "tokenizer": None, "text_encoder": None}, requires_safety_checker=False
    ).save_pretrained(bare)
    flow, _ = tiny_pipelines.stable_diffusion_3()
    flow.save_pretrained(tmp_path / "sd3")
    unconditional, _ = tiny_pipelines.unconditional()
    unconditional.save_pretrained(tmp_path / "plain")
    for words, said in {
        (path,): "a text-to-image model needs a prompt, got none",
        (path / "unet",): "a text-to-image model needs a prompt, got none",
        (path / "unet", "--prompt", "a"): "with a model_index.json",
        (bare, "--prompt", "a"): "got one without tokenizer, text_encoder",
        (tmp_path / "sd3", "--prompt", "a"): "pipe.scheduler = fast_scheduler(pipe.scheduler)",
        (tmp_path / "sd3",): "without unet",
        (tmp_path / "plain", "--prompt", "a"): "got a DDIMPipeline",
        (tmp_path / "nowhere", "--prompt", "a"): "nowhere', which does not exist",
        ("fashion", "--prompt", "a"): "--prompt is for the directory of a text-to-image pipeline, got --model fashion",
        (path, "--negative-prompt", "a"): "got --negative-prompt alone: add --prompt",
        (path, "--prompt", ""): "a prompt must be text, not empty",
    }.items():
        output = run("sample", "--model", *words, "--steps", 2, code=1)
        assert said in output
        assert "Traceback" not in output
    assert not list(tmp_path.glob("grid*"))


def test_a_damaged_text_encoder_is_named(stable_diffusion, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(stable_diffusion[0], broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"no weights")
    output = run("sample", "--model", broken, "--prompt", "a", "--out", tmp_path / "g.png", code=1)
    assert "diffusers cannot load the StableDiffusionPipeline in" in output
    assert "Traceback" not in output
