"""Options shared by several commands. Nothing here imports torch: ``--help`` needs only the names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import click

from .choices import (
    BACKENDS,
    CAPTURE_MODES,
    CONTINUOUS_SPACINGS,
    ETA_SCALES,
    PAPER,
    PREDICTION_TYPES,
    SCHEDULES,
    SHIPPED,
    SPACINGS,
)
from .interruption import interruption
from .lists import ListOf, NumberOrList
from .outputs import NUMBER_SUFFIXES, PICTURE_SUFFIXES, OutputFile

_OPTIONS = {
    "model_name": click.option(
        "--model",
        "model_name",
        default="fashion",
        show_default=True,
        metavar="NAME|PATH",
        help=f"The shipped model ({', '.join(SHIPPED)}), a diffusers directory, a TorchScript or torch.export archive, or "
        "module:attribute: a torch module or a function of x and t, with an attribute sample_shape or --shape, or a function that "
        "returns one. With --prompt, the diffusers directory of a Stable Diffusion (1, 2, XL).",
    ),
    "trust_pickle": click.option(
        "--trust-pickle",
        is_flag=True,
        help="Load a model file that can run code: TorchScript, torch.export, weights in a .bin.",
    ),
    "variant": click.option(
        "--variant",
        default=None,
        metavar="NAME",
        help='Which weights of a diffusers directory: "fp16" for diffusion_pytorch_model.fp16.safetensors.',
    ),
    "prompts": click.option(
        "--prompt",
        "prompts",
        multiple=True,
        metavar="TEXT",
        help="What a text-to-image pipeline draws; may be repeated.",
    ),
    "negative_prompt": click.option(
        "--negative-prompt", default=None, metavar="TEXT", help="What --guidance leads away from, with --prompt."
    ),
    "shape": click.option(
        "--shape",
        type=ListOf(int),
        default=None,
        metavar="C,H,W",
        help="Shape of a sample, for a model that does not tell it.",
    ),
    "prediction_type": click.option(
        "--prediction-type",
        type=click.Choice(PREDICTION_TYPES),
        default=None,
        help="What the model predicts.  [default: what it tells, or epsilon; in continuous time flow]",
    ),
    "class_name": click.option(
        "--class", "class_name", default=None, metavar="NAME", help="Use only this class: a name or number."
    ),
    "guidance": click.option(
        "--guidance",
        type=float,
        default=1.0,
        show_default=True,
        help="Classifier-free guidance scale; above 1, samples are more typical of their class.",
    ),
    "steps": click.option(
        "--steps",
        type=click.IntRange(1),
        default=None,
        help="Number of sampling steps: more are better and slower.  [default: 50]",
    ),
    "timesteps": click.option(
        "--timesteps",
        default=None,
        metavar="LIST",
        help='Instead of --steps: "ddim50", sections "10,15,20", a list "[900,600,300,0]", or a FILE.json from ddim-fast search.',
    ),
    "spacing": click.option(
        "--spacing",
        type=click.Choice(sorted({*SPACINGS, *CONTINUOUS_SPACINGS})),
        default=None,
        help="Timestep spacing.  [default: the model's, or the schedule's: leading, for flow matching uniform]",
    ),
    "schedule": click.option(
        "--schedule",
        default=None,
        metavar="NAME",
        help=f"Noise schedule, for a model whose files do not give one: {', '.join(sorted(SCHEDULES))}; with arguments as in "
        "'edm?sigma_max=50&rho=5'. A diffusion model is sampled along flow matching's path with 'flow'.  [default: the model's]",
    ),
    "shift": click.option(
        "--shift",
        type=float,
        default=None,
        help="Shift of flow matching's times towards the noise; 3 is Stable Diffusion 3's.  [default: the schedule's]",
    ),
    "batch_size": click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Samples per batch; changes speed only.",
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(1), default=None, help="Number of CPU threads.  [default: torch's]"
    ),
    "backend": click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default=None,
        help="Backend that computes the update.  [default: the fastest]",
    ),
    "device": click.option(
        "--device",
        default=None,
        metavar="DEVICE",
        help="cpu, cuda or cuda:1.  [default: cuda if available, else cpu]",
    ),
    "out": click.option(
        "--out",
        type=OutputFile(PICTURE_SUFFIXES),
        default="grid.png",
        show_default=True,
        help="The labelled grid (PNG, JPEG, WebP).",
    ),
    "save": click.option(
        "--save",
        type=OutputFile(NUMBER_SUFFIXES),
        default=None,
        metavar="FILE",
        help="Also write the raw samples: .npz or .safetensors.",
    ),
    "quiet": click.option(
        "--quiet", is_flag=True, help="Show no progress bar and no summary; notes and errors are still shown."
    ),
}

_OF_A_MODEL = (
    "model_name",
    "trust_pickle",
    "variant",
    "prompts",
    "negative_prompt",
    "shape",
    "prediction_type",
    "class_name",
    "guidance",
    "schedule",
    "shift",
    "batch_size",
    "threads",
    "device",
    "quiet",
)

_OF_NOISE = {
    "eta": click.option(
        "--eta",
        type=NumberOrList(),
        default=0.0,
        show_default=True,
        help="0: deterministic DDIM. 1: as much noise as DDPM. Or one number for each step: 0,0.7,0.7,0.",
    ),
    "eta_scales": click.option(
        "--eta-scales",
        type=click.Choice(ETA_SCALES),
        default=PAPER,
        show_default=True,
        help="What eta means: it scales the std_dev (the paper) or the variance of DDPM's noise; or it is the noise "
        "level of Flow-GRPO's or Coefficients-Preserving Sampling's (cps).",
    ),
    "order": click.option(
        "--order",
        type=click.IntRange(1, 3),
        default=None,
        help="2: multistep DDIM, closer to converged samples with the same number of model calls. 3 needs --eta 0.  "
        "[default: the order of --timesteps FILE.json, or 1]",
    ),
    "analytic_variance": click.option(
        "--analytic-variance",
        is_flag=True,
        help="Add Analytic-DPM's noise instead of eta's, as measured for --timesteps FILE.json.",
    ),
    "sigma_hat": click.option("--sigma-hat", is_flag=True, help="Use the paper's larger DDPM noise; needs --eta 1."),
    "seed": click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same samples."
    ),
    "capture": click.option(
        "--capture",
        type=click.Choice(CAPTURE_MODES),
        default="auto",
        show_default=True,
        help="On a CUDA device: replay CUDA graphs, one per step or one for the whole loop.",
    ),
}

noise_options = tuple(_OF_NOISE.values())


def takes_run(*more: Callable, without: Sequence[str] = ()) -> Callable:
    """Decorate a command with the options of all sampling commands, and with ``more``.

    The common ones are passed as a ``Run``, the command's first argument.

    Args:
        without: names of common options that do not apply to the command.
    """
    common = {name: option for name, option in _OPTIONS.items() if name not in without}
    return _gathered((*more, *common.values()), {*common, *_OF_NOISE})


def takes_model(command: Callable) -> Callable:
    """Decorate a command with the options of the model only, passed as a ``Run`` first."""
    return _gathered([_OPTIONS[name] for name in _OF_A_MODEL], set(_OF_A_MODEL))(command)


def _gathered(options: Sequence[Callable], names: set[str]) -> Callable:
    """Return a decorator that adds options, and passes those in ``names`` as a ``Run``."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def with_run(**given: Any) -> None:
            from .model_errors import model_errors_said
            from .run import Run

            run = Run(**{name: given.pop(name) for name in list(given) if name in names})
            with run.notes_of_warnings(), interruption(lambda: run.left), model_errors_said(run):
                command(run, **given)

        for option in reversed(options):
            with_run = option(with_run)
        return with_run

    return decorate
