# Everything happens in a virtual environment that the first command makes; nothing but Python is needed.
#   PYTHON=python3.11 make test     another interpreter (it gets its own environment)
#   make train RUN_DIR=runs/mine CONFIG=configs/tiny.py ARGS="--set seed=1"

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train serve test test-slow test-all test-aot aot-step gpu lint bench clean

PYTHON ?=
VENV ?= $(if $(PYTHON),.venv-$(notdir $(PYTHON)),.venv)
CONFIG ?= configs/tiny.py
RUN_DIR ?= runs/tiny
ARGS ?=
TESTS ?= tests
WORKERS ?= 2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# A file is one worker's, so that its fixtures are made once.
PYTEST = $(PY) -m pytest $(TESTS) -q -n $(WORKERS) --dist loadfile

# Programs are compiled for H100 in an environment of their own, with the CUDA plugin of jax and NVIDIA's compilers.
# Python 3.11 has no jax that can; there the check says so.
AOT_VENV := $(VENV)-aot
AOT_STAMP := $(AOT_VENV)/.installed
AOT_PLUGINS := jax-cuda13-pjrt jax-cuda13-plugin
AOT_COMPILERS := nvidia-cuda-nvcc nvidia-cuda-nvdisasm nvidia-nvvm

# Where the driver sees a GPU, programs run in an environment that has CUDA's libraries, too.
GPU_VENV := $(VENV)-gpu
GPU_STAMP := $(GPU_VENV)/.installed
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
RUN_STAMP := $(if $(HAS_GPU),$(GPU_STAMP),$(STAMP))
RUN_PY := $(if $(HAS_GPU),$(GPU_VENV),$(VENV))/bin/python
# What `make gpu` trains of V2-Lite, so that state and activations fit into 80 GiB (python -m dsv3_jax.planning.aot_step).
GPU_LAYERS := model.num_layers=4 train.batch.micro=8

# Compiled XLA programs are stored between runs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

help: ## this list
	@echo "make ...        (RUN_DIR, CONFIG, ARGS, TESTS, WORKERS and PYTHON can be given: make train RUN_DIR=runs/mine)"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment, if it is not there

train: $(RUN_STAMP) ## train the tiny model on real code, about ten minutes on 2 cores, or on the GPU; repeats resume
	$(RUN_PY) train.py --config $(CONFIG) --run-dir $(RUN_DIR) $(ARGS)

serve: $(RUN_STAMP) ## answer OpenAI's clients with the trained model, at http://127.0.0.1:8000; Ctrl-C ends it
	@[ -d $(RUN_DIR)/checkpoints ] || ls $(RUN_DIR)/*.safetensors >/dev/null 2>&1 || { \
	  echo "$(RUN_DIR) holds no trained model: run \"make train RUN_DIR=$(RUN_DIR)\" first, or give RUN_DIR=FOLDER." >&2; exit 1; }
	@exec $(RUN_PY) serve.py --model $(RUN_DIR) $(ARGS)

test: $(STAMP) ## the fast tests, about a quarter of an hour on 2 cores
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP) ## only the slow tests
	$(PYTEST) -m "slow" $(ARGS)

test-all: $(STAMP) ## all tests, about an hour on 2 cores
	$(PYTEST) $(ARGS)

test-aot: $(AOT_STAMP) ## compile every kernel for H100 without one; ARGS=--write renews kernels/results/compiled_sm90a.md
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m dsv3_kernels.aot $(or $(ARGS),--check)

aot-step: $(AOT_STAMP) ## compile a training step of CONFIG for H100 without one: kernels, loops, memory
	JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 $(AOT_VENV)/bin/python -m dsv3_jax.planning.aot_step $(CONFIG) $(ARGS)

gpu: $(RUN_STAMP) ## on a GPU: check the kernels, train layers of V2-Lite, measure kernels into kernels/results/; about ten minutes
	@$(RUN_PY) -m dsv3_kernels.check --isolate --small --seconds 150 --out kernels/results/check.jsonl; checked=$$?; \
	if [ $$checked = 3 ] && [ -z "$(HAS_GPU)" ]; then echo "Training layers of V2-Lite: not measured."; exit 0; fi; \
	for precision in mixed fp8_dsv3; do \
	  $(RUN_PY) -m dsv3_jax.bench.train configs/v2_lite_16b.py --rounds 20 --set $(GPU_LAYERS) precision=$$precision || checked=1; \
	done; \
	$(RUN_PY) -m dsv3_kernels.bench --seconds 150 $(ARGS) && exit $$checked

lint: $(STAMP) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

bench: $(RUN_STAMP) ## training and decoding speed of configs/bench_30m.py
	$(RUN_PY) -m dsv3_jax.bench.train configs/bench_30m.py $(ARGS)
	$(RUN_PY) -m dsv3_jax.bench.decode configs/bench_30m.py $(ARGS)

clean: ## remove environments, caches and build leftovers; runs/ stays
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call make_venv,FOLDER): an environment of the newest Python from 3.11 to 3.13 that can make one: on PATH, else one
# that pyenv installed. A candidate is run, because a name on PATH may be a pyenv shim of a version that is not active.
define make_venv
usable() { [ -x "$$1" ] && "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }; \
found=; \
if [ -n "$(PYTHON)" ]; then \
  usable "$$(command -v "$(PYTHON)")" && found=$$(command -v "$(PYTHON)"); \
else \
  for version in 3.13 3.12 3.11; do \
    for folder in $$(echo "$$PATH" | tr ':' ' ') "$$HOME"/.pyenv/versions/$$version*/bin; do \
      if usable "$$folder/python$$version"; then found=$$folder/python$$version; break 2; fi; \
    done; \
  done; \
fi; \
if [ -z "$$found" ]; then \
  echo "No usable $(or $(PYTHON),Python 3.11 to 3.13) found on PATH or in ~/.pyenv/versions. It must be 3.11 to 3.13 and have venv" >&2; \
  echo "and ensurepip (on Debian and Ubuntu: apt install python3-venv); then PYTHON=/path/to/python make ..." >&2; exit 1; \
fi; \
echo "Installing into $(1) with $$("$$found" --version) from $$found: one to three minutes, once."; \
"$$found" -m venv --clear $(1)
endef

PIP_INSTALL := -m pip --disable-pip-version-check install -qq -c constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(call make_venv,$(VENV))
	@$(PY) $(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(AOT_STAMP): pyproject.toml constraints.txt
	@$(call make_venv,$(AOT_VENV))
	@$(AOT_VENV)/bin/python $(PIP_INSTALL) -e . $(foreach name,$(AOT_PLUGINS),"$(name); python_version >= '3.12'")
	@$(AOT_VENV)/bin/python $(PIP_INSTALL) --no-deps $(foreach name,$(AOT_COMPILERS),"$(name); python_version >= '3.12'")
	@touch $@

$(GPU_STAMP): pyproject.toml constraints.txt
	@$(call make_venv,$(GPU_VENV))
	@$(GPU_VENV)/bin/python $(PIP_INSTALL) -e '.[cuda13]'
	@touch $@
