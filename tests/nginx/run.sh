#!/usr/bin/env bash
# examples/nginx/nginx.conf, run by Debian's nginx before three replicas: stand-ins, and real servers if target/phd-server (or
# $PHD_SERVER) is there. Installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

missing=()
command -v "${NGINX:-/usr/sbin/nginx}" >/dev/null || missing+=(nginx-light)
command -v openssl >/dev/null || missing+=(openssl)
[ ${#missing[@]} -eq 0 ] || scripts/packages.sh tests/nginx --no-install-recommends "${missing[@]}"
command -v node >/dev/null || { echo "tests/nginx: Node.js 20 or newer is missing" >&2; exit 1; }

mkdir -p target/web
(cd bindings/go && go build -o ../../target/web/standin ./internal/web/standin)
node --test --test-concurrency=1 tests/nginx/*.test.mjs
