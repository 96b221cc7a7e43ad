"""Drop-in replacement for diffusers: one call of its step, a run, and a pipeline of 50 steps.

Both run with the original scheduler and with ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UnCLIPScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

import ddim_fast.integrations.diffusers as drop_ins
from ddim_fast.integrations.diffusers import FastDDIMScheduler

SHAPES = {"1x4x64x64": (1, 4, 64, 64), "64x3x32x32": (64, 3, 32, 32)}
CONFIGS = {
    "eta 0": ({"clip_sample": False}, 0.0),
    "eta 0, clip": ({"clip_sample": True}, 0.0),
    "eta 1": ({"clip_sample": False}, 1.0),
}
LATENT_SHAPES = {"1x4x64x64": (1, 4, 64, 64), "1x16x128x128": (1, 16, 128, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = "1x4x64x64", "float32"
OTHERS = {
    kind.__name__: (kind, {})
    for kind in (
        FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, EDMEulerScheduler,
        LCMScheduler, TCDScheduler, CogVideoXDDIMScheduler, DPMSolverMultistepScheduler,
        EDMDPMSolverMultistepScheduler, UniPCMultistepScheduler,
        DDPMWuerstchenScheduler, UnCLIPScheduler, CogVideoXDPMScheduler, HeunDiscreteScheduler,
        *(getattr(diffusers, name) for name in ("LTXEulerAncestralRFScheduler", "FlowMapEulerDiscreteScheduler")
          if hasattr(diffusers, name)),
    )
} | {
    f"{kind.__name__}, {name}": (kind, config)
    for kind, name, config in (
        (DPMSolverMultistepScheduler, "order 1", {"solver_order": 1}),
        (DPMSolverMultistepScheduler, "order 3", {"solver_order": 3}),
        (DPMSolverMultistepScheduler, "SDE", {"algorithm_type": "sde-dpmsolver++"}),
        (UniPCMultistepScheduler, "order 3", {"solver_order": 3}),
    )
}  # fmt: skip
"""By name: the original, and its config."""
MORE_ARGUMENTS = {
    DDPMWuerstchenScheduler: lambda scheduler, x: {"timestep": scheduler.timesteps[25].expand(len(x))},
    UnCLIPScheduler: lambda scheduler, x: {"prev_timestep": scheduler.timesteps[26]},
    CogVideoXDPMScheduler: lambda scheduler, x: {
        "old_pred_original_sample": x, "timestep_back": scheduler.timesteps[24],
    },
}  # fmt: skip
SCHEDULERS = {"diffusers": DDIMScheduler, "ours": FastDDIMScheduler}


@pytest.fixture(autouse=True)
def _without_gradients():
    """Disable gradients, as pipelines do."""
    with torch.no_grad():
        yield


def steps(
    shape: tuple[int, ...], config: dict[str, Any], eta: float, return_dict: bool
) -> dict[str, Callable[[], Any]]:
    """Return each scheduler's step, called as in a pipeline, with a tensor as the timestep."""
    torch.manual_seed(0)
    x, m = torch.randn(shape), torch.randn(shape)
    found = {}
    for name, kind in SCHEDULERS.items():
        scheduler = kind(**config)
        scheduler.set_timesteps(50)
        t, generator = scheduler.timesteps[25], torch.Generator()

        def step(scheduler=scheduler, t=t, generator=generator):
            return scheduler.step(m, t, x, eta=eta, generator=generator, return_dict=return_dict)

        found[name] = step
    return found


@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step_of_the_drop_in(measure, benchmark, show, shape, config, return_dict):
    contenders = steps(SHAPES[shape], *CONFIGS[config], return_dict)

    def check(name, _):
        expected, got = (steps(SHAPES[shape], *CONFIGS[config], return_dict)[n]()[:2] for n in ("diffusers", name))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    result = measure("drop-ins", contenders, check, baseline="ours")
    returns = "dataclass" if return_dict else "tuple"
    benchmark.extra_info.update(shape=shape, step=config, returns=returns)
    show(
        "a step of diffusers, and of the drop-in",
        shape=shape,
        step=config,
        returns=returns,
        diffusers_us=f"{result.seconds('diffusers') * 1e6:.1f}",
        ours_us=f"{result.seconds('ours') * 1e6:.1f}",
        ratio=f"{result.ratio('diffusers'):.1f}",
    )


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, marks=() if (shape, name) == QUICK else pytest.mark.full, id=f"{shape}-{name}")
        for shape in LATENT_SHAPES
        for name, dtype in DTYPES.items()
    ],
)
@pytest.mark.parametrize("other", OTHERS)
def test_step_of_another_drop_in(measure, benchmark, show, other, shape, dtype):
    kind, config = OTHERS[other]
    torch.manual_seed(0)
    x, m = (torch.randn(LATENT_SHAPES[shape]).to(dtype) for _ in range(2))
    contenders = {}
    for name, scheduler in {
        "diffusers": kind(**config),
        "ours": getattr(drop_ins, f"Fast{kind.__name__}")(**config),
    }.items():
        scheduler.set_timesteps(50)
        scheduler.is_scale_input_called = True

        for t in scheduler.timesteps[22:25]:  # what a multistep scheduler remembers
            if hasattr(scheduler, "model_outputs"):
                scheduler.step(m, t, x)
        memory = {
            name: getattr(scheduler, name) for name in ("model_outputs", "last_sample") if hasattr(scheduler, name)
        }
        arguments = {"model_output": m, "timestep": scheduler.timesteps[25], "sample": x, "return_dict": False}
        arguments |= MORE_ARGUMENTS.get(kind, lambda *_: {})(scheduler, x)
        is_heun = kind is HeunDiscreteScheduler

        def step(scheduler=scheduler, arguments=arguments, memory=memory, is_heun=is_heun):
            for name, value in memory.items():
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            if is_heun:  # both halves
                scheduler._step_index, scheduler.dt = 24, None
                scheduler.step(**arguments)
            scheduler._step_index = 25
            return scheduler.step(**arguments)

        contenders[name] = step

    def check(name, _):
        results = []
        for contender in ("diffusers", name):
            torch.manual_seed(0)
            results.append(contenders[contender]())
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)

    result = measure("drop-ins", contenders, check, baseline="ours")
    of_dtype = f"{other}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info.update(shape=shape, step=of_dtype, returns="tuple")
    show(
        "a step of diffusers, and of the drop-in",
        shape=shape,
        step=of_dtype,
        returns="tuple",
        diffusers_us=f"{result.seconds('diffusers') * 1e6:.1f}",
        ours_us=f"{result.seconds('ours') * 1e6:.1f}",
        ratio=f"{result.ratio('diffusers'):.1f}",
    )


STEPS_OF_A_RUN = 20


@pytest.mark.full
@pytest.mark.parametrize("other", [name for name, (kind, _) in OTHERS.items() if kind not in MORE_ARGUMENTS])
def test_run_of_another_drop_in(measure, benchmark, show, other):
    """Time what a pipeline asks of a scheduler: the timesteps, and then each step once."""
    kind, config = OTHERS[other]
    torch.manual_seed(0)
    x, m = (torch.randn(LATENT_SHAPES["1x4x64x64"]) for _ in range(2))
    contenders = {}
    for name, scheduler in {
        "diffusers": kind(**config),
        "ours": getattr(drop_ins, f"Fast{kind.__name__}")(**config),
    }.items():
        scheduler.is_scale_input_called = True

        def timesteps(scheduler=scheduler):
            scheduler.set_timesteps(STEPS_OF_A_RUN)
            return scheduler.timesteps

        def run(timesteps=timesteps, scheduler=scheduler):
            sample = x
            for t in timesteps():
                sample = scheduler.step(m, t, sample, return_dict=False)[0]
            return sample

        contenders |= {name: run, f"{name}, timesteps alone": timesteps}

    def check(name, _):
        if name in SCHEDULERS:
            results = []
            for contender in ("diffusers", name):
                torch.manual_seed(0)
                results.append(contenders[contender]())
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)

    result = measure("drop-ins", contenders, check, baseline="ours", pairs=[("diffusers", "ours")])
    per_step = {
        name: (result.seconds(name) - result.seconds(f"{name}, timesteps alone")) / STEPS_OF_A_RUN * 1e6
        for name in SCHEDULERS
    }
    benchmark.extra_info.update(run=other, steps=STEPS_OF_A_RUN, microseconds_per_step=per_step)
    show(
        f"a run of {STEPS_OF_A_RUN} steps without a model",
        scheduler=other,
        diffusers_us_a_step=f"{per_step['diffusers']:.1f}",
        ours_us_a_step=f"{per_step['ours']:.1f}",
        ratio_of_runs=f"{result.ratio('diffusers'):.1f}",
    )


def test_pipeline_of_50_steps(measure, benchmark, show):
    """Time a pipeline with a minimal U-Net, so that the scheduler's share of the time is large."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    contenders, pictures = {}, {}
    for name, kind in SCHEDULERS.items():
        pipeline = DDIMPipeline(unet, DDIMScheduler())
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)

        def run(pipeline=pipeline):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pipeline(
                    generator=torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np"
                ).images

        contenders[name] = run
        pictures[name] = run()

    def check(name, picture):
        assert abs(picture - pictures["diffusers"]).max() <= 1 / 255

    result = measure("drop-ins", contenders, check, baseline="ours")
    benchmark.extra_info.update(steps=50)
    show(
        "a pipeline of 50 steps with a U-Net of 7,000 weights",
        diffusers_ms=f"{result.seconds('diffusers') * 1e3:.1f}",
        ours_ms=f"{result.seconds('ours') * 1e3:.1f}",
        ratio=f"{result.ratio('diffusers'):.2f}",
    )
