# Every target works on a bare machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What decides whether a version of torch or transformers is one that prac works with.
VERSIONED := $(patsubst %,tests/test_%.py,versions ops norm_ops lean compile kernel loss attention memory loops \
	way parts trying_again promises transforms by_hand)

.PHONY: train test test-oldest test-newest test-long check format gpu clean
.DEFAULT_GOAL := train

## train: train a small LLaMA on English plainly, with the paper's PRAC and with lean, and compare
train: $(READY)
	$(BIN)/prac train --method plain paper lean --out runs/demo --overwrite

## test: everything that decides whether a change is right
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

## test-oldest: with the oldest versions that pyproject.toml allows
## test-newest: with the newest that pip finds
test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -n 2 --dist worksteal $(VERSIONED)

## test-long: what takes too long to be run with every change
test-long: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long -vv -rP --show-capture=stdout

## check: format, lint, types
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

## format: make the first two of those pass
format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## gpu: what prac costs and saves on the CUDA GPU of this machine, with its own torch and transformers; .venv is not used.
## STAGE=block measures one stage, OUT=folder says where to, OPTIONS=--toy tries it on a CPU: benchmarks/gpu/run.py --help
gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu/run.py $(if $(STAGE),--stage $(STAGE)) \
		$(if $(OUT),--out $(OUT)) $(OPTIONS)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs .mypy_cache .ruff_cache .pytest_cache

# torch first and alone, by its exact version, so that nothing later picks another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[lab,peers,dev]'
	touch $@

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[lab,peers,dev]'
	touch $@

# Whatever is newest on the day when it is made: 'make clean' before asks again.
.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --editable '.[lab,peers,dev]'
	touch $@
