#!/usr/bin/env bash
# Installs what the build and the tests need on Debian: C and C++ compilers with sanitizers, CMake and libclang for ggml, nm,
# Valgrind, doctest, pip (the tests' real model comes from PyPI); and what `make install` needs: patchelf.
set -euo pipefail

missing=()
command -v cc >/dev/null && command -v c++ >/dev/null && command -v nm >/dev/null && command -v make >/dev/null || missing+=(build-essential)
command -v cmake >/dev/null || missing+=(cmake)
# Not libclang-cpp, which other packages bring along: bindgen loads the C library.
compgen -G "/usr/lib/llvm-*/lib/libclang*[0-9].so*" >/dev/null || compgen -G "/usr/lib/llvm-*/lib/libclang.so*" >/dev/null || missing+=(libclang-dev clang)
python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
command -v clang++ >/dev/null || missing+=(clang)
# Clang's sanitizers are a package of their own, which clang's does not ask for.
compgen -G "/usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.asan-*.a" >/dev/null || missing+=(libclang-rt-dev)
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v patchelf >/dev/null || missing+=(patchelf)
[ -f /usr/include/doctest/doctest.h ] || missing+=(doctest-dev)
command -v valgrind >/dev/null || missing+=(valgrind)
# Valgrind cannot start without the loader's symbols.
dpkg -s libc6-dbg >/dev/null 2>&1 || missing+=(libc6-dbg)
command -v cargo >/dev/null || { echo "setup: cargo is missing: install Rust through rustup first" >&2; exit 1; }
[ ${#missing[@]} -eq 0 ] || "$(dirname "$0")/packages.sh" setup "${missing[@]}"
