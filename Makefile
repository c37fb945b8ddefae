# Set-up is part of every target: `make demo` or `make test` on a fresh machine is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG := trainer_scripts/accelerate_configs/one_process.yaml
# A file at a time, in the order of tests/conftest.py: tests of one file share what was trained for them.
TESTS := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo benchmark benchmark-gpu test test-fast style quality docs clean

help:  ## Show this list
	@grep -E '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.train  ## Digits: train a ViT, remove 6 of its 12 attention layers, print before and after
	$(BIN)/accelerate launch --config_file $(CONFIG) -m lambda_vit_hf.cli.train digits --overwrite_output_dir

benchmark: $(VENV)/.train  ## Measure inference on this machine: DeiT-B shape, with and without 5 attention layers
	$(BIN)/lambda-vit benchmark --size base

benchmark-gpu: $(VENV)/.test  ## Measure inference, training and search on a GPU, in under 10 minutes
	$(BIN)/python -m benchmarks.gpu

test: $(VENV)/.test quality  ## Install what tests need, lint, run all tests offline
	$(TESTS) tests

test-fast: $(VENV)/.test  ## The tests without those of whole trainings, exports and several processes
	$(TESTS) -m "not slow" tests

style: $(VENV)/.test  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.test  ## Check format, lint, the order of imports between packages, public types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

docs: $(VENV)/.docs  ## Build docs/ and the API reference into site/, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## Remove the environment and all outputs
	rm -rf $(VENV) outputs site *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.train: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	@touch $@

$(VENV)/.test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.train

$(VENV)/.docs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@
