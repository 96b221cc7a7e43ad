#!/usr/bin/env bash
# Compile the C++ kernel with old and new compilers, and for another processor. Any warning fails.
# Builds for this machine are also loaded.
# usage: tools/build_check.sh PYTHON [COMPILER...]   (PYTHON has setuptools and ninja)
set -euo pipefail
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
compilers=("${@:2}")
[ ${#compilers[@]} -gt 0 ] || compilers=(g++ clang++-14 clang++-19 aarch64-linux-gnu-g++)

missing=()
for compiler in "${compilers[@]}"; do command -v "$compiler" > /dev/null || missing+=("$compiler"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "build-check needs every compiler, and did not find: ${missing[*]}. On Debian 12:" >&2
  echo "  apt-get install g++ clang-14 clang-19 g++-aarch64-linux-gnu" >&2
  echo "Or pass the compilers that you have: make build-check COMPILERS=\"g++ clang++\"" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for compiler in "${compilers[@]}"; do
  log=$work/$compiler.log
  if ! CXX=$compiler DDIM_FAST_REQUIRE_EXTENSION=1 "$python" setup.py --quiet build_ext \
    --build-lib "$work/$compiler" --build-temp "$work/$compiler-objects" > "$log" 2>&1; then
    echo "$compiler: does not compile the kernel"
    cat "$log"
    failed=1
  elif grep -q "warning:" "$log"; then
    echo "$compiler: warns"
    cat "$log"
    failed=1
  elif [ "$("$compiler" -dumpmachine | cut -d- -f1)" = "$(uname -m)" ]; then
    "$python" - "$work/$compiler" "$compiler" <<'PY'
import importlib.util
import sys
from pathlib import Path

(path,) = Path(sys.argv[1]).rglob("_cpu_step*.so")
spec = importlib.util.spec_from_file_location("_cpu_step", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(f"{sys.argv[2]}: compiles without warnings, and loads: {module.selected()}")
PY
  else
    echo "$compiler: compiles without warnings, for another processor"
  fi
done
exit $failed
