"""Find modules where they used to be, for one release: the old name imports, and warns of the new
one."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

OLD_TO_NEW = {
    "attributes": "utils.import_string",
    "capture": "sampling.capture",
    "convolutions": "models.convolutions",
    "editing": "sampling.editing",
    "graphs": "sampling.cuda_graphs",
    "guidance": "sampling.guidance",
    "inversion": "sampling.inversion",
    "loading": "models.loading",
    "loop": "sampling.loop",
    "metrics": "models.metrics",
    "optimize": "sampling.optimize",
    "pages": "utils.html",
    "parallel": "sampling.parallel",
    "pictures": "utils.pictures",
    "plan": "plans.plan",
    "schedule": "plans.schedules",
    "start": "sampling.initial_state",
    "steps_by_timestep": "integrations.rows_by_timestep",
    "timestep_files": "plans.files",
    "timesteps": "plans.timesteps",
    "unet": "models.unet",
    "update": "plans.coefficients",
    "verify.adapters": "verify.subjects.adapters",
    "verify.backends": "verify.subjects.backends",
    "verify.cases": "verify.truth.cases",
    "verify.emulated_gpu": "gpu_lab.emulated_gpu",
    "verify.fake_cuda": "gpu_lab.fake_cuda",
    "verify.golden": "verify.truth.golden",
    "verify.in_the_wild": "verify.subjects.in_the_wild",
    "verify.machine_code": "gpu_lab.machine_code",
    "verify.new_memory": "verify.checks.new_memory",
    "verify.oracle": "verify.truth.oracle",
    "verify.ptx": "gpu_lab.ptx",
    "verify.ptx_decoder": "gpu_lab.ptx.decoder",
    "verify.ptx_errors": "gpu_lab.ptx.errors",
    "verify.ptx_float": "gpu_lab.ptx.floats",
    "verify.ptx_integer": "gpu_lab.ptx.integers",
    "verify.ptx_memory": "gpu_lab.ptx.memory",
    "verify.ptx_operations": "gpu_lab.ptx.operations",
    "verify.ptx_parser": "gpu_lab.ptx.parser",
    "verify.ptx_scheduler": "gpu_lab.ptx.scheduler",
    "verify.ptx_warp": "gpu_lab.ptx.warp",
    "verify.replay": "gpu_lab.replay",
    "verify.report": "verify.reports.report",
    "verify.show": "verify.reports.show",
    "verify.statistics": "verify.truth.statistics",
    "verify.subject": "verify.subjects.subject",
    "verify.tolerances": "verify.truth.tolerances",
    "verify.write": "verify.reports.write",
    "verify.write_html": "verify.reports.write_html",
    "whole_files": "utils.atomic_files",
}
"""Below ``ddim_fast``: what a module was called in 0.1, and where its names are now. To be removed
in 0.3."""


class _Loader(Loader):
    """Give out the module of the new name, and warn."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(
            f"{self.old} has moved, and the old name ends with ddim_fast 0.3: import {self.new}",
            DeprecationWarning,
            stacklevel=2,
        )
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # importlib has put the old name's in its place

    def get_code(self, name: str) -> CodeType:
        """Return what ``python -m`` runs: the module of the new name."""
        warnings.warn(f"python -m {self.old} has moved: use python -m {self.new}", DeprecationWarning, stacklevel=2)
        code = f"import runpy\nrunpy.run_module({self.new!r}, run_name='__main__', alter_sys=True)\n"
        return compile(code, f"<{self.old}>", "exec")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != "ddim_fast" or module not in OLD_TO_NEW:
            return None
        new = f"ddim_fast.{OLD_TO_NEW[module]}"
        found = importlib.util.find_spec(new)
        return ModuleSpec(name, _Loader(name, new), origin=None if found is None else found.origin)


def install() -> None:
    """Let the old names be found, after everything else has been asked."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
