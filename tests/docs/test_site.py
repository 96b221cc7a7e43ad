"""The site: it builds with no warning, loads nothing from elsewhere, has all that is public, and quotes the code as it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import assert_fits, show_at

import ddim_fast as df

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as ``make docs`` builds it: a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    (recipe,) = re.findall(r"^docs:.*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.M)
    words = recipe.replace("$(OUT)/docs", str(out)).split()
    done = subprocess.run([sys.executable, *words, "-d", f"{out}-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.docs
def test_it_is_built_strictly_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"", text) == [], page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text()), sheet


@pytest.mark.docs
def test_formulas_are_mathml_and_every_page_is_in_the_navigation(site):
    method = (site / "METHOD.html").read_text()
    assert method.count("<math") > 40
    assert "$" not in re.sub(r"<script.*?</script>", "", method, flags=re.S).split("<article")[1].split("</article")[0]
    index = (site / "index.html").read_text()
    for page in site.rglob("*.html"):
        name = page.relative_to(site).as_posix()
        if name not in ("genindex.html", "search.html", "index.html", "py-modindex.html"):
            assert f'href="{name}"' in index, name


@pytest.mark.docs
@pytest.mark.browser
def test_pages_fit_a_phone_and_a_desk(site, browser):
    for width in (390, 1280):
        show_at(browser, width, "light")
        for name in ("index", "METHOD", "MODELS", "reference", "BENCHMARKS", "notebooks/start"):
            browser.get((site / f"{name}.html").as_uri())
            assert_fits(browser)


@pytest.mark.docs
@pytest.mark.slow
def test_a_broken_link_is_an_error(tmp_path):
    """Of a page that names a page, an anchor, an object and a picture that are not there, each is said."""
    configuration = (DOCS / "conf.py").read_text().replace("html_static_path", "unused")
    (tmp_path / "conf.py").write_text(f'{configuration}\nroot_doc = "page"\n')
    (tmp_path / "page.md").write_text(
        "# A\n\n[page](NO_PAGE.md) [anchor](#no-anchor) ![picture](no_picture.png)\n\n"
        "```{eval-rst}\n.. autofunction:: ddim_fast.no_function\n\n:py:class:`ddim_fast.NoClass`\n```\n"
    )
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "dummy",
        str(tmp_path),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    for name in ("NO_PAGE.md", "no-anchor", "no_picture.png", "no_function", "NoClass"):
        assert name in done.stderr, name


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", text, re.M)
    assert {*listed} >= {name for name in df.__all__ if name != "__version__"}


QUOTED = re.findall(r"^- `([^`]+)` in `([\w/.]+)`$", (DOCS / "METHOD.md").read_text(), re.M)


@pytest.mark.parametrize(("line", "file"), QUOTED, ids=lambda value: value if "/" in value and " " not in value else "")
def test_a_formula_is_followed_by_its_line_of_code(line, file):
    assert [line] == [
        found for found in {row.strip() for row in (ROOT / file).read_text().splitlines()} if found == line
    ]


def test_every_formula_has_its_line():
    text = (DOCS / "METHOD.md").read_text()
    assert len(re.findall(r"^\$\$", text, re.M)) <= len(QUOTED)
