#!/usr/bin/env bash
# `make serve`, as the README has it: the page and an answer come from the model in models/.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
set -m # the server and make in a process group of their own
make --no-print-directory serve SERVE="--port 0 --log-format json" >"$log" 2>&1 &
job=$!
trap 'kill -- -$job 2>/dev/null; wait $job 2>/dev/null || true; rm -f "$log"' EXIT

until address=$(grep -o '"address":"[^"]*"' "$log" | head -1 | cut -d'"' -f4) && grep -q '"msg":"ready"' "$log"; do
  kill -0 $job 2>/dev/null || { cat "$log" >&2; echo "serve: it has ended" >&2; exit 1; }
  sleep 0.1
done
[[ $address == http* ]] || address=http://$address
# Not through a pipe: grep leaves before curl is done.
[[ $(curl -fsS "$address/") == *"<!doctype html>"* ]]
[[ $(curl -fsS "$address/v1/models") == *english-phd-cswa-2-16-32* ]]
answer=$(curl -fsS "$address/completion" -d '{"prompt": "In the beginning", "n_predict": 8, "temperature": 0}')
grep -q '"tokens_predicted":8' <<<"$answer" || { echo "serve: $answer" >&2; exit 1; }
echo "serve: passed"
