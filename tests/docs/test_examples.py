"""README.md and every page of docs/: their Python runs from top to bottom as written, and their commands exist."""

import re
import unittest
import warnings

import click
import pytest
import torch
from page_commands import PROGRAMS, check_commands
from page_examples import DOCS, ROOT, SHELL, check_shell, parse

PAGES = ["../README.md", *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))]
BESIDE_AN_ORACLE = {
    "CI.md": "verify/test_ci_examples.py",
    "FINDINGS.md": "verify/test_findings_examples.py",
    "LOG_PROB.md": "kernels/test_log_prob.py",
    "MODELS.md": "test_models_page.py",
    "ROBOTS.md": "test_robots_page.py",
    "drop_ins/azula.md": "integrations/test_azula.py",
    "drop_ins/denoising_diffusion_pytorch.md": "integrations/test_denoising_diffusion_pytorch.py",
    "drop_ins/graph_denoiser.md": "integrations/test_graph_denoiser.py",
    "drop_ins/guided_diffusion.md": "integrations/test_guided_diffusion.py",
}
"""Pages whose Python another test runs, which holds its results to an original or to a closed form."""
SKIPPED = {"GPU.md": 3}
"""How many blocks say that they cannot run here."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of the reader's own, and their random state."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_from_top_to_bottom(page):
    skipped = 0
    for example in parse(page).examples():
        if page in BESIDE_AN_ORACLE and example.region.evaluator is not check_shell:
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="diffusers")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # torch's, of itself
            try:
                example.evaluate()
            except unittest.SkipTest:
                compile(example.parsed, page, "exec")
                skipped += 1
    assert skipped == SKIPPED.get(page, 0)


@pytest.mark.parametrize("page", BESIDE_AN_ORACLE)
def test_a_page_that_is_not_run_here_is_run_there(page):
    source = (ROOT / "tests" / BESIDE_AN_ORACLE[page]).read_text()
    assert f'"{page}"' in source


WITHIN_TEXT = re.compile(rf"`((?:{'|'.join(name for name in PROGRAMS if len(name) > 2)}) [^`]+)`")


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_the_text_exist(page):
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(), flags=re.M | re.S)
    for command in WITHIN_TEXT.findall(text):
        try:
            check_commands(" ".join(command.split()))
        except click.MissingParameter:
            pass  # a part of one
        except click.BadOptionUsage as error:
            if "requires an argument" not in str(error):
                raise


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language(page):
    """So none is overlooked: what is neither run nor parsed is text, a difference, or the site's."""
    opening = re.findall(r"^```(.*)\n(?:.*\n)*?```$", (DOCS / page).read_text(), re.M)
    assert set(opening) <= {"python", "text", "diff", "{toctree}", "{eval-rst}", *SHELL}


def test_the_readme_has_short_lines_and_fits_one_screen_and_a_half():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert len(lines) < 100


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ddim-fast sampel", "no command sampel"),
        ("ddim-fast sample --stepz 3", "stepz"),
        ("ddim-fast sample --steps many", "many"),
        ("torchrun -m ddim_fast generate --no-such", "no-such"),
        ("make no-such-target", "no-such-target"),
        ("python tools/no_such.py", "no_such"),
        ("python tools/pictures.py --no-such", "has no --no-such"),
        ('pip install ".[no-such]"', "no-such"),
        ("pip install ddim-fast", "no index has ddim-fast"),
        ("rm -rf out", "rm is not one of"),
    ],
)
def test_a_command_that_is_none_is_found(line, why):
    with pytest.raises((AssertionError, click.UsageError, OSError), match=why):
        check_commands(line)
