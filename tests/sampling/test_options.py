"""Flat keywords and the records that they are grouped into."""

import inspect

import pytest

from ddim_fast import DDIMSampler
from ddim_fast.sampling import options
from ddim_fast.sampling.options import Options, RolloutKeywords, SampleKeywords, options_of

METHODS = {
    "sample": options.SampleKeywords,
    "img2img": options.EditKeywords,
    "interpolate": options.EditKeywords,
    "inpaint": options.InpaintKeywords,
    "invert": options.InvertKeywords,
    "reconstruct": options.ReconstructKeywords,
    "sample_parallel": options.ParallelKeywords,
    "rollout": options.RolloutKeywords,
}
RECORDS = list(Options())


def test_every_option_is_a_field_of_one_record_and_a_keyword_of_sample_or_of_rollout():
    names = [name for record in RECORDS for name in record._fields]
    assert len(names) == len(set(names))
    of_rollout = RolloutKeywords.__optional_keys__ - SampleKeywords.__optional_keys__
    assert of_rollout == {"log_prob_reduction", "min_std"}
    assert {*names} == SampleKeywords.__optional_keys__ | of_rollout | {"return_trajectory"}


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_keywords_with_their_defaults(method):
    parameters = inspect.signature(getattr(DDIMSampler, method)).parameters
    keywords = METHODS[method].__optional_keys__
    assert keywords <= {*parameters}
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    defaults = {name: value for record in RECORDS for name, value in record._asdict().items()}
    assert all(parameters[name].default is defaults[name] for name in keywords)
    assert not any(isinstance(p.annotation, str) and "ForwardRef" in p.annotation for p in parameters.values())


def test_keywords_are_grouped():
    made = options_of("sample", SampleKeywords, {"seed": 3, "guidance_scale": 2.0, "capture": "off"})
    assert (made.noise.seed, made.guidance.guidance_scale, made.execution.capture) == (3, 2.0, "off")
    assert made.noise.normals == "exact"
    changed = made.replace(seed=None, seeds=[1], mask=None)
    assert (changed.noise.seed, changed.noise.seeds, changed.execution.capture) == (None, [1], "off")
    assert made.noise.seed == 3


@pytest.mark.parametrize(
    ("method", "keywords", "message"),
    [
        ("sample", {"sed": 0}, r"sample has no keyword 'sed', got sed=0: did you mean seed\?"),
        ("invert", {"cond_fn": None}, r"invert has no keyword 'cond_fn', got cond_fn=None: it takes backend, "),
        ("sample_parallel", {"generators": 1}, "sample_parallel has no keyword 'generators'"),
    ],
)
def test_an_unknown_keyword_is_refused_before_the_model_is_called(method, keywords, message):
    from ddim_fast import NoiseSchedule

    sampler = DDIMSampler(NoiseSchedule.linear(), 2)
    arguments = {"x0": None} if method == "invert" else {"shape": (1, 1)}
    with pytest.raises(TypeError, match=message):
        getattr(sampler, method)(lambda x, t: 1 / 0, **arguments, **keywords)
