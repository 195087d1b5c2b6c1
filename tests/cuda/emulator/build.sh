#!/usr/bin/env bash
# Builds the emulated driver, NVRTC and cuBLASLt into a folder: build.sh FOLDER. A program that finds them by LD_LIBRARY_PATH has a
# "GPU".
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
if ! grep -qw avx2 /proc/cpuinfo; then
  echo "the emulator is compiled for CPUs with AVX2 (x86-64-v3), which this one has not" >&2
  exit 1
fi
library() { # SOURCE NAME SONAME [FLAGS]
  if [ ! -e "$out/$3" ] || [ "$1" -nt "$out/$3" ] || [ launch.h -nt "$out/$3" ]; then
    c++ -std=c++17 -O3 -march=x86-64-v3 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wl,-soname,"$3" -o "$out/$3" "$1" \
      "${@:4}" -ldl -pthread
  fi
  ln -sf "$3" "$out/$2"
}
with_driver=(-L"$out" -lcuda -Wl,-rpath,'$ORIGIN')
library driver.cpp libcuda.so libcuda.so.1
library nvrtc.cpp libnvrtc.so libnvrtc.so.13 "${with_driver[@]}"
library cublaslt.cpp libcublasLt.so libcublasLt.so.13 "${with_driver[@]}"
for header in launch.h emulated.h; do
  cmp -s "$header" "$out/$header" || cp "$header" "$out/$header"
done
