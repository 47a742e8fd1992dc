# Every target starts from a fresh clone: it makes .venv, installs the pinned packages and builds what it needs first.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# Set on the command line: PYTEST="tests/ops -k dropout", DEMO="--help", BENCH="...".
PYTEST ?= --numprocesses auto --maxprocesses 4 --dist loadfile
DEMO ?=
BENCH ?=
UPDATE ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NVCC ?= $(firstword $(wildcard $(addsuffix /bin/nvcc,$(CUDA_HOME) /usr/local/cuda)) nvcc)
CONFIGURE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPYLORA_TESTS=ON
EMULATE := $(CONFIGURE) -DPYLORA_EMULATE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
CXX_FILES := $(shell find csrc tests/csrc tests/emu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
NATIVE_INPUTS := setup.py pyproject.toml CMakeLists.txt pylora/_version.py pylora/_source_hash.py \
  $(shell find csrc cmake -type f 2>/dev/null)

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install build test ctest pytest sanitize test-arm lint format demo docs bench cuda cuda-all test-cuda \
  sanitize-cuda bench-cuda test-cuda-build emulate emulate-full wheel sdist test-vllm doctor clean distclean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements-dev.txt | $(VENV)/bin/python
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(NATIVE_INPUTS) $(VENV)/.installed
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

install: $(VENV)/.installed  ## Make .venv with the pinned packages.

build: $(VENV)/.built  ## Build the native extension into the tree (an editable install); a repeat builds what changed.

test: ctest pytest  ## Run all tests: the C++ ones, then the Python ones.

ctest: $(VENV)/.built  ## Build and run the C++ tests of the kernel library.
	@mkdir -p build/kernels
	@$(CONFIGURE) -B build/kernels > build/kernels/configure.log || { cat build/kernels/configure.log; exit 1; }
	$(BIN)/cmake --build build/kernels
	$(BIN)/ctest --test-dir build/kernels --output-on-failure --no-tests=ignore

# A process a core and one thread a process: more threads than cores make the tests slower.
pytest: $(VENV)/.built  ## Run the Python tests; PYTEST="tests/ops -k dropout" picks some.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

# build/sanitize: memory and undefined behaviour; build/sanitize-thread: data races, in the tests that have threads.
sanitize: $(VENV)/.installed  ## Run the C++ tests under ASan and UBSan, and those of threads under TSan.
	$(CONFIGURE) -B build/sanitize -DPYLORA_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error
	$(CONFIGURE) -B build/sanitize-thread -DPYLORA_SANITIZE=thread
	$(BIN)/cmake --build build/sanitize-thread
	$(BIN)/ctest --test-dir build/sanitize-thread --output-on-failure --no-tests=error --tests-regex '^test_threads_'

# Debian's g++-aarch64-linux-gnu and qemu-user are enough. Says nothing about speed.
test-arm: $(VENV)/.installed  ## Compile the kernel library for aarch64 and run its C++ tests in QEMU.
	$(CONFIGURE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(BIN)/cmake --build build/arm
	$(BIN)/ctest --test-dir build/arm --output-on-failure --no-tests=error

lint: $(VENV)/.installed  ## Check style, types, import rules and C++ format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed  ## Rewrite Python and C++ sources in the project's format.
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

$(VENV)/.docs-installed: requirements-docs.txt $(VENV)/.built
	$(PIP) install -r requirements-docs.txt
	@touch $@

# A warning is an error: a link that leads nowhere, a name that is not there.
docs: $(VENV)/.docs-installed  ## Build the documentation site into build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

demo: $(VENV)/.built  ## Fine-tune SmolLM2-135M on real text, save, reload, merge and compare: ten minutes on two cores.
	$(BIN)/python examples/demo/run.py $(DEMO)

bench: $(VENV)/.built  ## Time pylora beside PEFT and the bare layer; BENCH="lora --plot plots", see `pylora bench --help`.
	$(BIN)/pylora bench $(BENCH)

# Apart from the installed build, which it leaves alone. UPDATE=1 records what the kernels take of a GPU.
cuda: $(VENV)/.installed  ## Compile, link and inspect the CUDA kernels (a CPU build of torch will do; needs nvcc); UPDATE=1.
	PYLORA_CUDA=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/cuda
	$(BIN)/python tests/build/cuda_smoke.py build/cuda
	$(BIN)/python tools/cuda_resources.py build/kernels-cuda $(if $(UPDATE),--update)

cuda-all: $(VENV)/.installed  ## Compile the CUDA kernels for all architectures from sm_80 on, and report what they take.
	CUDACXX=$(NVCC) $(BIN)/cmake -S . -B build/kernels-cuda-all -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPYLORA_CUDA=ON "-DPYLORA_CUDA_ARCHS=80;86;89;90;100;120"
	$(BIN)/cmake --build build/kernels-cuda-all --target pylora_cuda
	$(BIN)/python tools/cuda_resources.py build/kernels-cuda-all

# A day with a GPU: these three, each within ten minutes on 16 cores, then `pylora bench gpu --record`. Without one
# every test is skipped and says so. test-cuda needs nvcc but no CUDA build of torch: each launch gets copies of its tensors.
ON_DEVICE_ARCHS ?= 80;90
test-cuda: $(VENV)/.built  ## Run tests/cuda on a GPU, and the ops on CUDA tensors where torch and pylora have CUDA.
	@mkdir -p build/on-device
	@CUDACXX=$(NVCC) $(CONFIGURE) -B build/on-device -DPYLORA_TESTS=OFF -DPYLORA_CUDA=ON -DPYLORA_ON_DEVICE=ON \
	  "-DPYLORA_CUDA_ARCHS=$(ON_DEVICE_ARCHS)" -DPython_EXECUTABLE=$(abspath $(BIN)/python) > build/on-device/configure.log \
	  || { cat build/on-device/configure.log; exit 1; }
	$(BIN)/cmake --build build/on-device --target _on_device
	PYLORA_ON_DEVICE=build/on-device OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cuda tests/ops/test_on_gpu.py $(PYTEST)

# One tool after another: memory errors, races in shared memory, barriers, memory read before it is written.
SANITIZE_CUDA ?= memcheck racecheck synccheck initcheck
SANITIZE_CUDA_PYTEST ?= -x -k "not grid"
COMPUTE_SANITIZER ?= $(firstword $(wildcard $(patsubst %/nvcc,%/compute-sanitizer,$(NVCC))) compute-sanitizer)
sanitize-cuda: test-cuda  ## tests/cuda on a GPU under compute-sanitizer; SANITIZE_CUDA=racecheck picks a tool.
	@command -v $(COMPUTE_SANITIZER) > /dev/null || { echo "make sanitize-cuda: skipped: there is no compute-sanitizer"; exit 0; }; \
	for tool in $(SANITIZE_CUDA); do \
	  echo "== $$tool"; PYLORA_ON_DEVICE=build/on-device $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 \
	    --target-processes all $(BIN)/python -m pytest tests/cuda $(SANITIZE_CUDA_PYTEST) || exit 1; \
	done

bench-cuda: $(VENV)/.built  ## Time the ops on a GPU by CUDA events, L2 cold and warm, beside torch, PEFT and vLLM.
	$(BIN)/pylora bench gpu $(BENCH)

# 10 GB of disk, 6 GB of it downloaded. A copy of the tree, since an extension fits one torch. No GPU is needed: what runs
# are the CPU tests, in a build whose ops have CUDA kernels, and the errors for a missing driver.
CUDA_TORCH ?= build/cuda-torch
CUDA_TORCH_VERSION ?= 2.14.1
CUDA_TORCH_PIP = $(CUDA_TORCH)/venv/bin/python -m pip --disable-pip-version-check --quiet
$(CUDA_TORCH)/venv/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(CUDA_TORCH)/venv
	$(CUDA_TORCH_PIP) install torch==$(CUDA_TORCH_VERSION)
	grep -v '^torch==' requirements-dev.txt > $(CUDA_TORCH)/requirements.txt
	$(CUDA_TORCH_PIP) install -r $(CUDA_TORCH)/requirements.txt
	@touch $@

test-cuda-build: $(CUDA_TORCH)/venv/.installed  ## Build against a CUDA build of torch and run the tests there (slow, 10 GB; no GPU needed).
	mkdir -p $(CUDA_TORCH)/tree
	find $(CUDA_TORCH)/tree -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C $(CUDA_TORCH)/tree
	cd $(CUDA_TORCH)/tree && PYLORA_CUDA=1 $(abspath $(CUDA_TORCH))/venv/bin/python -m pip --quiet install --no-build-isolation --no-deps -e .
	cd $(CUDA_TORCH)/tree && OMP_NUM_THREADS=1 $(abspath $(CUDA_TORCH))/venv/bin/python -m pytest $(PYTEST)

# The tests of csrc/emu/README.md's emulator and, through it, of every CUDA kernel.
emulate: $(VENV)/.built  ## Run the CUDA kernels and their launchers on the CPU, in an emulator, against the references.
	@mkdir -p build/emulate
	@$(EMULATE) -B build/emulate > build/emulate/configure.log || { cat build/emulate/configure.log; exit 1; }
	$(BIN)/cmake --build build/emulate --target _emulated
	PYLORA_EMULATED=build/emulate OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emu $(wildcard tests/cuda) $(PYTEST)

# The entry point is found by an installed package alone, so that the tree is installed there as users do it, and out of
# Python's path. vLLM imports what is there of torchvision and its like, which pip chose for another torch.
$(VLLM_VENV)/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/.built: $(NATIVE_INPUTS) $(shell find pylora -name '*.py') $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

test-vllm: $(VLLM_VENV)/.built  ## Serve 64 adapters by vLLM's HTTP server with the plugin, in a venv of its own; not a part of CI.
	env -u PYTHONPATH $(VLLM_VENV)/bin/pytest tests/vllm $(VLLM_PYTEST)

# Python itself is not instrumented: the sanitizer's runtime is loaded before it, and leaks are not looked for. TSan
# counts the findings in its exit status, which workers of pytest would keep to themselves. TSAN_PYTEST picks its tests:
# one order of threads, since it finds races in every one.
TSAN_PYTEST ?= -k "random or sanitizer"
PRELOAD = LD_PRELOAD="$(foreach name,$(1),$(shell $(CXX) -print-file-name=lib$(name).so))"
emulate-full: $(VENV)/.built  ## The same under ASan and UBSan, and small shapes under TSan.
	$(EMULATE) -B build/emulate-asan -DPYLORA_SANITIZE=address,undefined > /dev/null
	$(BIN)/cmake --build build/emulate-asan --target _emulated
	$(call PRELOAD,asan ubsan stdc++) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYLORA_EMULATED=build/emulate-asan OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emu $(wildcard tests/cuda) $(PYTEST)
	$(EMULATE) -B build/emulate-tsan -DPYLORA_SANITIZE=thread > /dev/null
	$(BIN)/cmake --build build/emulate-tsan --target _emulated
	$(call PRELOAD,tsan) TSAN_OPTIONS=ignore_noninstrumented_modules=1 PYLORA_EMULATED=build/emulate-tsan \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emu $(wildcard tests/cuda) $(TSAN_PYTEST)

wheel: $(VENV)/.installed  ## Build a wheel, install it into an empty venv and use it there.
	rm -rf dist/*.whl build/wheel-venv
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install --no-compile -c requirements-dev.txt dist/*.whl
	cd build/wheel-venv && bin/python -I ../../tests/build/wheel_smoke.py && bin/pylora doctor

sdist: $(VENV)/.installed  ## Build a source distribution, and a wheel from nothing but that.
	rm -rf dist/*.tar.gz build/from-sdist
	$(BIN)/python -m build --sdist --no-isolation --outdir dist > /dev/null
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/from-sdist dist/*.tar.gz

doctor: $(VENV)/.built  ## Say what is built and what is wrong.
	$(BIN)/pylora doctor

clean:  ## Remove what was built; .venv and the demo's downloads stay.
	rm -rf build dist pylora/_C.*.so *.egg-info $(VENV)/.built

distclean: clean  ## Remove .venv as well.
	rm -rf $(VENV) $(VLLM_VENV)
