#!/usr/bin/env bash
# The tests of the CUDA backend.
#   tests/cuda/run.sh            on any machine: the kernels compile for every architecture (NVRTC, scripts/setup_nvrtc.sh), and do
#                                what they should on an emulator of the driver and cuBLASLt, which runs them on the CPU
#   tests/cuda/run.sh gpu        on a machine with a GPU: the same tests on it, then under compute-sanitizer if there is one
set -euo pipefail
cd "$(dirname "$0")/../.."

# What sessions promise, with the CUDA backend in the CPU's place. Left out is what it does not promise: nothing allocated by the
# driver, rows of the cache without padding; and what is about the CPU.
# PHD_CUDA_EXACT: their bounds are those of f32 sums.
suites=(--test golden --test sequences --test session --test batch --test programs)
skip=(--skip every_variant --skip threads_and_the_shape_of_heads --skip long_contexts_change_nothing --skip calls_allocate_nothing --skip the_cache_does_not_grow_with_the_copies)

case "${1:-}" in
  gpu)
    kernels=()
    # A driver without the toolkit has no NVRTC, nor cuBLASLt.
    libraries=$(ldconfig -p)
    [[ $libraries == *libnvrtc.so* ]] || scripts/setup_nvrtc.sh
    if [[ $libraries != *libcublasLt.so* && -z ${LD_LIBRARY_PATH:-} ]]; then
      echo "cuBLASLt is not there: its products are not tested"
      kernels=(--skip products_of)
    fi
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$PWD/target/nvrtc PHD_TEST_CUDA=1
    cargo test --release --lib -- --ignored cuda "${kernels[@]}"
    cargo test --release --test cuda -- --include-ignored --skip emulated
    PHD_CUDA_EXACT=1 cargo test --release "${suites[@]}" --test speculative -- "${skip[@]}" --skip lookup_steps_allocate_nothing
    if sanitizer=$(command -v compute-sanitizer); then
      program() { # KIND NAME: where cargo puts a test's program
        cargo test --release "$@" --no-run --message-format=json | python3 -c '
import json, sys
print([e["executable"] for e in map(json.loads, sys.stdin) if e.get("executable") and e["profile"]["test"]][-1])'
      }
      lib=$(program --lib) golden=$(program --test golden) cuda=$(program --test cuda)
      for tool in memcheck racecheck; do
        check=("$sanitizer" --tool "$tool" --error-exitcode 1)
        "${check[@]}" "$lib" --ignored cuda "${kernels[@]}"
        "${check[@]}" "$cuda" --include-ignored tensor_cores_attend quantized_models mixed_models long_prompts
        PHD_CUDA_EXACT=1 "${check[@]}" "$golden" one_step_at_a_time prefill_in_pieces
      done
    else
      echo "compute-sanitizer is not there: memory and races on the GPU were not checked"
    fi
    ;;
  "")
    scripts/setup_nvrtc.sh
    LD_LIBRARY_PATH=$PWD/target/nvrtc cargo test --release --test kernels -- --ignored --nocapture
    tests/cuda/emulator/build.sh target/cuda-emulator
    export LD_LIBRARY_PATH=$PWD/target/cuda-emulator PHD_TEST_CUDA=emulated PHD_PROGRAMS=${PHD_PROGRAMS:-1}
    PHD_CACHE_DIR=$(mktemp -d target/cuda-cache-XXXXXX)
    export PHD_CACHE_DIR
    trap 'rm -rf "$PHD_CACHE_DIR"' EXIT
    cargo test --release --lib -- --ignored cuda
    cargo test --release --test cuda -- --include-ignored
    PHD_CUDA_EXACT=1 cargo test --release --test cuda_failures -- --ignored
    PHD_CUDA_EXACT=1 cargo test --release "${suites[@]}" -- "${skip[@]}"
    # The rest of it takes minutes.
    PHD_CUDA_EXACT=1 cargo test --release --test speculative -- the_end_of_the_cache a_failed_step
    ;;
  *) sed -n '2,5s/^# \?//p' "$0" >&2; exit 2 ;;
esac
