"""Timesteps chosen for a model: the few that lead nearest to where many would.

    found = search_timesteps(model, schedule, shape, num_inference_steps=10)
    sampler = DDIMSampler(schedule, timesteps=found.timesteps)

Sources: dynamic programming over a table of measured one-step costs, Watson et al. 2021 (arXiv 2106.03802) and GITS (Chen et al. 2024,
arXiv 2405.11326); then moves of single timesteps judged by whole runs. On the command line: ``ddim-fast search``.
"""

from .analytic import MeanSquaredEps, measure_mean_squared_eps
from .dynamic import best_timesteps
from .search import Found, search_timesteps

__all__ = ["Found", "MeanSquaredEps", "best_timesteps", "measure_mean_squared_eps", "search_timesteps"]
