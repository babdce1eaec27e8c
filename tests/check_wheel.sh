#!/usr/bin/env bash
# check_wheel.sh WHEEL PYTHON TORCH: installs a wheel into a clean environment that finds no compiler, and computes with
# it. TORCH is what pip is asked for: torch==2.10.0, or torch for the newest.
set -euo pipefail
wheel=$(realpath "$1") python=$2 torch=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $(basename "$wheel") in
*-cp310-abi3-*) ;;
*) echo "expected a wheel cp310-abi3, got $(basename "$wheel")" >&2 && exit 1 ;;
esac
"$python" -m venv "$work/venv"
# Names of compilers that end in an error before those of the system: nothing may be compiled.
mkdir "$work/bin"
for name in cc c++ gcc g++ clang clang++ nvcc; do
  printf '#!/bin/sh\necho "check_wheel: %s was asked for" >&2\nexit 1\n' "$name" >"$work/bin/$name"
  chmod +x "$work/bin/$name"
done
export PATH=$work/bin:$PATH CC=$work/bin/cc CXX=$work/bin/c++ PIP_DISABLE_PIP_VERSION_CHECK=1
"$work/venv/bin/pip" install --quiet "$torch" numpy
SECONDS=0
"$work/venv/bin/pip" install --quiet --no-index "$wheel"
echo "installed in $SECONDS s, $(stat -c %s "$wheel") bytes"
cd "$work" # away from the source tree
"$work/venv/bin/python" -m rakd_ops
"$work/venv/bin/python" "$here/install_check.py"
