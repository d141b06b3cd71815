PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The build tools are pinned too; pip reads the second name for those since 25.3.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip -q

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test smoke sanitize sanitize-cuda cuda lint build wheel wheels clean

help:
	@echo "make demo    train a tiny LLaMA on this machine; results in demo/"
	@echo "make test    run the tests"
	@echo "make smoke   run every bench for a moment; its figures are of no use"
	@echo "make lint    check formatting, lint and types"
	@echo "make sanitize  run the CPU tests of a build with address and undefined-behaviour sanitizers"
	@echo "make sanitize-cuda  run the native GPU tests under compute-sanitizer"
	@echo "make cuda    build the CUDA half and show registers, spills and stores of every kernel"
	@echo "make build   editable install into $(VENV)"
	@echo "make wheel   build a wheel into dist/"
	@echo "make wheels  build one for every Linux and test it with the oldest and the newest torch"
	@echo "make clean   remove $(VENV) and everything built"

demo: $(VENV)/.bench
	@$(BIN)/python -m bench.pretrain --out demo --overwrite

test: $(VENV)/.bench $(VENV)/.test
	@$(BIN)/python -m pytest

smoke: $(VENV)/.bench $(VENV)/.test
	@rm -rf build/smoke
	@$(BIN)/python -m bench.campaign --quick --out build/smoke

# A build of its own, without the run-time choice of instruction sets: its resolvers run before the
# sanitizers are up. Leaks are not looked for: Python keeps much until its end.
sanitize: $(VENV)/.test
	@CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g" \
	  CMAKE_ARGS=-DLOWRANK_CPU_DISPATCH=OFF LOWRANK_CUDA=off \
	  $(PIP) install --no-deps --upgrade --target build/sanitized .
	@export PYTHONPATH=build/sanitized ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)"; \
	$(BIN)/python -P -c "from lowrank_kernels import _native; assert 'sanitized' in _native.__file__" && \
	$(BIN)/pytest python_tests/native --ignore python_tests/native/test_build.py

# Every tool sees every launch of the native tests on a GPU; a finding is an exit status. Without a
# GPU those tests would be skipped, which looks like success; under the tools they take their time.
SANITIZER_TOOLS := memcheck racecheck initcheck synccheck
sanitize-cuda: $(VENV)/.test
	@command -v compute-sanitizer >/dev/null || \
	  { echo "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"; exit 1; }
	@$(BIN)/python -c "import sys, torch; from lowrank_kernels import _native; \
	  torch.cuda.is_available() or sys.exit('sanitize-cuda: torch finds no CUDA device'); \
	  _native.build_info()['cuda'] or sys.exit('sanitize-cuda: built without the CUDA half')"
	@for tool in $(SANITIZER_TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --target-processes all $(BIN)/python -m pytest -q --timeout 0 -m gpu python_tests/native || \
	    exit 1; \
	done

cuda: $(VENV)/.bench $(VENV)/.test
	@$(BIN)/python -m bench.cuda_compile

lint: $(VENV)/.lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run -Werror $$(find csrc -type f)
	@$(BIN)/mypy

build: $(VENV)/.package

wheel: $(VENV)/.torch
	@$(PIP) wheel . --no-deps -w dist

wheels:
	@PYTHON=$(PYTHON) .ci/wheels

clean:
	@rm -rf $(VENV) build demo dist *.egg-info lowrank_kernels/_native*.so
	@rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without an NVIDIA GPU the CUDA build of torch is gigabytes of libraries that nothing can use. The
# CPU build for Linux is on torch's own index, unless pip is configured to find it elsewhere.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null || $(PIP) install "torch==$(TORCH)+cpu" \
	    --index-url https://download.pytorch.org/whl/cpu; \
	else \
	  $(PIP) install "torch==$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(NATIVE)
	@$(PIP) install -e .
	@touch $@

# The package is installed by now, so this adds the extra's dependencies without building again.
$(VENV)/.%: $(VENV)/.package
	@$(PIP) install "lowrank-kernels[$*]"
	@touch $@
