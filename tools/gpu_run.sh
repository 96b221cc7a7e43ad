#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most ten minutes, from a bare copy of the
# repository: nothing is installed. Python with torch, Triton, NumPy, pytest, hypothesis, SciPy,
# click, safetensors and tqdm must be there.
#
#   OUT=results tools/gpu_run.sh [--only SECTIONS] [--minutes N] [--rehearse]
#
# leaves gpu.json, gpu.md and log.txt in OUT, each section written as it ends; a run with --only adds
# to what is there. PYTHON names the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd)
found=$(command -v "${PYTHON:-python3}") || { echo "PYTHON must be an interpreter, got '${PYTHON:-python3}': name one"; exit 2; }
PYTHON=$(realpath -s "$found")

# The package as an installation lays it out: ddim_fast/ with kernels/ inside, by links.
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/ddim_fast"
ln -s "$root"/ddim_fast/* "$place/ddim_fast/"
ln -sfn "$root/kernels" "$place/ddim_fast/kernels"  # a copy may have lost the link
ln -s "$root/pytest_ddim_fast.py" "$root/benchmarks" "$place/"
export PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}"
cd "$place"

# The C++ kernel, which a few comparisons want: built here where a compiler is, if none came along.
if ! compgen -G "$root/kernels/_cpu_step*.so" > /dev/null; then
  (cd "$root" && "$PYTHON" setup.py -q build_ext --inplace) || echo "the C++ kernel was not built: its sections say so"
fi
set +e
"$PYTHON" -m benchmarks.gpu --out "$OUT" "$@" 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
