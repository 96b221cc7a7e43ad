"""The timesteps that a model is called with: kept from run to run, and never another's."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddim_fast import DDIMSampler, FlowSchedule, NoiseSchedule

SHAPE = (1, 3, 4)
SAMPLERS = {"int64": DDIMSampler(NoiseSchedule.linear(), 4), "float32": DDIMSampler(FlowSchedule(), 4)}
EXPECTED = {name: [torch.tensor([told]) for told in s.plan().model_times] for name, s in SAMPLERS.items()}


class Told(nn.Module):
    """It keeps the tensors that it was called with, and copies of them."""

    def __init__(self, change=lambda t: None):
        super().__init__()
        self.change, self.tensors, self.values = change, [], []

    def forward(self, x, t):
        self.tensors.append(t)
        self.values.append(t.clone())
        self.change(t)
        return 0.5 * x

    def assert_right(self, name):
        assert len(self.values) == 4
        assert all(map(torch.equal, self.values, EXPECTED[name]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_second_run_gets_the_same_tensors(name):
    runs = [Told(), Told()]
    for model in runs:
        SAMPLERS[name].sample(model, SHAPE, seed=0)
        model.assert_right(name)
    assert all(a is b for a, b in zip(*(model.tensors for model in runs), strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_writes_to_them_spoils_no_other_run(name, inference):
    with torch.inference_mode(inference):
        for _ in range(2):
            model = Told(lambda t: t.add_(1))
            SAMPLERS[name].sample(model, SHAPE, seed=0)
            model.assert_right(name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_inside_of_a_run_has_its_own(name):
    SAMPLERS[name].sample(Told(), SHAPE, seed=0)  # so that there are some to lend
    inner = Told(lambda t: t.zero_())
    outer = Told(lambda t: inner.values or SAMPLERS[name].sample(inner, SHAPE, seed=0))
    SAMPLERS[name].sample(outer, SHAPE, seed=0)
    inner.assert_right(name)
    outer.assert_right(name)
    assert not any(a is b for a in inner.tensors for b in outer.tensors)


def test_a_failed_run_leaves_the_next_one_right():
    with pytest.raises(ZeroDivisionError):
        SAMPLERS["int64"].sample(Told(lambda t: t.zero_() / 0 if t else 1 // 0), SHAPE, seed=0)
    model = Told()
    SAMPLERS["int64"].sample(model, SHAPE, seed=0)
    model.assert_right("int64")


def test_batches_of_other_sizes_and_fake_tensors_have_their_own():
    s = DDIMSampler(NoiseSchedule.linear(), 3)
    with FakeTensorMode():
        s.sample(Told(), (2, 3, 4), seed=0, x_T=torch.ones(2, 3, 4))
    for batch_size in (2, 5, 2):
        model = Told()
        s.sample(model, (batch_size, 3, 4), seed=0)
        assert [t.tolist() for t in model.tensors] == [[told] * batch_size for told in s.plan().model_times]
        assert all(type(t) is torch.Tensor for t in model.tensors)


def test_what_a_model_keeps_of_a_run_in_inference_mode_can_be_trained_with():
    s, model = DDIMSampler(NoiseSchedule.linear(), 6), Told()
    with torch.inference_mode():
        s.sample(model, SHAPE, seed=0)
    nn.Embedding(1000, 2)(model.tensors[0]).sum().backward()
