#!/usr/bin/env bash
# Build the C++ kernel with AddressSanitizer and UndefinedBehaviorSanitizer, and run its tests.
# usage: tools/sanitize.sh FOLDER   (the bin folder of an environment with the test dependencies)
set -euo pipefail
bin=$(realpath -s "$1")
cd "$(dirname "$0")/.."
export DDIM_FAST_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O0"  # with optimisation, compiling takes minutes
DDIM_FAST_REQUIRE_EXTENSION=1 "$bin/python" setup.py --quiet build --build-lib build/sanitize --build-temp build/sanitize-objects > build-sanitize.log 2>&1 ||
  { cat build-sanitize.log; exit 1; }
rm build-sanitize.log
compiler=${CXX:-c++}
# There is no C++ in the reference, and none of ours in diffusers. Leaks are not checked: the interpreter
# and torch keep memory until exit on purpose.
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so.6)" \
PYTHONPATH=$PWD/build/sanitize DDIM_FAST_SANITIZED=1 \
  "$bin/pytest" -n auto -k "not reference and not diffusers" \
  tests/kernels/test_step.py tests/kernels/test_noise.py tests/kernels/test_extension.py tests/kernels/test_convolution.py \
  tests/kernels/test_normalization.py tests/kernels/test_same_objects.py tests/kernels/test_plain_density.py \
  tests/kernels/test_plain_layers.py "${@:2}"
