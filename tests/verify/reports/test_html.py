"""The HTML report: its contents, that no text of a subject breaks out of it, and a browser."""

import re
from dataclasses import replace

import pytest
from pages import Page, assert_fits, click, show_at
from selenium.webdriver.common.by import By
from verify.example_reports import ALL, CODE, EVERY_OUTCOME, EVIL, RIGHT

from ddim_fast.utils.html import plain_text
from ddim_fast.verify.reports.write import verdict
from ddim_fast.verify.reports.write_html import html_text

# --- The text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_page_says_everything_and_needs_nothing_else(name):
    report = ALL[name]
    page = Page(html_text(report))
    assert verdict(report) in page.text
    for result in report.results:
        for said in (result.name, result.outcome.value, result.message, result.code, result.proves, result.tolerance):
            assert plain_text(said) in page.text, (result.name, said)
    for value in (*report.versions.values(), *report.conventions.values(), *report.features, f"seed {report.seed}"):
        assert value in page.text
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not [v for k, v in page.attributes if k in ("src", "href", "action", "srcset") and v != "data:,"]
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", html_text(report))


def test_nothing_of_the_subject_is_markup():
    plain = replace(
        EVERY_OUTCOME,
        subject="mine:step",
        results=tuple(
            replace(r, message=r.message and "a", code=r.code and "b", details=dict.fromkeys(r.details, "c"))
            for r in EVERY_OUTCOME.results
        ),
    )
    evil = replace(
        plain,
        results=tuple(
            replace(r, message=EVIL, code=r.code and EVIL, details=dict.fromkeys(r.details, EVIL)) if r.message else r
            for r in plain.results
        ),
    )
    tags = [tag for tag in Page(html_text(evil)).tags if tag != "span"]  # those of the colours
    assert tags == [tag for tag in Page(html_text(plain)).tags if tag != "span"]
    text = html_text(evil)
    assert "\x00" not in text
    assert "\x1b" not in text
    text.encode()


def test_two_subjects_stand_beside_each_other():
    page = Page(html_text(EVERY_OUTCOME, RIGHT))
    assert "For comparison: cpu is right" in page.text
    assert "For comparison" not in Page(html_text(EVERY_OUTCOME)).text


# --- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light")], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser, tmp_path, request):
    width, colours = request.param
    show_at(browser, width, colours)
    path = tmp_path / "report.html"
    path.write_text(html_text(EVERY_OUTCOME, RIGHT), "utf-8")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert_fits(browser)
    assert browser.title == verdict(EVERY_OUTCOME)  # no script of the subject's ran
    browser.save_screenshot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").stat().st_size > 10_000


def names(page):
    """The checks that can be seen, from top to bottom."""
    found = [(e.location["y"], e.text) for e in page.find_elements(By.CSS_SELECTOR, ".open") if e.is_displayed()]
    return [name for _, name in sorted(found)]


def is_open(page, name):
    return page.find_element(By.CSS_SELECTOR, f"tbody[data-name='{name}'] .more").is_displayed()


def sorted_by(page, key):
    header = click(page, f"[data-sort='{key}']")
    return header.find_element(By.XPATH, "..").get_attribute("aria-sort"), names(page)


@pytest.mark.browser
def test_sort(page):
    as_run = [r.name for r in EVERY_OUTCOME.results]
    assert names(page) == as_run
    assert sorted_by(page, "name") == ("ascending", sorted(as_run))
    assert sorted_by(page, "name") == ("descending", sorted(as_run)[::-1])
    assert sorted_by(page, "seconds")[1][:2] == ["noise", "run"]
    assert sorted_by(page, "worst")[1][:2] == ["update", "noise"]
    assert sorted_by(page, "cases")[1][:2] == ["noise", "run"]
    direction, by_outcome = sorted_by(page, "outcome")
    assert (direction, by_outcome[:3]) == ("ascending", ["update", "inversion", "gpu"])
    assert len(page.find_elements(By.CSS_SELECTOR, "[aria-sort='ascending'], [aria-sort='descending']")) == 1


@pytest.mark.browser
def test_filter(page):
    for wanted, shown in {"failed": ["update"], "not applicable": ["timesteps"], "skipped": ["gpu"]}.items():
        pressed = click(page, f"nav [data-show='{wanted}']")
        assert pressed.get_attribute("aria-pressed") == "true"
        assert names(page) == shown
        assert "1 of 6" in page.find_element(By.ID, "status").text
    click(page, "nav [data-show='passed']")
    assert len(names(page)) == 6  # the subject beside it passed them all
    click(page, "nav [data-show='']")
    assert len(names(page)) == 6


@pytest.mark.browser
def test_expand(page):
    assert [r.name for r in EVERY_OUTCOME.results if is_open(page, r.name)] == ["update", "inversion"]
    click(page, "tbody[data-name='noise'] .open")
    assert is_open(page, "noise")
    assert "What noise proves." in page.find_element(By.CSS_SELECTOR, "tbody[data-name='noise'] .more").text
    assert_fits(page)
    click(page, "tbody[data-name='update'] .open")
    assert not is_open(page, "update")
    click(page, "#expand")
    assert all(is_open(page, r.name) for r in EVERY_OUTCOME.results)
    assert_fits(page)
    click(page, "#expand")
    assert not any(is_open(page, r.name) for r in EVERY_OUTCOME.results)


@pytest.mark.browser
def test_copy(page):
    page.execute_cdp_cmd(
        "Browser.grantPermissions", dict(permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    )
    message = page.find_element(By.CSS_SELECTOR, "tbody[data-name='update'] .message").text
    assert "document.title = 'broken out'" in message
    button = click(page, "tbody[data-name='update'] .copy")
    assert button.text in ("copied", "copy")
    copied = page.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))"
    )
    assert copied.strip() == plain_text(CODE)
