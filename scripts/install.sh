#!/usr/bin/env bash
# Installs what `make build` has built, or takes it away again. `make install` calls it; docs/install.md says what goes where.
#
#   PREFIX=/usr/local DESTDIR= LIBDIR=$PREFIX/lib INCLUDEDIR=$PREFIX/include scripts/install.sh install|uninstall
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "install: $*" >&2; exit 1; }

action=${1:-install}
PREFIX=${PREFIX:-/usr/local}
LIBDIR=${LIBDIR:-$PREFIX/lib}
INCLUDEDIR=${INCLUDEDIR:-$PREFIX/include}
DESTDIR=${DESTDIR:-}
for folder in "$PREFIX" "$LIBDIR" "$INCLUDEDIR"; do
  # Nothing is quoted in phd.pc, and CMake's lists end at semicolons.
  [[ $folder == /* && $folder != *[\ \;\"\$\#]* ]] || fail "'$folder' must be an absolute path without spaces and ; \" \$ #"
done
bin=$DESTDIR$PREFIX/bin lib=$DESTDIR$LIBDIR include=$DESTDIR$INCLUDEDIR doc=$DESTDIR$PREFIX/share/doc/libphd

built=target/release
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
# What must be linked beside libphd.a: `cargo rustc --release --lib --crate-type staticlib -- --print native-static-libs`, without
# what every C compiler adds by itself.
system_libs=(stdc++ m pthread dl rt util)

# The soname's number is the ABI's, which phd_abi_version() returns.
abi=$(awk '/fn phd_abi_version/ { getline; print $1 }' src/ffi/mod.rs)
[[ $abi =~ ^[0-9]+$ ]] || fail "src/ffi/mod.rs: phd_abi_version is '$abi', expected a number"
soname=libphd.so.$abi

if [ "$action" = uninstall ]; then
  rm -f "$bin/phd" "$include"/phd.{h,hpp} "$lib"/{libphd.a,libphd.so,"$soname","libphd.so.$version"} \
    "$lib"/pkgconfig/phd{,-static}.pc "$lib"/cmake/phd/phd-config{,-version}.cmake "$doc"/LICENSE-{MIT,APACHE}
  rmdir --ignore-fail-on-non-empty "$lib/cmake/phd" "$doc" 2>/dev/null || true
  exit 0
fi
[ "$action" = install ] || fail "$action: expected install or uninstall"

[ "$(uname -s)" = Linux ] || fail "only Linux is supported"
for file in libphd.so libphd.a phd; do
  [ -f "$built/$file" ] || fail "$built/$file is missing: run make build first"
done
for tool in patchelf strip objcopy nm ld ar; do
  command -v "$tool" >/dev/null || fail "$tool is missing: run scripts/setup.sh first"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The shared library. In target/release it has no soname, so that programs linked there find it by its plain name. First stripped, then
# patched: patchelf moves sections that strip would not find again.
strip --strip-debug -o "$work/libphd.so" "$built/libphd.so"
patchelf --set-soname "$soname" "$work/libphd.so"

# The static library: one object that shows phd_* alone, so that a program may have its own ggml, llama.cpp or Rust. Code that nothing
# calls goes, and the bitcode of Rust's standard library, which older binutils' plugins fail on.
nm -D --defined-only "$built/libphd.so" | awk '{ print $3 }' | sort >"$work/exports"
mapfile -t roots < <(sed 's/^/--undefined=/' "$work/exports")
ld -r --gc-sections --force-group-allocation "${roots[@]}" -o "$work/all.o" "$built/libphd.a"
objcopy --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd --keep-global-symbols="$work/exports" \
  "$work/all.o" "$work/phd.o"
nm --defined-only --extern-only "$work/phd.o" | awk '{ print $3 }' | sort | cmp -s - "$work/exports" ||
  fail "$built/libphd.a and libphd.so are not of one build: run make build first"
ar rcs "$work/libphd.a" "$work/phd.o"

strip --strip-debug -o "$work/phd" "$built/phd"

# $1 with the values of this installation, for the folder $2.
fill_in() {
  local libs
  case $1 in
    *.pc) libs=$(printf -- '-l%s ' "${system_libs[@]}") ;;
    *) libs=$(IFS=';'; echo "${system_libs[*]}") ;;
  esac
  local series=${version%%.*}
  [ "$series" != 0 ] || series=${version%.*}
  sed -e "s#@VERSION@#$version#g" -e "s#@SERIES@#${series//./[.]}#g" -e "s#@ABI@#$abi#g" -e "s#@SYSTEM_LIBS@#${libs% }#g" \
    -e "s#@PREFIX@#$(realpath -ms --relative-to="$2" "$PREFIX")#g" -e "s#@POINTER_BYTES@#$(($(getconf LONG_BIT) / 8))#g" \
    -e "s#@INCLUDEDIR@#$(realpath -ms --relative-to="$2" "$INCLUDEDIR")#g" "packaging/$1.in" >"$work/$1"
}
fill_in phd.pc "$LIBDIR/pkgconfig"
fill_in phd-static.pc "$LIBDIR/pkgconfig"
fill_in phd-config.cmake "$LIBDIR/cmake/phd"
fill_in phd-config-version.cmake "$LIBDIR/cmake/phd"

install -d "$bin" "$include" "$lib/pkgconfig" "$lib/cmake/phd" "$doc"
install -m 755 "$work/phd" "$bin/phd"
install -m 644 include/phd.h include/phd.hpp "$include"
install -m 755 "$work/libphd.so" "$lib/libphd.so.$version"
ln -sf "libphd.so.$version" "$lib/$soname"
ln -sf "$soname" "$lib/libphd.so"
install -m 644 "$work/libphd.a" "$lib"
install -m 644 "$work"/phd{,-static}.pc "$lib/pkgconfig"
install -m 644 "$work"/phd-config{,-version}.cmake "$lib/cmake/phd"
install -m 644 LICENSE-MIT LICENSE-APACHE "$doc"
echo "install: libphd $version (ABI $abi) is in $DESTDIR$PREFIX"
