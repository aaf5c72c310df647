# Everything runs in .venv, which `make env` makes; no other set-up is needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU the CUDA library takes minutes to build and cannot be used: `make cuda` builds it all the same.
export LLAVA_ST_CUDA ?= $(if $(GPU),auto,off)

NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake -type f)
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# Processes of one thread each share a step of training: threads of one process would wait for each other all the time.
PROCESSES ?= $(if $(GPU),1,2)
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES) -m benchmarks.reproduction

.PHONY: env test bench report docs reproduce ablate mutate cuda lint format wheel clean

env: $(VENV)/ready

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja "cmake>=3.24"
	touch $@

$(VENV)/ready: $(VENV)/torch $(NATIVE)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# Files of tests are spread over the cores. Threads that wait must sleep: all processes' threads share those cores.
# A GPU's memory is not shared. PYTEST_ARGS="-n 0" runs one process.
test: env
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(if $(GPU),,-n auto --maxprocesses 8 --dist loadfile) $(PYTEST_ARGS)

# The main job: a real clip through every backend of this machine. BENCH_ARGS="--video FILE" takes your own.
bench: env
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# One page of all records, docs/report.html, and README's tables.
report: env
	$(BIN)/python -m benchmarks.site $(REPORT_ARGS)

# The site, into build/site; a broken link or a name that is not there is an error.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Trains the small model of moving shapes from nothing, and proves what it learned. REPRODUCE_ARGS="--seed 1".
reproduce: env
	$(TRAIN) train $(REPRODUCE_ARGS)

# The same with one idea changed at a time. Takes hours; goes on where it was cut off. ABLATE_ARGS="--seeds 0".
ablate: env
	$(TRAIN) ablate $(ABLATE_ARGS)

# Would the tests notice if a kernel were wrong? Tries hundreds of changes to the CUDA kernels, in the emulator.
mutate: env
	$(BIN)/python -m tests.mutation $(MUTATE_ARGS)

# The CUDA library, for all architectures, into the checkout. Needs nvcc, not a GPU. (Of CUTLASS, the headers alone.)
cuda: env
	$(BIN)/pip install --quiet --no-deps nvidia-cutlass
	LLAVA_ST_CUDA=on $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: env
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist llava_st_ops/lib *.egg-info
