#!/usr/bin/env bash
# The tests of training/, in a virtual environment under target/. Needs Python 3.11 or newer, cc, readelf, and target/release/phd.
#   training/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")"
venv=../target/training-venv
stamp=$venv/.installed-$(cat requirements.txt cpu_torch.py | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  python3 -m venv --clear "$venv"
  # Without dependencies: PyPI's torch asks for gigabytes of CUDA libraries that a CPU has no use for (see cpu_torch.py).
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
  "$venv/bin/python" cpu_torch.py
  touch "$stamp"
fi
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider tests "$@"
