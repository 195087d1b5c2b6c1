#!/usr/bin/env bash
# NVRTC, the compiler of CUDA sources, from PyPI into target/nvrtc: what the tests of the kernels need. It runs without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

version=13.0.88
stamp=target/nvrtc/.installed-$version
[ -e "$stamp" ] && exit 0
if [ "$(uname -sm)" != "Linux x86_64" ]; then
  echo "setup: NVRTC is fetched for Linux on x86_64 alone" >&2
  exit 1
fi
echo "setup: fetching NVRTC $version"
mkdir -p target/nvrtc
wheels=$(mktemp -d target/nvrtc-XXXXXX)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" "nvidia-cuda-nvrtc==$version"
python3 -m zipfile -e "$wheels"/*.whl "$wheels"
rm -rf target/nvrtc
mkdir -p target/nvrtc
mv "$wheels"/nvidia/cu13/lib/lib*.so.* target/nvrtc
# Under the name that every program looks for.
ln -s libnvrtc.so.13 target/nvrtc/libnvrtc.so
touch "$stamp"
