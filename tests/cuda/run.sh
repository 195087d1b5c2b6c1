#!/usr/bin/env bash
# The tests of the CUDA backend.
#   tests/cuda/run.sh            on any machine: the kernels compile for every architecture (NVRTC, scripts/setup_nvrtc.sh), and do
#                                what they should on an emulator of the driver, which runs them on the CPU
#   tests/cuda/run.sh gpu        on a machine with a GPU: the same tests on it, then under compute-sanitizer if there is one
set -euo pipefail
cd "$(dirname "$0")/../.."

# What sessions promise, with the CUDA backend in the CPU's place. Left out is what it does not promise: nothing allocated by the
# driver, rows of the cache without padding; and what is about the CPU.
# PHD_CUDA_EXACT: their bounds are those of f32 sums.
suites=(--test golden --test sequences --test session --test batch --test programs)
skip=(--skip every_variant --skip calls_allocate_nothing --skip the_cache_does_not_grow_with_the_copies)

case "${1:-}" in
  gpu)
    cargo test --release --lib -- --ignored cuda
    PHD_TEST_CUDA=1 cargo test --release --test cuda -- --include-ignored --skip emulated
    PHD_TEST_CUDA=1 PHD_CUDA_EXACT=1 cargo test --release "${suites[@]}" -- "${skip[@]}"
    if sanitizer=$(command -v compute-sanitizer); then
      program=$(cargo test --release --test golden --no-run --message-format=json | python3 -c '
import json, sys
print([e for e in map(json.loads, sys.stdin) if e.get("executable") and e["target"]["name"] == "golden"][0]["executable"])')
      for tool in memcheck racecheck; do
        PHD_TEST_CUDA=1 PHD_CUDA_EXACT=1 "$sanitizer" --tool "$tool" --error-exitcode 1 "$program" one_step_at_a_time prefill_in_pieces
      done
    else
      echo "compute-sanitizer is not there: memory and races on the GPU were not checked"
    fi
    ;;
  "")
    scripts/setup_nvrtc.sh
    LD_LIBRARY_PATH=$PWD/target/nvrtc cargo test --release --test kernels -- --ignored --nocapture
    tests/cuda/emulator/build.sh target/cuda-emulator
    export LD_LIBRARY_PATH=$PWD/target/cuda-emulator PHD_TEST_CUDA=1 PHD_PROGRAMS=${PHD_PROGRAMS:-1}
    PHD_CACHE_DIR=$(mktemp -d target/cuda-cache-XXXXXX)
    export PHD_CACHE_DIR
    trap 'rm -rf "$PHD_CACHE_DIR"' EXIT
    cargo test --release --lib -- --ignored cuda
    cargo test --release --test cuda -- --include-ignored
    PHD_CUDA_EXACT=1 cargo test --release --test cuda_failures -- --ignored
    # The emulator takes minutes for these.
    skip+=(--skip a_prefix_is_paid_for_once --skip a_text_without_end --skip a_saved_sequence_goes_on --skip what_is_left_after_a_drop)
    PHD_CUDA_EXACT=1 cargo test --release "${suites[@]}" -- "${skip[@]}"
    ;;
  *) sed -n '2,5s/^# \?//p' "$0" >&2; exit 2 ;;
esac
