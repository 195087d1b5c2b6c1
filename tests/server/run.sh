#!/usr/bin/env bash
# phd-server against clients that others have written: openai's, LangChain's, and llama.cpp's server tests; and under load.
# Needs target/phd-server, SmolLM2 (make server smollm2), go and python3. See docs/server-tests.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=target/venv
if ! cmp -s tests/server/requirements.txt "$venv/requirements.txt"; then
  python3 -m venv --clear "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement tests/server/requirements.txt
  cp tests/server/requirements.txt "$venv/requirements.txt"
fi
(cd bindings/go && go build -o ../../target/phd-load ./cmd/phd-load)

"$venv/bin/python" -m pytest -q tests/server
"$venv/bin/python" tests/server/llama_suite.py
