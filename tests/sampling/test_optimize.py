"""A model made faster: the same samples, whatever was tried; what was said is what was measured."""

import dataclasses

import pytest
import torch
from torch import nn

import ddim_fast as df
from ddim_fast.sampling import optimize as module
from ddim_fast.sampling.optimize import OptimizedModel, reduced_convolutions

LINEAR = df.NoiseSchedule.linear()
SHAPE = (3, 2, 8, 8)


class Small(nn.Module):
    prediction_type = "v_prediction"
    flavour = "small"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.label = nn.Embedding(5, 16)
        self.batches = []

    def forward(self, x, t, label):
        self.batches.append(len(x))
        return self.last(
            torch.tanh(self.first(x) + self.label(label)[:, :, None, None] + t[:, None, None, None] / 1000)
        )

    def unconditional(self, conditioning):
        return {"label": torch.full_like(conditioning["label"], 4)}


@pytest.fixture
def model():
    return Small().eval().requires_grad_(False)


CONDITIONING = {"label": torch.tensor([0, 1, 2])}


def sampler(steps=6):
    return df.DDIMSampler(LINEAR, steps)


def test_the_samples_stay(model):
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False)
    options = dict(seed=7, conditioning=CONDITIONING)
    expected = sampler().sample(model, SHAPE, **options)
    assert (sampler().sample(fast, SHAPE, **options) - expected).abs().max() <= 2 / 255
    assert fast.gain.largest_change <= fast.gain.tolerance == 2 / 255
    assert fast.gain.after <= fast.gain.before
    assert fast.flavour == "small"
    assert fast.prediction_type == "v_prediction"
    assert "times faster" in str(fast.gain)
    with pytest.raises(AttributeError, match="nothing_like_that"):
        fast.nothing_like_that  # noqa: B018 (the access is the test)


def test_no_tolerance_leaves_exact_ways_only(model):
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False, tolerance=0.0)
    options = dict(seed=7, conditioning=CONDITIONING)
    assert fast.gain.largest_change == 0
    torch.testing.assert_close(
        sampler().sample(fast, SHAPE, **options), sampler().sample(model, SHAPE, **options), rtol=0, atol=0
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_torch_compile(model):
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING)
    options = dict(seed=7, conditioning=CONDITIONING)
    expected = sampler().sample(model, SHAPE, **options)
    assert (sampler().sample(fast, SHAPE, **options) - expected).abs().max() <= 2 / 255


def fake_clock(monkeypatch, costs):
    """``_in_turn`` without a clock: each call costs what ``costs`` says of it, in the order of the calls of ``_in_turn``."""
    left = iter(costs)

    def in_turn(*calls, rounds):
        for call in calls:
            call()
        return list(next(left))

    monkeypatch.setattr(module, "_in_turn", in_turn)


def test_the_fastest_way_is_taken(model, monkeypatch):
    fake_clock(monkeypatch, [(1.0, 0.5), (1.0, 1.0), (2.0, 1.0)])  # channels last is faster; reduced is not; whole runs
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False)
    assert fast.gain.ways == ("channels last",)
    assert fast.fast is not model
    assert model.first.weight.is_contiguous()
    assert (fast.gain.before, fast.gain.after, fast.gain.times_faster) == (2.0, 1.0, 2.0)


def test_normalizations_are_replaced_where_that_is_faster(monkeypatch):
    way = "group normalization and SiLU in one pass"

    class Normalized(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU())

        def forward(self, x, t, label):
            return self.last(self.norm(self.first(x) + self.label(label)[:, :, None, None]))

    model = Normalized().eval().requires_grad_(False)
    # channels last; this; reduced precision; whole runs
    fake_clock(monkeypatch, [(1.0, 1.0), (1.0, 0.5), (1.0, 1.0), (2.0, 1.0)])
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False)
    assert fast.gain.ways == (way,)
    assert 0 < fast.gain.largest_change <= 1e-4
    moved = fast.gain.largest_change
    for seconds, tolerance in ((0.99, 1.0), (0.5, moved * 0.99)):
        fake_clock(monkeypatch, [(1.0, 1.0), (1.0, seconds), (1.0, 1.0), (2.0, 1.0)])
        made = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False, tolerance=tolerance)
        assert made.gain.ways == ()


def test_what_does_not_help_in_the_end_is_left_out(model, monkeypatch):
    fake_clock(monkeypatch, [(1.0, 0.5), (1.0, 1.0), (1.0, 1.5)])
    fast = sampler().optimize(model, SHAPE, conditioning=CONDITIONING, compile=False)
    assert fast.gain.ways == ()
    assert fast.fast is model
    assert fast.gain.times_faster == 1
    assert "nothing helped" in str(fast.gain)


def test_reduced_precision_goes_as_far_as_the_tolerance(model, monkeypatch):
    """A way that is wrong wherever convolutions are reduced: the later in the run, the less."""
    asked = []

    def reduced(self, x, t, **conditioning):
        low = torch.backends.mkldnn.conv.fp32_precision == "bf16"
        asked.append((int(t[0]), low))
        return Small.forward(self, x, t, **conditioning) + (0.01 if low else 0.0)

    wrong = type("Wrong", (Small,), {"forward": reduced})().eval().requires_grad_(False)
    times = [(1.0, 2.0), (0.5, 1.0), (2.0, 1.0)]  # channels last is slower; reduced is faster; whole runs
    fake_clock(monkeypatch, times)
    everything = sampler().optimize(wrong, SHAPE, conditioning=CONDITIONING, compile=False, tolerance=10.0)
    assert everything.gain.ways == ("convolutions in bfloat16 in the 6 noisiest of 6 steps",)
    fake_clock(monkeypatch, times)
    nothing = sampler().optimize(wrong, SHAPE, conditioning=CONDITIONING, compile=False, tolerance=0.0)
    assert nothing.gain.ways == ()
    assert nothing.reduced_from is None
    fake_clock(monkeypatch, times)
    middle = everything.gain.largest_change * 0.9
    some = sampler().optimize(wrong, SHAPE, conditioning=CONDITIONING, compile=False, tolerance=middle * module.MARGIN)
    assert some.gain.largest_change <= middle
    assert some.reduced_from in sampler().timesteps
    asked.clear()
    sampler().sample(some, SHAPE, seed=0, conditioning=CONDITIONING)
    assert {t for t, low in asked if low} == {t for t in sampler().timesteps if t >= some.reduced_from} != set()
    assert torch.backends.mkldnn.conv.fp32_precision != "bf16"


def test_reduced_convolutions_are_taken_back_after_an_error():
    before = torch.backends.mkldnn.conv.fp32_precision
    with pytest.raises(KeyError), reduced_convolutions():  # noqa: PT012 (what holds inside is looked at, too)
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
        raise KeyError
    assert torch.backends.mkldnn.conv.fp32_precision == before


def test_other_shapes_go_to_the_model(model):
    calls = []
    fast = OptimizedModel(model, lambda x, t, **c: calls.append(x.shape) or model(x, t, **c), SHAPE, None, False)
    x, t = torch.zeros(SHAPE), torch.zeros(3, dtype=torch.long)
    fast(x, t, **CONDITIONING)
    fast(x[:2], t[:2], label=torch.tensor([0, 1]))
    assert calls == [SHAPE]


# --- Both halves of guidance in one call ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.5}, {"return_trajectory": True}])
def test_guidance_in_one_batch(model, options):
    together = OptimizedModel(model, model, (6, 2, 8, 8), None, True)
    arguments = dict(seed=3, conditioning=CONDITIONING, guidance_scale=2.5, **options)
    expected = sampler().sample(model, SHAPE, **arguments)
    assert set(model.batches) == {3}
    model.batches.clear()
    got = sampler().sample(together, SHAPE, **arguments)
    assert set(model.batches) == {6}
    if "return_trajectory" in options:
        expected, got = expected.samples, got.samples
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    model.batches.clear()
    sampler().sample(together, SHAPE, seed=3, conditioning=CONDITIONING)
    assert set(model.batches) == {3}


def test_what_cannot_be_one_batch_is_refused(model):
    together = OptimizedModel(model, lambda x, t, **c: x, (6, 2, 8, 8), None, True)
    for first, second in (({"label": CONDITIONING["label"]}, {"label": None}), ({"a": 1}, {"a": 2}), ({"a": 1}, {})):
        with pytest.raises(ValueError, match="guidance in one batch needs conditioning that is a tensor"):
            sampler().sample(
                together, SHAPE, seed=0, conditioning=first, unconditional_conditioning=second, guidance_scale=2.0
            )


def test_guidance_is_batched_where_that_is_faster(model, monkeypatch):
    exact = [(1.0, 2.0), (1.0, 1.0), (3.0, 2.0)]
    fake_clock(monkeypatch, [(1.0, 2.0), *exact])
    options = dict(conditioning=CONDITIONING, guidance_scale=2.0, compile=False)
    fast = sampler().optimize(model, SHAPE, **options)
    assert fast.gain.ways == ("both halves of guidance in one batch",)
    assert fast.batches_guidance
    assert fast.shape == (6, *SHAPE[1:])
    fake_clock(monkeypatch, [(2.0, 2.0), *exact])
    assert not sampler().optimize(model, SHAPE, **options).batches_guidance


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": lambda x, t: x}, TypeError, "optimize needs an nn.Module, .* got function"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be a finite number, at least 0, got -1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be a finite number, at least 0, got nan"),
        ({"shape": (3,)}, ValueError, r"shape must be \(batch, channels, ...\)"),
    ],
)
def test_errors(model, change, error, said):
    arguments = {"model": model, "shape": SHAPE, "conditioning": CONDITIONING, **change}
    with pytest.raises(error, match=said):
        sampler().optimize(arguments.pop("model"), arguments.pop("shape"), **arguments)


def test_a_gain_is_data():
    gain = module.Gain(("a", "b"), 2.0, 1.0, 0.001, 0.01)
    assert dataclasses.asdict(gain)["before"] == 2.0
    assert (
        str(gain)
        == "2.00 times faster (2.000 s before, 1.000 s after), samples within 1.0e-03 of what they were (allowed: 1.0e-02): a, b"
    )
