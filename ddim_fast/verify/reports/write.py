"""A report as JSON (see ``report.schema.json``) and JUnit XML, which CI systems read, and its
verdict in words."""

from __future__ import annotations

import json
import platform
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...utils.atomic_files import write_atomically
from ...utils.html import plain_text
from .report import CheckResult, Outcome, Report

_MOST_NAMED = 5  # checks, in a command


# --- In words ---------------------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
    """Return one sentence: whether the subject is right, and how many checks say so."""
    ran = len(report.of(Outcome.PASSED)) + len(report.of(Outcome.FAILED)) + len(report.of(Outcome.ERROR))
    name = plain_text(report.subject)
    if not report.complete:
        return f"{name} was not verified to the end: {plain_text(report.ended_by) or 'the run was ended'}"
    if report.exit_code == 1:
        return f"{name} is wrong: {len(report.of(Outcome.FAILED))} of {_checks(ran)} failed"
    if report.exit_code == 2:
        return f"{name} was not verified to the end: {len(report.of(Outcome.ERROR))} of {_checks(ran)} did not finish"
    if report.exit_code == 3:
        return f"{name} was not shown to be right: required checks did not run ({', '.join(report.missing)})"
    return f"{name} is right: {_checks(ran)} passed"


def counts(report: Report) -> str:
    """Return how many checks had each outcome, in words."""
    numbers = {outcome: len(report.of(outcome)) for outcome in Outcome}
    return ", ".join(f"{number} {outcome.value}" for outcome, number in numbers.items() if number)


def remedy(report: Report) -> str:
    """Return what to do next, in words; ``again`` gives the command."""
    if not report.complete:
        return "The remaining checks did not run. To run them:"
    if report.exit_code == 1:
        return "Run the Python given with each failure, fix the subject, then:"
    if report.exit_code == 2:
        return "The messages say why each check did not finish. To repeat only these:"
    if report.exit_code == 3:
        return "Install what the messages name, or require only what the subject offers (--require NAME)."
    return "" if report.full else "For a thorough verification:"


def again(report: Report, name: str | None = None) -> str:
    """Return the command for what to do next; empty where there is none.

    Args:
        name: of the subject, as given on the command line.
    """
    if report.exit_code == 3 or (report.passed and report.full):
        return ""
    wrong = [r.name for r in (*report.of(Outcome.FAILED), *report.of(Outcome.ERROR))]
    words = ["ddim-fast verify", plain_text(name or report.subject)]
    if report.complete and len(wrong) <= _MOST_NAMED:
        words += [f"--check {check}" for check in wrong]
    words += ["--full"] if report.full or report.passed else []
    words += [f"--seed {report.seed}"] if report.seed else []
    words += [f"--device {report.device}"] if report.device != "cpu" else []
    return " ".join(words)


def share_text(share: float) -> str:
    """Return the largest error as a share of what is allowed, as text; empty where none was
    measured."""
    if share != share:
        return ""
    return f"{share:.2f}" if share < 100 else f"{share:.1e}"


def seconds_text(seconds: float) -> str:
    """Return a time as text."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _checks(count: int) -> str:
    return f"{count} check" if count == 1 else f"{count} checks"


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_text(report: Report, against: Report | None = None) -> str:
    """Return the report as JSON text; that on the second subject, if any, is under "against"."""
    data: dict[str, Any] = report.to_dict()
    if against is not None:
        data["against"] = against.to_dict()
    return json.dumps(data, indent=2, allow_nan=False, default=repr) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON's schema (draft 2020-12)."""
    return json.loads(resources.files(__package__).joinpath("report.schema.json").read_text("utf-8"))


# --- JUnit XML --------------------------------------------------------------------------------------------------------


def junit_text(report: Report) -> str:
    """Return a test suite with a test case for each check, as JUnit XML.

    It conforms to both schemas that readers of JUnit XML use: Jenkins' (junit-10.xsd), and that of
    Ant's reports. A required check that did not run is an error; any other that did not run is
    skipped.
    """
    cases = [_case(report, result) for result in report.results]
    if not report.complete or not report.results:
        ended = _element("testcase", name="complete run", classname=_class_name(report), time="0.000")
        _said(ended, "error", "Ended", verdict(report), again(report))
        cases.append(ended)
    suite = _element(
        "testsuite",
        name=f"ddim-fast verify {report.subject}",
        package="ddim_fast.verify",
        id="0",
        hostname=platform.node() or "localhost",
        timestamp=report.made_at.removesuffix("Z"),
        tests=len(cases),
        failures=sum(case.find("failure") is not None for case in cases),
        errors=sum(case.find("error") is not None for case in cases),
        skipped=sum(case.find("skipped") is not None for case in cases),
        time=f"{report.seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        properties.append(_element("property", name=name, value=value))
    suite.extend(cases)
    for name, text in (("system-out", _what_was_proved(report)), ("system-err", "")):
        ElementTree.SubElement(suite, name).text = plain_text(text)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(report: Report, result: CheckResult) -> ElementTree.Element:
    case = _element("testcase", name=result.name, classname=_class_name(report), time=f"{result.seconds:.3f}")
    first = result.message.strip().partition("\n")[0]
    whole = f"{result.message}\n\n{result.code}\n\nproves: {result.proves}\nsource: {result.source}\ntolerance: {result.tolerance}\n"
    if result.outcome is Outcome.FAILED:
        _said(case, "failure", "CheckFailedError", first, whole)
    elif result.outcome is Outcome.ERROR:
        _said(case, "error", "CheckError", first, whole)
    elif result.name in report.missing:
        _said(case, "error", "RequiredCheckDidNotRun", f"required, but {result.outcome.value}: {first}", whole)
    elif result.outcome is not Outcome.PASSED:
        case.append(_element("skipped", message=f"{result.outcome.value}: {first}"))
    return case


def _class_name(report: Report) -> str:
    return f"ddim_fast.verify.{report.subject}"


def _properties(report: Report) -> dict[str, Any]:
    return {
        "subject": report.subject,
        "exit code": report.exit_code,
        "seed": report.seed,
        "set": "full" if report.full else "quick",
        "device": report.device,
        **report.conventions,
        **{f"version of {name}": value for name, value in report.versions.items()},
    }


def _what_was_proved(report: Report) -> str:
    lines = [verdict(report)]
    for r in report.results:
        lines.append(
            f"{r.name}: {r.outcome.value}, {r.cases} cases, worst {share_text(r.worst) or '-'} of what is allowed"
        )
    return "\n".join(lines)


def _element(tag: str, /, **attributes: Any) -> ElementTree.Element:
    return ElementTree.Element(tag, {name: plain_text(str(value)) for name, value in attributes.items()})


def _said(case: ElementTree.Element, tag: str, kind: str, message: str, text: str) -> None:
    element = _element(tag, type=kind, message=message)
    element.text = plain_text(text)
    case.append(element)


# --- Files ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; the target of a link, as the caller named it.

    Raises:
        OSError: it could not be written; an earlier file with this name is unchanged.
    """
    write_atomically(path.resolve(), text.encode())
