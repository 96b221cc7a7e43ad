"""``ddim-fast info``."""

from __future__ import annotations

import os
import platform

import click

from .._version import __version__


@click.command()
def info() -> None:
    """Print versions, usable backends (and why others are not), and the instruction set."""
    import numpy as np
    import torch

    from ..kernels import cpu_step, dispatch
    from ..kernels.contract import StepCoefficients, StepInputs
    from ..kernels.noise import NOISE_STANDARD_VERSION

    click.echo(f"ddim_fast {__version__}, noise standard {NOISE_STANDARD_VERSION}")
    click.echo(f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    click.echo(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"
    )
    click.echo("backends, best first:")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        x = torch.zeros(1, 4, dtype=torch.float32, device=device)
        inputs = StepInputs(x, x, StepCoefficients(1, 0, 0, 1, 0, 1, 0, 0))
        for name, backend in dispatch.BACKENDS.items():
            reasons = backend.unsupported_reasons(inputs)
            click.echo(f"  {name} on {device}: {'not usable: ' + '; '.join(reasons) if reasons else 'usable'}")
    if cpu_step.extension is not None:
        usable = cpu_step.extension.instruction_sets()
        click.echo(f"instruction set: {cpu_step.extension.selected()} (usable here: {', '.join(usable)})")
