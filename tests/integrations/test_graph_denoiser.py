"""``graph_denoiser`` on real pipelines of diffusers, small, with random weights: eager's pictures, one graph a signature. Graphs are the
recorded stand-in on the CPU, which freezes pointers and Python's numbers as a CUDA graph does."""

import copy
import inspect
import re
import warnings
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    MultiControlNetModel,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from page_examples import examples
from tiny_pipelines import SIZE, picture, stable_diffusion, stable_diffusion_parts, unconditional
from torch import nn

from ddim_fast.gpu_lab import Replay
from ddim_fast.gpu_lab.fake_cuda import FakeGraphs, fake_cuda
from ddim_fast.integrations.diffusers import fast_scheduler, graph_denoiser, graphed_denoisers
from ddim_fast.integrations.diffusers.denoisers import TIMESTEP_FROM_HOST, denoisers_of, timestep_on_device
from ddim_fast.sampling import capture
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*:UserWarning:diffusers")


def cache(**options):
    return GraphCache(backend=lambda device: Replay(), device_types=("cpu",), **options)


def with_controlnet():
    pipe, prompt = stable_diffusion(StableDiffusionControlNetPipeline, None, "unet", "controlnet")
    return pipe, {"image": picture(), **prompt}


def with_two_controlnets():
    parts = stable_diffusion_parts()
    other = copy.deepcopy(parts["controlnet"])
    controlnet = MultiControlNetModel([parts["controlnet"], other])
    pipe, prompt = stable_diffusion(StableDiffusionControlNetPipeline, parts, "unet", controlnet=controlnet)
    return pipe, {"image": [picture(), picture(1)], **prompt, "controlnet_conditioning_scale": [0.5, 1.0]}


def text_to_image():
    pipe, prompt = stable_diffusion()
    return pipe, {**SIZE, **prompt}


def image_to_image():
    pipe, prompt = tiny_pipelines.stable_diffusion_xl(kind=StableDiffusionXLImg2ImgPipeline)
    return pipe, {name: value for name, value in prompt.items() if name not in SIZE} | {
        "image": picture(),
        "strength": 0.6,
    }


PIPELINES = {
    "DDIM": (unconditional, {"unet": 1}),
    "Stable Diffusion": (text_to_image, {"unet": 1}),
    "ControlNet": (with_controlnet, {"unet": 1, "controlnet": 1}),
    "two ControlNets": (with_two_controlnets, {"unet": 1, "controlnet": 1}),
    "SDXL": (tiny_pipelines.stable_diffusion_xl, {"unet": 1}),
    "SDXL from a picture": (image_to_image, {"unet": 1}),
    "Stable Diffusion 3": (tiny_pipelines.stable_diffusion_3, {"transformer": 1}),
    "Flux": (tiny_pipelines.flux, {"transformer": 1}),
    "Wan": (tiny_pipelines.wan, {"transformer": 1}),
    "LTX": (tiny_pipelines.ltx, {"transformer": 1}),
    "CogVideoX": (tiny_pipelines.cogvideox, {"transformer": 1}),
    "LCM": (tiny_pipelines.latent_consistency, {"unet": 1}),
}
"""How a pipeline is made, and how many graphs each of its denoisers has."""


def run(pipe, call, seed=0, steps=4, **more):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!.*without CUDA graphs)", module="diffusers")
        result = pipe(
            **call, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="pt", **more
        )
    return result.frames if hasattr(result, "frames") else result.images


def tensor(pictures):
    return pictures if isinstance(pictures, torch.Tensor) else torch.as_tensor(pictures)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_pictures_by_one_graph_a_signature(name):
    make, graphs = PIPELINES[name]
    pipe, call = make()
    if name == "DDIM":
        call = {"batch_size": 2}
    run_ = (
        (lambda *args: tensor(pipe_of_arrays(pipe, call, *args)))
        if name == "DDIM"
        else (lambda *args: tensor(run(pipe, call, *args)))
    )
    expected = [run_(seed) for seed in range(2)]
    assert float(expected[0].max() - expected[0].min()) > 0.05, "these pictures must show something"
    assert not torch.equal(*expected)
    with graph_denoiser(pipe, graphs=cache(), strict=True) as graphed:
        for seed in range(2):
            assert torch.equal(run_(seed), expected[seed])
        stats = graphed.stats()
        assert {name: s.graphs for name, s in stats.items()} == graphs
        assert {name: s.misses for name, s in stats.items()} == graphs
        assert all(s.hits >= 3 and s.nbytes > 0 and s.fallbacks == {} for s in stats.values())
    assert not any("forward" in vars(part) for part in pipe.components.values() if isinstance(part, nn.Module))
    assert torch.equal(run_(0), expected[0])


def pipe_of_arrays(pipe, call, seed=0, steps=4):
    return pipe(
        **call, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np"
    ).images


SCHEDULERS = [UniPCMultistepScheduler, DPMSolverMultistepScheduler, PNDMScheduler]


@pytest.mark.parametrize(
    ("scheduler", "is_fast"), [*((s, False) for s in SCHEDULERS), *((s, True) for s in SCHEDULERS[:2])]
)
def test_outputs_that_schedulers_keep_are_not_overwritten(scheduler, is_fast):
    pipe, call = text_to_image()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = fast_scheduler(pipe.scheduler) if is_fast else pipe.scheduler
    expected = run(pipe, call, steps=8)
    with graph_denoiser(pipe, graphs=cache(), strict=True) as graphed:
        for _ in range(2):
            assert torch.equal(run(pipe, call, steps=8), expected)
        assert graphed.stats()["unet"].graphs == 1


def test_a_change_of_the_call_is_another_graph_and_the_old_one_is_found_again():
    pipe, call = text_to_image()
    calls = [
        ({}, 1),
        ({"guidance_scale": 1.0}, 2),  # no second half of the batch
        ({"height": 32}, 3),
        ({"guidance_scale": 3.0}, 3),
        ({"cross_attention_kwargs": {}}, 4),
        ({"eta": 0.5}, 4),
        ({}, 4),
    ]
    expected = [run(pipe, call | change, steps=2) for change, _ in calls]
    with graph_denoiser(pipe, graphs=cache(), strict=True) as graphed:
        for (change, graphs), pictures in zip(calls, expected, strict=True):
            assert torch.equal(run(pipe, call | change, steps=2), pictures), change
            assert graphed.stats()["unet"].graphs == graphs


def test_what_a_pipeline_does_between_steps_is_done():
    pipe, call = text_to_image()
    steps = []

    def callback(pipe, step, t, tensors):
        steps.append(step)
        return {"latents": tensors["latents"] * 0.9}

    expected = run(pipe, call, callback_on_step_end=callback)
    with graph_denoiser(pipe, graphs=cache(), strict=True):
        assert torch.equal(run(pipe, call, callback_on_step_end=callback), expected)
    assert steps == [0, 1, 2, 3] * 2
    assert not torch.equal(run(pipe, call), expected)


def test_autocast_and_half_precision():
    pipe, call = text_to_image()
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(pipe, call)
    pipe_16 = copy.deepcopy(pipe).to(torch.bfloat16)
    expected_16 = run(pipe_16, {name: v.bfloat16() if torch.is_tensor(v) else v for name, v in call.items()})
    with graph_denoiser(pipe, graphs=cache(), strict=True):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(run(pipe, call), expected)
        pipe.to(torch.bfloat16)
        assert torch.equal(
            run(pipe, {name: v.bfloat16() if torch.is_tensor(v) else v for name, v in call.items()}), expected_16
        )


# --- which modules ----------------------------------------------------------------------------------------------------------------------


def test_names_choose_and_shared_modules_are_one():
    pipe, call = with_controlnet()
    with graph_denoiser(pipe, names=("controlnet",), graphs=cache()) as graphed:
        assert repr(graphed) == "GraphedDenoisers(controlnet: 0 graphs, 0.0 MiB, 0 replays, 0 captures)"
        run(pipe, call)
        assert list(graphed.stats()) == ["controlnet"]
        assert re.fullmatch(r"GraphedDenoisers\(controlnet: 1 graphs, 0.0 MiB, 3 replays, 1 captures\)", repr(graphed))
        graphed.clear()
        assert graphed.stats()["controlnet"].graphs == 0
        run(pipe, call)
        assert graphed.stats()["controlnet"].misses == 1
    shared = type("Pipe", (), {"components": {"unet": pipe.unet, "transformer_2": pipe.unet}})()
    with graph_denoiser(shared, graphs=cache()) as graphed:
        run(pipe, call)
        assert [s.hits for s in graphed.stats().values()] == [3, 3]
    assert "forward" not in vars(pipe.unet)


def test_a_module_alone_is_its_own_pipeline():
    unet = unconditional()[0].unet
    with graph_denoiser(unet, graphs=cache(), strict=True) as graphed, torch.no_grad():
        x = torch.ones(1, 3, 16, 16)
        expected = copy.deepcopy(unet)(x, 3, return_dict=False)[0]
        for _ in range(2):
            assert torch.equal(unet(x, 3, return_dict=False)[0], expected)
        assert list(graphed.stats()) == ["UNet2DModel"]


def test_wrong_arguments_are_refused_before_anything_is_replaced():
    pipe, _ = with_controlnet()
    vae_only = copy.copy(pipe)
    for arguments, error, message in [
        ((3,), TypeError, "pipe must be a pipeline of diffusers, or a torch.nn.Module, got 3: for instance pipe.unet"),
        (
            (pipe, ("unet", "transformer")),
            ValueError,
            "got 'transformer', and it has vae, text_encoder, unet, controlnet",
        ),
        ((pipe, ()), ValueError, "at least one, got "),
        ((pipe, "unet"), TypeError, r"names must be several, .* got 'unet': names=\('unet',\)"),
        ((pipe.unet, ("unet",)), ValueError, "a module has none"),
    ]:
        names = {"names": arguments[1]} if len(arguments) > 1 else {}
        with pytest.raises(error, match=message):
            graph_denoiser(arguments[0], graphs=cache(), **names)
    with pytest.raises(TypeError, match="graphs must be a GraphCache"):
        graph_denoiser(pipe, graphs={})
    vae_only = type("Pipe", (), {"components": {"vae": pipe.vae}})()
    with pytest.raises(ValueError, match="must have a denoiser, got a Pipe with vae: name the modules"):
        graph_denoiser(vae_only)
    assert not any("forward" in vars(part) for part in pipe.components.values() if isinstance(part, nn.Module))
    with (
        graph_denoiser(pipe, graphs=cache()),
        pytest.raises(
            ValueError, match=r"gets graphs once, got unet, which has some: restore\(\) .*unet.forward.restore"
        ),
    ):
        graph_denoiser(pipe, graphs=cache())
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match=r"got unet, which .compile\(\) compiled in place"):
        graph_denoiser(pipe, graphs=cache())
    assert "forward" not in vars(pipe.controlnet)


class Closed(nn.Module):
    """It takes no attribute any more."""

    def __setattr__(self, name, value):
        if name == "forward":
            raise AttributeError("this module is closed")
        super().__setattr__(name, value)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_shallow_copy_has_the_originals_forward_until_it_gets_graphs_of_its_own():
    module, x = Scaled(2, 2), torch.ones(1, 2)
    with graph_denoiser(module, graphs=cache()), torch.no_grad():
        expected, other = module(x), copy.copy(module)
        other.scale = 2.0
        assert torch.equal(other(x), expected)
        with graph_denoiser(other, graphs=cache()) as graphed:
            assert torch.equal(other(x), 2 * expected)
            assert torch.equal(module(x), expected)
            assert graphed.stats()["Scaled"].misses == 1
        assert torch.equal(other(x), 2 * expected)


def test_what_was_restored_below_a_hook_gets_graphs_again():
    module, x = Scaled(2, 2), torch.ones(1, 2)
    graphed, old = graph_denoiser(module, graphs=cache()), module.forward
    module.forward = lambda x: old(x)
    graphed.restore()
    module.forward = old  # as hooks do that are taken away
    with graph_denoiser(module, graphs=cache()) as again, torch.no_grad():
        module(x)
        assert again.stats()["Scaled"].misses == 1
    assert "forward" not in vars(module)


def test_a_timestep_is_moved_where_the_module_moves_it():
    (unet,) = denoisers_of(text_to_image()[0]).values()
    arranged, sample = timestep_on_device(unet), torch.empty(1, device="meta")
    for timestep in (7, True, torch.tensor(7), torch.tensor(7.0)):
        (_, moved), _ = arranged((sample, timestep), {})
        _, kwargs = arranged((sample,), {"timestep": timestep})
        for got in (moved, kwargs["timestep"]):
            assert got.device.type == "meta"
            assert got.dtype == (timestep.dtype if isinstance(timestep, torch.Tensor) else torch.int64)
    for timestep in (7.0, None, torch.tensor([7]), torch.empty((), device="meta")):
        assert arranged((sample, timestep), {})[0][1] is timestep


def test_either_all_denoisers_get_graphs_or_none():
    parts = {"unet": nn.Linear(2, 2), "transformer": nn.Linear(2, 2), "controlnet": Closed()}
    pipe = type("Pipe", (), {"components": parts})()
    with pytest.raises(AttributeError, match="this module is closed"):
        graph_denoiser(pipe, graphs=cache())
    assert not any("forward" in vars(part) for part in parts.values())


def test_all_denoisers_are_restored_whatever_one_of_them_raises(monkeypatch):
    parts = {"unet": nn.Linear(2, 2), "transformer": nn.Linear(2, 2), "controlnet": nn.Linear(2, 2)}
    graphs = cache()
    graphed = graph_denoiser(type("Pipe", (), {"components": parts})(), graphs=graphs)
    discard = graphs.discard

    def fails(module):
        discard(module)
        if module is parts["transformer"]:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(graphs, "discard", fails)
    for module in parts.values():
        with torch.no_grad():
            module(torch.ones(1, 2))
    assert len(graphs) == 3
    with pytest.raises(RuntimeError, match="the device is gone"):
        graphed.restore()
    assert len(graphs) == 0
    assert not any("forward" in vars(part) for part in parts.values())


def test_on_a_cpu_the_pipeline_goes_on_and_says_why_once():
    pipe, call = text_to_image()
    expected = run(pipe, call)
    with graph_denoiser(pipe) as graphed:
        with pytest.warns(
            UserWarning, match=r"unet without CUDA graphs, for sample .*: graphs are made on cuda, got .* cpu"
        ) as caught:
            assert torch.equal(run(pipe, call), expected)
        assert len([w for w in caught if "without CUDA graphs" in str(w.message)]) == 1
        assert list(graphed.stats()["unet"].fallbacks.values()) == [4]
        assert repr(graphed).endswith("0 captures, 4 calls without a graph)")
    with graph_denoiser(pipe, strict=True), pytest.raises(CaptureError, match="graphs are made on cuda"):
        run(pipe, call)


def test_every_denoiser_of_diffusers_is_found():
    """By the classes that the constructors of all pipelines name."""
    missed, found = [], set()
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            continue
        for parameter in inspect.signature(kind.__init__).parameters.values():
            part = parameter.annotation
            if not isinstance(part, type) or not issubclass(part, nn.Module):
                continue
            of_steps = (
                ".unets." in part.__module__
                or ".transformers." in part.__module__
                or ".controlnets." in part.__module__
            )
            if not part.__module__.startswith("diffusers.models.") or not of_steps:
                continue
            pipe = type("Pipe", (), {"components": {parameter.name: part.__new__(part)}})()
            found.add(parameter.name)
            missed += [] if parameter.name in denoisers_of(pipe) else [f"{name}.{parameter.name}"]
    assert not missed
    assert {"unet", "transformer", "controlnet", "prior", "decoder"} <= found


# --- timesteps on the host -------------------------------------------------------------------------------------------------------------


def small_unet():
    return unconditional()[0].unet, (torch.ones(2, 3, 16, 16),), {}


def conditioned_unet():
    pipe, _ = stable_diffusion()
    return pipe.unet, (torch.ones(2, 4, 8, 8),), {"encoder_hidden_states": torch.ones(2, 4, 16)}


def controlnet():
    _, args, more = conditioned_unet()
    return stable_diffusion_parts()["controlnet"], args, {**more, "controlnet_cond": torch.ones(2, 3, 16, 16)}


@pytest.mark.parametrize("make", [small_unet, conditioned_unet, controlnet])
def test_an_int_and_a_number_on_the_host_are_the_tensor_that_the_module_makes_of_them(make):
    module, args, more = make()
    arranged = timestep_on_device(module)
    with torch.no_grad():
        for given in (0, 7, 999, torch.tensor(7), torch.tensor(951.5), torch.tensor(3, dtype=torch.int32)):
            for call in (((*args, given), {}), (args, {"timestep": given})):
                moved, kwargs = arranged(*call)
                told = kwargs.get("timestep", moved[-1])
                assert isinstance(told, torch.Tensor)
                expected = module(*call[0], **call[1], **more, return_dict=False)
                got = module(*moved, **kwargs, **more, return_dict=False)
                flat = lambda result: [*result[0], result[1]] if make is controlnet else [*result]  # noqa: E731
                assert all(map(torch.equal, flat(got), flat(expected)))
    for left in (True, 0.5, torch.tensor([1, 2])):
        assert arranged((*args, left), {}) == ((*args, left), {})
    assert timestep_on_device(nn.Linear(1, 1)) is None


def test_an_int_has_one_graph_for_all_steps():
    unet = unconditional()[0].unet
    with graph_denoiser(unet, graphs=cache(), strict=True) as graphed, torch.no_grad():
        for t in range(0, 1000, 100):
            assert torch.equal(unet(torch.ones(1, 3, 16, 16), t)[0], unet.forward.eager(torch.ones(1, 3, 16, 16), t)[0])
        assert graphed.stats()["UNet2DModel"].misses == 1


def test_a_subclass_may_use_its_timestep_otherwise():
    class Halved(UNet2DModel):
        def forward(self, sample, timestep):
            return sample * timestep / 2

    assert timestep_on_device(Halved(**unconditional()[0].unet.config)) is None


def test_the_classes_with_timesteps_on_the_host_are_those_whose_code_says_so():
    folder = Path(diffusers.__file__).parent / "models"
    pattern = (
        r"if not torch\.is_tensor\(timesteps\):.*?torch\.tensor\(\[timesteps\].*?"
        r"timesteps\[None\]\.to\((?:sample|hidden_states)\.device\)"
    )
    found = set()
    for path in (p for part in ("unets", "transformers", "controlnets") for p in (folder / part).glob("*.py")):
        text = path.read_text()
        for body in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            if re.search(pattern, body, re.DOTALL):
                found.add(re.match(r"\w+", body)[0])
    passes_on = {"MultiControlNetModel", "MultiControlNetUnionModel", "ControlNetXSAdapter"}
    assert found <= {*TIMESTEP_FROM_HOST}
    assert {*TIMESTEP_FROM_HOST} - found <= passes_on


def test_the_steps_of_a_pipeline_with_timesteps_on_the_host_wait_for_nothing():
    """DDIMPipeline's timesteps stay on the host."""
    with fake_cuda() as device:
        graphs = []

        class Reporting(FakeGraphs):
            def capture(self, function, pool=None):
                graphs.append(super().capture(function, pool))
                return graphs[-1]

        unet, (sample,), _ = small_unet()
        unet = unet.to("cuda").eval()
        with (
            graph_denoiser(unet, graphs=GraphCache(backend=lambda where: Reporting(device)), strict=True),
            torch.no_grad(),
        ):
            for t in (torch.tensor(3), torch.tensor(2), 1):
                unet(sample.to("cuda"), t)
    (graph,) = graphs
    assert graph.replays == 3
    assert graph.steady.syncs == graph.steady.copies == graph.steady.others == []


# --- the page -------------------------------------------------------------------------------------------------------------------------


class Kept(GraphCache):
    """A cache of the stand-in, in place of the device's."""

    def __init__(self, maxsize=8, max_bytes=None):
        super().__init__(maxsize, lambda device: Replay(), ("cpu",), max_bytes)


def test_the_examples_of_the_page_run_and_leave_the_pictures_as_they_are(monkeypatch):
    pipe, call = text_to_image()
    pipe.scheduler = fast_scheduler(pipe.scheduler)
    expected = run(pipe, call, steps=20)
    monkeypatch.setattr(graphed_denoisers, "GraphCache", Kept)
    monkeypatch.setattr(capture, "GraphCache", Kept)
    names = {"pipe": pipe, "call": call | {"output_type": "pt"}}
    for example in examples("drop_ins/graph_denoiser.md"):
        names["generator"] = torch.Generator().manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?!.*without CUDA graphs)", module="diffusers")
            example.run(names)
    assert torch.equal(names["images"], expected)
    assert "forward" not in vars(pipe.unet)
