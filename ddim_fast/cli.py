"""The command line, ``ddim-fast``."""

from __future__ import annotations

import click

from ._version import __version__
from .commands.edit import img2img, inpaint, interpolate, reconstruct
from .commands.generate import generate
from .commands.info import info
from .commands.interruption import interruption
from .commands.sample import sample
from .commands.search import search
from .commands.tradeoff import tradeoff
from .commands.verify import verify

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Turns the library's errors, which say what to do, into messages without a traceback."""

    def invoke(self, ctx: click.Context):
        try:
            with interruption():  # while a command is still imported
                return super().invoke(ctx)
        except BrokenPipeError:  # click's: whatever reads the output has closed it
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="ddim-fast")
def main() -> None:
    """A fast DDIM sampler: the whole update in one kernel.

    \b
    Start here:
      ddim-fast sample                     60 pictures from the model that ships with the package
      ddim-fast sample --steps 10 --eta 1  fewer steps, with DDPM's noise
      ddim-fast interpolate                from one sample to another
      ddim-fast generate -n 50000          a set of samples as files, by any number of processes
      ddim-fast tradeoff --quick --out DIR how many steps are enough, on one page
      ddim-fast search --steps 10          the best ten timesteps for a model
      ddim-fast verify                     whether a sampler is right, ours or anyone's
      ddim-fast info                       which backends run on this machine, and why others do not
    """


for _command in (sample, img2img, inpaint, interpolate, reconstruct, generate, tradeoff, search, verify, info):
    main.add_command(_command)

if __name__ == "__main__":
    main()
