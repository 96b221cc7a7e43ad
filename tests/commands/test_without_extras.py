"""Every command in an environment with no extras: it works, or names what installs what it needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import tiny_pipelines

ROOT = Path(__file__).parents[2]
OF_TORCH = {"jinja2", "setuptools"}
"""What an extra names, and torch brings."""

SCRIPT = """
import importlib.machinery, json, sys

blocked, commands = json.loads(sys.argv[1])
actual = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *given: (
    None if name.partition(".")[0] in blocked else actual(name, *given)
)
from click.testing import CliRunner
from ddim_fast.cli import main

said = [CliRunner().invoke(main, words) for words in commands]
print("said:" + json.dumps([(result.exit_code, result.output) for result in said]))
"""
FEW = ["--steps", "2", "--quiet"]
WORKS = [
    ["info"],
    ["sample", *FEW, "-n", "2", "--save", "s.npz", "--files", "each", "--trajectory", "t.gif"],
    ["img2img", "s.npz", *FEW, "--strength", "1"],
    ["inpaint", "s.npz", *FEW, "--keep", "left"],
    ["interpolate", *FEW, "--frames", "2", "-n", "1"],
    ["reconstruct", "s.npz", *FEW],
    ["generate", *FEW, "-n", "2", "--out", "set"],
    ["generate", "--check", "set"],
]
SAYS = {
    'pip install ".[tradeoff]"': ["tradeoff", "--quick", "--out", "study"],
    'verify needs scipy, rich, not installed: pip install ".[verify]"': ["verify"],
    "pip install diffusers": ["sample", "--model", "pipeline"],
    "pip install diffusers transformers": ["sample", "--model", "text", "--prompt", "a"],
    "pip install pyarrow, or write JSON lines": ["generate", "--conditioning", "t.parquet", "--out", "other"],
    "Triton is not installed: pip install triton": ["sample", "--backend", "triton"],
}


def packages_of_extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n\n")[0]
    return {name.replace("-", "_") for name in re.findall(r'"([\w-]+)[><="]', text)} - OF_TORCH


def test_each_command_works_or_names_what_it_needs(tmp_path):
    blocked = sorted(packages_of_extras() - {"pytest", "hypothesis"} | {"yaml"})
    assert {"scipy", "rich", "matplotlib", "diffusers", "transformers", "triton", "pyarrow"} <= {*blocked}
    tiny_pipelines.unconditional()[0].save_pretrained(tmp_path / "pipeline")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "t.parquet").touch()
    words = [sys.executable, "-c", SCRIPT, json.dumps([blocked, [*WORKS, *SAYS.values()]])]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.rpartition("said:")[2])
    for words, (code, output) in zip(WORKS, said, strict=False):
        assert code == 0, (words, output)
    for expected, (code, output) in zip(SAYS, said[len(WORKS) :], strict=True):
        assert code in (1, 2)
        assert expected in output
        assert "Traceback" not in output
