#!/usr/bin/env bash
# Tests of the page in headless Chromium: against a stand-in whose answers are known, and against the real server if
# target/phd-server (or $PHD_SERVER) is there. Installs what is missing; keeps it under target/web.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=target/web
mkdir -p "$out"

missing=()
command -v "${CHROMIUM:-chromium}" >/dev/null || missing+=(chromium)
fc-list 2>/dev/null | grep -q . || missing+=(fontconfig fonts-dejavu-core)
[ ${#missing[@]} -eq 0 ] || scripts/packages.sh tests/web --no-install-recommends "${missing[@]}"
command -v node >/dev/null || { echo "tests/web: Node.js 20 or newer is missing" >&2; exit 1; }

# The packages are installed again when the list has changed. No package brings a browser.
if ! cmp -s tests/web/package-lock.json "$out/package-lock.json" || [ ! -d "$out/node_modules" ]; then
  cp tests/web/package.json tests/web/package-lock.json "$out/"
  (cd "$out" && npm ci --silent)
fi
(cd bindings/go && go build -o "../../$out/standin" ./internal/web/standin)

# Files of tests run at the same time, one on each core.
node --test --test-concurrency=2 tests/web/*.test.mjs
