"""Run the notebooks of docs/notebooks/, and keep their outputs in them: ``python tools/notebooks.py``."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run in another folder."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}, record_timing=False).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop("image/jpeg", None)  # the same picture again
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(FOLDER.glob("*.ipynb")):
            nbformat.write(run(path, Path(folder)), path)
            print(f"wrote {path.name}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
