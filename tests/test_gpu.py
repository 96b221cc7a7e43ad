"""On a real CUDA device: what the emulator and the stand-ins promise. ``make gpu`` runs it; without a device each test says so and skips,
or fails where DDIM_FAST_REQUIRE_GPU=1."""

import copy
import os

import numpy as np
import pytest
import torch
import triton_cases
from covering import covering

import ddim_fast as df
from ddim_fast.kernels import noise
from ddim_fast.kernels.contract import StepInputs
from ddim_fast.kernels.dispatch import ddim_step, normals
from ddim_fast.kernels.thresholding import dynamic_thresholds
from ddim_fast.kernels.triton_backend import dynamic_thresholds as thresholds_by_triton
from ddim_fast.kernels.triton_backend import run
from ddim_fast.sampling.capture import GraphCache
from ddim_fast.sampling.cuda_graphs import CaptureError
from ddim_fast.utils.transfer import to_device as send

pytestmark = pytest.mark.gpu
SHAPE = (4, 1, 28, 28)


@pytest.fixture(autouse=True, scope="module")
def _device():
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and torch finds none"
        if os.environ.get("DDIM_FAST_REQUIRE_GPU") == "1":
            pytest.fail(f"DDIM_FAST_REQUIRE_GPU=1, but this {reason}")
        pytest.skip(reason)
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def cache():
    cache = GraphCache()
    yield cache
    cache.clear()


def to_device(inputs):
    """The same inputs on the device, in the same layout of memory; a tensor that is updated in place still is."""
    moved = {}

    def move(tensor):
        if id(tensor) not in moved:
            base = torch.empty(
                tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cuda"
            )
            view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            moved[id(tensor)] = view.copy_(tensor)
        return moved[id(tensor)]

    fields = {name: getattr(inputs, name) for name in StepInputs.__dataclass_fields__ if name != "reads"}
    return StepInputs(**{k: move(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


def same_bits(a, b):
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.cpu().contiguous().view(kind), b.cpu().contiguous().view(kind))


@pytest.mark.parametrize("choice", covering(triton_cases.OPTIONS, seed=3), ids=triton_cases.name_of)
def test_step_has_the_bits_of_the_cpu(choice):
    inputs = triton_cases.make(choice).inputs
    there = to_device(inputs)
    run(there)
    here = copy.deepcopy(inputs)
    names = set(StepInputs.__dataclass_fields__) - {
        "reads",
        "x_t",
        "model_output",
        "coefficients",
        "index",
        "x_prev",
        "x0",
    }
    keywords = {name: getattr(here, name) for name in names}
    ddim_step(
        here.x_t, here.model_output, here.coefficients, backend="cpu", out=here.x_prev, x0_out=here.x0, **keywords
    )
    assert same_bits(there.x_prev, here.x_prev)
    for name in ("x0", "history", "history_2", "model_input_out", "log_prob_out"):
        assert getattr(here, name) is None or same_bits(getattr(there, name), getattr(here, name))


def test_noise_has_the_bits_of_the_standard():
    seeds = torch.tensor([0, 1, -1, 1 << 40])
    for step, stream in [(0, 0), (2**32 - 1, 3)]:
        z = normals(seeds.cuda(), (100_003,), step, stream)
        assert same_bits(z, torch.from_numpy(noise.standard_normals(seeds.numpy(), 100_003, step, stream)))


def test_fast_noise_is_normal():
    from scipy import stats

    x = torch.zeros(4, 1 << 20, device="cuda")
    row = df.StepCoefficients(0, 0, 0, 0, 0, 0, 0, prev_noise=1)
    z = run(StepInputs(x, x, row, seeds=torch.arange(4, device="cuda"), normals="fast")).cpu().numpy().ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 5e-3
    assert abs(z.std() - 1) < 5e-3
    exact = noise.standard_normals(np.arange(4), 1 << 20, 0, 0).ravel()
    assert np.corrcoef(np.sort(z), np.sort(exact))[0, 1] > 0.99999


@pytest.mark.parametrize("n", [1, 129, 5000, (1 << 24) + 3])
def test_thresholds_are_the_quantile(n):
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(2, 2, n, generator=generator)
    row = df.StepCoefficients(1.0, 0.0, 0, 1, 0, 0.5, 0.5, 0, clip=0.25)
    for ratio in (0.0, 0.995, 1.0):
        got = thresholds_by_triton(StepInputs(x.cuda(), m.cuda(), row), ratio, 100.0)
        torch.testing.assert_close(got.cpu(), dynamic_thresholds(x, m, row, ratio, 100.0), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def model():
    return df.load_model("fashion").cuda()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_eager_step_and_loop_are_equal_to_the_bit(model, cache, eta, guidance):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 10, eta, graphs=cache)
    for seed in (0, 1):
        labels = {"class_labels": torch.tensor([seed, 1, 2, 3], device="cuda")}
        call = dict(shape=SHAPE, seed=seed, device="cuda", conditioning=labels, guidance_scale=guidance)
        eager = s.sample(model, capture="off", **call)
        for mode in ("step", "loop", "auto"):
            assert torch.equal(s.sample(model, capture=mode, **call), eager), (mode, seed)
    assert len(cache) == 2
    assert torch.isfinite(eager).all()


def test_pictures_are_those_of_the_cpu(model, cache):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 10, 1.0, graphs=cache)
    there = s.sample(model, SHAPE, seed=0, device="cuda").cpu()
    here = s.sample(df.load_model("fashion"), SHAPE, seed=0)
    assert (there - here).abs().mean() < 1e-2


def test_new_values_take_effect_on_replay(model, cache):
    for eta in (0.3, 0.9):
        s = df.DDIMSampler(df.NoiseSchedule.linear(), 7, eta, graphs=cache)
        for seed, guidance in [(0, 2.0), (1, 2.0), (1, 4.0)]:
            labels = {"class_labels": torch.tensor([seed, 1, 2, 3], device="cuda")}
            call = dict(shape=SHAPE, seed=seed, device="cuda", conditioning=labels, guidance_scale=guidance)
            eager = s.sample(model, capture="off", **call)
            assert torch.equal(s.sample(model, capture="step", **call), eager)
    assert len(cache) == 1


class Syncs(torch.nn.Module):
    prediction_type = "epsilon"

    def forward(self, x, t):
        return x * 0.1 if x.abs().max().item() > 0 else x


def test_a_model_that_waits_is_refused_or_falls_back_and_leaves_the_device_usable(model, cache):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 4, graphs=cache)
    with pytest.raises(CaptureError, match=r"x\.abs\(\)"):
        s.sample(Syncs(), SHAPE, seed=0, device="cuda", capture="step")
    bad = Syncs()
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        s.sample(bad, SHAPE, seed=0, device="cuda")
    torch.randn(2, device="cuda")  # directly after the fallback, before another capture
    assert torch.isfinite(s.sample(model, SHAPE, seed=0, device="cuda", capture="step")).all()


def test_a_compiled_model_is_captured(cache):
    compiled = torch.compile(df.load_model("fashion").cuda())
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 5, prediction_type="v_prediction", graphs=cache)
    eager = s.sample(compiled, SHAPE, seed=0, device="cuda", capture="off")
    assert torch.equal(s.sample(compiled, SHAPE, seed=0, device="cuda", capture="step"), eager)


def test_the_step_is_one_operator_for_torch_compile():
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100), eta=1.0)
    x, m = torch.randn(2, 2, 3, 8, 8, device="cuda")
    table, index, seeds = (
        plan.table("cuda"),
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        torch.arange(2, device="cuda"),
    )

    def two_steps(x, m, index):
        for _ in range(2):
            x = df.ddim_step_from_table(x, m, table, index, seeds=seeds)
            index.add_(1)
        return x

    with torch.inference_mode():
        expected = two_steps(x, m, index.clone())
        compiled = torch.compile(two_steps, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            assert torch.equal(compiled(x, m, index.clone()), expected)


def test_a_multistep_form_is_captured(cache):
    model = df.load_model("fashion", "cuda")
    sampler = df.DDIMSampler(model.schedule, 6, order=2, graphs=cache)
    options = {"seed": 3, "device": "cuda", "conditioning": {"class_labels": torch.arange(4, device="cuda")}}
    expected, *others = (
        sampler.sample(model, SHAPE, capture=mode, **options) for mode in ("off", "step", "loop", "step")
    )
    for got in others:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("noisy_steps", [None, [0, 3]])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_rollout_is_captured(model, cache, guidance, noisy_steps):
    s = df.DDIMSampler(df.NoiseSchedule.linear(), 6, 0.8, eta_scales="cps", graphs=cache)
    labels = {"class_labels": torch.arange(4, device="cuda")}
    call = dict(seed=0, device="cuda", conditioning=labels, guidance_scale=guidance, noisy_steps=noisy_steps)
    eager, *others = (s.rollout(model, SHAPE, capture=mode, **call) for mode in ("off", "step", "auto"))
    for captured in (*others, others[0].replay(model)):
        for name in ("samples", "states", "log_probs"):
            assert torch.equal(getattr(captured, name), getattr(eager, name)), name
    assert len(cache) == 1
    for index in range(len(eager)):
        assert torch.equal(eager.log_prob(model, index).detach(), eager.log_probs[index])


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.7])
def test_inpainting_with_a_scale_for_each_step_is_captured(cache, guidance_rescale):
    model = df.load_model("fashion", "cuda")
    sampler = df.DDIMSampler(model.schedule, 6, eta=0.5, graphs=cache)
    x0 = torch.rand(SHAPE, device="cuda") * 2 - 1
    mask = torch.zeros(28, 28)
    mask[:14] = 1
    options = {
        "seed": 3,
        "conditioning": {"class_labels": torch.arange(4, device="cuda")},
        "guidance_scale": [1.0, 3.0, 2.0, 1.5, 1.0, 0.5],
        "guidance_rescale": guidance_rescale,
    }
    expected, *others = (
        sampler.inpaint(model, x0, mask, capture=capture, **options) for capture in ("off", "step", "loop")
    )
    assert torch.equal(expected[:, :, :14], x0[:, :, :14])
    for got in others:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("noise", ["none", "given", "seeds"])
def test_each_sample_by_a_row_of_its_own(noise):
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100, 0), eta=0.0 if noise == "none" else 1.0)
    x, m, z = torch.randn(3, 5, 4001)
    index = torch.tensor([3, 0, 2, 0, 1])
    options = {"none": {}, "given": {"noise": z}, "seeds": {"seeds": torch.arange(5)}}[noise]
    expected = df.ddim_step_from_table(x, m, plan.table(), index, **options)
    options = {name: value.cuda() for name, value in options.items()}
    got = df.ddim_step_from_table(x.cuda(), m.cuda(), plan.table("cuda"), index.cuda(), **options)
    assert same_bits(got, expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("thresholding", [False, True])
def test_the_drop_in_for_diffusers_does_not_wait(eta, thresholding):
    pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    from diffusers import DDIMScheduler

    from ddim_fast.integrations.diffusers import FastDDIMScheduler

    original, fast = (kind(thresholding=thresholding) for kind in (DDIMScheduler, FastDDIMScheduler))
    x, m = torch.randn(2, 2, 4, 64, 64, device="cuda")
    results = []
    for scheduler in (original, fast):
        scheduler.set_timesteps(10, device="cuda")
        generator = torch.Generator("cuda").manual_seed(0)
        scheduler.step(m, scheduler.timesteps[0], x, eta, generator=generator)  # the table is copied once
        torch.cuda.set_sync_debug_mode("error" if scheduler is fast else "default")
        try:
            results.append(
                [scheduler.step(m, t, x, eta, generator=generator).prev_sample for t in scheduler.timesteps.unbind()]
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- launches that were prepared, and copies that nobody waits for ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_for_aligned_memory_is_used_for_no_other(dtype):
    memory = torch.linspace(-2, 2, 4 * 1100).view(4, 1100).to(dtype)
    plan = df.SamplingPlan(df.NoiseSchedule.linear(), (900, 500, 100, 0), eta=1.0)
    seeds = torch.tensor([7, -8])
    table = plan.table("cuda")
    there = memory.cuda()
    for offset in (0, 1, 0, 8, 3, 0):
        here, on_device = (
            [row[offset : offset + 1024].view(2, 512) for row in tensor] for tensor in (memory.clone(), there)
        )
        for step in plan.steps:
            expected = ddim_step(here[0], here[1], step.coefficients, seeds=seeds, noise_step=step.index, out=here[2])
            ddim_step(
                on_device[0],
                on_device[1],
                step.coefficients,
                seeds=seeds.cuda(),
                noise_step=step.index,
                out=on_device[2],
            )
            assert same_bits(on_device[2], expected)
            index = torch.tensor([step.index], device="cuda")
            df.ddim_step_from_table(on_device[0], on_device[1], table, index, seeds=seeds.cuda(), out=on_device[3])
            assert same_bits(on_device[3], expected)


def test_copies_from_pinned_memory_are_whole():
    for i in range(200):
        assert send(torch.full((17,), i), "cuda").tolist() == [i] * 17
