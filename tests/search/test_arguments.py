"""The arguments of a search: a mistake in any of them is refused by its name, before the model is called."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast.generation import EveryClass
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.search import Search, best_timesteps, search_timesteps

NOTHING = st.one_of(st.binary(max_size=2), st.builds(object), st.just([None, None]), st.just(torch.zeros(2)))
"""What is no number and no name."""
WORDS = st.text(st.characters(categories=["L"]), min_size=1, max_size=3)
NO_COUNT = st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.integers(max_value=0), st.booleans())
MISTAKES = {
    "model": st.one_of(NOTHING, WORDS, st.none(), st.integers()),
    "schedule": st.one_of(NOTHING, WORDS, st.none(), st.integers(), st.just(NoiseSchedule)),
    "shape": st.one_of(
        st.sampled_from(["abc", b"ab", 5, (), (1, 0), (1, -2), (1.5, 2), (None,), ("a", 2), (True, 2), object()]),
        st.just(torch.zeros(2)),
    ),
    "num_inference_steps": st.one_of(NO_COUNT, st.integers(min_value=1001)),
    "order": st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.sampled_from([0, 3, -1, True])),
    "conditioning": st.one_of(NOTHING, WORDS, st.integers(), st.just({"class_labels": torch.zeros(2)}), st.just(EveryClass)),
    "guidance_scale": st.one_of(
        st.binary(max_size=2), st.builds(object), WORDS, st.sampled_from([float("nan"), float("inf"), [1.0, 2.0], "2"])
    ),
    "sampler_options": st.one_of(NOTHING, WORDS, st.none(), st.integers(), st.sampled_from([{1: 2}, {"eat": 1}, {"eta": [0.0, 1.0, 0.0]}])),
    "count": NO_COUNT,
    "refine_count": NO_COUNT,
    "refine_runs": st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.integers(max_value=-1), st.booleans()),
    "held_out": NO_COUNT,
    "candidates": st.one_of(NOTHING, WORDS, st.floats(), st.integers(max_value=2), st.booleans()),
    "seed": st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.integers(max_value=-1), st.integers(min_value=2**64 - 1)),
    "coefficients": st.one_of(NOTHING, WORDS, st.none(), st.integers(), st.just(True)),  # of order 1
    "fit_iterations": NO_COUNT,
    "device": st.one_of(NOTHING, WORDS, st.none(), st.just("meta")),
}  # fmt: skip


def uncalled(x, t, **conditioning):
    raise AssertionError("the model was called")


@pytest.mark.parametrize("name", MISTAKES)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_mistake_is_refused_by_the_name_of_the_argument(name, data):
    schedule = NoiseSchedule.linear()
    arguments = {"model": uncalled, "schedule": schedule, "shape": (1, 2, 2), "num_inference_steps": 3}
    arguments |= {name: data.draw(MISTAKES[name])}
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b(.|\n)*, got "):
        search_timesteps(Search(**arguments))


@pytest.mark.parametrize("costs", [None, [[1.0]], "costs", torch.zeros(3, 4)], ids=repr)
def test_costs_that_are_no_table_are_refused(costs):
    with pytest.raises(TypeError, match=r"^costs must be a NumPy array .*, got "):
        best_timesteps(costs, 1)
