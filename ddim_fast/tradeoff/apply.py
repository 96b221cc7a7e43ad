"""How a cell is applied: the command and the line of Python that sample as it did."""

from __future__ import annotations

import shlex

from ..plans.eta import PAPER
from .cells import Cell

_DEFAULT_MODEL = "fashion"


def command_of(cell: Cell, model: str) -> str:
    """Return the ``ddim-fast sample`` of a cell; "" for another library's scheduler."""
    if cell.scheduler is not None:
        return ""
    words = ["ddim-fast", "sample"]
    if model != _DEFAULT_MODEL:
        words += ["--model", model]
    if cell.timesteps is not None:
        words += ["--timesteps", _file_of(cell)]
    else:
        words += ["--steps", str(cell.num_inference_steps), "--spacing", cell.timestep_spacing]
    if _states_order(cell):
        words += ["--order", str(cell.order)]
    if cell.analytic_variance is not None:
        words += ["--analytic-variance"]
    if cell.eta:
        words += ["--eta", f"{cell.eta:g}"]
    if cell.eta_scales != PAPER:
        words += ["--eta-scales", cell.eta_scales]
    if cell.sigma_hat:
        words += ["--sigma-hat"]
    return shlex.join(words)


def python_of(cell: Cell) -> str:
    """Return the sampler of a cell in Python; "" for another library's scheduler."""
    if cell.scheduler is not None:
        return ""
    given = ["model.schedule"]
    if cell.timesteps is not None:
        given += [f"timesteps={_file_of(cell)!r}"]
    else:
        given += [str(cell.num_inference_steps), f"timestep_spacing={cell.timestep_spacing!r}"]
    if _states_order(cell):
        given += [f"order={cell.order}"]
    if cell.analytic_variance is not None:
        given += ["analytic_variance=True"]
    if cell.eta:
        given += [f"eta={cell.eta!r}"]
    if cell.eta_scales != PAPER:
        given += [f"eta_scales={cell.eta_scales!r}"]
    if cell.sigma_hat:
        given += ["sigma_hat=True"]
    return f"df.DDIMSampler({', '.join(given)})"


def _states_order(cell: Cell) -> bool:
    """Return whether the order is not the one that is taken unasked: 1, or with a file the file's."""
    return cell.history_weights is None and (cell.order != 1 or cell.timesteps is not None)


def _file_of(cell: Cell) -> str:
    """Return the file of a cell's timesteps, by which the cell is named."""
    name = cell.timestep_spacing
    return name if name.endswith(".json") else f"{name}.json"
