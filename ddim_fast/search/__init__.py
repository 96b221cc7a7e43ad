"""Timesteps fitted to a model: the few whose samples come nearest to those of many steps.

    found = search_timesteps(Search(model, schedule, num_inference_steps=10))
    sampler = DDIMSampler(schedule, timesteps=found.best)

Sources: dynamic programming over a table of measured one-step costs, Watson et al. 2021 (arXiv
2106.03802) and GITS (Chen et al. 2024, arXiv 2405.11326); then moves of single timesteps, judged by
whole runs, both of the timesteps visited and of the timesteps given to the model (Xia et al. 2023,
arXiv 2310.09469, and LD3, Tong et al. 2024, arXiv 2405.15506, find the latter by gradients). With
``Search(coefficients=True)`` the weights of earlier predictions are fitted, too, so that the result
is a whole solver: see ``fit.py`` for the sources. On the command line: ``ddim-fast search``.
"""

from .analytic import measure_eps_residual
from .dynamic import best_timesteps
from .fitted import FITTED, FittedSolver
from .refine import Candidate
from .search import Found, Score, Search, search_timesteps

__all__ = [
    "FITTED",
    "Candidate",
    "FittedSolver",
    "Found",
    "Score",
    "Search",
    "best_timesteps",
    "measure_eps_residual",
    "search_timesteps",
]
