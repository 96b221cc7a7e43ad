"""Time to quality: who is fastest to a target, how sure that is, and what its times are worth."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tradeoff.example_studies import FEW, MANY, RACE, result, study

from ddim_fast.tradeoff import Cell, read_json
from ddim_fast.tradeoff.race import alternatives, as_data, race_of, races, reached_text, summary, ways_to_apply
from ddim_fast.tradeoff.report import write_report
from ddim_fast.tradeoff.timing import remarks, spread, spread_text


def entries(race):
    return {entry.name: entry for entry in race.entries}


def two(**fields):
    """Plain DDIM, with 10 to 50 steps, and another way, which reaches its quality in 20."""
    plain = [result(Cell(S), value, error) for S, value, error in ((10, 9.0, 0.1), (20, 6.0, 0.1), (50, 5.0, 0.1))]
    other = [
        result(Cell(S, "quad"), value, error) for S, value, error in ((10, 6.5, 0.1), (20, 4.5, 0.1), (50, 4.0, 0.1))
    ]
    return study(*plain, *other, **fields)


def test_the_fastest_cell_that_reaches_the_target_is_taken():
    race = race_of(two(), "frechet")
    assert (race.target, race.baseline.cell) == (5.0, Cell(50))
    assert [entry.name for entry in race.entries] == ["quad spacing", "leading spacing"]
    quad, plain = race.entries
    assert (quad.fastest.cell, quad.milliseconds.value, quad.ratio.value) == (Cell(20, "quad"), 10.0, 0.4)
    assert (plain.fastest.cell, plain.is_baseline, str(plain.ratio)) == (Cell(50), True, "1.00")
    assert str(race) == (
        "20 steps with quad spacing reach the Frechet distance of 50 steps with leading spacing, 5.00, in 20 model calls instead of 50, "
        "and 0.400 of the time."
    )


def test_the_target_may_be_given():
    race = race_of(two(targets={"frechet": 6.5}), "frechet")
    assert race.baseline is None
    assert {name: entry.fastest.cell for name, entry in entries(race).items()} == {
        "quad spacing": Cell(10, "quad"),
        "leading spacing": Cell(20),
    }
    assert entries(race)["quad spacing"].ratio.value == 0.5
    assert "a Frechet distance of 6.50, in 10 model calls instead of 20" in str(race)
    nothing = race_of(two(targets={"frechet": 1.0}), "frechet")
    assert str(nothing) == "Nothing that was measured reaches a Frechet distance of 1.00."
    assert [reached_text(entry, nothing.metric) for entry in nothing.entries] == [
        "never reaches it: 4.00 in 50 calls at best",
        "never reaches it: 5.00 in 50 calls at best",
    ]


def test_who_nobody_beats_is_told():
    found = study(
        *(result(Cell(S, name), value) for name in ("leading", "quad") for S, value in ((10, 9.0), (50, 5.0)))
    )
    found = replace(found, results=(*found.results[:2], *(replace(r, model_ms=99.0) for r in found.results[2:])))
    assert str(race_of(found, "frechet")).startswith(
        "Nothing that was measured reaches the Frechet distance of 50 steps"
    )


def test_the_baseline_is_plain_ddim_with_50_steps_or_the_most():
    other = result(Cell(30, "quad"), 3.0)
    cells = [result(Cell(S), float(100 - S)) for S in (10, 50, 100)]
    assert race_of(study(*cells, other), "frechet").baseline.cell == Cell(50)
    assert race_of(study(cells[0], cells[2], other), "frechet").baseline.cell == Cell(100)
    assert race_of(study(other, result(Cell(9, "beta"), 1.0)), "frechet").baseline.cell == Cell(30, "quad")
    theirs = result(Cell(50, "UniPC", scheduler="x:UniPC"), 1.0)
    assert race_of(study(theirs, result(Cell(50, order=2), 1.0), result(Cell(50, eta=1.0), 1.0)), "frechet") is None
    assert race_of(FEW, "frechet") is None  # against itself


def test_other_numbers_of_samples_do_not_race():
    cells = [result(Cell(50), 5.0), result(Cell(20, "quad"), 4.0, count=100), result(Cell(50, "quad"), 4.5)]
    assert entries(race_of(study(*cells), "frechet"))["quad spacing"].fastest.cell == Cell(50, "quad")


# --- Chance -----------------------------------------------------------------------------------------------------------


def test_quality_within_its_error_opens_the_interval():
    race = race_of(two(), "frechet")
    assert (race.entries[0].ratio.low, race.entries[0].ratio.high, race.entries[0].reached) == (0.4, 0.4, 1.0)
    assert entries(race)["leading spacing"].reached == 1.0  # the target is its own quality, whatever its error
    near = [result(Cell(50), 5.0), result(Cell(10, "quad"), 5.05, 0.1), result(Cell(20, "quad"), 4.0, 0.1)]
    entry = entries(race_of(study(*near), "frechet"))["quad spacing"]
    assert (entry.ratio.value, entry.ratio.low, entry.ratio.high) == (0.4, 0.2, 0.4)
    missed = study(result(Cell(50), 5.0), result(Cell(10, "quad"), 5.05, 0.1))
    entry = entries(race_of(missed, "frechet"))["quad spacing"]
    assert entry.might
    assert entry.reached == pytest.approx(0.5 * math.erfc(0.5 / math.sqrt(2)), abs=0.04)
    assert reached_text(entry, race.metric) == "not reached, though within error: 5.05 in 10 calls at best"
    far = study(result(Cell(50), 5.0), result(Cell(10, "quad"), 5.5, 0.1))
    assert not entries(race_of(far, "frechet"))["quad spacing"].might


def timed(cell, frechet, batches, run="now"):
    return result(cell, frechet, ms=float(np.median(batches)), batch_ms=tuple(batches), measured_at=run)


def test_what_slows_a_round_slows_both_and_cancels_in_the_ratio():
    slowed = 1 + np.random.default_rng(3).exponential(0.5, 21)
    plain, quad = timed(Cell(50), 5.0, 10 * slowed), timed(Cell(20, "quad"), 4.0, 4 * slowed)
    entry = entries(race_of(study(plain, quad), "frechet"))["quad spacing"]
    assert entry.milliseconds.high > 1.05 * entry.milliseconds.low
    assert entry.ratio.low == pytest.approx(0.4) == entry.ratio.high
    apart = entries(race_of(study(plain, replace(quad, measured_at="later")), "frechet"))["quad spacing"]
    assert apart.ratio.high > 1.05 * apart.ratio.low


def test_an_interval_of_times_is_that_of_their_median():
    random = np.random.default_rng(5)
    batches = random.normal(100, 10, 25)
    found = race_of(study(timed(Cell(50), 5.0, batches), result(Cell(20, "quad"), 9.0)), "frechet")
    interval = entries(found)["leading spacing"].milliseconds
    # The standard error of a median of n normal numbers is sqrt(pi / 2) sigma / sqrt(n).
    assert interval.high - interval.low == pytest.approx(2 * math.sqrt(math.pi / 2) * 10 / 5, rel=0.5)
    assert interval.low < interval.value < interval.high


# --- Everybody ----------------------------------------------------------------------------------------------------------


def test_everybody_races_by_what_they_have(tmp_path):
    frechet, distance = races(RACE)
    assert (frechet.metric.name, distance.metric.name) == ("frechet", "distance")
    assert len(frechet.entries) == 9
    assert distance.not_judged == ("EulerAncestralDiscrete",)
    heun = entries(frechet)["HeunDiscrete"]
    assert (heun.fastest.calls, heun.fastest.cell.num_inference_steps) == (39, 20)
    never = entries(frechet)["six"] if "six" in entries(frechet) else entries(frechet)["the timesteps six"]
    assert never.fastest is None
    assert [entry.milliseconds.value for entry in frechet.entries] == sorted(
        e.milliseconds.value for e in frechet.entries
    )
    write_report(RACE, tmp_path)
    written = json.loads((tmp_path / "study.json").read_text())["time_to_quality"]
    assert [race["metric"] for race in written] == ["frechet", "distance"]
    assert written[0]["contenders"][0]["cell"] == frechet.entries[0].fastest.cell.key
    assert written[0]["contenders"][0]["ratio_to_baseline"]["value"] == frechet.entries[0].ratio.value
    assert written[0]["contenders"][-1]["milliseconds"]["value"] is None
    assert as_data(races(read_json(tmp_path / "study.json"))[0]) == as_data(frechet)


def test_targets_are_kept(tmp_path):
    write_report(replace(RACE, targets={"frechet": 7.0}), tmp_path)
    assert race_of(read_json(tmp_path / "study.json"), "frechet").target == 7.0


def test_a_summary_has_each_contender_in_a_line():
    lines = summary(RACE)
    for race in races(RACE):
        assert str(race) in lines
        for entry in race.entries:
            assert any(entry.name in line and reached_text(entry, race.metric) in line for line in lines)
    assert "  EulerAncestralDiscrete: has no distance to converged" in lines
    first = lines.index(str(RACE.recommendation()))
    assert lines[first + 1 :][: len(ways_to_apply(RACE))] == [f"  {how}" for how in ways_to_apply(RACE)]
    assert lines[first + 1 + len(ways_to_apply(RACE)) :] == [str(other) for other in alternatives(RACE)]
    assert summary(study()) == []
    slow = replace(RACE, results=(replace(RACE.results[0], model_ms=99.0), *RACE.results[1:]))
    (remark,) = remarks(slow)
    assert summary(slow).index(remark) == summary(slow).index(str(slow.recommendation())) - 1
    assert summary(MANY)


# --- What times are worth -----------------------------------------------------------------------------------------------


def test_a_spread_is_that_of_the_quartiles():
    assert spread(timed(Cell(5), 1.0, [1.0, 2.0, 3.0, 4.0, 5.0])) == (2.0, 4.0)
    assert spread_text(timed(Cell(5), 1.0, [1.0, 2.0, 3.0, 4.0, 5.0])) == "2.0 to 4.0"
    assert spread(timed(Cell(5), 1.0, [1.0])) is None
    assert spread_text(result(Cell(5), 1.0)) == ""


def test_cells_of_equal_calls_that_disagree_are_told():
    cells = [
        result(Cell(5), ms=10),
        result(Cell(5, "quad"), ms=10.9),
        result(Cell(20), ms=40),
        result(Cell(20, "quad"), ms=60),
    ]
    (told,) = remarks(study(*cells))
    assert "39.6 to 59.4 ms for 20 calls" in told
    assert "less than 50 %" in told
    assert "5 calls" not in told
    assert remarks(study(*cells[:3])) == []


def test_runs_apart_are_told():
    cells = [timed(Cell(5), 1.0, [2.0], "a"), timed(Cell(10), 1.0, [4.0], "b")]
    assert "in 2 runs" in remarks(study(*cells))[0]
