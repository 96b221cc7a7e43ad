"""Our numbers beside the paper's: the layout, gaps, and that statements follow from numbers."""

import re
from dataclasses import replace

import pytest
from tradeoff.example_studies import MANY, PAPER, result, study

from ddim_fast.tradeoff import Measure, grid, paper_table
from ddim_fast.tradeoff.paper import PAPER_FIDS, ROWS, paper_table_of
from ddim_fast.tradeoff.report import html_text


def changed(values, error=0.1):
    """The paper's numbers, but for some: (row, S) -> value; None takes the cell away."""
    results = []
    for found in PAPER.results:
        place = ("sigma-hat" if found.cell.sigma_hat else found.cell.eta, found.cell.num_inference_steps)
        value = values.get(place, PAPER_FIDS[place[0]][place[1]])
        if value is not None:
            results.append(replace(found, quality={"frechet": Measure(value, error)}))
    return study(*results)


def differing(shown):
    return [s.text for s in paper_table_of(shown).statements() if not s.agrees]


def test_numbers_of_the_paper():
    assert [list(PAPER_FIDS[row].values()) for row in ROWS] == [
        [13.36, 6.84, 4.67, 4.16, 4.04],
        [14.04, 7.11, 4.77, 4.25, 4.09],
        [16.66, 8.35, 5.25, 4.46, 4.29],
        [41.07, 18.36, 8.01, 5.78, 4.73],
        [367.43, 133.37, 32.72, 9.99, 3.17],
    ]


def test_which_studies_have_the_table():
    assert paper_table_of(PAPER)
    assert not paper_table_of(MANY)  # no eta of 0.2, no sigma-hat
    assert not paper_table_of(study())
    assert not paper_table_of(study(*(result(c, 1.0) for c in paper_table() if not c.sigma_hat)))
    assert not paper_table_of(study(*(result(c) for c in paper_table())))
    mixed = [replace(c, timestep_spacing=f"{c.eta}") for c in paper_table()]
    assert not paper_table_of(study(*(result(c, 1.0) for c in mixed)))
    searched = [replace(c, timesteps=tuple(range(c.num_inference_steps, 0, -1))) for c in paper_table()]
    assert not paper_table_of(study(*(result(c, 1.0) for c in searched)))
    other = [replace(c, eta_scales="variance") for c in paper_table()]
    assert not paper_table_of(study(*(result(c, 1.0) for c in other)))


def test_of_several_spacings_the_fullest_and_then_the_papers():
    both = [*paper_table(spacing="leading"), *paper_table()]
    assert paper_table_of(study(*(result(c, 1.0) for c in both))).spacing == "quad"
    without = [c for c in both if c.timestep_spacing == "leading" or c.num_inference_steps < 1000]
    assert paper_table_of(study(*(result(c, 1.0) for c in without))).spacing == "leading"


def test_a_metric_that_all_rows_have():
    cells = paper_table()
    shown = study(*(result(c, wasserstein=2.0, **({"distance": 1.0} if c.eta == 0 else {})) for c in cells))
    assert paper_table_of(shown).metric.name == "wasserstein"


def test_the_papers_own_numbers_agree():
    statements = paper_table_of(PAPER).statements()
    assert differing(PAPER) == []
    # A column and a row each, and two of sigma-hat.
    assert len(statements) == 12
    assert statements[4].text.startswith(
        "At S = 1000 the rows come in the paper's order, sigma-hat < eta 0.0 < eta 0.2"
    )
    assert "collapses: it is 27.5 times the best row's here, 27.5 times in the paper" in statements[10].text


def test_rows_in_another_order():
    found = differing(changed({(0.5, 10): 10.0}))
    assert len(found) == 1
    assert "here eta 0.5 is better than eta 0.0, eta 0.5 is better than eta 0.2." in found[0]
    assert differing(changed({(0.5, 10): 13.3})) != []
    assert differing(changed({(0.5, 10): 13.3}, error=0.5)) == []  # within the error bars


def test_more_steps_that_are_worse():
    found = differing(changed({(0.2, 100): 5.2, (0.5, 100): 5.24, (0.0, 100): 4.7}))
    assert "eta 0.2: in the paper every further step helps; here S = 100 is worse than S = 50." in found
    assert not [text for text in found if text.startswith("eta 0.5:")]


def test_sigma_hat():
    found = differing(changed({("sigma-hat", 10): 20.0, ("sigma-hat", 1000): 4.2}))
    assert (
        "At S = 10 sigma-hat does not collapse: it is 1.5 times the best row's here, 27.5 times in the paper." in found
    )
    found = differing(changed({("sigma-hat", 1000): 4.5}))
    assert "At S = 1000 sigma-hat is the paper's best row; here eta 0.0 and eta 0.2 and eta 0.5 are better." in found
    assert [text for text in found if text.startswith("At S = 1000 the paper's order is sigma-hat <")]


def test_a_metric_that_rises():
    fids = [PAPER_FIDS["sigma-hat" if c.sigma_hat else c.eta][c.num_inference_steps] for c in paper_table()]
    rising = study(*(result(c, precision=1 / fid) for c, fid in zip(paper_table(), fids, strict=True)))
    assert differing(rising) == []
    falling = study(*(result(c, precision=fid) for c, fid in zip(paper_table(), fids, strict=True)))
    assert len(differing(falling)) == 11  # all that can be told


def test_gaps_are_shown_and_nothing_is_said_of_them(tmp_path):
    gaps = {(row, S): None for row in ROWS for S in (100, 1000)} | {("sigma-hat", 10): None}
    shown = changed(gaps)
    table = paper_table_of(shown)
    assert table.measure("sigma-hat", 10) is None
    assert table.measure(0.0, 10) == Measure(13.36, 0.1)
    said = " ".join(s.text for s in table.statements())
    assert "S = 1000" not in said
    assert "collapse" not in said
    section = re.search(r'<section class="card" id="paper".*?</section>', html_text(shown, tmp_path), re.S)[0]
    assert section.count("<b>—</b>") == 11
    assert section.count("<td>") == 25
    for row in ROWS:
        for value in PAPER_FIDS[row].values():
            assert f"<small>{value:.2f}</small>" in section


@pytest.mark.parametrize("shown", [MANY, study(*(result(c, 1.0) for c in grid((10, 20))))])
def test_other_studies_have_no_such_section(shown, tmp_path):
    assert "DDIM paper</h2>" not in html_text(shown, tmp_path)
    assert "DDIM paper</h2>" in html_text(PAPER, tmp_path)
