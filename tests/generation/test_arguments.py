"""The arguments of a set of samples: a mistake in any of them is refused by its name, before the model is called or a file written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ddim_fast.generation import EveryClass, OneClass, Table, check_set, generate, join_npz
from ddim_fast.plans.schedules import NoiseSchedule
from ddim_fast.sampler import DDIMSampler

NOTHING = st.one_of(st.binary(max_size=2), st.builds(object), st.just([None, None]), st.just(torch.zeros(2)))
"""What is no number and no name."""
WORDS = st.text(st.characters(categories=["L"]), min_size=1, max_size=3)
NO_COUNT = st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.integers(max_value=0), st.booleans())
NO_PATH = st.one_of(st.none(), st.just("a\0b"), st.integers(), st.binary(max_size=2), st.builds(object), st.just(["a"]))
NO_DTYPE = st.one_of(NOTHING, WORDS, st.sampled_from([torch.int64, torch.complex64, float]))
MISTAKES = {
    "model": st.one_of(NOTHING, WORDS, st.none(), st.integers()),
    "sampler": st.one_of(NOTHING, WORDS, st.none(), st.just(DDIMSampler)),
    "count": NO_COUNT,
    "out": NO_PATH,
    "seed": st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.integers(max_value=-1), st.integers(min_value=2**64)),
    "shape": st.one_of(
        st.sampled_from(["abc", b"ab", 5, (), (1, 0), (1, -2), (1.5, 2), (None,), ("a", 2), (True, 2), object(), [[1, 2]]]),
        st.just(torch.zeros(2)),
    ),
    "conditioning": st.one_of(NOTHING, WORDS, st.integers(), st.just({"class_labels": torch.zeros(2)}), st.just(EveryClass)),
    "guidance_scale": st.one_of(
        st.binary(max_size=2), st.builds(object), WORDS, st.sampled_from([float("nan"), float("inf"), [1.0], [1.0, "a"]])
    ),
    "guidance_rescale": st.one_of(NOTHING, WORDS, st.none(), st.sampled_from([-0.1, 1.1, float("nan")])),
    "format": st.one_of(NOTHING, WORDS, st.none(), st.integers()),
    "shard_size": NO_COUNT,
    "batch_size": NO_COUNT,
    "compute_batch_size": NO_COUNT,
    "device": st.one_of(NOTHING, WORDS, st.none(), st.just("meta"), st.just("cuda:99")),
    "dtype": st.one_of(NO_DTYPE, st.none()),
    "model_dtype": NO_DTYPE,
    "backend": st.one_of(NOTHING, WORDS, st.integers()),
    "capture": st.one_of(NOTHING, WORDS, st.none(), st.integers()),
    "threads": NO_COUNT,
    "model_id": st.one_of(NOTHING, st.integers(), st.just("")),
    "patience": st.one_of(NOTHING, WORDS, st.sampled_from([0, -1, float("nan"), float("inf"), True])),
}  # fmt: skip


class Uncalled(nn.Module):
    def forward(self, x, t, class_labels=None):
        raise AssertionError("the model was called")


@pytest.mark.parametrize("name", MISTAKES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mistake_is_refused_by_the_name_of_the_argument(name, tmp_path, data):
    arguments = {
        "model": Uncalled().eval(),
        "sampler": DDIMSampler(NoiseSchedule.linear(), 2),
        "count": 4,
        "out": tmp_path / "out",
        "shape": (1, 2, 2),
    }
    if name == "guidance_rescale":
        arguments |= {"guidance_scale": 2.0, "conditioning": EveryClass(3)}
    arguments |= {name: data.draw(MISTAKES[name])}
    with pytest.raises((TypeError, ValueError), match=rf"^(a )?{name}\b(.|\n)*, got "):
        generate(**arguments)
    assert not (tmp_path / "out").exists()


CALLS = {
    "EveryClass": (EveryClass, {"num_classes": 3, "name": "class_labels"}),
    "OneClass": (OneClass, {"label": 3, "name": "class_labels"}),
    "Table": (Table, {"path": "rows.csv"}),
    "check_set": (check_set, {"path": "set"}),
    "join_npz": (join_npz, {"out": "set", "file": "set.npz"}),
}
PLAUSIBLE = {
    "num_classes": NO_COUNT,
    "label": st.one_of(NOTHING, WORDS, st.none(), st.floats(), st.booleans(), st.integers(min_value=2**63)),
    "name": st.one_of(NOTHING, st.none(), st.integers(), st.just("")),
    "path": NO_PATH,
    "out": NO_PATH,
    "file": NO_PATH,
}


@pytest.mark.parametrize(("call", "name"), [(call, name) for call, (_, given) in CALLS.items() for name in given])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_mistake_beside_generate_is_refused_by_the_name_of_the_argument(call, name, data):
    function, arguments = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.*, got "):
        function(**arguments | {name: data.draw(PLAUSIBLE[name])})
