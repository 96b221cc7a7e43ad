"""Files of ``ddim-fast search`` in diffusers' loops: the steps are those of ``DDIMSampler`` with the
file, whose own tests hold it against float64."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from tiny_pipelines import SIZE, picture, stable_diffusion, stable_diffusion_parts

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.integrations.diffusers import FastDDIMParallelScheduler, FastDDIMScheduler
from ddim_fast.kernels.dispatch import ddim_step, normals
from ddim_fast.kernels.noise import NoiseStream, sample_seeds
from ddim_fast.plans.files import TimestepList
from ddim_fast.plans.rows import rows_of_plan

LINEAR, VISITED, TOLD = NoiseSchedule.linear(), (999, 700, 420, 90), (990, 731, 400, 110)
WEIGHTS = ((0.0, 0.0), (-0.3, 0.0), (-0.5, 0.125), (0.2, -0.1))
SHAPE = (2, 3, 4, 4)
KINDS = [FastDDIMScheduler, FastDDIMParallelScheduler]
PLAIN = {"clip_sample": False}


def fitted(schedule=LINEAR, weights=WEIGHTS, prediction_type="epsilon", told=TOLD, **options):
    plan = DDIMSampler(
        schedule, timesteps=VISITED, history_weights=weights, prediction_type=prediction_type, **options
    ).plan()
    rows = {"order": plan.order, "coefficients": rows_of_plan(plan), "prediction_type": prediction_type}
    return TimestepList(VISITED, 1000, schedule.digest, model_timesteps=told, **rows)


FILES = {
    "one list": TimestepList(VISITED, 1000, LINEAR.digest),
    "two lists": TimestepList(VISITED, 1000, LINEAR.digest, model_timesteps=(600, 731, 600, 0)),
    "order 2": TimestepList(VISITED, 1000, LINEAR.digest, order=2, model_timesteps=TOLD),
    "coefficients": fitted(),
}


def model(x, t, **conditioning):
    return torch.tanh(x * (1 + t.reshape(-1, 1, 1, 1) / 700)) - 0.3 * x


def noise(shape=SHAPE, seed=3):
    return normals(torch.from_numpy(sample_seeds(seed, shape[0])), shape[1:], 0, NoiseStream.INITIAL)


def loop(scheduler, x, first=0, **arguments):
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **arguments).prev_sample
    return x


def made(kind, tmp_path, found, **config):
    path = tmp_path / "solver.json"
    found.write(path)
    scheduler = kind(**{**PLAIN, **config})
    scheduler.set_timesteps(timesteps=path)
    return scheduler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_loop_with_a_file_gives_the_samplers_bits(kind, name, tmp_path):
    found = FILES[name]
    scheduler = made(kind, tmp_path, found)
    assert scheduler.timesteps.tolist() == list(found.model_timesteps or VISITED)
    expected = DDIMSampler(LINEAR, timesteps=found).sample(model, SHAPE, seed=3)
    for _ in range(2):  # the second run begins where the first one ended
        assert torch.equal(loop(scheduler, noise()), expected)
    scheduler.set_timesteps(50)
    plain = DDIMScheduler(**PLAIN)
    plain.set_timesteps(50)
    torch.testing.assert_close(loop(scheduler, noise()), loop(plain, noise()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_half_precision_and_mixed_dtypes_have_the_originals_dtypes(name, tmp_path):
    scheduler = made(FastDDIMScheduler, tmp_path, FILES[name])
    original = DDIMScheduler(**PLAIN)
    original.set_timesteps(4)
    for dtypes in [(torch.float16, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        scheduler.set_timesteps(timesteps=FILES[name])
        x, m = torch.randn(SHAPE).to(dtypes[0]), torch.randn(SHAPE).to(dtypes[1])
        for t in scheduler.timesteps:
            got, wanted = scheduler.step(m, t, x), original.step(m, original.timesteps[0], x)
            assert (got[0].dtype, got[1].dtype) == (wanted[0].dtype, wanted[1].dtype)
            assert got[0].stride() == wanted[0].stride()


def test_what_a_step_returns_is_not_changed_by_the_next_one(tmp_path):
    scheduler, x = made(FastDDIMScheduler, tmp_path, FILES["coefficients"]), noise()
    results, kept = [], []
    for t in scheduler.timesteps:
        results.append(scheduler.step(model(x, t.expand(2)), t, x))
        kept.append([tensor.clone() for tensor in results[-1].to_tuple()])
        x = results[-1].prev_sample
    returned = [tensor for result in results for tensor in result.to_tuple()]
    assert all(map(torch.equal, returned, [tensor for copies in kept for tensor in copies]))
    assert torch.equal(
        results[0].pred_original_sample,
        DDIMSampler(LINEAR, timesteps=[999]).sample(lambda x, t: model(x, t - 9), SHAPE, seed=3),
    )


@pytest.mark.parametrize("clipped", [False, True])
def test_eta_where_steps_are_not_deterministic_by_their_coefficients(clipped, tmp_path):
    scheduler = made(FastDDIMScheduler, tmp_path, FILES["two lists"], clip_sample=clipped, philox_noise=True)
    seeds = sample_seeds(3, 2)
    generators = [torch.Generator().manual_seed(int(np.uint64(seed))) for seed in seeds.view(np.uint64)]
    sampler = DDIMSampler(LINEAR, timesteps=FILES["two lists"], eta=0.7, clip_sample=clipped)
    assert torch.equal(loop(scheduler, noise(), eta=0.7, generator=generators), sampler.sample(model, SHAPE, seed=3))
    scheduler = made(FastDDIMScheduler, tmp_path, FILES["coefficients"])
    with pytest.raises(ValueError, match="need eta = 0, got"):
        loop(scheduler, noise(), eta=0.5)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("first", [1, 3])
def test_a_run_may_begin_at_any_step_as_img2img_does(name, first, tmp_path):
    scheduler = made(FastDDIMScheduler, tmp_path, FILES[name])
    x = noise()
    sampler = DDIMSampler(LINEAR, timesteps=FILES[name]).last_steps(4 - first)
    expected = x
    rows, told, histories = sampler.plan().steps, sampler.model_timesteps, {}
    if sampler.order > 1:
        names = ("history", "history_2")[: sampler.order - 1]
        histories = {which: torch.zeros_like(x) for which in names}
    for row, t in zip(rows, told, strict=True):
        expected = ddim_step(expected, model(expected, torch.full((2,), int(t))), row.coefficients, **histories)
    assert torch.equal(loop(scheduler, x, first), expected)


def test_noise_is_added_to_the_level_that_the_step_starts_from(tmp_path):
    scheduler = made(FastDDIMScheduler, tmp_path, FILES["coefficients"])
    x0, z = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    got = scheduler.add_noise(x0, z, torch.tensor([731, 110, 500]))
    bars = torch.tensor([LINEAR.alpha_bar(t) for t in (700, 90, 500)]).view(3, 1, 1)
    torch.testing.assert_close(got, (bars.sqrt() * x0 + (1 - bars).sqrt() * z).float(), rtol=1e-6, atol=1e-6)


# --- In pipelines --------------------------------------------------------------------------------------------------------


def of_pipeline(path):
    schedule = NoiseSchedule.scaled_linear()
    found = fitted(schedule, set_alpha_to_one=False)
    found.write(path)
    return found


def test_a_pipeline_takes_a_file_as_its_timesteps_or_keeps_it_in_its_config(tmp_path):
    path = tmp_path / "four.json"
    of_pipeline(path)
    pipe, prompt = stable_diffusion()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {**SIZE, **prompt, "latents": latents, "output_type": "latent"}
    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)
    by_argument = pipe(**arguments, timesteps=str(path)).images
    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config, solver=path)
    path.unlink()  # the config has what was in it
    assert torch.equal(pipe(**arguments, num_inference_steps=4).images, by_argument)
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be 4, those of the solver .* got 50: pass num_inference_steps=4"
    ):
        pipe(**arguments)
    pipe.save_pretrained(tmp_path / "pipe")
    stored = json.loads((tmp_path / "pipe/scheduler/scheduler_config.json").read_text())
    assert stored["solver"]["timesteps"] == list(VISITED)
    again = FastDDIMScheduler.from_pretrained(tmp_path / "pipe/scheduler")
    again.set_timesteps(4)
    assert again.timesteps.tolist() == list(TOLD)
    assert DDIMScheduler.from_pretrained(tmp_path / "pipe/scheduler").config.beta_schedule == "scaled_linear"
    off = FastDDIMScheduler.from_config(again.config, solver=None)
    off.set_timesteps(50)
    assert len(off.timesteps) == 50


def test_img2img_begins_within_the_file(tmp_path):
    path = tmp_path / "four.json"
    of_pipeline(path)
    parts = stable_diffusion_parts()
    pipe, prompt = stable_diffusion(StableDiffusionImg2ImgPipeline, parts)
    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config, solver=path)
    visited = []
    taken = pipe.scheduler.step
    pipe.scheduler.step = lambda m, t, x, **more: (visited.append(int(t)), taken(m, t, x, **more))[1]
    images = pipe(**prompt, image=picture(), strength=0.5, num_inference_steps=4, output_type="np").images
    assert visited == list(TOLD[2:])
    assert np.isfinite(images).all()


# --- What is refused, before anything changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "config", "error", "said"),
    [
        ("missing.json", {}, FileNotFoundError, r"no file of timesteps missing\.json: make one"),
        ("missing.txt", {}, ValueError, r"must end in \.json, got 'missing\.txt': make one"),
        (
            fitted(),
            {"beta_schedule": "squaredcos_cap_v2"},
            ValueError,
            "coefficients, which are those of one noise schedule",
        ),
        (fitted(), {"prediction_type": "v_prediction"}, ValueError, "for a model with prediction_type"),
        (fitted(), {"set_alpha_to_one": False}, ValueError, "must hold consistent coefficients"),
        (TimestepList((9, 3), 10), {}, ValueError, "is for 10 training timesteps"),
        (TimestepList((0.9, 0.3), None), {}, ValueError, "times of another path in continuous time"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(kind, given, config, error, said):
    scheduler = kind(**PLAIN, **config)
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.tolist()
    with pytest.raises(error, match=said):
        scheduler.set_timesteps(timesteps=given)
    with pytest.raises(error, match=said):
        kind(**PLAIN, **config, solver=given)
    assert (scheduler.timesteps.tolist(), scheduler.custom_timesteps) == (before, False)
    scheduler.step(torch.zeros(SHAPE), before[0], torch.zeros(SHAPE))


@pytest.mark.parametrize(("given", "error"), [(7, TypeError), ({}, ValueError), ({"format": "x"}, ValueError)])
def test_a_solver_that_is_none_is_refused(given, error):
    with pytest.raises(error, match=r"solver must be"):
        FastDDIMScheduler(solver=given)


def test_levels_that_are_not_the_configs_are_refused():
    scheduler = FastDDIMScheduler(**PLAIN)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match="alphas_cumprod holds another one: make the scheduler with the betas"):
        scheduler.set_timesteps(timesteps=FILES["one list"])


def test_steps_that_read_earlier_ones_must_come_in_order(tmp_path):
    scheduler, x = made(FastDDIMScheduler, tmp_path, FILES["coefficients"]), noise()
    scheduler.step(x, TOLD[0], x)
    for t in (TOLD[2], 5):
        with pytest.raises(
            ValueError, match=r"must come in order, 731 next, got 400|must be one of scheduler\.timesteps"
        ):
            scheduler.step(x, t, x)
    assert torch.equal(
        loop(scheduler, x), DDIMSampler(LINEAR, timesteps=FILES["coefficients"]).sample(model, SHAPE, seed=3)
    )
    with pytest.raises(ValueError, match="has no gradients"):
        scheduler.step(x, TOLD[0], x.clone().requires_grad_())


def test_a_step_of_each_samples_own_timestep_is_refused():
    scheduler = FastDDIMParallelScheduler(**PLAIN)
    scheduler.set_timesteps(timesteps=FILES["two lists"])
    x = noise()
    with pytest.raises(ValueError, match="not of a solver"):
        scheduler.batch_step_no_noise(x, torch.tensor([731, 0]), x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_made_within_a_run_goes_on_by_itself(copied, tmp_path):
    scheduler, x = made(FastDDIMScheduler, tmp_path, FILES["coefficients"]), noise()
    expected = DDIMSampler(LINEAR, timesteps=FILES["coefficients"]).sample(model, SHAPE, seed=3)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
    again = copied(scheduler)
    assert torch.equal(loop(scheduler, x, 2), expected)
    assert torch.equal(loop(again, x, 2), expected)


def test_on_a_gpu_nothing_waits_within_a_run():
    from ddim_fast.gpu_lab.fake_cuda import fake_cuda

    scheduler = FastDDIMScheduler(**PLAIN)
    scheduler.set_timesteps(timesteps=FILES["coefficients"])
    with fake_cuda() as device:
        timesteps = scheduler.timesteps.to("cuda")
        x, m = (torch.empty(2, 4, 8, 8, device="cuda") for _ in range(2))
        scheduler.step(m, TOLD[0], x)  # the table is copied to the device once
        with device.steady_state() as steady:
            for t in timesteps[1:]:
                scheduler.step(m, t, x)
    assert steady.region().own_launches["ddim_fast::ddim_step_kernel"] == 3
    assert (steady.syncs, steady.copies) == ([], [])


@pytest.mark.filterwarnings("ignore:.*Dynamo:UserWarning")  # dynamo warns of graph breaks
def test_a_compiled_step_of_a_file_breaks_the_graph_and_gives_the_same_bits():
    plain, compiled = FastDDIMScheduler(**PLAIN), FastDDIMScheduler(**PLAIN)
    for scheduler in (plain, compiled):
        scheduler.set_timesteps(timesteps=FILES["coefficients"])
    torch.compiler.reset()
    compiled.step = torch.compile(compiled.step, backend="eager")
    assert torch.equal(loop(compiled, noise()), loop(plain, noise()))
