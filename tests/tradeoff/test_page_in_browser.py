"""The page of a study in a browser: it sorts, filters, switches and shows pictures, with and without a mouse."""

import pytest
from pages import assert_fits, click, show_at
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tradeoff.example_studies import ALL, EVIL, HOSTILE, MANY, NO_METRICS, ONE, RACE, with_pictures

from ddim_fast.tradeoff.race import races
from ddim_fast.tradeoff.report import html_text, measure_text
from ddim_fast.tradeoff.results import describe

pytestmark = pytest.mark.browser
SIZES = [(1280, "light"), (1280, "dark"), (390, "light")]


def load(browser, directory, shown, width=1280, colours="light"):
    show_at(browser, width, colours)
    path = directory / "report.html"
    path.write_text(html_text(shown, directory), "utf-8")
    browser.get(path.as_uri())
    # A browser that has just started may take a moment to lay its first page out.
    WebDriverWait(browser, 20).until(lambda page: page.execute_script("return document.body.offsetHeight > 0"))


@pytest.fixture(params=SIZES, ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser, tmp_path, request):
    load(browser, tmp_path, with_pictures(MANY, tmp_path), *request.param)
    yield browser
    assert browser.get_log("browser") == []
    assert_fits(browser)


def cells(page):
    """Numbers of the cells that can be seen, from top to bottom."""
    return page.execute_script(
        "return [...document.querySelectorAll('#cells tbody tr')].filter((r) => r.offsetHeight).map((r) => Number(r.dataset.number))"
    )


def numbers(results):
    return [1 + next(i for i, one in enumerate(MANY.results) if one is r) for r in results]


def sort(page, column):
    header = click(page, f"#cells th:nth-child({column}) button")
    return header.find_element(By.XPATH, "..").get_attribute("aria-sort")


def choose(page, name, value):
    click(page, f"[data-filter='{name}'] option[value='{value}']")


def visible(page, selector):
    return [e for e in page.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]


def title(page):
    return page.find_element(By.ID, "viewer-title").text


def is_open(page):
    return page.execute_script("return document.getElementById('viewer').open")


def test_sort(page):
    assert cells(page) == numbers(MANY.results)
    by_frechet = numbers(sorted(MANY.results, key=lambda r: r.quality["frechet"].value))
    assert (sort(page, 6), cells(page)) == ("ascending", by_frechet)
    assert sort(page, 6) == "descending"
    assert [MANY.results[n - 1].quality["frechet"].value for n in cells(page)] == sorted(
        (r.quality["frechet"].value for r in MANY.results), reverse=True
    )
    for direction in ("ascending", "descending"):  # of the distance, that the noisy have not: they come last
        assert sort(page, 7) == direction
        assert all("distance" in MANY.results[n - 1].quality for n in cells(page)[:30])
        assert not any("distance" in MANY.results[n - 1].quality for n in cells(page)[30:])
    sort(page, 2)
    spacings = [MANY.results[n - 1].cell.timestep_spacing for n in cells(page)]
    assert spacings == sorted(spacings)
    assert len(page.find_elements(By.CSS_SELECTOR, "[aria-sort='ascending'], [aria-sort='descending']")) == 1


def test_filter(page):
    choose(page, "spacing", "quad")
    choose(page, "order", "2")
    wanted = [r for r in MANY.results if (r.cell.timestep_spacing, r.cell.order) == ("quad", 2)]
    assert cells(page) == numbers(wanted)
    assert page.find_element(By.ID, "status").text == "5 of 60 cells"
    seen = visible(page, "[data-metric='frechet'] .point:not(.out)")
    assert sorted(int(e.get_attribute("data-number")) for e in seen) == sorted(numbers(wanted))
    choose(page, "steps", "20")
    assert len(cells(page)) == 1
    for name in ("spacing", "order", "steps"):
        choose(page, name, "")
    assert len(cells(page)) == 60
    assert page.find_element(By.ID, "status").text == "60 cells"


def test_front_and_metric(page):
    assert [e.get_attribute("data-metric") for e in visible(page, ".metrics figure")] == ["frechet"]
    click(page, "#front-only")
    assert sorted(cells(page)) == sorted(numbers(MANY.pareto_front("frechet")))
    click(page, "label[for='metric-precision']")
    assert [e.get_attribute("data-metric") for e in visible(page, ".metrics figure")] == ["precision"]
    assert sorted(cells(page)) == sorted(numbers(MANY.pareto_front("precision")))
    assert page.find_element(By.ID, "front-of").text == "Precision"
    assert str(MANY.recommendation("precision")) in visible(page, ".metrics figcaption")[0].text
    assert len(visible(page, ".metrics figure svg")) == 1
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert [e.get_attribute("data-metric") for e in visible(page, ".metrics figure")] == ["recall"]


def test_open_a_cell_from_the_table(page):
    click(page, "#row-8 .open")
    assert title(page) == describe(MANY.results[7].cell)
    picture = page.find_element(By.ID, "viewer-picture")
    assert picture.is_displayed()
    assert picture.get_attribute("src") == page.find_element(By.CSS_SELECTOR, "#pictures-8 img").get_attribute("src")
    assert page.execute_script("return arguments[0].naturalWidth", picture) == 626
    assert measure_text(MANY.results[7].quality["frechet"]) in page.find_element(By.ID, "viewer-numbers").text
    click(page, "#next")
    assert title(page) == describe(MANY.results[8].cell)
    ActionChains(page).send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT).perform()
    assert title(page) == describe(MANY.results[6].cell)
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not is_open(page)
    # Neighbours are those that the table shows.
    choose(page, "steps", "100")
    click(page, "#cells tbody tr:not([hidden]) td:nth-child(5)")
    assert title(page) == describe(MANY.results[48].cell)
    assert not page.find_element(By.ID, "previous").is_enabled()
    assert page.find_element(By.ID, "next").is_enabled()
    click(page, "#close")
    assert not is_open(page)


def test_open_a_cell_from_a_point_and_from_the_pictures(page):
    best = numbers([MANY.best("frechet")])[0]
    (point,) = visible(page, f"[data-metric='frechet'] .point[data-number='{best}']")
    assert measure_text(MANY.best("frechet").quality["frechet"]) in point.find_element(
        By.TAG_NAME, "title"
    ).get_attribute("textContent")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    point.find_element(By.CSS_SELECTOR, "g path").click()
    assert title(page) == describe(MANY.best("frechet").cell)
    assert "#" not in page.current_url  # the page behind has not moved
    click(page, "#close")
    page.execute_script("arguments[0].focus()", point)
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert is_open(page)
    click(page, "#close")
    click(page, "#pictures-3 img")
    assert title(page) == describe(MANY.results[2].cell)


def test_strips(page):
    opened = [e for e in page.find_elements(By.CSS_SELECTOR, "details") if e.get_attribute("open")]
    assert len(opened) == 1
    assert opened[0].find_element(By.TAG_NAME, "summary").text == "log_snr spacing, eta 0, order=2"
    assert [e.text.split()[0] for e in opened[0].find_elements(By.TAG_NAME, "p")] == ["5", "10", "20", "50", "100"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [1280, 390])
def test_every_study_fits_and_says_nothing_wrong(browser, tmp_path, name, width):
    load(browser, tmp_path, ALL[name], width, "dark")
    assert browser.get_log("browser") == []
    assert_fits(browser)
    assert "how many steps are enough" in browser.title
    assert "broken out" not in browser.title.split("document.title")[0]
    assert len(cells(browser)) == len(ALL[name].results)


def test_hostile_names_can_be_filtered_and_shown(browser, tmp_path):
    load(browser, tmp_path, with_pictures(HOSTILE, tmp_path), 390)
    browser.find_elements(By.CSS_SELECTOR, "[data-filter='spacing'] option")[1].click()
    assert cells(browser) == [1]
    click(browser, "#row-1 .open")
    assert "</script><script>document.title" in title(browser)
    assert browser.title != "broken out"
    assert EVIL[:20] in browser.find_element(By.ID, "viewer-numbers").text
    assert browser.get_log("browser") == []


def test_cells_without_pictures_show_their_numbers(browser, tmp_path):
    for shown in (ONE, NO_METRICS):
        load(browser, tmp_path, shown)
        click(browser, "#row-1 .open")
        assert not browser.find_element(By.ID, "viewer-picture").is_displayed()
        assert "Model calls" in browser.find_element(By.ID, "viewer-numbers").text
        assert browser.get_log("browser") == []


def test_without_scripts_metrics_switch_and_pictures_are_there(browser, tmp_path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        load(browser, tmp_path, with_pictures(MANY, tmp_path))
        label = browser.find_element(By.CSS_SELECTOR, "label[for='metric-recall']")
        label.click()
        shown = visible(browser, ".metrics figure")
        assert [e.get_attribute("data-metric") for e in shown] == ["recall"]
        assert len(visible(browser, ".gallery img")) == 60
        assert visible(browser, ".filters") == []
        assert visible(browser, "dialog") == []
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_switch_shows_quality_against_calls(browser, tmp_path):
    load(browser, tmp_path, RACE)
    shown = ".metrics figure .against-{} svg"
    assert [len(visible(browser, shown.format(axis))) for axis in ("time", "calls")] == [1, 0]
    click(browser, "label[for='axis-calls']")
    assert [len(visible(browser, shown.format(axis))) for axis in ("time", "calls")] == [0, 1]
    click(browser, "label[for='metric-distance']")
    assert [len(visible(browser, shown.format(axis))) for axis in ("time", "calls")] == [0, 1]
    assert browser.find_element(By.ID, "front-of").text == "Distance to converged"
    show_at(browser, 1700, "light")
    assert [len(visible(browser, shown.format(axis))) for axis in ("time", "calls")] == [1, 1]
    assert visible(browser, ".axis-label") == []
    assert_fits(browser)


@pytest.mark.parametrize("width", [1280, 390])
def test_races_fit_and_lead_to_their_cells(browser, tmp_path, width):
    load(browser, tmp_path, RACE, width)
    inner = browser.execute_script(
        "return [...document.querySelectorAll('.races .scroll')].map((e) => e.scrollWidth - e.clientWidth)"
    )
    assert inner == [0, 0]
    for race in races(RACE):
        rows = browser.find_elements(By.CSS_SELECTOR, f"[data-race='{race.metric.name}'] tbody tr")
        assert [
            row.find_element(By.CSS_SELECTOR, "a span").text.split("\n")[0].removesuffix(" baseline") for row in rows
        ] == [entry.name for entry in race.entries]
    link = browser.find_element(By.CSS_SELECTOR, "[data-race] a")
    best = races(RACE)[0].entries[0].fastest
    assert link.get_attribute("href").endswith(f"#row-{1 + next(i for i, r in enumerate(RACE.results) if r is best)}")


def test_no_labels_of_a_chart_overlap(browser, tmp_path):
    load(browser, tmp_path, RACE, 1700)
    for svg in visible(browser, ".metrics figure svg"):
        boxes = browser.execute_script(
            "return [...arguments[0].querySelectorAll('text')].map((e) => { const b = e.getBoundingClientRect(); "
            "return [b.left, b.right, b.top, b.bottom, e.textContent]; })",
            svg,
        )
        assert len(boxes) > 10
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[0] >= b[1] or b[0] >= a[1] or a[2] >= b[3] or b[2] >= a[3], (a, b)


def test_others_are_filtered_by_their_names(browser, tmp_path):
    load(browser, tmp_path, RACE)
    choose(browser, "order", "theirs")
    assert cells(browser) == [i for i, r in enumerate(RACE.results, 1) if r.cell.scheduler]
    choose(browser, "spacing", "HeunDiscrete")
    assert len(cells(browser)) == 4
