"""The notebooks of docs/notebooks/ run, and hold the outputs of a run."""

import base64
import importlib.util
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tools/notebooks.py, with kernels that write to no folder of the user's."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    """For each cell of code, the kinds of its outputs, its text, and its pictures."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        data = [output.get("data", {}) for output in cell["outputs"]]
        text = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        pictures = [
            np.asarray(Image.open(BytesIO(base64.b64decode(one["image/png"]))).convert("L"), dtype=float)
            for one in data
            if "image/png" in one
        ]
        found.append(([sorted(one) for one in data], text, pictures))
    return found


@pytest.mark.docs
@pytest.mark.filterwarnings("ignore")  # of the libraries that start kernels
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_has_kept(tool, tmp_path, path):
    kept = outputs(json.loads(path.read_text()))
    for (kinds, text, pictures), (now_kinds, now_text, now_pictures) in zip(
        kept, outputs(tool.run(path, tmp_path)), strict=True
    ):
        assert kinds == now_kinds
        assert text == now_text
        for picture, now in zip(pictures, now_pictures, strict=True):
            assert picture.shape == now.shape
            assert np.abs(picture - now).mean() < 2  # of 255: another processor rounds a model otherwise


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_no_error(path):
    assert path.stat().st_size < 150_000
    cells = json.loads(path.read_text())["cells"]
    assert all(cell["outputs"] or cell["source"] for cell in cells if cell["cell_type"] == "code")
    assert not [
        o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error" or o.get("name") == "stderr"
    ]
