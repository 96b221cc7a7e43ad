"""``python -m ddim_fast`` is ``ddim-fast``."""

from .cli import main

main(prog_name="ddim-fast")
