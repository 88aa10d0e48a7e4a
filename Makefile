# Targets install what they need into .venv; a second call starts at once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
SWEEP ?= outputs/sweeps/lora.r-8-16-64
SCALE ?= smoke

.DEFAULT_GOAL := help
.PHONY: help setup demo test check hub gpu chaos test-cluster bench ui report notebooks clean

help: ## show this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## install the pinned dependencies, ftexp and the embedded model

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("ftexp needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(BIN)/python -c 'from ftexp.model import embedded; embedded.folder()'
	@rm -f .venv/.ready-*
	@touch $@

demo: $(READY) ## fine-tune SmolLM2-135M at rank 8, 16 and 64, score and compare (about 5 minutes on 2 cores)
	$(BIN)/python -m ftexp.run lora.r=8,16,64 -m
	@echo "curves and examples: make ui, then http://127.0.0.1:5000"

test: $(READY) ## run every check and test, two at a time
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY) ## run the fast tests only
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not chaos and not hub"

hub: $(READY) ## run the tests that need the Hugging Face hub
	$(BIN)/python -m pytest -m hub tests/data/test_hub.py tests/test_export.py

gpu: $(READY) ## run the tests that need a CUDA device: formats and their planned memory, engines, shared devices
	$(BIN)/python -m pytest -m gpu tests/gpu

chaos: $(READY) ## measure R1 to R18: 200 kills of a training, a sweep under 300 faults, full disks, 500 trials (an hour), as one table
	$(BIN)/python tests/chaos/table.py

test-cluster: $(READY) ## install Slurm, PostgreSQL and Ray, and run a sweep on each while its workers are killed (Debian, as root)
	command -v slurmctld slurmd munged && ls /usr/lib/postgresql/*/bin/initdb || apt-get install -y slurmctld slurmd slurm-client munge postgresql
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ray>=2.50,<3'
	$(BIN)/python -m pytest -m "cluster or slow" -s tests/cluster

bench: $(READY) ## a sweep beside a shell loop over a TRL script, the sweeper's cost, a million rows, what a record carries (some 90 minutes)
	$(BIN)/python tests/bench/sweeper.py
	$(BIN)/python tests/bench/loop.py
	$(BIN)/python tests/bench/loop.py --task short
	$(BIN)/python tests/bench/loop.py --task system work answer
	$(BIN)/python tests/bench/packed.py
	$(BIN)/python tests/bench/data.py
	$(BIN)/python tests/bench/storage.py

ui: $(READY) ## open the MLflow UI on 127.0.0.1:5000
	$(BIN)/python -m ftexp.ui

report: $(READY) ## print the leaderboard of SWEEP=outputs/sweeps/<name> and write its page
	$(BIN)/python -m ftexp.report $(SWEEP)

notebooks: $(READY) ## run the notebooks of analysis/ on SWEEP and keep what they show
	$(BIN)/python -m ftexp.notebooks $(SWEEP)

reproduce-%: $(READY) ## train a recipe, small and offline (SCALE=none: as its source); says whether a kept result is stale
	$(BIN)/python -m ftexp.run experiment=$* scale=$(SCALE) name=reproduce-$*-$(SCALE)

clean: ## remove caches of tools; outputs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
