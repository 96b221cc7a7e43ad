"""benchmarks/: two runs compared, on made-up files; and the timing harness, on made-up clocks. Nothing here is timed."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    """A script of this repository as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load("benchmarks/compare.py")
interleaved = load("benchmarks/interleaved.py")

FACTS = dict(
    cpu_model="A", cpu_count=2, instruction_set="avx2", torch_cpu_capability="AVX2", threads=1, python="3.11",
    torch="2.13.0", diffusers="0.42.1", numpy="2.4.6",
)  # fmt: skip


def case(name="bench_step.py::test_step[eta0]", ratio=16.0, seconds=1e-5, spread=0.03):
    info = {
        "ratios": {
            "diffusers / ours out": {"ratio": ratio, "spread": spread},
            "triad out / ours out": {"ratio": 0.9, "spread": spread},
        },
        "seconds": {"ours out": seconds, "diffusers": seconds * ratio, "triad out": seconds * 0.9},
        "spread": {"ours out": spread, "diffusers": spread, "triad out": spread},
    }
    return {"fullname": name, "extra_info": info}


def run_file(path: Path, *cases, **facts) -> str:
    data = {
        "machine_info": {"ddim_fast": FACTS | facts},
        "commit_info": {"id": "1d396101d396101d39610"},
        "benchmarks": list(cases),
    }
    path.write_text(json.dumps(data))
    return str(path)


@pytest.fixture
def compared(tmp_path):
    """``compared(cases before, cases after, *arguments, **facts after)``: (exit code, report, text)."""

    def run(before, after, *arguments, **facts):
        files = [run_file(tmp_path / "a.json", *before), run_file(tmp_path / "b.json", *after, **facts)]
        report = tmp_path / "report.json"
        result = CliRunner().invoke(compare.main, [*files, "--json", str(report), *arguments])
        return result.exit_code, json.loads(report.read_text()), result.output

    return run


def verdicts(report, *which):
    return {(c["case"], c["what"]) for c in report["changes"] if c["verdict"] in which}


STEP = case()["fullname"]


def test_a_run_against_itself_says_nothing(compared):
    code, report, text = compared([case()], [case()])
    assert code == 0
    assert verdicts(report, "slower", "faster", "not judged") == set()
    assert {c["verdict"] for c in report["changes"]} == {"same"}
    assert report["differences"] == []
    assert report["missing"] == {"missing in the second run": [], "new in the second run": []}
    assert "0 slower, 0 faster, 3 within the noise" in text
    assert "beyond the noise" not in text


def test_a_ratio_that_fell_is_slower(compared):
    code, report, text = compared([case()], [case(ratio=12.0)])
    assert code == 1
    assert verdicts(report, "slower") == {(STEP, "diffusers / ours out")}
    (change,) = [c for c in report["changes"] if c["verdict"] == "slower"]
    assert change["gain"] == pytest.approx(-1 / 3)
    assert change["allowed"] == pytest.approx(0.15)
    assert STEP in text
    assert "slower, beyond the noise" in text
    assert "-33%" in text


def test_a_ratio_that_rose_is_faster_and_no_failure(compared):
    code, report, text = compared([case()], [case(ratio=20.0)])
    assert code == 0
    assert verdicts(report, "faster") == {(STEP, "diffusers / ours out")}
    assert verdicts(report, "slower") == set()
    assert "+25%" in text


@pytest.mark.parametrize("ratio", [16 / 1.14, 16 * 1.14])
def test_less_than_the_threshold_is_noise(compared, ratio):
    code, report, _ = compared([case()], [case(ratio=ratio)])
    assert (code, verdicts(report, "slower", "faster")) == (0, set())


def test_the_threshold_is_stated(compared):
    code, report, _ = compared([case()], [case(ratio=16 / 1.14)], "--threshold", "0.1")
    assert code == 1
    assert report["threshold"] == 0.1
    assert verdicts(report, "slower") == {(STEP, "diffusers / ours out")}


@pytest.mark.parametrize(("before", "after"), [(0.4, 0.03), (0.03, 0.4)])
def test_a_difference_within_either_spread_is_noise(compared, before, after):
    code, report, _ = compared([case(spread=before)], [case(ratio=12.0, spread=after)])
    assert (code, verdicts(report, "slower", "faster")) == (0, set())
    assert {round(c["allowed"], 9) for c in report["changes"]} == {round(math.hypot(0.4, 0.03), 9)}
    code, report, _ = compared([case(spread=before)], [case(ratio=8.0, spread=after)])
    assert verdicts(report, "slower") == {(STEP, "diffusers / ours out")}


@pytest.mark.parametrize("unknown", [math.nan, None])
@pytest.mark.parametrize("in_first", [True, False])
def test_an_unknown_spread_is_not_judged_and_said(compared, unknown, in_first):
    known, other = case(), case(ratio=1.0, spread=unknown)
    code, report, text = compared(*(([other], [known]) if in_first else ([known], [other])))
    assert code == 0
    assert verdicts(report, "not judged") == {(c["case"], c["what"]) for c in report["changes"]}
    assert all(c["allowed"] is None for c in report["changes"])
    assert "not judged, fewer than four rounds" in text


def test_our_seconds_count_on_one_kind_of_machine(compared):
    code, report, text = compared([case()], [case(seconds=2e-5)])
    assert code == 1
    assert verdicts(report, "slower") == {(STEP, "seconds of ours out")}
    assert "seconds are not compared" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("cpu_model", "B"), ("cpu_count", 4), ("torch", "2.14.0"), ("diffusers", "0.43"), ("threads", 2)],
)
def test_elsewhere_only_ratios_count_and_the_difference_is_said(compared, name, value):
    code, report, text = compared([case()], [case(seconds=2e-5)], **{name: value})
    assert code == 0
    assert report["compared"] == ["ratios"]
    assert report["differences"] == [f"{name}: {FACTS[name]} -> {value}"]
    assert f"not the same: {name}: {FACTS[name]} -> {value}" in text
    assert "seconds are not compared" in text
    code, report, _ = compared([case()], [case(seconds=2e-5)], "--measure", "seconds", **{name: value})
    assert verdicts(report, "slower") == {(STEP, "seconds of ours out")}


def test_ratios_alone_can_be_asked_for(compared):
    code, report, _ = compared([case()], [case(seconds=2e-5)], "--measure", "ratios")
    assert (code, report["compared"]) == (0, ["ratios"])


def test_missing_and_new_cases_and_ratios_are_named(compared):
    fewer = case("both")
    del fewer["extra_info"]["ratios"]["triad out / ours out"]
    code, report, text = compared([case("both"), case("old")], [fewer, case("new")])
    assert code == 0
    assert report["missing"] == {
        "missing in the second run": ["both: triad out / ours out", "old"],
        "new in the second run": ["new"],
    }
    for name in ("  old", "  new", "  both: triad out / ours out"):
        assert name in text.splitlines()


def test_the_slowest_comes_first(compared):
    before = [case("a"), case("b"), case("c")]
    _, report, text = compared(before, [case("a", ratio=12), case("b", ratio=4), case("c", ratio=10)])
    assert [c["case"] for c in report["changes"] if c["verdict"] == "slower"] == ["b", "c", "a"]
    assert text.index("\n  b ") < text.index("\n  c ") < text.index("\n  a ")


def test_agreement_counts_winners_and_the_largest_difference(compared):
    before = [case("a", ratio=1.2), case("b", ratio=1.03), case("c", ratio=8.0)]
    after = [case("a", ratio=0.8), case("b", ratio=0.9), case("c", ratio=9.0)]
    _, report, text = compared(before, after)
    assert report["agreement"] == {
        "ratios": 6,
        "agree_on_which_is_faster": 5,
        "even": 1,
        "within_threshold": 5,
        "median_difference": pytest.approx(0.125),
        "largest_difference": pytest.approx(0.5),
        "largest_difference_in": "a: diffusers / ours out",
    }
    assert "5 of 6 ratios agree on which is faster" in text


def broken(change) -> str:
    data = {
        "machine_info": {"ddim_fast": FACTS},
        "commit_info": {"id": "1d39610"},
        "benchmarks": [case()],
    }
    data = copy.deepcopy(data)
    change(data)
    return json.dumps(data)


RATIO = "diffusers / ours out"
UNUSABLE = {
    "no file": (None, "must be a JSON file that can be read"),
    "no JSON": ("benchmarks: 3", "must be a JSON file that can be read"),
    "another JSON": ("[1, 2]", 'must have a list "benchmarks"'),
    "nothing measured": (broken(lambda d: d.update(benchmarks=[])), "must have a benchmark with ratios, got none of 0"),
    "no ratios": (broken(lambda d: d["benchmarks"][0]["extra_info"].pop("ratios")), "must have a benchmark with ratios"),
    "no name": (broken(lambda d: d["benchmarks"][0].pop("fullname")), "got KeyError ('fullname')"),
    "no seconds": (broken(lambda d: d["benchmarks"][0]["extra_info"].pop("seconds")), "got KeyError ('seconds')"),
    "no machine": (broken(lambda d: d.pop("machine_info")), "got KeyError ('machine_info')"),
    "a ratio of 0": (broken(lambda d: d["benchmarks"][0]["extra_info"]["ratios"][RATIO].update(ratio=0)), "not positive"),
    "a ratio of NaN": (
        broken(lambda d: d["benchmarks"][0]["extra_info"]["ratios"][RATIO].update(ratio=math.nan)),
        "not positive",
    ),
    "a word": (
        broken(lambda d: d["benchmarks"][0]["extra_info"]["ratios"][RATIO].update(ratio="fast")),
        "got TypeError",
    ),
    "nothing in common": (
        broken(lambda d: d["benchmarks"][0].update(fullname="other")),
        "must have a ratio in common",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", UNUSABLE)
@pytest.mark.parametrize("first", [True, False])
def test_unusable_input_is_exit_code_2_with_rule_value_and_remedy(tmp_path, why, first):
    text, message = UNUSABLE[why]
    bad, good = tmp_path / "bad.json", run_file(tmp_path / "good.json", case())
    if text is not None:
        bad.write_text(text)
    files = [str(bad), good] if first else [good, str(bad)]
    result = CliRunner().invoke(compare.main, files)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "got" in result.output
    assert str(bad) in result.output
    assert "measure" in result.output or "make bench" in result.output


def test_json_on_standard_output_is_json_alone(tmp_path):
    path = run_file(tmp_path / "a.json", case())
    result = CliRunner().invoke(compare.main, [path, path, "--json", "-"])
    assert result.exit_code == 0
    assert json.loads(result.output)["agreement"]["ratios"] == 2


# --- The timing harness -----------------------------------------------------------------------------------------------


def comparison(**rounds):
    return interleaved.Comparison("ours", {name: dict(enumerate(values)) for name, values in rounds.items()})


def test_a_ratios_spread_is_that_of_the_ratios_within_rounds():
    drifting = [1.0, 2.0, 3.0, 4.0, 5.0]
    result = comparison(ours=drifting, other=[3 * seconds for seconds in drifting])
    assert result.ratio("other") == 3
    assert result.ratio_spread("other") == 0
    assert result.spread("ours") == 1
    assert result.summary()["ratio_spread"] == {"ours": 0, "other": 0}


def test_a_spread_needs_four_rounds():
    assert math.isnan(comparison(ours=[1.0, 2, 3], other=[1.0, 2, 3, 4]).ratio_spread("other"))
    assert math.isnan(comparison(ours=[1.0, 2, 3]).spread("ours"))


def test_nothing_is_timed_before_all_have_passed():
    called = []

    def check(name, result):
        assert result == "right", f"{name} is wrong"

    contenders = {
        "ours": lambda: called.append("ours") or "right",
        "other": lambda: called.append("other") or "wrong",
    }
    with pytest.raises(AssertionError, match="other is wrong"):
        interleaved.compare(contenders, check, baseline="ours")
    assert called == ["ours", "other"]


def test_each_contender_runs_on_its_threads_and_they_are_put_back(threads):
    import torch

    threads(1)
    seen = {"one": set(), "two": set()}
    contenders = {name: lambda name=name: seen[name].add(torch.get_num_threads()) for name in seen}
    options = dict(baseline="one", threads={"one": 1, "two": 2}, time_limit=0, min_rounds=2)
    interleaved.compare(contenders, lambda *_: None, **options)
    assert seen == {"one": {1}, "two": {2}}
    assert torch.get_num_threads() == 1


def test_seconds_are_those_of_a_unit(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: float(next(clock)))
    contenders = {"one": lambda: None, "ten": lambda: None}
    options = dict(baseline="one", units={"ten": 10}, time_limit=0, min_rounds=4)
    result = interleaved.compare(contenders, lambda *_: None, **options)
    assert result.seconds("one") == 1
    assert result.seconds("ten") == pytest.approx(0.1)
    assert result.ratio("ten") == pytest.approx(0.1)


# --- A run ------------------------------------------------------------------------------------------------------------


def test_a_run_records_what_its_numbers_depend_on(tmp_path):
    """The shortest case, as make bench runs it. Its numbers are not looked at."""
    pytest.importorskip("pytest_benchmark", reason="needs the extra bench")
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "bench_overhead.py", "--quick", "-p", "no:cacheprovider"]
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--benchmark-json", str(path)],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = compare.read_run(path)
    assert {
        *compare.MACHINE,
        *compare.VERSIONS,
        "version",
        "load_average_before",
        "load_average_after",
    } <= run.facts.keys()
    assert run.cases["bench_overhead.py::test_overhead"].ratios.keys() == {
        "x.add_(m) / ours in place",
        "diffusers / ours in place",
    }
    (one,) = json.loads(path.read_text())["benchmarks"]
    info = one["extra_info"]
    names = {"ours in place", "ours out", "x.add_(m)", "diffusers"}
    assert all(
        info[key].keys() == names for key in ("seconds", "spread", "ratio_to_baseline", "ratio_spread", "rounds")
    )
    assert info["threads"] == 1
    assert info["processors_of_others"] >= 0 or sys.platform != "linux"
    assert compare.report_on(run, run)["agreement"]["largest_difference"] == 0


# --- The page ---------------------------------------------------------------------------------------------------------

page = load("tools/benchmark_page.py")
PUBLISHED = json.loads(page.JSON_FILE.read_text())


def test_the_page_says_what_the_data_say():
    document = page.DOCUMENT.read_text()
    assert page.with_numbers(document, PUBLISHED) == document


def test_a_number_that_was_typed_is_found():
    document = page.DOCUMENT.read_text()
    begin = document.index(page.BEGIN)
    digit = next(i for i in range(begin, len(document)) if document[i].isdigit())
    typed = document[:digit] + str((int(document[digit]) + 1) % 10) + document[digit + 1 :]
    assert page.with_numbers(typed, PUBLISHED) != typed


def test_the_published_run_says_where_it_was_measured_and_compares_with_itself():
    run = compare.read_run(page.JSON_FILE)
    assert {*compare.MACHINE, *compare.VERSIONS, "version"} <= run.facts.keys()
    assert len(run.commit) == 40
    report = compare.report_on(run, run)
    assert {c["verdict"] for c in report["changes"]} <= {"same", "not judged"}
    assert "seconds" in report["compared"]


def test_every_case_has_a_section_and_after_a_whole_run_every_section_has_cases():
    names = [one["fullname"] for one in PUBLISHED["benchmarks"]]
    found = {section for name in names for section in page.SECTIONS if name.startswith(section)}
    assert all(name.startswith(tuple(page.SECTIONS)) for name in names)
    assert found == page.SECTIONS.keys() or PUBLISHED["machine_info"]["ddim_fast"]["quick"]


def test_reducing_keeps_four_digits_and_writes_null_for_nan():
    whole = {
        "machine_info": {"node": "secret", "ddim_fast": FACTS},
        "commit_info": {"id": "1d39610", "dirty": False, "branch": "main"},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [case(ratio=1.23456, spread=math.nan) | {"group": "step", "stats": {"data": [1.0]}}],
    }
    small = page.reduced(whole)
    assert small["machine_info"] == {"ddim_fast": FACTS}
    (one,) = small["benchmarks"]
    assert one.keys() == {"fullname", "group", "extra_info"}
    assert one["extra_info"]["ratios"]["diffusers / ours out"] == {"ratio": 1.235, "spread": None}
    json.dumps(small, allow_nan=False)
    assert page.reduced({**whole, **small}) == small


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5e-9, "1.50 ns"),
        (2e-6, "2.0 µs"),
        (15.4e-3, "15 ms"),
        (0.2513, "251 ms"),
        (3.21, "3.2 s"),
        (5e-10, "0.50 ns"),
    ],
)
def test_times_are_read_by_people(seconds, text):
    assert page._time(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "0.012"), (0.987, "0.99"), (1.06, "1.06"), (7.26, "7.3"), (52.7, "53")]
)
def test_ratios_have_the_digits_that_they_deserve(value, text):
    assert page._number(value) == text


def test_one_disturbed_case_makes_a_run_not_quiet():
    run = copy.deepcopy(PUBLISHED)
    run.pop("beside", None)
    for one in run["benchmarks"]:
        one["extra_info"]["processors_of_others"] = 0.01
    assert "not quiet" not in page.rendered(run)
    run["benchmarks"][-1]["extra_info"]["processors_of_others"] = 1.5
    assert "not quiet" in page.rendered(run)


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_says_so(quick):
    run = copy.deepcopy(PUBLISHED)
    run["machine_info"]["ddim_fast"]["quick"] = quick
    assert ("a quick run" in page.rendered(run)) == quick


def test_a_run_on_another_processor_stands_beside_the_first():
    run = copy.deepcopy(PUBLISHED)
    run.pop("beside", None)
    assert "Another kind of processor" not in page.rendered(run)
    other = copy.deepcopy(run)
    other["machine_info"]["ddim_fast"] |= {"instruction_set": "avx2", "limited_by": {"ATEN_CPU_CAPABILITY": "avx2"}}
    for one in other["benchmarks"]:
        for found in one["extra_info"]["ratios"].values():
            found["ratio"] *= 2
    text = page.rendered({**run, "beside": other})
    assert "avx2 (ATEN_CPU_CAPABILITY=avx2)" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| One step | diffusers / ours out |"))
    ratios = sorted(
        one["extra_info"]["ratios"]["diffusers / ours out"]["ratio"]
        for one in run["benchmarks"]
        if one["fullname"].startswith("bench_step.py::")
    )
    least, most = (page._number(2 * ratio) for ratio in (ratios[0], ratios[-1]))
    assert f"({least} to {most}) |" in row
