# Needs python3 (3.11), make and pip, nothing else. `make book` and `make test` are the two that matter.
PROFILE ?= quick
PYTHON ?= python3
PY := .venv/bin/python
# .venv is ours, and compiled as it is imported: kept from that, every process would compile all of it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install book print results study test test-slow lint params gpu-check bench lab clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  PROFILE=quick (the default) names a file in params/: $(basename $(notdir $(wildcard params/*.yaml)))"

install:  ## .venv from requirements.lock, if anything changed
	@$(PYTHON) .ci/install.py

book: install  ## everything: data, training, probes, notebooks, book
	@$(PY) -m ggsm_core.pipeline --profile params/$(PROFILE).yaml --target book

print: book  ## the whole book on one page, for printing
	@$(PY) -c "from jupyter_book.cli.main import main; main()" build -W --keep-going -q \
	  --builder singlehtml build/$(PROFILE)/book
	@echo "open build/$(PROFILE)/book/_build/singlehtml/index.html"

results: install  ## the same up to results/PROFILE/, without notebooks and book
	@$(PY) -m ggsm_core.pipeline --profile params/$(PROFILE).yaml --target results

study: install  ## the evidence, hours: all that needs no hub, five seeds, ablations (RECIPES=ggsm,causal SEEDS=0: a part)
	@$(PY) -m ggsm_core.study $(if $(RECIPES),--recipes $(RECIPES)) $(if $(SEEDS),--seeds $(SEEDS))

test: install  ## the tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow" -n 2 --dist loadfile

test-slow: install  ## the tests that take long: Ray, real weights, killed processes
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow -n 2 --dist loadfile

lint: install  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m mypy

params: install  ## the profile, merged, with each field's meaning and unit
	@$(PY) -m ggsm_core.params params/$(PROFILE).yaml

gpu-check: PROFILE = gpu
gpu-check: install  ## does PROFILE (here gpu by default) fit this machine's GPUs? (PROCESSES=1: as make book trains)
	@$(PY) -m ggsm_core.gpu_check --profile params/$(PROFILE).yaml $(if $(PROCESSES),--processes $(PROCESSES))

bench: install  ## what the project promises of speed and memory, into results/bench/
	@for script in $(filter-out benchmarks/report.py,$(wildcard benchmarks/*.py)); do \
	  echo "$$script"; $(PY) $$script || exit 1; done

lab: install  ## JupyterLab in notebooks/
	@$(PY) -m jupyter lab --notebook-dir=.

clean:  ## remove all runs and everything built; .venv and results/ stay
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
