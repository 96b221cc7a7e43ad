"""What follows from a study's numbers: the front, the recommendation and its sentence."""

import json
import math
from dataclasses import replace

import pytest
from damaged_files import DEEP, damaged, other_json, reads_or_names_the_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tradeoff.example_studies import ALL, DIVERGED, MANY, result, study

from ddim_fast.tradeoff import Cell, Measure, Study, read_json, write_json
from ddim_fast.tradeoff.results import describe, overlap


def steps_of(results):
    return [r.cell.num_inference_steps for r in results]


@pytest.mark.parametrize("name", ["many", "paper", "few", "wasserstein"])
def test_front_is_what_nothing_dominates(name):
    for metric in ALL[name].metrics:
        results = ALL[name].with_metric(metric.name)

        def cost(r, metric=metric):
            return metric.cost(r.quality[metric.name].value)

        def dominated(r, results=results, cost=cost):
            return any(
                o.milliseconds <= r.milliseconds
                and cost(o) <= cost(r)
                and (o.milliseconds < r.milliseconds or cost(o) < cost(r))
                for o in results
            )

        front = ALL[name].pareto_front(metric.name)
        assert not any(dominated(r) for r in front)
        alike = {(r.milliseconds, cost(r)) for r in front}
        assert all(dominated(r) or (r.milliseconds, cost(r)) in alike for r in results)
        assert len(alike) == len(front)


def test_of_equally_fast_cells_the_better_is_on_the_front_for_metrics_that_rise_too():
    found = study(result(Cell(10), precision=0.5, ms=1), result(Cell(11), precision=0.9, ms=1))
    assert steps_of(found.pareto_front("precision")) == [11]
    found = study(result(Cell(10), 5.0, ms=1), result(Cell(11), 9.0, ms=1))
    assert steps_of(found.pareto_front("frechet")) == [10]


def test_of_equal_cells_the_first():
    found = study(result(Cell(10), 5.0, ms=1), result(Cell(11), 5.0, ms=1), result(Cell(12), 5.0, ms=2))
    assert steps_of(found.pareto_front("frechet")) == [10]
    found = study(result(Cell(100), 5.0), result(Cell(10), 5.0))
    assert found.best("frechet").cell == Cell(10)
    assert found.recommendation().chosen.cell == Cell(10)


def test_what_is_not_finite_is_not_compared():
    assert steps_of(DIVERGED.pareto_front("frechet")) == [20, 50]
    assert DIVERGED.recommendation().best.cell == Cell(50)
    assert str(DIVERGED.recommendation()).endswith("the best of all 2 cells.")
    assert study(result(Cell(1), math.nan)).metrics == []
    assert study(result(Cell(1), math.nan)).recommendation() is None


def test_recommendation_is_the_fastest_that_is_close():
    found = study(result(Cell(10), 9.0), result(Cell(20), 5.1), result(Cell(50), 5.05), result(Cell(100), 5.0))
    recommended = found.recommendation()
    assert (recommended.chosen.cell, recommended.best.cell) == (Cell(20), Cell(100))
    assert recommended.times_less == pytest.approx(5)
    assert recommended.share_worse == pytest.approx(0.02)
    assert found.recommendation(within=0.01).chosen.cell == Cell(50)
    assert found.recommendation(within=0).chosen.cell == Cell(100)


def test_chance_makes_more_cells_close():
    found = study(result(Cell(10), 9.0, 0.1), result(Cell(20), 6.0, 0.6), result(Cell(100), 5.0, 0.5))
    assert found.recommendation().chosen.cell == Cell(20)
    assert steps_of(found.within_error("frechet")) == [20, 100]
    assert str(found.recommendation()) == (
        "Use 20 steps with leading spacing: its Frechet distance is within error of the best (100 steps), at 5.0 times the speed."
    )


def test_what_nobody_sees_is_not_worth_any_time():
    cells = [result(Cell(S), distance=value) for S, value in ((10, 0.05), (20, 0.018), (50, 0.004), (100, 0.001))]
    assert str(study(*cells).recommendation("distance")) == (
        "Use 20 steps with leading spacing: its distance to converged is 0.018, too small to see, as is the best (100 steps), at 5.0 "
        "times the speed."
    )
    assert study(*cells[:1], *cells[2:]).recommendation("distance").chosen.cell == Cell(50)
    assert study(result(Cell(10), distance=0.05), result(Cell(20), distance=0.03)).recommendation(
        "distance"
    ).chosen.cell == Cell(20)


def test_higher_can_be_better():
    found = study(result(Cell(10), precision=0.5), result(Cell(20), precision=0.88), result(Cell(50), precision=0.9))
    assert found.best("precision").cell == Cell(50)
    assert found.recommendation("precision").chosen.cell == Cell(20)


def test_errors_that_are_not_known_have_no_length():
    assert overlap(Measure(1.0), Measure(1.0))
    assert not overlap(Measure(1.0), Measure(1.1))
    assert overlap(Measure(1.0), Measure(1.1, 0.11))
    assert overlap(Measure(1.0, 0.06), Measure(1.1, 0.05))
    assert not overlap(Measure(1.0, math.inf), Measure(1.1, 0.01))


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            [result(Cell(20, "log_snr", order=2), 5.15, ms=1), result(Cell(100, "log_snr", order=2), 5.0, ms=5)],
            "Use 20 steps with log_snr spacing and order=2: its Frechet distance is within 3 % of the best (100 steps), at 5.0 times "
            "the speed.",
        ),
        (
            [result(Cell(20, "quad", 0.5), 5.001, ms=1), result(Cell(100, "leading"), 5.0, ms=7.25)],
            "Use 20 steps with quad spacing and eta 0.5: its Frechet distance is within 1 % of the best (100 steps with leading spacing "
            "and eta 0), at 7.2 times the speed.",
        ),
        (
            [result(Cell(20), 5.0, ms=1), result(Cell(100, sigma_hat=True, eta=1.0), 5.0, ms=1.04)],
            "Use 20 steps with leading spacing: its Frechet distance is the best of all 2 cells.",
        ),
        (
            [result(Cell(20), 5.1, ms=1), result(Cell(100, sigma_hat=True, eta=1.0), 5.0, ms=1.04)],
            "Use 20 steps with leading spacing: its Frechet distance is within 2 % of the best (100 steps with sigma-hat), in no more "
            "time.",
        ),
        (
            [result(Cell(1, "mine", 0.5, "variance", timesteps=(999,)), 5.0)],
            "Use 1 step with the timesteps mine and eta 0.5 of the variance: its Frechet distance is the only one measured.",
        ),
        (
            [result(Cell(10), 5.1, ms=0), result(Cell(20), 5.0, ms=1)],
            "Use 10 steps with leading spacing: its Frechet distance is within 2 % of the best (20 steps), in no more time.",
        ),
        (
            [result(Cell(10), 0.01, 0.02, ms=1), result(Cell(20), 0.0, ms=2)],
            "Use 10 steps with leading spacing: its Frechet distance is within error of the best (20 steps), at 2.0 times the speed.",
        ),
    ],
    ids=["as wanted", "what differs", "the best", "no gain", "alone", "no time", "best is 0"],
)
def test_sentence(results, sentence):
    assert str(study(*results).recommendation()) == sentence


def test_description_beside_another_says_what_differs():
    assert describe(Cell(10), beside=Cell(20)) == "10 steps"
    assert describe(Cell(10), beside=Cell(10, "quad", 0.2)) == "10 steps with leading spacing and eta 0"
    assert describe(Cell(10, eta=0.2, order=2)) == "10 steps with leading spacing, eta 0.2 and order=2"


def test_recommendation_by_no_metric():
    assert study().recommendation() is None
    assert MANY.recommendation("wasserstein") is None
    with pytest.raises(ValueError, match=r"frechet, distance.*got 'fid'"):
        MANY.recommendation("fid")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_json_of_any_bytes_is_read_or_named(tmp_path_factory, data):
    fields = MANY.as_dict()
    content = st.one_of(other_json(fields), damaged(json.dumps(fields).encode()), st.sampled_from(DEEP))
    reads_or_names_the_file(read_json, tmp_path_factory.getbasetemp() / "study.json", data.draw(content))


@pytest.mark.parametrize("name", ALL)
def test_json_is_read_back(name, tmp_path):
    if name == "hostile":  # half a surrogate pair is no text that a file can hold, but JSON escapes it
        assert "\\ud800" in json.dumps(ALL[name].as_dict())
    path = tmp_path / "study.json"
    write_json(ALL[name], path)
    again = read_json(path)
    assert repr(again) == repr(ALL[name]).replace("inf)", "nan)").replace("inf,", "nan,")  # NaN is unequal to itself
    assert isinstance(again, Study)
    assert replace(again, results=()) == replace(ALL[name], results=())
