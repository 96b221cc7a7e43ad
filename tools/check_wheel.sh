#!/usr/bin/env bash
# Build the sdist and from it the wheel, install the wheel into an empty folder, and use it outside
# the repository.
# usage: tools/check_wheel.sh PYTHON   (PYTHON has `build`, torch and the other dependencies)
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
DDIM_FAST_REQUIRE_EXTENSION=1 "$python" -m build --outdir "$work/dist" . > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$work"/dist/*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" - "$work/site" <<'PY'
import sys
from pathlib import Path

import ddim_fast
import ddim_fast.gpu_lab.emulated_gpu
from ddim_fast.kernels import cpu_step

assert Path(ddim_fast.__file__).is_relative_to(sys.argv[1]), ddim_fast.__file__
assert Path(cpu_step.__file__).is_relative_to(sys.argv[1]), cpu_step.__file__
assert cpu_step.extension is not None, "the wheel has no C++ kernel"
sampler = ddim_fast.DDIMSampler(ddim_fast.NoiseSchedule.linear(), num_inference_steps=2)
pictures = sampler.sample(ddim_fast.load_model("fashion"), shape=(1, 1, 28, 28), seed=0)
assert pictures.isfinite().all()
from ddim_fast.verify.reports.write import schema
from ddim_fast.verify.reports.write_html import html_text

report = ddim_fast.verify.verify("cpu", checks=["update", "golden"])
assert report.passed, report.results
assert schema() and "<html" in html_text(report)
from ddim_fast.tradeoff import Study, report as study_report

assert "<html" in study_report.html_text(Study("none", {}, ()), Path())
print("the wheel works outside the repository:", ", ".join(p.name for p in Path("dist").iterdir()))
PY
