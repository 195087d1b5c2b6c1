#!/bin/sh
#   test.sh [PACKAGES]    all, by default; those after the race detector are package phd's own
# Tests of the Go module with the library in target/release, which must be built. -count=1: Go's cache of test results does
# not know of the library.
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- ./...
export PKG_CONFIG_PATH="$PWD/pkgconfig"
say() { echo "go: $*"; }

say "vet"
unformatted=$(gofmt -l .)
[ -z "$unformatted" ] || { say "not formatted: $unformatted"; exit 1; }
go vet "$@"
go vet -tags phd_gc .

say "tests"
go test -count=1 -timeout 5m "$@"

say "race detector"
go test -count=1 -timeout 10m -race "$@"

say "a collection whenever the heap has doubled from nothing"
GOGC=1 go test -count=1 -timeout 5m . ./cmd/phd-chat

say "a collection at each call into C"
go test -count=1 -timeout 5m -tags phd_gc .

say "vendored static library, without pkg-config"
vendored=$(mktemp -d)
trap 'rm -rf "$vendored"' EXIT
scripts/vendor.sh >/dev/null
# Go's cache does not know of the archive either: its checksum as a build ID makes the linker run again.
id=0x$(sha1sum vendored/lib/*/libphd.a | cut -c1-40)
PKG_CONFIG=false go vet -tags phd_vendored .
PKG_CONFIG=false go test -c -tags phd_vendored -ldflags "-B $id" -o "$vendored/phd.test" .
if readelf -d "$vendored/phd.test" | grep -q libphd; then
  say "the vendored build needs libphd.so"
  exit 1
fi
"$vendored/phd.test" -test.timeout 5m

