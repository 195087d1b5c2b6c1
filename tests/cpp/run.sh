#!/usr/bin/env bash
# include/phd.hpp with gcc and clang, as C++17 and C++20, with and without exceptions and RTTI: alone, in a program of
# two units, under the sanitizers; what must not compile; the code in docs/cpp.md and README.md. Needs
# target/release/libphd.so and doctest.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
model=$root/models/kjv-phd-cswa-2-16-32
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "cpp: $*" >&2; exit 1; }

warnings=(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror)
link=(-L"$root/target/release" -lphd -Wl,-rpath,"$root/target/release")
sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=all)
without=(-fno-exceptions -fno-rtti)

# What the header wraps: every function of phd.h, so that a new one is not forgotten.
sed -n 's/^[a-z].*[ *]\(phd_[a-z0-9_]*\)(.*/\1/p' include/phd.h | sort -u >"$work/functions"
[ "$(wc -l <"$work/functions")" -gt 80 ] || fail "include/phd.h has only $(wc -l <"$work/functions") functions"
missing=$(grep -vxFf <(grep -oE 'phd_[a-z0-9_]+' include/phd.hpp) "$work/functions" || true)
[ -z "$missing" ] || fail "include/phd.hpp does not wrap" $missing

# Compiles the tests and other_unit.cpp, which is compiled the other way, and runs them.
build_and_run() {
  local name=$1 compiler=$2 standard=$3 other=("${without[@]}")
  shift 3
  [[ " $* " != *" -fno-exceptions "* ]] || other=()
  local flags=(-g -std="$standard" "${warnings[@]}" -Iinclude) shared=()
  local flag
  for flag in "$@"; do
    [[ " ${without[*]} " == *" $flag "* ]] || shared+=("$flag")
  done
  mkdir "$work/$name"
  "$compiler" "${flags[@]}" "$@" -c tests/cpp/test_phd.cpp -o "$work/$name/test_phd.o"
  "$compiler" "${flags[@]}" "${shared[@]}" "${other[@]}" -c tests/cpp/other_unit.cpp -o "$work/$name/other_unit.o"
  "$compiler" "$@" "$work/$name"/*.o "${link[@]}" -o "$work/$name/test"
  "$work/$name/test" "$model" "$work/$name" --no-version --minimal || fail "$name: the tests fail"
  echo "cpp: $name: passed"
}

# Alone, as the first thing that a file includes.
check_alone() {
  local compiler standard way
  for compiler in g++ clang++; do
    for standard in c++17 c++20; do
      for way in "" "${without[*]}"; do
        # shellcheck disable=SC2086 # several flags
        echo '#include "phd.hpp"' | "$compiler" -std=$standard $way "${warnings[@]}" -Wsign-conversion \
          -Wold-style-cast -Iinclude -fsyntax-only -x c++ - || fail "phd.hpp alone: $compiler $standard $way"
      done
    done
  done
  echo "cpp: alone: passed"
}

# A function body that must not compile, and what the compiler must say.
refuses() {
  local body=$1 why=$2 compiler
  for compiler in g++ clang++; do
    ! echo "#include \"phd.hpp\"
void f(phd::model &model, phd::session &session) { $body }" |
      "$compiler" -std=c++17 -Werror -Wall -Iinclude -fsyntax-only -x c++ - 2>"$work/refused" || fail "$compiler takes: $body"
    grep -qE "$why" "$work/refused" || { cat "$work/refused" >&2; fail "$compiler: expected '$why' of: $body"; }
  done
}
check_refused() {
  refuses 'phd::model copy = model;' 'deleted'
  refuses 'session.sequence(0).step(1);' 'unused-result'
  refuses 'session.stats();' 'unused-result'
  refuses 'phd::model::load("x");' 'unused-result'
  refuses 'if (model.token_is_end(1)) {}' 'does this ask for success'
  refuses 'const std::vector<int> constant; phd::span<int> span = constant;' 'conver'
  echo "cpp: what must not compile: passed"
}

# Code blocks of a document: with a main function a program, which is run; else the body of a function.
check_document() {
  local document=$1 name=$2 n_blocks block
  mkdir "$work/$name"
  awk -v to="$work/$name" '
    /^```cpp$/ { n++; inside = 1; file = to "/" n ".cpp"; printf "" >file; next }
    /^```/ { inside = 0 }
    inside { print >file }' "$document"
  n_blocks=$(find "$work/$name" -name '*.cpp' | wc -l)
  { echo '#include "phd.hpp"'; echo '#include <iostream>'; } >"$work/$name/bodies.cc"
  for block in "$work/$name"/*.cpp; do
    [ -e "$block" ] || continue
    if grep -q '^int main' "$block"; then
      g++ -std=c++17 "${warnings[@]}" -Iinclude "$block" "${link[@]}" -o "$work/$name/program"
      [ -n "$("$work/$name/program" "$model")" ] || fail "$document: a program writes nothing"
    else
      { echo "void f$(basename "$block" .cpp)(phd::model &model, phd::session &session, phd::sampler &sampler,"
        # In a scope of its own, where it may have its own model and session.
        echo '  phd::stream &stream, phd::sequence sequence) { {'
        cat "$block"
        echo '} (void)model; (void)session; (void)sampler; (void)stream; (void)sequence; }'; } >>"$work/$name/bodies.cc"
    fi
  done
  g++ -std=c++17 "${warnings[@]}" -Wno-unused -Wno-shadow -Iinclude -fsyntax-only -x c++ "$work/$name/bodies.cc"
  echo "cpp: $document: $n_blocks blocks passed"
}

# Two at a time: machines of two cores are common.
pids=()
together() {
  "$@" &
  pids+=($!)
  if [ ${#pids[@]} -eq 2 ]; then
    wait "${pids[0]}" || exit 1
    pids=("${pids[1]}")
  fi
}
together build_and_run gcc17 g++ c++17
together build_and_run clang20-asan clang++ c++20 "${sanitizers[@]}"
together build_and_run gcc20-asan-without g++ c++20 "${sanitizers[@]}" "${without[@]}"
together build_and_run clang17-without clang++ c++17 "${without[@]}"
together check_alone
together check_refused
together check_document docs/cpp.md document
together check_document README.md readme
wait "${pids[0]}" || exit 1
echo "cpp: all passed"
