"""Reports as JSON and JUnit XML: valid by their schemas, complete, written atomically."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from lxml import etree
from verify.example_reports import ALL, CODE, EVERY_OUTCOME, EXIT_CODES, RIGHT, SKIPPED, result

from ddim_fast.utils.html import plain_text
from ddim_fast.verify.reports import write
from ddim_fast.verify.reports.report import CheckResult, Outcome
from ddim_fast.verify.reports.write_html import html_text

XSD = etree.XMLSchema(etree.parse(Path(__file__).with_name("junit.xsd")))
VALIDATOR = jsonschema.Draft202012Validator(write.schema())


def suite_of(report):
    tree = etree.fromstring(write.junit_text(report).encode())
    XSD.assertValid(tree)
    (suite,) = tree
    return suite


@pytest.mark.parametrize("name", ALL)
def test_json_is_valid_and_whole(name):
    report = ALL[name]
    data = json.loads(write.json_text(report, RIGHT))
    VALIDATOR.validate(data)
    assert data["exit_code"] == report.exit_code == EXIT_CODES[name]
    assert data["against"]["subject"] == "cpu"
    read = [CheckResult(**{**r, "outcome": Outcome(r["outcome"])}) for r in data["results"]]
    for one, other in zip(report.results, read, strict=True):
        assert (one.name, one.outcome, one.message, one.code, one.cases, one.seconds) == (
            other.name,
            other.outcome,
            other.message,
            other.code,
            other.cases,
            other.seconds,
        )
    assert "against" not in json.loads(write.json_text(report))


def test_json_has_no_infinity_and_no_nan():
    results = {r["name"]: r for r in json.loads(write.json_text(EVERY_OUTCOME))["results"]}
    assert results["update"]["worst"] == 5.4e5
    assert results["update"]["details"]["largest"] is None
    assert results["run"]["worst"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"exit_code": 4},
        {"report_version": 2},
        {"missing": None},
        {"made_at": "yesterday"},
        {"seed": -1},
        {"more": 1},
        {"results": [{"name": "update"}]},
        {"against": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_schema_refuses(change):
    data = json.loads(write.json_text(EVERY_OUTCOME))
    VALIDATOR.validate(data)
    assert not VALIDATOR.is_valid(data | change)
    worse = {"outcome": "fine"} if "results" in change else {"cases": -1}
    data["results"][0] |= worse
    assert not VALIDATOR.is_valid(data)


def test_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(write.schema())


@pytest.mark.parametrize("name", ALL)
def test_junit_is_valid_and_its_counts_are_true(name):
    suite = suite_of(ALL[name])
    for tag, attribute in {"failure": "failures", "error": "errors", "skipped": "skipped"}.items():
        assert int(suite.get(attribute)) == len(suite.findall(f"testcase/{tag}"))
    assert int(suite.get("tests")) == len(suite.findall("testcase"))
    # A CI system that sees this file alone comes to the same verdict as one that sees the exit
    # code.
    assert (int(suite.get("failures")) + int(suite.get("errors")) == 0) == ALL[name].passed


def test_junit_says_what_became_of_each_check():
    suite = suite_of(EVERY_OUTCOME)
    found = {case.get("name"): [child.tag for child in case] for case in suite.findall("testcase")}
    assert found == {
        "update": ["failure"],
        "noise": [],
        "run": [],
        "timesteps": ["skipped"],
        "gpu": ["error"],  # required, and not run
        "inversion": ["error"],
    }
    failure = suite.find("testcase/failure")
    assert failure.get("message").startswith("</pre><script>")
    assert "import torch\n\nx_prev" in failure.text
    assert "\n  second line" in failure.text
    assert "equation 12" in failure.text
    assert "required" in suite.find("testcase[@name='gpu']/error").get("message")
    assert [case.get("time") for case in suite.findall("testcase")][:2] == ["0.100", "12.000"]
    properties = {p.get("name"): p.get("value") for p in suite.find("properties")}
    assert properties["seed"] == "7"
    assert properties["eta scales"] == "std_dev"
    assert properties["version of torch"]


def test_words():
    assert write.verdict(EVERY_OUTCOME) == "mine:step<u> is wrong: 1 of 4 checks failed"
    assert write.again(EVERY_OUTCOME) == "ddim-fast verify mine:step<u> --check update --check inversion --seed 7"
    assert "6 checks passed" in write.verdict(RIGHT)
    assert "update" in write.verdict(SKIPPED)
    assert "Ctrl-C" in write.verdict(ALL["ended"])
    assert "no module mine" in write.verdict(ALL["refused"])
    for report in ALL.values():
        assert write.remedy(report)


def test_plain_text_keeps_what_is_text():
    assert plain_text("a\tb\r\nω 😀\x85") == "a\tb\nω 😀\x85"
    replaced = "\N{REPLACEMENT CHARACTER}"
    assert plain_text("\x00\x1b[2J\ud800\r\x7f\ufffe") == f"{replaced}{replaced}[2J{4 * replaced}"
    assert "\x07" not in plain_text(CODE)


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("before")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write.write_text(path, "after")
    assert path.read_text() == "before"
    monkeypatch.undo()
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write.write_text(link, "after ω")
    assert link.is_symlink()
    assert path.read_text("utf-8") == "after ω"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "report.json"]


@pytest.mark.parametrize("worst", [0.0, 1.0, 2.7e3, math.inf, math.nan])
def test_every_size_of_an_error_can_be_written(worst):
    report = replace(EVERY_OUTCOME, results=(result("update", Outcome.FAILED, "off", worst=worst),))
    assert "update" in html_text(report)
    assert suite_of(report) is not None
    VALIDATOR.validate(json.loads(write.json_text(report)))
