PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRITON := triton==3.6.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One architecture keeps the development build short; empty, the build serves every card.
export XSPEC_CUDA_ARCHS ?= 90-virtual

NATIVE := setup.py CMakeLists.txt $(shell find csrc _build_backend -type f)
SOURCES := $(shell find csrc tests/simt tests/nvtx_tool tests/ngram -name '*.c' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# How many times as many random cases `make fuzz` runs as `make test`.
FUZZ ?= 10

.PHONY: setup e2e test test-transformers fuzz lint gpu-bundle clean

setup: $(VENV)/.xspec-built

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A CPU build of torch comes without Triton; then the version is ours to choose.
$(VENV)/.xspec-pinned: requirements/pinned.txt Makefile | $(BIN)/python
	$(PIP) -r requirements/pinned.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
	touch $@

$(VENV)/.xspec-built: $(VENV)/.xspec-pinned pyproject.toml $(NATIVE)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

e2e: setup
	$(BIN)/python bench/e2e.py --gamma 5

# How many processes share the tests, whole files each.
JOBS ?= 2

# Triton decides at import between its interpreter and its compiler, hence two runs.
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile; compiled=$$?; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile; interpreted=$$?; \
	exit $$((compiled || interpreted))

# The runtime on another version of transformers: make test-transformers V=5.17.0. Its own
# dependencies come beside it, torch is none of them; numpy is the one that torch was built for.
V ?= 5.17.0
OTHER := build/transformers-$(V)
$(OTHER)/.xspec-made: | setup
	rm -rf $(OTHER)
	$(PIP) --target $(OTHER) transformers==$(V) $(shell grep ^numpy requirements/pinned.txt)
	test ! -e $(OTHER)/torch
	touch $@

test-transformers: setup $(OTHER)/.xspec-made
	PYTHONPATH=$(OTHER) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
		tests/test_hf*.py tests/test_engine.py tests/test_batch.py tests/test_lossless.py \
		tests/test_e2e.py

# Other cases in every run; a failure prints the case and what repeats it.
fuzz: export XSPEC_FUZZ = $(FUZZ)
fuzz: setup
	$(BIN)/python -m pytest tests/test_fuzz_*.py; compiled=$$?; \
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_fuzz_*.py; interpreted=$$?; \
	exit $$((compiled || interpreted))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

# What bench/gpu_suite.py carries to a machine without a network: peers to beat, recorded data.
gpu-bundle: setup
	$(BIN)/python -m xspec_runtime.gpu.bundle gpu_bundle

clean:
	rm -rf $(VENV) build dist *.egg-info xspec_kernels/_C.*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
