"""The DDIM step itself, in every backend: tensors and numbers, nothing of schedules or models. Installed as ``ddim_fast.kernels``."""

if __name__ == "kernels":
    # The repository's folder was found by ``import kernels``, because the repository root is on sys.path. That name belongs to an
    # unrelated package: hand over to it where it is installed, and otherwise act as if nothing had been found.
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _here = Path(__file__).resolve().parents[1]
    _elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is None or _spec.loader is None:
        raise ModuleNotFoundError(
            "No module named 'kernels' (this folder is installed as ddim_fast.kernels: import that)", name="kernels"
        )
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["kernels"] = _module
    _spec.loader.exec_module(_module)
