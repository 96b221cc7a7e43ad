"""Files of ``ddim-fast search`` in diffusers' schedulers that count in ``sigmas``, and on paths without
betas: the steps are those of ``DDIMSampler`` with the file, whose own tests hold it against float64."""

import copy
import json
import pickle
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from scheduler_steps import known_fields
from tiny_pipelines import flux, picture, stable_diffusion_3, stable_diffusion_xl

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast import DDIMSampler, EDMSchedule, FlowSchedule, NoiseSchedule
from ddim_fast.integrations.diffusers.choose import DROP_INS
from ddim_fast.kernels.dispatch import normals
from ddim_fast.kernels.noise import NoiseStream, sample_seeds
from ddim_fast.plans.files import TimestepList
from ddim_fast.plans.rows import rows_of_plan
from ddim_fast.verify.truth.tolerances import assert_near, to_numpy

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers and NumPy
SHAPE = (2, 3, 4, 4)
WEIGHTS = ((0.0, 0.0), (-0.3, 0.0), (-0.5, 0.125), (0.2, -0.1))
BETAS, FLOW, EDM = NoiseSchedule.linear(), FlowSchedule(time_scale=1000.0), EDMSchedule(0.002, 80.0)
COGVIDEOX = NoiseSchedule.from_alphas_cumprod(diffusers.CogVideoXDDIMScheduler().alphas_cumprod)
VISITED = {
    BETAS: ((999, 700, 420, 90), (990, 731, 400, 110)),
    COGVIDEOX: ((999, 700, 420, 90), (990, 731, 400, 110)),
    FLOW: ((0.999, 0.7, 0.42, 0.09), (0.96, 0.731, 0.4, 0.11)),
    EDM: ((80.0, 20.0, 3.0, 0.25), (75.0, 22.0, 2.5, 0.3)),
}
FIELDS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CASES = {
    # name: the drop-in, its config, the path, what the model predicts on it
    "cogvideox": ("FastCogVideoXDDIMScheduler", {}, COGVIDEOX, "epsilon"),
    "dpm": ("FastDPMSolverMultistepScheduler", {}, BETAS, "epsilon"),
    "dpm v": ("FastDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, BETAS, "v_prediction"),
    "dpm flow": ("FastDPMSolverMultistepScheduler", FIELDS, FLOW, "flow"),
    "unipc": ("FastUniPCMultistepScheduler", {"solver_order": 3}, BETAS, "epsilon"),
    "unipc flow": ("FastUniPCMultistepScheduler", FIELDS, FLOW, "flow"),
    "flow": ("FastFlowMatchEulerDiscreteScheduler", {"shift": 3.0}, FLOW, "flow"),
    "flow shifted": ("FastFlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, FLOW, "flow"),
    "edm": ("FastEDMEulerScheduler", {}, EDM, "edm"),
    "edm dpm": ("FastEDMDPMSolverMultistepScheduler", {}, EDM, "edm"),
}


def solver(schedule, prediction_type, **options):
    visited, told = VISITED[schedule]
    plan = DDIMSampler(
        schedule, timesteps=visited, history_weights=WEIGHTS, prediction_type=prediction_type, **options
    ).plan()
    total = schedule.num_train_timesteps if isinstance(schedule, NoiseSchedule) else None
    rows = {"order": plan.order, "coefficients": rows_of_plan(plan), "prediction_type": prediction_type}
    return TimestepList(visited, total, schedule.digest, model_timesteps=told, **rows)


def files(schedule, prediction_type):
    fitted = solver(schedule, prediction_type)
    plain = replace(fitted, coefficients=None, prediction_type=None)
    told = fitted.model_timesteps
    return {
        "one list": replace(plain, order=1, model_timesteps=None),
        "a timestep told twice": replace(plain, order=1, model_timesteps=(told[2], told[1], told[2], told[3])),
        "order 2": replace(plain, order=2),
        "coefficients": fitted,
    }


FILES = ["one list", "a timestep told twice", "order 2", "coefficients"]


def made(case, name, **more):
    kind, config, schedule, prediction_type = CASES[case]
    found = files(schedule, prediction_type)[name]
    kind = getattr(drop_ins, kind)
    return (
        kind(**known_fields(kind, config), **more),
        found,
        DDIMSampler(schedule, timesteps=found, prediction_type=prediction_type),
    )


def model(x, t, **conditioning):
    return torch.tanh(x * (1 + t.reshape(-1, 1, 1, 1) / 700)) - 0.3 * x


def noise(seed=3):
    return normals(torch.from_numpy(sample_seeds(seed, SHAPE[0])), SHAPE[1:], 0, NoiseStream.INITIAL)


def loop(scheduler, x, sampler, first=0):
    """Run a loop; the model's input is scaled as the sampler scales it, which rounds otherwise."""
    scales = [step.input_scale for step in sampler.plan().steps]
    for t, scale in list(zip(scheduler.timesteps, scales, strict=True))[first:]:
        x = scheduler.step(model(x * scale, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_a_loop_with_a_file_gives_the_samplers_bits(case, name, tmp_path):
    scheduler, found, sampler = made(case, name)
    found.write(tmp_path / "solver.json")
    expected, plain = sampler.sample(model, SHAPE, x_T=noise()), copy.deepcopy(scheduler)
    for _ in range(2):
        scheduler.set_timesteps(timesteps=str(tmp_path / "solver.json"))
        times = torch.tensor(sampler.plan().model_times, dtype=scheduler.timesteps.dtype)
        assert torch.equal(scheduler.timesteps, times)
        assert torch.equal(loop(scheduler, noise(), sampler), expected)
    more = {"mu": 1.0} if case == "flow shifted" else {}
    for each in (scheduler, plain):
        each.set_timesteps(4, **more)
    assert torch.equal(loop(scheduler, noise(), sampler), loop(plain, noise(), sampler))


@pytest.mark.parametrize("case", ["dpm", "flow", "edm"])
def test_the_noise_levels_of_a_file_are_sigmas(case):
    scheduler, found, _ = made(case, "coefficients")
    scheduler.set_timesteps(timesteps=found)
    bars = np.array([BETAS.alpha_bar(int(t)) for t in VISITED[BETAS][0]])
    wanted = {"dpm": np.sqrt((1 - bars) / bars), "flow": VISITED[FLOW][0], "edm": VISITED[EDM][0]}[case]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*wanted, 0.0], dtype=torch.float32), rtol=1e-6, atol=0)
    assert scheduler.num_inference_steps == 4


EULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_eulers_samples_are_those_of_the_sampler_divided_by_alpha(name, prediction_type):
    found = files(BETAS, prediction_type)[name]
    scheduler = drop_ins.FastEulerDiscreteScheduler(**EULER, prediction_type=prediction_type)
    scheduler.set_timesteps(timesteps=found)
    plan = DDIMSampler(BETAS, timesteps=found, prediction_type=prediction_type).plan()
    alphas = np.array([*(np.sqrt(BETAS.alpha_bar(t)) for t in VISITED[BETAS][0]), 1.0])
    sigmas = np.sqrt(1 - alphas**2) / alphas
    assert float(scheduler.init_noise_sigma) == pytest.approx(1 / alphas[0], rel=1e-6)
    x, earlier = (noise().double() / alphas[0]).float(), [np.zeros(SHAPE)] * 2
    for i, (t, (a, b, *weights)) in enumerate(zip(scheduler.timesteps, rows_of_plan(plan), strict=True)):
        m = model(scheduler.scale_model_input(x, t), t.expand(2))
        of_x, of_m = {  # x0, from the sample x0 + sigma eps
            "epsilon": (1, -sigmas[i]),
            "sample": (0, 1),
            "v_prediction": (alphas[i] ** 2, -alphas[i] * sigmas[i]),
        }[prediction_type]
        wide, out, (w_1, w_2) = to_numpy(x), to_numpy(m), np.array(weights) / alphas[i + 1]
        exact = (a * alphas[i] * wide + b * out) / alphas[i + 1] + w_1 * earlier[0] + w_2 * earlier[1]
        x0_terms = abs(of_x * wide) + abs(of_m * out)
        histories = abs(w_1 * earlier[0]) + abs(w_2 * earlier[1])
        terms = (1 + abs(w_1) + abs(w_2)) * x0_terms + sigmas[i + 1] / sigmas[i] * (abs(wide) + x0_terms) + histories
        x = scheduler.step(m, t, x).prev_sample
        assert_near(x, exact, terms)
        earlier = [of_x * wide + of_m * out, earlier[0]]


@pytest.mark.parametrize("case", ["dpm", "unipc flow", "flow", "edm", "edm dpm"])
def test_half_precision_and_mixed_dtypes_have_the_originals_dtypes(case):
    scheduler, found, _ = made(case, "coefficients")
    original = next(base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))(
        **known_fields(type(scheduler), CASES[case][1])
    )
    for dtypes in [(torch.float16, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]:
        scheduler.set_timesteps(timesteps=found)
        original.set_timesteps(4)
        x, m = torch.randn(SHAPE).to(dtypes[0]), torch.randn(SHAPE).to(dtypes[1])
        for t, theirs in zip(scheduler.timesteps, original.timesteps, strict=True):
            for each in (scheduler, original):
                each.is_scale_input_called = True
            got, wanted = scheduler.step(m, t, x).to_tuple(), original.step(m, theirs, x).to_tuple()
            assert [y.dtype for y in got] == [y.dtype for y in wanted]


def begun(case, begin_index=None):
    scheduler, found, sampler = made(case, "a timestep told twice")
    scheduler.set_timesteps(timesteps=found)
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    return scheduler, sampler


@pytest.mark.parametrize("case", ["dpm", "flow", "edm"])
@pytest.mark.parametrize("begin_index", [None, 1, 2])
def test_a_run_may_begin_at_any_step_as_img2img_does(case, begin_index):
    scheduler, sampler = begun(case, begin_index)
    first = begin_index or 0  # by its timestep: the first one that is told so
    last = sampler.last_steps(4 - first)
    assert torch.equal(loop(scheduler, noise(), sampler, first), last.sample(model, SHAPE, x_T=noise()))


def test_the_noise_is_added_to_the_level_that_the_step_starts_from():
    scheduler, _ = begun("flow")
    x0, z, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), scheduler.timesteps[[1, 3]]
    levels = torch.tensor([0.7, 0.09]).view(2, 1, 1, 1)
    torch.testing.assert_close(scheduler.scale_noise(x0, t, z), (1 - levels) * x0 + levels * z)
    scheduler, _ = begun("dpm")
    bars = torch.tensor([BETAS.alpha_bar(t) for t in (700, 90)]).view(2, 1, 1, 1).float()
    got = scheduler.add_noise(x0, z, torch.tensor([731, 110]))
    torch.testing.assert_close(got, bars.sqrt() * x0 + (1 - bars).sqrt() * z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_config_keeps_a_file_and_is_saved_with_it(case, tmp_path):
    _, found, sampler = made(case, "coefficients")
    found.write(tmp_path / "four.json")
    scheduler, _, _ = made(case, "coefficients", solver=tmp_path / "four.json")
    scheduler.save_pretrained(tmp_path / "saved")
    (tmp_path / "four.json").unlink()  # the config has what was in it
    stored = json.loads((tmp_path / "saved/scheduler_config.json").read_text())
    assert TimestepList.of_content(stored["solver"], "it") == found
    again = type(scheduler).from_pretrained(tmp_path / "saved")
    again.set_timesteps(4)
    assert torch.equal(loop(again, noise(), sampler), sampler.sample(model, SHAPE, x_T=noise()))
    before = again.timesteps.tolist()
    with pytest.raises(ValueError, match=r"num_inference_steps must be 4, those of the solver .* got 50"):
        again.set_timesteps(50)
    assert again.timesteps.tolist() == before
    original = next(base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))
    assert original.from_pretrained(tmp_path / "saved").config.num_train_timesteps == 1000
    off = type(scheduler).from_config(again.config, solver=None)
    off.set_timesteps(10, **({"mu": 1.0} if case == "flow shifted" else {}))
    assert len(off.timesteps) == 10


# --- In pipelines --------------------------------------------------------------------------------------------------------


def run(pipeline, arguments, **more):
    arguments = {name: value for name, value in arguments.items() if name not in ("num_inference_steps", *more)}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**{**arguments, "output_type": "np", **more}, generator=generator)[0]


@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
def test_pipelines_for_flow_matching_take_a_file_as_sigmas_or_keep_it(make, tmp_path):
    found = solver(FLOW, "flow")
    found.write(tmp_path / "four.json")
    pipeline, arguments = make()
    kind = drop_ins.FastFlowMatchEulerDiscreteScheduler
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    got = []
    if make is stable_diffusion_3:  # Flux's asks for the length of its sigmas
        got.append(run(pipeline, arguments, sigmas=str(tmp_path / "four.json"), num_inference_steps=4))
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, solver=found)
    got.append(run(pipeline, arguments, num_inference_steps=4))
    visited, taken = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda m, t, x, **more: (visited.append(t.item()), taken(m, t, x, **more))[1]
    got.append(run(pipeline, arguments, num_inference_steps=4))
    assert visited == pytest.approx([960, 731, 400, 110])
    assert all(np.array_equal(one, got[0]) for one in got)
    assert np.isfinite(got[0]).all()
    with pytest.raises(ValueError, match="num_inference_steps must be 4"):
        run(pipeline, arguments, num_inference_steps=5)


def test_sigmas_of_ones_own_are_taken_instead_of_the_configs_file():
    scheduler, _, _ = made("flow", "coefficients", solver=solver(FLOW, "flow"))
    scheduler.set_timesteps(sigmas=[1.0, 0.3])
    assert len(scheduler.timesteps) == 2
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))  # what pipelines pass where nobody asks for sigmas
    assert scheduler.timesteps.tolist() == pytest.approx([960, 731, 400, 110])


def test_img2img_begins_within_the_file():
    pipeline, arguments = stable_diffusion_3(StableDiffusion3Img2ImgPipeline)
    pipeline.scheduler = drop_ins.FastFlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, solver=solver(FLOW, "flow")
    )
    visited, taken = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda m, t, x, **more: (visited.append(t.item()), taken(m, t, x, **more))[1]
    images = run(pipeline, arguments, image=picture(), strength=0.5, num_inference_steps=4)
    assert visited == pytest.approx([400, 110])
    assert np.isfinite(images).all()


@pytest.mark.parametrize(
    ("kind", "name"), [("EulerDiscreteScheduler", "Euler"), ("DPMSolverMultistepScheduler", "DPM")]
)
def test_a_pipeline_with_betas_gives_the_pictures_of_ddim(kind, name):
    schedule = NoiseSchedule.scaled_linear()
    VISITED.setdefault(schedule, VISITED[BETAS])
    found = solver(schedule, "epsilon")
    pipeline, arguments = stable_diffusion_xl(
        getattr(diffusers, kind), beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    config, images = pipeline.scheduler.config, []
    for each in (f"Fast{kind}", "FastDDIMScheduler"):
        options = {"clip_sample": False} if each == "FastDDIMScheduler" else {}
        pipeline.scheduler = getattr(drop_ins, each).from_config(config, solver=found, **options)
        images.append(run(pipeline, arguments, num_inference_steps=4))
    np.testing.assert_allclose(images[0], images[1], atol=1e-3)


# --- What is refused, before anything changes ---------------------------------------------------------------------------


def refused(case, given, said, error=ValueError, **config):
    kind, others, *_ = CASES[case]
    kind = getattr(drop_ins, kind)
    config = {**known_fields(kind, others), **config}
    scheduler = kind(**config)
    more = {"mu": 1.0} if case == "flow shifted" else {}
    scheduler.set_timesteps(10, **more)
    before = {name: copy.copy(value) for name, value in vars(scheduler).items()}
    with pytest.raises(error, match=said):
        scheduler.set_timesteps(timesteps=given)
    with pytest.raises(error, match=said):
        kind(**config, solver=given)
    for name, value in before.items():
        now = vars(scheduler)[name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


MISFITS = [
    ("flow", solver(BETAS, "epsilon"), "is for 1000 training timesteps", {}),
    ("flow", solver(EDM, "edm"), "times of another path in continuous time", {}),
    ("dpm", solver(FLOW, "flow"), "times of another path in continuous time", {}),
    ("edm", solver(FLOW, "flow"), "times of another path in continuous time", {}),
    ("edm", solver(EDM, "edm"), "must hold consistent coefficients", {"sigma_data": 1.0}),
    ("edm", solver(EDM, "edm"), r"must lie in \(0, 50\]", {"sigma_max": 50.0}),
    ("dpm", solver(BETAS, "epsilon"), "of one noise schedule, got another", {"beta_schedule": "squaredcos_cap_v2"}),
    ("dpm", solver(BETAS, "epsilon"), "must hold consistent coefficients", {"final_sigmas_type": "sigma_min"}),
    ("cogvideox", solver(BETAS, "epsilon"), "coefficients, which are those of one noise schedule", {}),
    (
        "dpm",
        solver(BETAS, "epsilon"),
        "prediction_type 'epsilon', got .* says 'v_",
        {"prediction_type": "v_prediction"},
    ),
    ("unipc flow", solver(FLOW, "flow"), "prediction_type 'flow', got .* says 'sample'", {"prediction_type": "sample"}),
]
CONFIGS = [
    # a case, and a field with what it must be
    ("dpm", {"algorithm_type": "sde-dpmsolver++"}, r"dpmsolver\+\+ or dpmsolver,"),
    ("dpm", {"thresholding": True}, "False,"),
    ("unipc", {"rescale_betas_zero_snr": True}, r"False,.*FastDDIMScheduler"),
    ("unipc flow", {"prediction_type": "v_prediction"}, "flow_prediction or epsilon or sample,"),
    ("flow", {"stochastic_sampling": True}, "False,"),
    ("flow", {"invert_sigmas": True}, "False,"),
    ("edm", {"prediction_type": "v_prediction"}, "epsilon,"),
    ("edm dpm", {"final_sigmas_type": "sigma_min"}, "zero,"),
]


@pytest.mark.parametrize(("case", "config", "said"), CONFIGS)
def test_a_config_whose_steps_no_file_has_is_refused_and_changes_nothing(case, config, said):
    ((name, _),) = config.items()
    refused(case, solver(*CASES[case][2:]), f"{name} in the scheduler's config must be {said}", **config)


@pytest.mark.parametrize(("case", "given", "said", "config"), MISFITS)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(case, given, said, config):
    refused(case, given, said, **config)


@pytest.mark.parametrize("case", ["dpm", "unipc", "flow", "edm", "edm dpm"])
def test_a_damaged_or_missing_file_is_refused_and_changes_nothing(case, tmp_path):
    refused(case, "missing.json", r"no file of timesteps missing\.json: make one", FileNotFoundError)
    refused(case, "missing.txt", r"must end in \.json, got 'missing\.txt': make one")
    broken = tmp_path / "broken.json"
    for content in ('{"format": "ddim_fast timesteps", "ver', '{"format": "another"}', "[]"):
        broken.write_text(content)
        refused(case, str(broken), r"broken\.json")


def test_what_helps_is_said_where_the_model_predicts_something_else():
    scheduler = drop_ins.FastDDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match=r"\[999, 700, 420, 90\], are for any model: set_timesteps takes such a list"):
        scheduler.set_timesteps(timesteps=solver(BETAS, "v_prediction"))
    scheduler.set_timesteps(timesteps=[999, 700, 420, 90])
    alone = TimestepList((0.999, 0.7, 0.42, 0.09), None, FLOW.digest)
    scheduler = drop_ins.FastUniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="sample")
    with pytest.raises(ValueError, match="a TimestepList of them is a file, too"):
        scheduler.set_timesteps(timesteps=solver(FLOW, "flow"))
    scheduler.set_timesteps(timesteps=alone)


TAKERS = {kind for kind, *_ in CASES.values()} | {
    "FastDDIMScheduler", "FastDDIMParallelScheduler", "FastEulerDiscreteScheduler"
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", sorted(set(DROP_INS.values()), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__
)
def test_every_drop_in_takes_files_or_says_which_one_does(kind):
    scheduler = kind(**({"prediction_type": "epsilon"} if kind.__name__ == "FastDDPMScheduler" else {}))
    if kind.__name__ in TAKERS:
        with pytest.raises(FileNotFoundError, match="no file of timesteps"):
            scheduler.set_timesteps(timesteps="missing.json")
        return
    before = {name: copy.copy(value) for name, value in vars(scheduler).items()}
    with pytest.raises(ValueError, match=rf"no file of ddim-fast search for {kind.__name__}.*FastDDIMScheduler of"):
        scheduler.set_timesteps(timesteps="f.json")
    assert list(vars(scheduler)) == list(before)


def test_options_that_only_the_original_has_are_refused_beside_a_file():
    for case, options in [
        ("flow", {"per_token_timesteps": torch.ones(2)}),
        ("edm", {"s_churn": 0.5}),
    ]:
        scheduler, found, _ = made(case, "coefficients")
        scheduler.set_timesteps(timesteps=found)
        with pytest.raises(ValueError, match="must be given no options"):
            scheduler.step(noise(), scheduler.timesteps[0], noise(), **options)
        assert scheduler.step_index is None


@pytest.mark.parametrize("case", ["dpm", "flow"])
def test_a_step_without_a_fused_form_or_out_of_turn_is_refused(case):
    scheduler, found, sampler = made(case, "coefficients")
    scheduler.set_timesteps(timesteps=found)
    x, first = noise(), scheduler.timesteps[0]
    for wrong, said in [(x.double(), "must be of"), (x.clone().requires_grad_(), "has no gradients")]:
        with pytest.raises(ValueError, match=said):
            scheduler.step(x.to(wrong.dtype), first, wrong)
    with pytest.raises(ValueError, match=r"must be one of scheduler\.timesteps"):
        scheduler.step(x, 5.0, x)
    assert torch.equal(loop(scheduler, x, sampler), sampler.sample(model, SHAPE, x_T=x))
    with pytest.raises(ValueError, match=r"must come in order, no more, got step_index = 4: call set_timesteps"):
        scheduler.step(x, first, x)
    with pytest.raises(ValueError, match="must be given alone"):
        scheduler.set_timesteps(7, timesteps=found)


# --- Copies, GPUs, the compiler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("case", ["unipc", "flow"])
def test_a_copy_made_within_a_run_goes_on_by_itself(copied, case):
    scheduler, found, sampler = made(case, "coefficients")
    scheduler.set_timesteps(timesteps=found)
    x, expected = noise(), sampler.sample(model, SHAPE, x_T=noise())
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
    again = copied(scheduler)
    assert torch.equal(loop(scheduler, x, sampler, 2), expected)
    assert torch.equal(loop(again, x, sampler, 2), expected)


@pytest.mark.parametrize("case", ["dpm", "flow", "edm"])
def test_on_a_gpu_nothing_waits_within_a_run(case):
    from ddim_fast.gpu_lab.fake_cuda import fake_cuda

    scheduler, found, _ = made(case, "coefficients")
    with fake_cuda() as device:
        scheduler.set_timesteps(timesteps=found, device="cuda")
        x, m = (torch.empty(2, 4, 8, 8, device="cuda") for _ in range(2))
        scheduler.step(m, scheduler.timesteps[0], x)  # the table is copied to the device once
        with device.steady_state() as steady:
            for t in scheduler.timesteps[1:]:
                scheduler.step(m, t, x)
    assert steady.region().own_launches["ddim_fast::ddim_step_kernel"] == 3
    assert (steady.syncs, steady.copies) == ([], [])


@pytest.mark.filterwarnings("ignore:.*Dynamo:UserWarning")  # dynamo warns of graph breaks
def test_a_compiled_step_of_a_file_breaks_the_graph_and_gives_the_same_bits():
    (plain, found, sampler), (compiled, *_) = made("flow", "coefficients"), made("flow", "coefficients")
    for scheduler in (plain, compiled):
        scheduler.set_timesteps(timesteps=found)
    torch.compiler.reset()
    compiled.step = torch.compile(compiled.step, backend="eager")
    assert torch.equal(loop(compiled, noise(), sampler), loop(plain, noise(), sampler))
