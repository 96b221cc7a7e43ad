"""Where the shape of the samples comes from: the caller, a tensor, or the model; and the batch that was forgotten."""

import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule, as_flow
from ddim_fast.generation import generate
from ddim_fast.search import Search, search_timesteps
from ddim_fast.tradeoff import Cell, Subject, draw, settings_of

LINEAR = NoiseSchedule.linear(100)
ONE = (2, 4, 4)
SAMPLER = DDIMSampler(LINEAR, 2)
NOISY = DDIMSampler(LINEAR, 2, eta=1.0)


class Net(nn.Module):
    """A model that says what one of its samples is, and notes what it was given."""

    def __init__(self, sample_shape=ONE):
        super().__init__()
        self.sample_shape = sample_shape
        self.seen = []

    def forward(self, x, t):
        self.seen.append(tuple(x.shape))
        return x * 0.5


TAKING_A_SHAPE = {
    "sample": lambda model, shape, **noise: SAMPLER.sample(model, shape, **noise),
    "sample_parallel": lambda model, shape, **noise: SAMPLER.sample_parallel(model, shape, **noise),
    "rollout": lambda model, shape, **noise: NOISY.rollout(model, shape, **noise).samples,
}


@pytest.mark.parametrize("call", TAKING_A_SHAPE.values(), ids=TAKING_A_SHAPE)
def test_the_shape_may_be_the_models(call):
    assert torch.equal(call(Net(), None, seed=3), call(Net(), (1, *ONE), seed=3))
    assert torch.equal(call(Net(), None, seeds=[3, 4, 5]), call(Net(), (3, *ONE), seeds=[3, 4, 5]))
    assert torch.equal(call(Net(list(ONE)), None, seeds=torch.tensor([3, 4])), call(Net(), (2, *ONE), seeds=[3, 4]))


def search(model, shape):
    few = {"count": 2, "refine_count": 2, "refine_runs": 2, "held_out": 2, "candidates": 5}
    return search_timesteps(Search(model, LINEAR, shape, num_inference_steps=2, **few)).best.timesteps


def study(model, shape):
    subject = Subject(model, LINEAR, shape, count=2, batch_size=2)
    return settings_of(subject, "net")["shape"], draw(subject, Cell(2, "trailing")).tolist()


def written(model, shape, tmp_path):
    out = tmp_path / str(shape)
    generate(model.eval(), SAMPLER, count=2, out=out, seed=3, shape=shape)
    return sorted((path.name, path.read_bytes()) for path in out.glob("*.safetensors"))


def test_what_takes_the_shape_of_one_sample_takes_the_models(tmp_path):
    assert search(Net(), None) == search(Net(), ONE) == search(Net(list(ONE)), None)
    assert study(Net(), None) == study(Net(), ONE)
    assert written(Net(), None, tmp_path) == written(Net(), ONE, tmp_path)


@pytest.mark.parametrize("shape", [ONE, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda model, shape: Search(model, LINEAR, shape, num_inference_steps=2),
        lambda model, shape: Subject(model, LINEAR, shape),
    ],
)
def test_a_wrong_shape_of_one_sample_is_named(make, shape):
    with pytest.raises(ValueError, match=r"^shape must be given for a model without sample_shape, got None: for"):
        make(lambda x, t: x, None)
    wrong = (0, 4)
    name = "shape" if shape is None else r"model\.sample_shape"
    model, given = (Net(), wrong) if shape is None else (Net(wrong), None)
    with pytest.raises(ValueError, match=rf"^{name}\[0\] must be an integer, at least 1, got 0"):
        make(model, given)


def test_the_first_sample_of_a_seed_is_the_same_in_every_batch():
    assert torch.equal(SAMPLER.sample(Net(), seed=3), SAMPLER.sample(Net(), (5, *ONE), seed=3)[:1])


def test_optimize_takes_the_models_shape_too():
    model = Net()
    SAMPLER.optimize(model, compile=False)
    assert {*model.seen} == {(1, *ONE)}


def test_what_wraps_a_model_passes_its_shape_on():
    assert SAMPLER.sample(torch.compile(Net(), backend="eager"), seed=0).shape == (1, *ONE)
    flow = as_flow(Net(), LINEAR, prediction_type="v_prediction")
    assert DDIMSampler(FlowSchedule(), 2).sample(flow, seed=0).shape == (1, *ONE)


@pytest.mark.parametrize("call", TAKING_A_SHAPE.values(), ids=TAKING_A_SHAPE)
@pytest.mark.parametrize("model", [lambda x, t: pytest.fail("called"), Net(None)], ids=["no attribute", "None"])
def test_without_a_shape_anywhere_the_error_says_where_one_may_stand(call, model):
    message = r"^shape is needed .* no sample_shape, got None: for instance shape=\(16, .*set model\.sample_shape = \("
    with pytest.raises(ValueError, match=message):
        call(model, None, seed=0)


@pytest.mark.parametrize("stated", ["3x4x4", (2, 0, 4), (), (2, 4.5)], ids=str)
def test_a_wrong_shape_of_the_model_is_named(stated):
    with pytest.raises((TypeError, ValueError), match=r"^model\.sample_shape.* got "):
        SAMPLER.sample(Net(stated), seed=0)


PICTURE = torch.zeros(ONE)
WITHOUT_A_BATCH = {
    **{name: (lambda model, call=call: call(model, ONE, seed=0), "shape") for name, call in TAKING_A_SHAPE.items()},
    "x_T": (lambda model: SAMPLER.sample(model, x_T=PICTURE), "x_T"),
    "optimize": (lambda model: SAMPLER.optimize(model, ONE), "shape"),
    "img2img": (lambda model: SAMPLER.img2img(model, PICTURE, 0.5), "x0"),
    "inpaint": (lambda model: SAMPLER.inpaint(model, PICTURE, PICTURE), "x0"),
    "interpolate": (lambda model: SAMPLER.interpolate(model, PICTURE, PICTURE, [0.5]), "x_T_first"),
    "invert": (lambda model: SAMPLER.invert(model, PICTURE), "x0"),
    "reconstruct": (lambda model: SAMPLER.reconstruct(model, PICTURE), "x0"),
}


@pytest.mark.parametrize("name", WITHOUT_A_BATCH)
def test_a_forgotten_batch_is_named_before_the_model_is_called(name):
    call, argument = WITHOUT_A_BATCH[name]
    remedy = r"use shape=\(1, 2, 4, 4\)" if argument == "shape" else rf"use {argument}\.unsqueeze\(0\)"
    model = Net()
    with pytest.raises(ValueError, match=rf"^{argument} must have a batch .* got \(2, 4, 4\): {remedy}$"):
        call(model)
    assert model.seen == []


def test_other_sizes_than_the_models_are_sampled():
    """A convolutional model draws larger pictures than it was trained on, which is said."""
    with pytest.warns(UserWarning, match="sample_shape"):
        assert SAMPLER.sample(Net(), (1, 2, 8, 8), seed=0).shape == (1, 2, 8, 8)
