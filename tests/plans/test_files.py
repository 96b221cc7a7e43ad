"""Files of timesteps: read back as written, taken by the sampler, and refused with a reason."""

import json

import numpy as np
import pytest
from damaged_files import DEEP, damaged, other_json, reads_or_names_the_file
from hypothesis import given, settings
from hypothesis import strategies as st

from ddim_fast import DDIMSampler, NoiseSchedule
from ddim_fast.plans.files import TimestepList, read_timesteps

LINEAR = NoiseSchedule.linear()
RESIDUAL = (0.1, 0.2, 0.3)


def written(path, **changes):
    fields = {"num_train_timesteps": 1000, "schedule_digest": LINEAR.digest, "order": 2, "eps_residual": RESIDUAL}
    TimestepList((999, 500, 10), **{**fields, **changes}).write(path)
    return path


@settings(max_examples=50, deadline=None)
@given(
    st.sets(st.integers(0, 999), min_size=1, max_size=30),
    st.sampled_from([1, 2]),
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5))
    ),
)
def test_round_trip(tmp_path_factory, timesteps, order, provenance):
    path = tmp_path_factory.mktemp("list") / "list.json"
    timesteps = tuple(sorted(timesteps, reverse=True))
    residual, told = tuple(0.5 for _ in timesteps), timesteps[::-1]
    for model_timesteps in (None, told):
        found = TimestepList(timesteps, 1000, LINEAR.digest, order, residual, provenance, model_timesteps)
        found.write(path)
        assert read_timesteps(path) == found
    assert json.dumps(list(timesteps)) in path.read_text()  # on a line, for people


def test_the_sampler_takes_a_file(tmp_path):
    path = written(tmp_path / "list.json")
    for taken in (path, str(path), read_timesteps(path)):
        sampler = DDIMSampler(LINEAR, timesteps=taken)
        assert sampler.timesteps == (999, 500, 10)
        assert sampler.plan().order == 2
        assert sampler.plan().eps_residual is None
    assert DDIMSampler(LINEAR, timesteps=path, order=1).plan().order == 1
    assert DDIMSampler(LINEAR, timesteps=path, order=1, analytic_variance=True).plan().eps_residual == RESIDUAL
    own = DDIMSampler(LINEAR, timesteps=path, order=1, analytic_variance=[1, 0.5, 0]).plan().eps_residual
    assert own == (1.0, 0.5, 0.0)
    assert (
        DDIMSampler(LINEAR, timesteps=path, order=1, analytic_variance=True).last_steps(2).plan().eps_residual
        == RESIDUAL[1:]
    )


def test_another_schedule(tmp_path):
    path = written(tmp_path / "list.json")
    with pytest.warns(UserWarning, match="was made for another noise schedule"):
        assert DDIMSampler(NoiseSchedule.cosine(), timesteps=path).timesteps == (999, 500, 10)
    with pytest.raises(
        ValueError, match="is for 1000 training timesteps, got a schedule with 50 training timesteps: search again"
    ):
        DDIMSampler(NoiseSchedule.linear(50), timesteps=path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "must be JSON"),
        ("[1, 2]", '"format": "ddim_fast timesteps"'),
        ('{"format": "other"}', '"format": "ddim_fast timesteps"'),
        ('{"format": "ddim_fast timesteps", "version": 5}', "must have version 1 or 2 or 3 or 4, got 5"),
        ('{"format": "ddim_fast timesteps", "version": 1}', "is no list of timesteps: 'timesteps'"),
        (
            '{"format": "ddim_fast timesteps", "version": 1, "timesteps": [1, 2], "num_train_timesteps": 10}',
            "strictly decreasing",
        ),
        (
            '{"format": "ddim_fast timesteps", "version": 1, "timesteps": [10], "num_train_timesteps": 10}',
            r"lie in \[0, 9\]",
        ),
        (
            '{"format": "ddim_fast timesteps", "version": 1, "timesteps": [1.5], "num_train_timesteps": 10}',
            "must be an int",
        ),
        (
            '{"format": "ddim_fast timesteps", "version": 1, "timesteps": [5], "num_train_timesteps": 10, "order": 3}',
            "must have order 1 or 2, got 3",
        ),
        (
            '{"format": "ddim_fast timesteps", "version": 1, "timesteps": [5], "num_train_timesteps": 10, "eps_residual": [1, 2]}',
            "one for each of the 1 timesteps",
        ),
        (
            '{"format": "ddim_fast timesteps", "version": 2, "timesteps": [5], "num_train_timesteps": 10, "model_timesteps": [10]}',
            r"must be 1 integers, .* in \[0, 9\], got \[10\]",
        ),
    ],
)
def test_what_is_no_list(tmp_path, text, said):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_timesteps(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with ddim-fast search"):
        DDIMSampler(LINEAR, timesteps=str(tmp_path / "nothing.json"))


def test_an_analytic_variance_needs_numbers(tmp_path):
    with pytest.raises(ValueError, match="takes the mean squared error of eps from a file of timesteps"):
        DDIMSampler(LINEAR, 10, analytic_variance=True)
    path = written(tmp_path / "list.json", eps_residual=None)
    with pytest.raises(ValueError, match=f"{path} holds none"):
        DDIMSampler(LINEAR, timesteps=path, order=1, analytic_variance=True)
    with pytest.raises(
        ValueError, match="analytic_variance must be one finite number, 0 or more, for each of the 10 timesteps"
    ):
        DDIMSampler(LINEAR, 10, analytic_variance=[0.5])
    with pytest.raises(ValueError, match=r"analytic_variance\[1\] must be a finite number, at least 0, got nan"):
        DDIMSampler(LINEAR, 2, analytic_variance=[0.5, np.nan])
    with pytest.raises(ValueError, match="order=2 beside it"):
        DDIMSampler(LINEAR, 2, analytic_variance=[0.5, 0.5], order=2)


WHOLE = {
    "format": "ddim_fast timesteps",
    "version": 2,
    "timesteps": [900, 500, 10],
    "model_timesteps": [890, 510, 10],
    "num_train_timesteps": 1000,
    "schedule_sha256": LINEAR.digest,
    "order": 2,
    "eps_residual": [0.1, 0.2, 0.3],
    "provenance": {"method": "x"},
}


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(other_json(WHOLE), damaged(json.dumps(WHOLE).encode()), st.sampled_from(DEEP)))
def test_a_list_of_any_bytes_is_read_or_named(tmp_path_factory, content):
    reads_or_names_the_file(read_timesteps, tmp_path_factory.getbasetemp() / "list.json", content)
