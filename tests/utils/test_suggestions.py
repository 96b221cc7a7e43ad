"""An argument, a word or an object that is nearly right: the error names what was meant."""

import inspect
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule, as_flow, load_model
from ddim_fast.plans.coefficients import PREDICTION_TYPES
from ddim_fast.plans.continuous import CONTINUOUS_SPACINGS
from ddim_fast.plans.timesteps import SPACINGS
from ddim_fast.sampling.options import SampleKeywords
from ddim_fast.utils.suggestions import OTHER_WORDS, did_you_mean

LINEAR = NoiseSchedule.linear()
SAMPLER = DDIMSampler(LINEAR, 2)
SHAPE = (2, 2, 4, 4)


def half(x, t):
    return x * 0.5


ARGUMENTS = {
    "steps": "num_inference_steps",
    "num_inference_step": "num_inference_steps",
    "sampling_timesteps": "num_inference_steps",
    "clip_smaple": "clip_sample",
    "clip_denoised": "clip_sample",
    "spacing": "timestep_spacing",
    "Eta": "eta",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_the_sampler(name):
    for make in (lambda **given: DDIMSampler(LINEAR, **given), SAMPLER.replace):
        with pytest.raises(TypeError, match=rf"no argument '{name}', got {name}=7: did you mean {ARGUMENTS[name]}\?$"):
            make(**{name: 7})


def test_an_argument_like_no_other():
    with pytest.raises(TypeError, match="no argument 'qqq', got qqq=7: it takes schedule, num_inference_steps, eta, "):
        DDIMSampler(LINEAR, qqq=7)


def test_the_signature_stays():
    parameters = inspect.signature(DDIMSampler).parameters
    assert list(parameters)[:3] == ["schedule", "num_inference_steps", "eta"]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert pickle.loads(pickle.dumps(SAMPLER)) == SAMPLER


WORDS = {
    "epsilon": ["eps", "noise", "Epsilon", "epsilonn"],
    "v_prediction": ["v", "V-Prediction", "v_pred"],
    "sample": ["x0", "pred_x0"],
    "flow": ["velocity", "flow_prediction"],
}


@pytest.mark.parametrize(("word", "meant"), [(word, meant) for meant, words in WORDS.items() for word in words])
def test_a_prediction_type(word, meant):
    with pytest.raises(ValueError, match=rf"one of epsilon, .*, got '{word}': did you mean {meant}\?$"):
        DDIMSampler(LINEAR, 2, prediction_type=word)
    if meant != "flow":
        with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
            as_flow(half, LINEAR, word)


@pytest.mark.parametrize(
    ("word", "meant"), [("use_karras_sigmas", "karras"), ("trailling", "trailing"), ("use_lu_lambdas", "log_snr")]
)
def test_a_spacing(word, meant):
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        DDIMSampler(LINEAR, 2, timestep_spacing=word)


def test_every_other_word_is_of_something():
    known = {*inspect.signature(DDIMSampler).parameters, *SampleKeywords.__annotations__}
    assert set(OTHER_WORDS) <= known | set(PREDICTION_TYPES) | set(SPACINGS) | set(CONTINUOUS_SPACINGS)
    assert did_you_mean(3, ["a"]) == did_you_mean("qqq", ["a"]) == ""


def test_a_condition_given_as_a_keyword():
    with pytest.raises(TypeError, match=r'no keyword \'class_labels\', .*conditioning=\{"class_labels": \.\.\.\}$'):
        SAMPLER.sample(half, SHAPE, class_labels=torch.arange(2))
    with pytest.raises(TypeError, match="did you mean guidance_scale"):
        SAMPLER.sample(half, SHAPE, cfg_scale=2.0)


class Holder:
    """An object with an attribute, as schedulers and pipelines are."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def __call__(self, prompt):
        return prompt


SCHEDULES = {
    "a scheduler": (Holder(alphas_cumprod=torch.ones(3)), "got Holder: use NoiseSchedule(scheduler.alphas_cumprod)"),
    "a model": (load_model("fashion"), "got ShippedModel: use its schedule, model.schedule"),
    "a class": (FlowSchedule, "got the class FlowSchedule: call it, FlowSchedule(...)"),
    "a method": (NoiseSchedule.linear, "call it, NoiseSchedule.linear()"),
    "a name": ("linear", "got str: for instance NoiseSchedule.linear()"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_no_schedule(name):
    given, words = SCHEDULES[name]
    with pytest.raises(TypeError, match=re.escape(words)):
        DDIMSampler(given, 5)


PIPELINE = Holder(unet=nn.Identity(), scheduler=Holder(alphas_cumprod=torch.ones(3)))
MODELS = {
    "a name": ("fashion", "got str: load it with load_model('fashion')"),
    "a pipeline": (PIPELINE, "got Holder, a whole pipeline: pass its denoiser, pipe.unet"),
    "a number": (3, "got int"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model(name):
    given, words = MODELS[name]
    calls = (
        lambda: SAMPLER.sample(given, seed=0),
        lambda: SAMPLER.invert(given, torch.zeros(SHAPE)),
        lambda: SAMPLER.sample_parallel(given, SHAPE, seed=0),
    )
    for call in calls:
        with pytest.raises(TypeError, match=rf"^model must be callable as model\(x, t, .*{re.escape(words)}"):
            call()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (PIPELINE, "got Holder: of a pipeline in memory sample pipe.unet, with"),
        (nn.Identity(), "sampled as it is"),
        (3, "got int"),
    ],
    ids=["a pipeline", "a module", "a number"],
)
def test_what_cannot_be_loaded(given, words):
    with pytest.raises(TypeError, match=rf"^a model to load must be the name .*{re.escape(words)}"):
        load_model(given)


SAMPLES = {
    "an array": (np.zeros(SHAPE, np.float32), "got an array (2, 2, 4, 4) float32: use torch.from_numpy({}).float()"),
    "integers": (torch.zeros(SHAPE, dtype=torch.int64), "got (2, 2, 4, 4) torch.int64: use {}.float()"),
    "one size": (torch.zeros(4), "got (4,) torch.float32: use {}.view(B, C, ...)"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_no_batch_of_samples(name):
    given, words = SAMPLES[name]
    with pytest.raises(TypeError, match=re.escape(words.format("x_T"))):
        SAMPLER.sample(half, x_T=given)
    for call in (lambda: SAMPLER.invert(half, given), lambda: SAMPLER.img2img(half, given, 0.5)):
        with pytest.raises(TypeError, match=re.escape(words.format("x0"))):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_dtype_are_noted(dtype):
    model = nn.Conv2d(2, 2, 1, dtype=dtype)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, x, t):
            return self.layer(x)

    with pytest.raises(RuntimeError) as error:
        SAMPLER.sample(Model(), SHAPE, seed=0)
    if sys.version_info >= (3, 11):
        assert f"pass model_dtype={dtype}" in error.value.__notes__[0]
    SAMPLER.sample(Model(), SHAPE, seed=0, model_dtype=dtype)
