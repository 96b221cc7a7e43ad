"""Mistakes that cannot be refused, since a few people mean them: a warning, or a note on the model's own error, says them."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ddim_fast import DDIMSampler, EDMSchedule, FlowSchedule, NoiseSchedule, load_model
from ddim_fast.utils.warn import add_note

LINEAR = NoiseSchedule.linear(100)
SAMPLER = DDIMSampler(LINEAR, 2)
SHAPE = (3, 2, 4, 4)
LEVELS = torch.arange(96.0).reshape(SHAPE) * (255 / 95)
MASK = torch.ones(4, 4)
SOLVER = Path(__file__).parents[2] / "docs" / "examples" / "fashion-8.json"


def half(x, t, **conditioning):
    return x * 0.5


# --- Pictures of 8 bits -----------------------------------------------------------------------------------------------

GIVEN_A_PICTURE = {
    "img2img": lambda x0: SAMPLER.img2img(half, x0, 0.5, seed=0),
    "inpaint": lambda x0: SAMPLER.inpaint(half, x0, MASK, seed=0),
    "inpaint from it": lambda x0: SAMPLER.inpaint(half, x0, MASK, strength=0.5, seed=0),
    "known_x0": lambda x0: SAMPLER.sample(half, mask=MASK, known_x0=x0, seed=0),
    "invert": lambda x0: SAMPLER.invert(half, x0),
    "reconstruct": lambda x0: SAMPLER.reconstruct(half, x0),
}


@pytest.mark.parametrize("name", GIVEN_A_PICTURE)
def test_levels_of_8_bits_are_said_once_and_by_what_line(name):
    with pytest.warns(UserWarning, match=r"^clean samples .*\[-1, 1\], got 0 to 255: .*x0 / 127\.5 - 1$") as said:
        GIVEN_A_PICTURE[name](LEVELS)
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("name", GIVEN_A_PICTURE)
@pytest.mark.parametrize("x0", [LEVELS / 127.5 - 1, LEVELS / 255, LEVELS - 100, LEVELS * torch.nan, LEVELS[:0]])
def test_other_samples_are_nobodys_mistake(name, x0):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "samples must be finite")
        GIVEN_A_PICTURE[name](x0)


@pytest.mark.parametrize("name", GIVEN_A_PICTURE)
def test_a_picture_of_bytes_is_refused_with_the_remedy(name):
    with pytest.raises(TypeError, match=r"x0 must be a floating-point tensor .*uint8: .*x0\.float\(\) / 127\.5 - 1$"):
        GIVEN_A_PICTURE[name](LEVELS.byte())


# --- Guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-2.0, [1.0, -2.0], lambda t: -2.0], ids=["number", "list", "function"])
def test_a_negative_guidance_scale_is_said(scale):
    with pytest.warns(UserWarning, match=r"^guidance_scale should be at least 0 .*, got -2, which steers away") as said:
        SAMPLER.sample(half, SHAPE, seed=0, guidance_scale=scale, unconditional_conditioning={})
    assert [warning.filename for warning in said] == [__file__]


# --- What the model did not expect ------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """A model with a label for each sample, whose error says nothing of labels."""

    def forward(self, x, t, y, table=None, hidden=None):
        return x * y.to(x.dtype).view(-1, 1, 1, 1) + (0 if hidden is None else hidden["text"][0])

    def unconditional(self, conditioning):
        return {**conditioning, "y": torch.zeros_like(conditioning["y"])}


CALLS = {
    "sample": lambda model, x, **given: SAMPLER.sample(model, x.shape, seed=0, **given),
    "img2img": lambda model, x, **given: SAMPLER.img2img(model, x, 0.5, seed=0, **given),
    "invert": lambda model, x, **given: SAMPLER.invert(model, x, **given),
    "sample_parallel": lambda model, x, **given: SAMPLER.sample_parallel(model, x.shape, seed=0, window=1, **given),
    "rollout": lambda model, x, **given: SAMPLER.replace(eta=1.0).rollout(model, x.shape, seed=0, **given),
}


def notes(error):
    return getattr(error.value, "__notes__", [])


has_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes from Python 3.11 on")


@has_notes
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
def test_conditioning_of_another_batch_is_noted_on_the_models_error(name, guidance):
    with pytest.raises(RuntimeError, match="size of tensor") as error:
        CALLS[name](Labelled(), torch.zeros(SHAPE), conditioning={"y": torch.arange(8)}, **guidance)
    (note,) = notes(error)
    assert note.endswith("a batch of 3, and conditioning with a row for each is what most models want, got y (8,)")


@has_notes
def test_a_result_of_the_wrong_shape_is_noted_as_an_error_of_the_models_is():
    """One sample and eight labels: the model's tensors broadcast, and its output is the first thing wrong."""
    with pytest.raises(ValueError, match="must return the shape of its input") as error:
        SAMPLER.sample(Labelled(), (1, 2, 4, 4), conditioning={"y": torch.arange(8)})
    assert "got y (8,)" in notes(error)[0]


@has_notes
def test_nested_conditioning_is_named_by_its_place_and_what_fits_is_not_named():
    given = {"y": torch.arange(3), "table": torch.tensor(2.0), "hidden": {"text": [torch.zeros(5, 2, 4, 4)]}}
    with pytest.raises(RuntimeError) as error:
        SAMPLER.sample(Labelled(), SHAPE, conditioning=given)
    assert notes(error)[0].endswith("got hidden['text'][0] (5, 2, 4, 4)")


@has_notes
def test_a_picture_without_a_batch_is_noted_where_the_model_does_not_say_its_shape():
    with pytest.raises(ValueError, match="must return the shape of its input") as error:
        SAMPLER.img2img(Labelled(), torch.zeros(3, 4, 4), 0.5, seed=0, conditioning={"y": torch.arange(3)})
    (note,) = notes(error)
    assert note.endswith("(3, 4, 4), whose first size is the batch: one picture is (1, 3, 4, 4)")


@has_notes
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_errors_that_say_it_themselves_have_no_note(kind):
    def failing(x, t, y):
        raise kind("of its own")

    with pytest.raises(kind) as error:
        SAMPLER.sample(failing, (3, 4, 4), conditioning={"y": torch.arange(8)})
    assert notes(error) == []


@has_notes
def test_an_error_with_usual_input_is_left_as_it_is():
    with pytest.raises(RuntimeError) as error:
        SAMPLER.sample(lambda x, t: x @ torch.zeros(7, 7), SHAPE)
    assert notes(error) == []


@has_notes
def test_the_model_that_ships_says_it():
    with pytest.raises(ValueError, match=r"class_labels must be .* one for each of the 1 samples") as error:
        DDIMSampler(NoiseSchedule.linear(), 2).sample(
            load_model(), seed=0, conditioning={"class_labels": torch.arange(8)}
        )
    assert "class_labels (8,)" in str(notes(error))


def test_before_python_3_11_a_note_is_a_warning():
    class OldError(Exception):
        add_note = property(lambda self: self.missing)  # as if there were none

    with pytest.warns(UserWarning, match="^what was wrong$"):
        add_note(OldError(), "what was wrong")


# --- A model sampled otherwise than it was trained --------------------------------------------------------------------


class Trained(nn.Module):
    """A model that says what it was trained with."""

    def __init__(self, schedule, *layers):
        super().__init__()
        self.schedule, self.layers, self.prediction_type = schedule, nn.Sequential(*layers), "v_prediction"

    def forward(self, x, t, y=None):
        return self.layers(x) * 0.5


METHODS = {
    "sample": lambda sampler, model: sampler.sample(model, SHAPE, seed=0),
    "img2img": lambda sampler, model: sampler.img2img(model, torch.zeros(SHAPE), 0.5, seed=0),
    "inpaint": lambda sampler, model: sampler.inpaint(model, torch.zeros(SHAPE), MASK, seed=0),
    "interpolate": lambda sampler, model: sampler.interpolate(model, torch.ones(SHAPE), torch.ones(SHAPE), [0.5]),
    "invert": lambda sampler, model: sampler.invert(model, torch.zeros(SHAPE)),
    "reconstruct": lambda sampler, model: sampler.reconstruct(model, torch.zeros(SHAPE)),
    "sample_parallel": lambda sampler, model: sampler.sample_parallel(model, SHAPE, seed=0),
    "rollout": lambda sampler, model: sampler.replace(eta=1.0).rollout(model, SHAPE, seed=0),
}

OTHERS = {
    "another schedule": (LINEAR, NoiseSchedule.cosine(100)),
    "another path": (LINEAR, FlowSchedule()),
    "another scale of time": (FlowSchedule(time_scale=1000.0), FlowSchedule()),
    "another form of the network": (EDMSchedule(), EDMSchedule(preconditioned=True)),
}
THE_SAME = {
    "equal": (LINEAR, NoiseSchedule.linear(100)),
    "from float32": (LINEAR, NoiseSchedule(LINEAR.alphas_cumprod.astype("float32"))),
    "other times": (FlowSchedule(), FlowSchedule(shift=3.0)),
    "another range": (EDMSchedule(), EDMSchedule(sigma_max=40.0)),
    "no schedule of ours": ("linear", LINEAR),
}


@pytest.mark.parametrize("pair", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_another_schedule_is_said_once_and_by_what_line(pair, method):
    trained, used = OTHERS[pair]
    with pytest.warns(
        UserWarning, match=r"^the sampler's schedule should be .* use DDIMSampler\(model\.schedule"
    ) as said:
        METHODS[method](DDIMSampler(used, 2), Trained(trained))
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("pair", THE_SAME)
def test_a_schedule_that_tells_the_model_the_same_is_nobodys_mistake(pair):
    trained, used = THE_SAME[pair]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["sample"](DDIMSampler(used, 2), Trained(trained))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.1), nn.Dropout2d(), nn.BatchNorm2d(2)], ids=lambda layer: type(layer).__name__
)
def test_training_mode_is_said_once_and_by_what_line(method, layer):
    with pytest.warns(UserWarning, match=rf"{type(layer).__name__} in 'layers\.0' .*: call model\.eval\(\)$") as said:
        METHODS[method](SAMPLER, Trained(LINEAR, layer).train())
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize(
    "model",
    [
        Trained(LINEAR, nn.Dropout(0.1), nn.BatchNorm2d(2)).eval(),
        Trained(LINEAR, nn.GroupNorm(1, 2), nn.Dropout(0.0)).train(),
        Trained(LINEAR, nn.Dropout(0.1).eval()),
    ],
    ids=["eval", "no such layer", "the layer alone"],
)
def test_other_modules_are_nobodys_mistake(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["sample"](SAMPLER, model)


def test_what_a_file_says_of_a_model_that_does_not_say_it_is_said():
    """Of the file's coefficients, which are for v_prediction; the schedule's own is epsilon."""
    linear = NoiseSchedule.linear()
    sampler = DDIMSampler(linear, timesteps=SOLVER)
    with pytest.warns(
        UserWarning, match=r"taken for .* 'v_prediction', .*: pass prediction_type='v_prediction', or"
    ) as said:
        guessed = sampler.sample(half, SHAPE, seed=0)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sampler.replace(prediction_type="v_prediction").sample(half, SHAPE, seed=0), guessed)
        assert torch.equal(sampler.sample(Trained(linear), SHAPE, seed=0), guessed)
        sampler.replace(order=1).sample(half, SHAPE, seed=0)  # the timesteps alone
        sampler.plan()


# --- What a model that says what it takes is given --------------------------------------------------------------------

FASHION = load_model("fashion")
OF_FASHION = DDIMSampler(FASHION.schedule, 2)


@pytest.mark.parametrize("conditioning", [None, {}, {"class_labels": None}])
def test_guidance_to_nothing_is_said(conditioning):
    with pytest.warns(
        UserWarning, match=r"^guidance needs what .*guidance_scale=3 .*pass conditioning, .*class_labels"
    ) as said:
        OF_FASHION.sample(FASHION, (2, 1, 28, 28), seed=0, guidance_scale=3.0, conditioning=conditioning)
    assert [warning.filename for warning in said] == [__file__]


WRONG_LABELS = {
    "one for all": (
        torch.tensor([1]),
        ValueError,
        r"one for each of the 2 samples, got \(1,\): .* labels\.expand\(2\)",
    ),
    "no batch": (torch.tensor(1), ValueError, r"one for each of the 2 samples, got \(\): .* labels\.expand\(2\)"),
    "too many": (torch.arange(3), ValueError, r"one for each of the 2 samples, got \(3,\)"),
    "one-hot": (torch.zeros(2, 10, dtype=torch.int64), ValueError, r"got \(2, 10\)$"),
    "a list": ([1, 2], TypeError, r"got \[1, 2\]: use torch\.tensor"),
    "a number": (3, TypeError, r"got 3: use torch\.tensor"),
    "floats": (torch.ones(2), TypeError, r"got torch\.float32: use labels\.long\(\)$"),
    "a mask": (torch.ones(2, dtype=torch.bool), TypeError, r"got torch\.bool: use labels\.long\(\)$"),
    "below": (torch.tensor([0, -1]), ValueError, r"from 0 to 9 \(10: no class\), got -1$"),
    "above": (torch.tensor([0, 200]), ValueError, r"from 0 to 9 \(10: no class\), got 200$"),
}


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
@pytest.mark.parametrize("wrong", WRONG_LABELS)
def test_labels_that_are_no_classes_are_refused(wrong, guidance):
    labels, kind, words = WRONG_LABELS[wrong]
    with pytest.raises(kind, match=rf"^class_labels must be a tensor .*{words}"):
        OF_FASHION.sample(FASHION, (2, 1, 28, 28), seed=0, conditioning={"class_labels": labels}, **guidance)


def test_no_class_is_a_label_too_and_either_integer_will_do():
    labels = torch.tensor([10, 3])
    for given in (labels, labels.int()):
        OF_FASHION.sample(FASHION, (2, 1, 28, 28), seed=0, conditioning={"class_labels": given})


@pytest.mark.parametrize("method", ["sample", "img2img", "sample_parallel"])
def test_another_shape_than_the_models_is_said_once(method):
    calls = {
        "sample": lambda: OF_FASHION.sample(FASHION, (2, 1, 32, 32), seed=0),
        "img2img": lambda: OF_FASHION.img2img(FASHION, torch.zeros(2, 1, 32, 32), 0.5, seed=0),
        "sample_parallel": lambda: OF_FASHION.sample_parallel(FASHION, (2, 1, 32, 32), seed=0),
    }
    with pytest.warns(UserWarning, match=r"sample_shape, \(B, 1, 28, 28\), got \(2, 1, 32, 32\), on which") as said:
        calls[method]()
    assert [warning.filename for warning in said] == [__file__]


def test_a_forgotten_batch_is_named():
    def model(x, t):
        return x.expand(3, *x.shape)

    with pytest.raises(
        ValueError, match=r"got \(3, 3, 16, 16\): .* its batch is missing, and its shape is \(1, 3, 16, 16\)"
    ):
        SAMPLER.sample(model, (3, 16, 16), seed=0)


@has_notes
def test_a_misspelt_condition_is_noted_on_the_models_error():
    with pytest.raises(TypeError, match="unexpected keyword") as error:
        OF_FASHION.sample(FASHION, (2, 1, 28, 28), seed=0, conditioning={"labels": torch.arange(2)})
    assert notes(error)[0].endswith("by name, got 'labels': the model takes class_labels")
