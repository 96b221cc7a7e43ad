"""What people look at: the page, its tables and plots as text, and that nothing of a study's can break out of it."""

import builtins
import csv
import io
import math
import os
import re
import struct
import zlib
from dataclasses import replace

import pytest
from pages import Page
from PIL import Image
from tradeoff.example_studies import (
    ALL,
    DIVERGED,
    EVIL,
    FEW,
    MANY,
    NO_METRICS,
    ONE,
    RACE,
    result,
    study,
    with_pictures,
)

from ddim_fast.tradeoff import Cell, Measure, read_json
from ddim_fast.tradeoff import report as report_module
from ddim_fast.tradeoff.numbers import range_text
from ddim_fast.tradeoff.race import races, reached_text
from ddim_fast.tradeoff.report import csv_text, html_text, measure_text, number_text, write_report
from ddim_fast.tradeoff.results import describe
from ddim_fast.utils.html import plain_text

# --- The page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_page_says_everything_and_needs_nothing_else(name, tmp_path):
    shown = ALL[name]
    text = html_text(shown, tmp_path)
    page = Page(text)
    said = page.text.replace("\u00a0", " ")
    for metric in shown.metrics:
        assert said.count(plain_text(str(shown.recommendation(metric.name)))) >= 1
        assert metric.meaning[1:] in said
        for found in shown.with_metric(metric.name):
            assert measure_text(found.quality[metric.name]) in said
    for found in shown.results:
        assert plain_text(describe(found.cell)) in text.replace("&#39;", "'") or name == "hostile"
    for note in shown.notes:
        assert plain_text(note) in said
    for value in ("2.13.0+cpu", "a processor", "shipped classifier", "2025-01-02 03:04:05 UTC"):
        assert value in said
    assert ("biased upward" in said) == any(metric.name == "frechet" for metric in shown.metrics)
    assert page.tags.count("script") == page.tags.count("style") == 1
    links = [v for k, v in page.attributes if k in ("src", "href", "action", "srcset", "xlink:href")]
    assert all(v == "data:," or re.fullmatch(r"#(row|pictures)-\d+", v) for v in links)
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert {v[1:] for v in links if v.startswith("#")} <= set(ids)
    assert not [k for k, _ in page.attributes if k.startswith("on") or k == "style"]
    assert not re.search(r"url\(|@import|https?:", text)


def headline(shown, tmp_path):
    found = re.search(r'<p class="headline">(.*?)</p>', html_text(shown, tmp_path))[1]
    return found.replace("\u00a0", " ")


def test_headline_is_the_first_recommendation_and_how_it_is_applied(tmp_path):
    assert headline(RACE, tmp_path) == str(RACE.recommendation())
    assert headline(FEW, tmp_path) == str(FEW.recommendation())
    assert "no quality" in html_text(NO_METRICS, tmp_path)
    assert "Nothing was measured" in html_text(study(), tmp_path)


def test_nothing_of_the_study_is_markup(tmp_path):
    def with_name(evil):
        cells = [Cell(n, f"{evil}{n}", timesteps=tuple(range(n, 0, -1))) for n in (2, 3)]
        results = [result(cell, 12.0 / cell.num_inference_steps, 0.5) for cell in cells]
        return study(*results, model=evil, notes=(evil,), settings={evil: {evil: evil}}, made_at=evil)

    pages = [html_text(with_name(name), tmp_path) for name in ("plain", EVIL)]
    assert Page(pages[0]).tags == Page(pages[1]).tags
    assert "\x00" not in pages[1]
    assert "\x1b" not in pages[1]
    pages[1].encode()


def test_table_marks_the_front_the_best_and_what_error_allows(tmp_path):
    found = study(
        result(Cell(10), 9.0, 0.1), result(Cell(20), 5.5, 0.3), result(Cell(50), 5.0, 0.3), result(Cell(60), 5.2, 0.1)
    )
    rows = re.findall(r'<tr id="row.*?</tr>', html_text(found, tmp_path), re.S)
    signs = [re.findall(r'<abbr title="(.*?)"', row) for row in rows]
    front, best, close = "on the front", "the best", "within error of the best"
    assert signs == [[front], [front, close], [front, best], [close]]


def test_races_are_tables_with_a_row_for_each_contender(tmp_path):
    text = html_text(RACE, tmp_path)
    for race in races(RACE):
        table = re.search(rf'<table class="race" data-race="{race.metric.name}">.*?</table>', text, re.S)[0]
        rows = [" ".join(Page(row).text.split()) for row in re.findall("<tr.*?</tr>", table, re.S)[1:]]
        assert len(rows) == len(race.entries)
        for row, entry in zip(rows, race.entries, strict=True):
            assert row.startswith(entry.name)
            if entry.fastest is None:
                assert row.endswith(reached_text(entry, race.metric))
            else:
                assert str(entry.ratio) in row
                assert row.endswith(f" {entry.fastest.calls} {entry.fastest.cell.num_inference_steps}")
    assert "data-race" not in html_text(FEW, tmp_path)


def test_times_have_their_spread_and_a_busy_machine_is_told(tmp_path):
    assert re.search(
        r'data-label="Milliseconds a sample"[^>]*>2.52 <small>2.5 to 3.8</small>', html_text(RACE, tmp_path)
    )
    slow = replace(RACE.results[0], model_ms=2 * RACE.results[0].model_ms)
    text = Page(html_text(replace(RACE, results=(slow, *RACE.results[1:])), tmp_path)).text
    assert "disagree in the time that the model took" in text
    assert "disagree in the time that the model took" not in Page(html_text(RACE, tmp_path)).text


def test_pictures_are_within_the_page(tmp_path):
    shown = with_pictures(MANY, tmp_path)
    page = Page(html_text(shown, tmp_path))
    pictures = [v for k, v in page.attributes if k == "src" and v.startswith("data:image/png;base64,")]
    # One of each cell, and a strip for each of the ways, with a row of every step count.
    assert len(pictures) == 2 * len(MANY.results)
    assert len(set(pictures)) == 10  # as bright as the number of steps says: whole, and cut
    assert page.tags.count("details") == 12
    assert page.attributes.count(("open", None)) == 1


def test_first_row_of_a_grid_is_cut_whole():
    sheet = Image.new("L", (626, 192), 255)
    for row in range(3):
        sheet.paste(10 + row, (6, 6 + 62 * row, 620, 62 + 62 * row))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    for count, seen in {500: {10, 255}, 30: {10, 255}, 25: {10, 255}, 10: {10, 11, 12, 255}}.items():
        uri = report_module._first_row(file.getvalue(), count)
        cut = Image.open(io.BytesIO(report_module.base64.b64decode(uri.partition(",")[2])))
        assert {value for _, value in cut.getcolors()} == seen
        assert cut.crop((6, 6, 620, 62)).getcolors() == [(614 * 56, 10)]


def test_only_png_files_of_the_study_are_read(tmp_path):
    directory = tmp_path / "study"
    directory.mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "outside.png")
    Image.new("L", (8, 8)).save(directory / "good.png")
    (directory / "text.png").write_text("secret")
    whole = (directory / "good.png").read_bytes()
    (directory / "broken.png").write_bytes(whole[:40])
    (directory / "damaged.png").write_bytes(whole.replace(whole[45:50], b"WRONG"))
    Image.new("L", (8, 8)).save(directory / "other.png", "JPEG")
    (directory / "link.png").symlink_to(tmp_path / "outside.png")
    for name in (
        "../outside.png",
        str(tmp_path / "outside.png"),
        "none.png",
        "",
        "text.png",
        "broken.png",
        "damaged.png",
        "other.png",
        "link.png",
    ):
        assert "data:image" not in html_text(study(replace(result(Cell(10), 1.0), pictures=name)), directory), name
    assert html_text(study(replace(result(Cell(10), 1.0), pictures="good.png")), directory).count("data:image") == 1


def _png_without_rows():
    """A PNG whose checksums are right, and whose rows are none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    rows = chunk(b"IHDR", header) + chunk(b"IDAT", b"no rows, nor any other compressed bytes") + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + rows


def hostile_pictures(directory):
    """Names that a results file from elsewhere may give, with what is there under some of them."""
    Image.new("L", (8, 8)).save(directory.parent / "outside.png")
    (directory / "folder.png").mkdir()
    (directory / "loop.png").symlink_to(directory / "loop.png")
    (directory / "way_out").symlink_to(directory.parent)
    os.mkfifo(directory / "pipe.png")
    with open(directory / "endless.png", "wb") as file:
        file.truncate(1 << 40)  # no blocks on the disk
    bomb = io.BytesIO()
    Image.new("1", (300, 300)).save(bomb, "PNG")
    (directory / "bomb.png").write_bytes(bomb.getvalue())
    (directory / "short.png").write_bytes(_png_without_rows())
    return {
        "absolute": str(directory.parent / "outside.png"),
        "the system's": "/etc/passwd",
        "above": "../outside.png",
        "above, later": "a/../../outside.png",
        "through a link": "way_out/outside.png",
        "a link to itself": "loop.png",
        "a folder": "folder.png",
        "the study": ".",
        "a pipe": "pipe.png",
        "a device": "/dev/zero",
        "more than memory": "endless.png",
        "more than memory once it is read": "bomb.png",
        "rows missing": "short.png",
        "no path": "a\0b.png",
        "no text": "\ud800.png",
        "too long": "a" * 5000,
        "HTML": "<script>alert(1)</script>.png",
        "a quote": '" onerror="alert(1)',
    }


@pytest.mark.parametrize(
    "kind",
    [
        "absolute",
        "the system's",
        "above",
        "above, later",
        "through a link",
        "a link to itself",
        "a folder",
        "the study",
        "a pipe",
        "a device",
        "more than memory",
        "more than memory once it is read",
        "rows missing",
        "no path",
        "no text",
        "too long",
        "HTML",
        "a quote",
    ],
)
def test_no_name_of_pictures_is_followed_out_of_the_study(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    directory = tmp_path / "study"
    directory.mkdir()
    name = hostile_pictures(directory)[kind]
    page = html_text(study(replace(result(Cell(10), 1.0), pictures=name)), directory)
    assert "data:image" not in page
    assert "alert" not in page
    assert "root:" not in page


def test_counts_that_differ_are_told(tmp_path):
    assert "Each cell has 500 samples." in html_text(FEW, tmp_path)
    fewer = study(*FEW.results, result(Cell(1000, "quad"), 7.0, count=1))
    text = html_text(fewer, tmp_path)
    assert "Each cell has 500 samples, except 1000 steps with quad spacing: 1." in text
    assert "500 at most" in text


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (Measure(12.3456, 0.1234), "12.35 ± 0.12"),
        (Measure(12345.6, 250.0), "12,346 ± 250"),
        (Measure(0.0123456, 0.00099), "0.01235 ± 0.00099"),
        (Measure(12.3456), "12.3"),
        (Measure(12.3456, math.inf), "12.3"),
        (Measure(1.0, 0.0), "1.00"),
        (Measure(0.0), "0"),
        (Measure(-0.5, 0.25), "-0.50 ± 0.25"),
        (Measure(math.nan), "not finite"),
        (Measure(math.inf, 1.0), "not finite"),
        (None, "—"),
    ],
)
def test_numbers_have_the_digits_that_errors_allow(measure, text):
    assert measure_text(measure) == text


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.19, 0.2412, "0.190 to 0.241"),
        (80.0, 95.4, "80 to 95"),
        (25.0, 25.0000001, "25.0"),
        (0.4, 0.4, "0.400"),
        (2.0, math.inf, "2.00 or more"),
        (1500.0, 2500.0, "1,500 to 2,500"),
        (0.0, 0.0, "0"),
    ],
)
def test_intervals_have_the_digits_that_their_width_allows(low, high, text):
    assert range_text(low, high) == text


def test_every_size_of_a_number_can_be_written():
    assert [number_text(x) for x in (math.nan, 1e-12, 0.00123, 1234567.0)] == [
        "—",
        "0.000000000",
        "0.00123",
        "1,234,567",
    ]


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_csv_is_read_back(name):
    shown = ALL[name]
    rows = list(csv.DictReader(io.StringIO(csv_text(shown))))
    assert len(rows) == len(shown.results)
    for row, found in zip(rows, shown.results, strict=True):
        cell = found.cell
        assert None not in row
        assert "nan" not in row.values()
        assert row["scheduler"] == (cell.scheduler or "")
        if cell.scheduler:
            assert (row["spacing"], row["eta"], row["order"]) == (cell.timestep_spacing, "", "theirs")
            continue
        timesteps = tuple(map(int, row["timesteps"].split())) or None
        sigma_hat = bool(int(row["sigma_hat"]))
        read = Cell(
            int(row["steps"]),
            row["spacing"],
            float(row["eta"]),
            row["eta_scales"],
            sigma_hat,
            int(row["order"]),
            timesteps,
        )
        assert read == replace(cell, timestep_spacing=plain_text(cell.timestep_spacing))
        assert int(row["samples"]) == found.count
        assert float(row["milliseconds"]) == found.milliseconds
        assert float(row["model_ms"]) == found.model_ms
        for metric in shown.metrics:
            measure = found.quality.get(metric.name, Measure(math.nan))
            for value, column in ((measure.value, metric.name), (measure.error, f"{metric.name}_error")):
                assert row[column] == (repr(value) if math.isfinite(value) else "")
            assert row[f"{metric.name}_front"] == str(int(found in shown.pareto_front(metric.name)))


def test_csv_of_nothing_has_its_columns():
    assert csv_text(study()).startswith("steps,spacing,timesteps,eta,")
    assert csv_text(study()).count("\n") == 1


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["many", "one", "nothing", "diverged", "hostile", "wasserstein"])
def test_files(name, tmp_path):
    directory = tmp_path / "new"
    files = write_report(ALL[name], directory)
    kinds = [f"quality-against-{kind}-{metric.name}.png" for metric in ALL[name].metrics for kind in ("time", "calls")]
    assert [path.name for path in files] == ["report.html", "study.json", "cells.csv", *kinds]
    assert sorted(directory.iterdir()) == sorted(files)
    assert repr(read_json(directory / "study.json").metrics) == repr(ALL[name].metrics)
    assert (directory / "report.html").read_text("utf-8") == html_text(ALL[name], directory)
    for path in files[3:]:
        with Image.open(path) as image:
            assert image.size == (1280, 800)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    if name == "one":
        assert write_report(ALL[name], directory) == files  # again, over what is there


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_is_missing_is_named_before_anything_is_written(package, tmp_path, monkeypatch):
    actual = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return actual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "\.\[tradeoff\]"'):
        write_report(ONE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(ONE, tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_every_study_has_a_plot_of_each_metric(tmp_path):
    for name, shown in ALL.items():
        text = html_text(shown, tmp_path)
        assert re.findall(r'<figure data-metric="(\w+)"', text) == [metric.name for metric in shown.metrics], name
        points = sum(len(shown.with_metric(metric.name)) for metric in shown.metrics)
        assert text.count('<a class="point') == 4 * points, name
    assert html_text(DIVERGED, tmp_path).count('<a class="point') == 8
    assert "not finite" in html_text(DIVERGED, tmp_path)
