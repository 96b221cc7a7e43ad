"""Where plots put things: marks, axes, ticks; and the PNG files."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageColor
from tradeoff.example_studies import ALL, FEW, MANY, PAPER, RACE, result, study

from ddim_fast.tradeoff import Cell, plots, svg
from ddim_fast.tradeoff.marks import COLOURS, HORIZONTALS, SHAPES, Mark, Marks, _in_order, is_log, points
from ddim_fast.tradeoff.results import way_of


def test_each_way_to_sample_has_a_mark_of_its_own():
    for shown in (MANY, PAPER, FEW):
        marks = Marks(shown)
        ways = {(r.cell.timestep_spacing, r.cell.eta, r.cell.sigma_hat, r.cell.order) for r in shown.results}
        assert len({marks.of(r.cell) for r in shown.results}) == len(ways)


def test_colour_is_what_differs():
    assert [e.value for e in Marks(PAPER).legend()["eta"]] == ["0", "0.2", "0.5", "1", "sigma-hat"]
    assert len({e.mark.colour for e in Marks(PAPER).legend()["eta"]}) == 5
    assert list(Marks(MANY).legend()) == ["spacing", "eta", "order"]
    assert len({e.mark.colour for e in Marks(MANY).legend()["spacing"]}) == 3
    assert Marks(FEW).legend() == {}
    orders = study(result(Cell(10), 1.0), result(Cell(10, order=2), 2.0))
    assert [e.mark for e in Marks(orders).legend()["order"]] == [Mark(0, 0, True), Mark(1, 0, False)]


def test_everybody_has_a_mark_of_their_own():
    marks = Marks(RACE)
    ways = {way_of(r.cell): marks.of(r.cell) for r in RACE.results}
    assert len({*ways.values()}) == len(ways) == 9
    assert {e.value: e.mark for e in marks.legend()["others"]} == {
        name: marks.of(r.cell) for r in RACE.results if r.cell.scheduler for name in way_of(r.cell)
    }
    alone = study(*(r for r in RACE.results if r.cell.scheduler or way_of(r.cell) == way_of(Cell(5))))
    assert [e.value for e in Marks(alone).legend()["spacing"]] == ["leading"]
    many = study(*(result(Cell(1, f"S{i}", scheduler=f"x:S{i}"), 1.0) for i in range(30)), result(Cell(1), 2.0))
    assert len({Marks(many).of(r.cell) for r in many.results}) == 31


def test_times_reach_over_the_quartiles_of_their_batches():
    drawn = points(RACE, "frechet", HORIZONTALS["time"])
    assert all(p.reach[0] <= p.x <= p.reach[1] for p in drawn)
    assert all(p.reach is None for p in points(RACE, "frechet", HORIZONTALS["calls"]))


def test_many_names_take_colours_again():
    shown = study(*(result(Cell(1, f"list {i}", timesteps=(i,)), 1.0 + i) for i in range(20)))
    assert {Marks(shown).of(r.cell).colour for r in shown.results} == set(range(len(COLOURS)))


def test_every_shape_has_a_path_and_a_marker():
    assert set(svg._PATHS) == set(SHAPES) == set(plots._SHAPES)


def test_logarithms_are_for_wide_ranges_of_positive_values():
    assert is_log([1.0, 8.0])
    assert not is_log([1.0, 7.9])
    assert not is_log([0.0, 8.0])
    assert not is_log([-1.0, 8.0])
    assert not is_log([])


@pytest.mark.parametrize(
    "values", [[1, 2], [5], [0], [-3, 4], [0.001, 1000], [1e-9, 1e-9], [2, 2], [0, 1e6], [0.98, 0.99]]
)
def test_axes_hold_all_values_and_have_ticks_at_round_numbers(values):
    axis = svg.axis(values, 50, 850)
    places = [axis.place(value) for value in values]
    assert all(50 < place < 850 or value == 0 for place, value in zip(places, values, strict=True))
    assert places == sorted(places)
    for most in (3, 8):
        ticks = axis.ticks(most)
        assert 1 <= len(ticks) <= most
        assert all(50 <= tick.at <= 850 for tick in ticks)
        assert all(abs(axis.place(float(tick.text.replace(",", ""))) - tick.at) < 0.2 for tick in ticks)
        assert len({tick.text for tick in ticks}) == len(ticks)


@pytest.mark.parametrize("name", ["many", "paper", "one", "few", "diverged", "wasserstein", "race"])
@pytest.mark.parametrize("size", [(900, 460), (366, 380)])
@pytest.mark.parametrize("horizontal", HORIZONTALS)
def test_svg_is_where_its_numbers_are(name, size, horizontal):
    by = HORIZONTALS[horizontal].of
    for metric in ALL[name].metrics:
        drawn = points(ALL[name], metric.name, HORIZONTALS[horizontal])
        plot = svg.plot(drawn, ALL[name].pareto_front(metric.name, by), *size, metric.better == "lower")
        by_quality = sorted(plot.dots, key=lambda dot: dot.point.measure.value)
        assert [dot.y for dot in by_quality] == sorted((dot.y for dot in plot.dots), reverse=True)
        by_time = sorted(plot.dots, key=lambda dot: dot.point.x)
        assert [dot.x for dot in by_time] == sorted(dot.x for dot in plot.dots)
        for dot in plot.dots:
            assert plot.left <= dot.x <= plot.right
            assert plot.top <= dot.y <= plot.bottom
            if dot.left is not None:
                assert plot.left <= dot.left <= dot.right <= plot.right
            if dot.top is None:
                assert not dot.point.measure.error > 0
            else:
                assert plot.top <= dot.top <= dot.y <= dot.bottom <= plot.bottom
        on_line = [tuple(map(float, pair.split(","))) for pair in plot.line.split()]
        assert on_line == sorted((dot.x, dot.y) for dot in plot.dots if dot.on_front)
        assert len(on_line) == len(ALL[name].pareto_front(metric.name, by))
        assert plot.labels
        assert all(0 < y <= plot.bottom and abs(y - dot.y) > 10 for dot, y in plot.labels)


def test_an_error_bar_longer_than_its_value_stays_within():
    shown = study(result(Cell(10), 1.0, 50.0), result(Cell(20), 100.0, 1.0))
    plot = svg.plot(points(shown, "frechet", HORIZONTALS["time"]), [], 900, 460, True)
    assert all(math.isfinite(dot.bottom) and dot.bottom <= plot.bottom for dot in plot.dots)
    assert all(float(tick.text) > 0 for tick in plot.y_ticks)  # the axis is logarithmic all the same


@pytest.mark.parametrize("draw", [plots.quality_against_time, plots.quality_against_calls])
@pytest.mark.parametrize("name", ["many", "paper", "one", "diverged", "hostile", "race"])
def test_png_has_the_colours_of_the_page(draw, name):
    image = np.asarray(Image.open(io.BytesIO(draw(ALL[name], "frechet"))).convert("RGB"))
    marks = Marks(ALL[name])
    for colour in {marks.of(r.cell).colour for r in ALL[name].with_metric("frechet")}:
        assert (image == ImageColor.getrgb(COLOURS[colour])).all(2).sum() > 20


def test_png_is_a_function_of_the_study():
    assert plots.quality_against_time(FEW, "frechet") == plots.quality_against_time(FEW, "frechet")


def test_names_are_no_formulas():
    named = [result(Cell(1, f"$\\frac{{{i}", timesteps=(i,)), 1.0 + i) for i in range(2)]
    assert plots.quality_against_time(study(*named, model="$\\frac{ $"), "frechet")


def test_a_plot_needs_a_metric_of_the_study():
    with pytest.raises(ValueError, match=r"\['frechet'\], got 'recall'"):
        plots.quality_against_time(FEW, "recall")


def test_what_begins_with_a_number_is_ordered_by_it_and_words_come_last():
    etas = ["sigma-hat", "1, analytic variance", "0.5 of the variance", "1", "1e-05", "0"]
    assert _in_order("eta", etas) == ["0", "1e-05", "0.5 of the variance", "1", "1, analytic variance", "sigma-hat"]
    assert _in_order("order", ["fitted", "2", "1"]) == ["1", "2", "fitted"]
