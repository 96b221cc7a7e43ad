"""Modules under the names they had in 0.1: they import, are the modules of the new names, and warn."""

import importlib
import re
import subprocess
import sys

import pytest

from ddim_fast._moved import OLD_TO_NEW


@pytest.mark.parametrize("old", OLD_TO_NEW)
def test_an_old_name_is_the_new_module_and_warns(old):
    pytest.importorskip("scipy")  # some of verify's modules need it
    new = importlib.import_module(f"ddim_fast.{OLD_TO_NEW[old]}")
    spec = new.__spec__
    sys.modules.pop(f"ddim_fast.{old}", None)
    expected = f"ddim_fast.{old} has moved, and the old name ends with ddim_fast 0.3: import {new.__name__}"
    with pytest.warns(DeprecationWarning, match=re.escape(expected)) as caught:
        module = importlib.import_module(f"ddim_fast.{old}")
    assert module is new
    assert new.__spec__ is spec  # as the module's own name finds it
    assert len(caught) == 1


def test_documented_deep_imports():
    code = (
        "from ddim_fast.capture import GRAPHS; from ddim_fast.inversion import reconstruction_error; print(len(GRAPHS))"
    )
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert ran.stdout == "0\n", ran.stderr
    assert "import ddim_fast.sampling.capture" in ran.stderr
    assert "import ddim_fast.sampling.inversion" in ran.stderr


def test_python_m_by_an_old_name():
    words = [sys.executable, "-W", "always", "-m", "ddim_fast.verify.machine_code", "--help"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--target" in ran.stdout
    assert "python -m ddim_fast.gpu_lab.machine_code" in ran.stderr


def test_a_name_that_never_was_is_an_ordinary_error():
    with pytest.raises(ModuleNotFoundError, match=r"ddim_fast\.never_was"):
        importlib.import_module("ddim_fast.never_was")
