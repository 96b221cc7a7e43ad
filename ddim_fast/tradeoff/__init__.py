"""How many steps are enough: quality against time, measured for one model.

    directory = StudyDirectory(path, settings_of(subject))
    study = run_study(subject, grid((10, 20, 50)), directory, "my model")
    print(study.recommendation())

On the command line: ``ddim-fast tradeoff``.
"""

from .cells import Cell, grid, paper_table
from .closed_form import ClosedForm
from .measure import Subject, draw, measure, other_cells
from .quality import Judge, judge_of, shipped_judge
from .results import METRICS, CellResult, Measure, Metric, Recommendation, Study, read_json, write_json
from .study import StudyDirectory, run_study, settings_of

__all__ = [
    "METRICS",
    "Cell",
    "CellResult",
    "ClosedForm",
    "Judge",
    "Measure",
    "Metric",
    "Recommendation",
    "Study",
    "StudyDirectory",
    "Subject",
    "draw",
    "grid",
    "judge_of",
    "measure",
    "other_cells",
    "paper_table",
    "read_json",
    "run_study",
    "settings_of",
    "shipped_judge",
    "write_json",
]
