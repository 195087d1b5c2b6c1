#!/usr/bin/env bash
# Builds the emulated driver and NVRTC into a folder: build.sh FOLDER. A program that finds them by LD_LIBRARY_PATH has a "GPU".
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"
library() { # SOURCE NAME SONAME
  if [ ! -e "$out/$3" ] || [ "$1" -nt "$out/$3" ]; then
    c++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wl,-soname,"$3" -o "$out/$3" "$1" -ldl -pthread
  fi
  ln -sf "$3" "$out/$2"
}
library driver.cpp libcuda.so libcuda.so.1
library nvrtc.cpp libnvrtc.so libnvrtc.so.13
cmp -s emulated.h "$out/emulated.h" || cp emulated.h "$out/emulated.h"
