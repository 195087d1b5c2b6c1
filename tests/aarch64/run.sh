#!/usr/bin/env bash
# The NEON kernels on any machine: the tests of kernels and attention, under qemu's emulation of a CPU that has all of Arm's extensions.
# Without ggml, which has its own. Installs Debian's cross linker and emulator, and rustup's target. On Arm itself `make test-rust` runs
# them, and the golden suite, with each variant.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ "$(uname -m)" != aarch64 ] || { echo "test-aarch64: this is Arm: see make test-rust"; exit 0; }
missing=()
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu)
[ -e /usr/aarch64-linux-gnu/lib/crt1.o ] || missing+=(libc6-dev-arm64-cross)
[ ${#missing[@]} -eq 0 ] || scripts/packages.sh test-aarch64 "${missing[@]}"
rustup --quiet target add aarch64-unknown-linux-gnu

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER='qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu'
# Optimized little: compiling takes longer than the tests do. The emulator does not tell the system which pages are to be huge.
cargo test --lib --no-default-features --target aarch64-unknown-linux-gnu \
  --config 'profile.dev.package.phd.opt-level=1' --config profile.dev.debug=0 backend::cpu -- --skip huge_pages
