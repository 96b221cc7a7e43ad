#!/usr/bin/env bash
# Check that all instruction sets give the same bits. Each is compiled from its source, AVX-512 as
# two AVX2 halves, and compared with the others on random steps, noise, convolutions and
# normalizations.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=(-std=c++17 -O1 -ffp-contract=off -fno-math-errno -mavx2 -mfma -mf16c -DDDIM_WITH_X86 -Ikernels/csrc)
compile() { "${CXX:-c++}" "${flags[@]}" "$@"; }
compile -include tests/native/avx512_by_halves.h -c kernels/csrc/isa_avx512.cpp -o "$work/avx512.o" &
background=$!
compile -c kernels/csrc/isa_avx2.cpp -o "$work/avx2.o"
compile -c kernels/csrc/isa_portable.cpp -o "$work/portable.o"
wait $background
compile tests/native/same_bits.cpp "$work"/*.o -o "$work/same_bits"
"$work/same_bits"
