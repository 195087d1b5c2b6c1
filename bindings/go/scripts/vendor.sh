#!/bin/sh
# Puts phd.h and libphd.a where the package looks for them under the build tag phd_vendored:
#   scripts/vendor.sh [INCLUDE_DIR LIBPHD_A [OUT]]
# By default from this repository, into the package's folder `vendored`. For another platform set GOOS and GOARCH.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
include=${1:-$here/../../include}
library=${2:-$here/../../target/release/libphd.a}
out=${3:-$here/vendored}
platform=$(go env GOOS)_$(go env GOARCH)
mkdir -p "$out/include" "$out/lib/$platform"
cp "$include/phd.h" "$out/include/phd.h"
cp "$library" "$out/lib/$platform/libphd.a"
echo "$out: phd.h, lib/$platform/libphd.a"
