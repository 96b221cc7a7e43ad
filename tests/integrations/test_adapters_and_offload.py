"""``graph_denoiser`` and captured loops with the real peft and accelerate: adapters that are switched, weights that hooks move. Run by
``make test-adapters``, since only these tests need them."""

import copy
import warnings

import pytest
import torch
from tiny_pipelines import SIZE, stable_diffusion

import ddim_fast as df
from ddim_fast.gpu_lab import Replay
from ddim_fast.integrations.diffusers import graph_denoiser
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError

pytestmark = [pytest.mark.adapters, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


def cache():
    return GraphCache(backend=lambda device: Replay(), device_types=("cpu",))


def text_to_image():
    pipe, prompt = stable_diffusion()
    return pipe, {**SIZE, **prompt}


def run(pipe, call, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!.*without CUDA graphs)", module="diffusers")
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, num_inference_steps=3, generator=generator, output_type="pt", **more).images


def quietly(pipe, call, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without CUDA graphs")
        return run(pipe, call, **more)


def with_adapters(unet):
    """Two adapters of random weights."""
    from peft import LoraConfig

    for seed, name in enumerate(("one", "two")):
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a .peft_config.")
            unet.add_adapter(config, adapter_name=name)
    for name, weight in unet.named_parameters():
        if "lora" in name:
            weight.data.mul_(30)
    return unet


SWITCHES = {
    "one": lambda unet: unet.set_adapter("one"),
    "two": lambda unet: unet.set_adapter("two"),
    "both": lambda unet: unet.set_adapters(["one", "two"], [1.0, 1.0]),
    "both, weighted": lambda unet: unet.set_adapters(["one", "two"], [0.3, 0.9]),
    "none": lambda unet: unet.disable_adapters(),
    "one again": lambda unet: (unet.enable_adapters(), unet.set_adapters(["one"], [1.0])),
}


@pytest.mark.parametrize("vouched", [False, True])
def test_pictures_are_those_of_the_adapter_that_is_on(vouched):
    pipe, call = text_to_image()
    with_adapters(pipe.unet)
    eager = copy.deepcopy(pipe)
    with graph_denoiser(pipe, graphs=cache(), vouched=vouched) as graphed:
        pictures = []
        for n, (name, switch) in enumerate(SWITCHES.items()):
            for each in (pipe, eager):
                switch(each.unet)
            expected = run(eager, call)
            if not vouched and n == 0:
                with pytest.warns(UserWarning, match="unet without CUDA graphs, .* has adapters of peft"):
                    got = run(pipe, call)
            else:
                got = quietly(pipe, call)
            assert torch.equal(got, expected), name
            assert torch.equal(quietly(pipe, call), expected), name
            pictures.append(got)
        assert not any(torch.equal(pictures[0], other) for other in pictures[1:-1])
        assert torch.equal(pictures[0], pictures[-1])
        stats = graphed.stats()["unet"]
        assert (stats.graphs == 0) != vouched
        assert bool(stats.fallbacks) != vouched
        assert not vouched or 5 <= stats.misses <= 6


def test_adapters_that_are_fused_or_taken_away_leave_a_module_that_is_captured():
    pipe, call = text_to_image()
    plain = run(pipe, call)
    with_adapters(pipe.unet)
    pipe.unet.set_adapter("one")
    adapted = run(pipe, call)
    pipe.unet.fuse_lora()
    fused = run(pipe, call)
    assert torch.allclose(fused, adapted, atol=1e-3)
    with graph_denoiser(pipe, graphs=cache()) as graphed:
        with pytest.warns(UserWarning, match="has adapters of peft"):
            assert torch.equal(run(pipe, call), fused)
        pipe.unet.unload_lora()
        assert torch.equal(quietly(pipe, call), fused)
        assert graphed.stats()["unet"].graphs == 1
    pipe, call = text_to_image()
    with_adapters(pipe.unet)
    pipe.unet.unload_lora()
    with graph_denoiser(pipe, graphs=cache(), strict=True):
        assert torch.equal(run(pipe, call), plain)


@pytest.mark.parametrize("capture", ["auto", "step", "loop"])
def test_a_captured_loop_follows_the_adapter_that_is_on(capture):
    unet = with_adapters(text_to_image()[0].unet)
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 3, graphs=cache())
    call = dict(shape=(1, 4, 8, 8), seed=0, conditioning={"encoder_hidden_states": torch.ones(1, 4, 16)})
    seen = []
    for switch in SWITCHES.values():
        switch(unet)
        expected = s.sample(unet, capture="off", **call)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(s.sample(unet, capture=capture, **call), expected)
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1])
    assert (len(s.graphs) == 0) == (capture == "auto")


def hook(module):
    """As accelerate's hooks of offloading do: weights are elsewhere before each call."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Moves(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            for weight in module.parameters():
                weight.data = weight.data.clone()
            return args, kwargs

    add_hook_to_module(module, Moves())


def unhook(module):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate_are_stood_aside_for_and_can_be_taken_away(when):
    pipe, call = text_to_image()
    expected = run(pipe, call)
    if when == "before":
        hook(pipe.unet)
        hooked = vars(pipe.unet)["forward"]
    graphed = graph_denoiser(pipe, graphs=cache())
    if when == "after":
        assert torch.equal(quietly(pipe, call), expected)
        hook(pipe.unet)
    with pytest.warns(
        UserWarning, match=r"forward replaced, as hooks that move|hooks that replace a forward come before"
    ):
        assert torch.equal(run(pipe, call), expected)
    if when == "before":
        graphed.restore()
        assert vars(pipe.unet)["forward"] is hooked
        unhook(pipe.unet)
        graphed = graph_denoiser(pipe, graphs=cache(), strict=True)  # accelerate leaves the class's method in the slot
    else:
        unhook(pipe.unet)
    assert torch.equal(quietly(pipe, call), expected)
    assert graphed.stats()["unet"].graphs == (1 if when == "before" else 2)  # the weights have moved
    graphed.restore()
    hook(pipe.unet)
    assert torch.equal(run(pipe, call), expected)


def test_restoring_below_hooks_of_accelerate_leaves_them():
    pipe, call = text_to_image()
    expected = run(pipe, call)
    graphed = graph_denoiser(pipe, graphs=cache())
    quietly(pipe, call)
    hook(pipe.unet)
    graphed.restore()
    assert torch.equal(quietly(pipe, call), expected)
    unhook(pipe.unet)
    assert torch.equal(quietly(pipe, call), expected)
    with graph_denoiser(pipe, graphs=cache(), strict=True) as graphed:
        assert torch.equal(run(pipe, call), expected)
        assert graphed.stats()["unet"].graphs == 1


@pytest.mark.parametrize("vouched", [False, True])
def test_sequential_offloading_is_not_captured(vouched):
    """Its weights are on meta between calls."""
    from accelerate import cpu_offload

    pipe, call = text_to_image()
    expected = run(pipe, call)
    cpu_offload(pipe.unet, execution_device="cpu")
    assert any(weight.device.type == "meta" for weight in pipe.unet.parameters())
    with graph_denoiser(pipe, graphs=cache(), vouched=vouched) as graphed:
        with pytest.warns(UserWarning, match="unet without CUDA graphs"):
            assert torch.equal(run(pipe, call), expected)
        assert graphed.stats()["unet"].graphs == 0
    with (
        graph_denoiser(pipe, graphs=cache(), vouched=vouched, strict=True),
        pytest.raises(CaptureError, match="unet without"),
    ):
        run(pipe, call)
