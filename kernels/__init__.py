"""The DDIM step in every backend: tensors and numbers, no schedules or models. Installed as
``ddim_fast.kernels``."""

if __name__ == "kernels":
    # With the repository's root on sys.path, Python finds this folder as ``kernels``, the name of
    # an unrelated package that transformers and diffusers look for. Become that package where it is
    # installed. Otherwise look like a folder that is no package: without a file, version or
    # modules, which they take for a missing package.
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
    else:
        __path__ = []
        del __file__
