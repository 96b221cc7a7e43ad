"""ddim_fast: a fast DDIM sampler (Song, Meng, Ermon 2020, arXiv 2010.02502).

import ddim_fast as df

model = df.load_model("fashion")
sampler = df.DDIMSampler(df.NoiseSchedule.linear(), num_inference_steps=50, eta=0.0)
images = sampler.sample(model, shape=(64, 1, 28, 28), seed=0)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from ._public import *  # noqa: F403  (the names are listed there)
else:  # type checkers would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        """Import the public names, and torch with them, when the first one is asked for (PEP 562):
        ``ddim-fast --help`` asks for none."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = importlib.import_module("._public", __name__)
        now = {*public.__all__, "__all__"} - {*public.LATER}
        globals().update({one: getattr(public, one) for one in now})
        if name in public.LATER:
            globals()[name] = getattr(public, name)
        if name not in globals():  # neither public, nor a module that the import has brought
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("._public", __name__).__all__})


_moved.install()
if not TYPE_CHECKING and "torch" in sys.modules:  # nothing is saved by waiting
    __getattr__("__all__")
