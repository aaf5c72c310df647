#!/usr/bin/env bash
# One wheel, the oldest and the newest torch: builds a wheel with the CUDA library, installs it under each pair of Python
# and torch below, loads both libraries there (no GPU is needed) and runs the CPU op tests against what was installed.
# Also builds in isolation under a constraints file. Downloads gigabytes: not for CI.
#
#   scripts/check_wheel.sh [FOLDER]      the log is FOLDER/wheel_check.txt; keep it in benchmarks/results/
#
# PYTHON_OLDEST, PYTHON_NEWEST: interpreters 3.10 and 3.13. PYTHON_BUILD: the one that builds.
# TORCH_NEWEST: defaults to the newest on the registry. LLAVA_ST_CUDA_ARCHS is passed on to the build.
set -euo pipefail
cd "$(dirname "$0")/.."

python_oldest=${PYTHON_OLDEST:-python3.10}
python_newest=${PYTHON_NEWEST:-python3.13}
python_build=${PYTHON_BUILD:-python3}
torch_build=${TORCH_BUILD:-torch==2.13.0}
out=$(realpath -m "${1:-out}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
exec > >(tee "$out/wheel_check.txt") 2>&1

say() { printf '\n== %s\n' "$*"; }

say "commit $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ' with uncommitted changes'), $(date -u +%FT%TZ)"
git archive --format=tar HEAD | (mkdir "$work/source" && tar -x -C "$work/source")

say "isolated build under a constraints file, CPU library only"
"$python_build" -m venv "$work/isolated"
echo "$torch_build" > "$work/constraints.txt"
(cd "$work/source" && LLAVA_ST_CUDA=off PIP_CONSTRAINT="$work/constraints.txt" \
  "$work/isolated/bin/pip" wheel -qq --no-deps --wheel-dir "$work/isolated-wheel" .)
ls "$work/isolated-wheel"

say "the wheel, with the CUDA library"
"$python_build" -m venv "$work/build"
"$work/build/bin/pip" install -qq "$torch_build" "setuptools>=77" wheel ninja "cmake>=3.24"
(cd "$work/source" && LLAVA_ST_CUDA=on PATH="$work/build/bin:$PATH" \
  "$work/build/bin/pip" wheel -qq --no-build-isolation --no-deps --wheel-dir "$work/wheel" .)
wheel=$(ls "$work"/wheel/*.whl)
ls -l "$wheel" | awk '{print $5, $9}' | sed "s|$work/wheel/||"

check() {  # interpreter, requirement for torch
  local python=$1 torch=$2 env="$work/env"
  say "$("$python" --version), $torch"
  rm -rf "$env" "$work/tests"
  "$python" -m venv "$env"
  "$env/bin/pip" install -qq "$torch" numpy pytest hypothesis safetensors
  "$env/bin/pip" install -qq "$wheel"
  # Away from the checkout, so that the installed package is the one under test.
  cp -r tests "$work/tests"
  (
    cd "$work"
    "$env/bin/python" -m llava_st_ops.info
    "$env/bin/python" - <<'PYTHON'
import torch
from llava_st_ops import library

assert "site-packages" in library.__file__, library.__file__
assert library.CPU.loaded, library.CPU.reason
assert library.CUDA.loaded or torch.version.cuda is None, library.CUDA.reason
print("both libraries loaded" if library.CUDA.loaded else "the CPU library loaded; this torch has no CUDA")
PYTHON
    "$env/bin/python" -m pytest -q --disable-warnings -p no:cacheprovider tests/ops tests/nn tests/test_backends.py --show-capture=no -k "not emulated"
  )
}

check "$python_oldest" "torch==2.10.0"
check "$python_newest" "${TORCH_NEWEST:-torch}"
say "all passed"
