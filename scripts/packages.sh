#!/usr/bin/env bash
#   scripts/packages.sh WHO PACKAGE...
# Installs Debian packages, as root or through sudo. WHO says what they are for; options of apt-get may stand among them.
set -euo pipefail
who=$1
shift
names=("${@/#-*/}")
if ! command -v apt-get >/dev/null; then
  echo "$who: please install:" ${names[*]} >&2
  exit 1
fi
root=()
[ "$(id -u)" -eq 0 ] || root=(sudo)
echo "$who: installing" ${names[*]}
"${root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq "$@" >/dev/null
