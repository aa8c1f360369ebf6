# Needs Python 3.11 or newer, make and pip; everything else is installed into .venv by the first target that needs it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install dev demo test test-versions lint format type wheel wheel-check lmms-check train-nano bench results clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.venv/.installed: pyproject.toml constraints.txt
	@echo 'Installing into .venv: minutes the first time, mostly torch.'
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/.dev: .venv/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

install: .venv/.installed ## Make .venv with the pinned requirements

dev: .venv/.dev ## The same, with everything a contributor needs

demo: install ## Ask the bundled pictures, dense and sparse, and show what was kept
	$(BIN)/dynamic-llava demo

test: dev ## Run all tests (ARGS="-k cache" passes options to pytest)
	$(BIN)/python -m pytest $(ARGS)

# Which versions, and what pytest gets: see .ci/test_versions.py.
VERSIONS ?= floor 5.19.0 pin newest newest-torch
test-versions: dev ## Run the tests of the core with other versions of transformers and torch (VERSIONS="5.19.0", ARGS="-k golden")
	$(BIN)/python .ci/test_versions.py --versions "$(VERSIONS)" -- $(ARGS)

lint: dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: dev ## Check types
	$(BIN)/mypy

wheel: install ## Build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir dist .

wheel-check: wheel ## Install the wheel in an empty environment and run the demo there
	PYTHON=$(BIN)/python bash .ci/wheel-check

lmms-check: dev ## Run a local task through lmms-eval and the plugin, in an environment of its own
	bash .ci/lmms-check

train-nano: dev ## Train the bundled model again, five stages into runs/ (three hours)
	$(BIN)/dynamic-llava train recipes/nano-vision.yaml
	$(BIN)/dynamic-llava train recipes/nano-dense.yaml
	$(BIN)/dynamic-llava train recipes/nano-places.yaml
	$(BIN)/dynamic-llava train recipes/nano-mixed.yaml
	$(BIN)/dynamic-llava train recipes/nano-dynamic.yaml

RESULTS := evidence/results
bench: dev ## Measure again what docs/performance.md shows (half an hour, 16 GB of memory)
	$(BIN)/dynamic-llava bench --model llava-small --phase prefill --phase overhead --batch 1 --output-tokens 200 \
		--repeats 15 --output $(RESULTS)/bench-small-prefill.json
	$(BIN)/dynamic-llava bench --model llava-small --phase decode --policies dense,static,preallocated,learned \
		--batch 8 --output-tokens 1000 --plot docs/images/bench --output $(RESULTS)/bench-small-decode.json
	$(BIN)/dynamic-llava bench --model llava-small --phase decode --policies preallocated,uniform --batch 8 \
		--output-tokens 1000 --output $(RESULTS)/bench-small-decode-uniform.json
	$(BIN)/dynamic-llava bench --model llava-small --phase decode --policies static,preallocated,learned \
		--batch 1 --batch 4 --batch 16 --output-tokens 100 --plot docs/images/bench-batch \
		--output $(RESULTS)/bench-small-batches.json
	$(BIN)/dynamic-llava bench --model llava-small --phase no-cache --policies dense,learned --output-tokens 1000 \
		--repeats 5 --output $(RESULTS)/bench-small-no-cache.json
	$(BIN)/dynamic-llava bench --model llava-1.5-7b --layers 8 --phase prefill \
		--policies dense,learned,fastv,uniform --repeats 5 --output $(RESULTS)/bench-7b-8-layers.json
	$(BIN)/dynamic-llava bench --model llava-1.5-7b --dtype bfloat16 --phase prefill --phase decode \
		--output-tokens 8 --policies dense,learned --repeats 3 --output $(RESULTS)/bench-7b-bfloat16.json
	$(BIN)/dynamic-llava bench --model nano --phase generate --policies dense,preallocated,learned \
		--output-tokens 100 --repeats 15 --output $(RESULTS)/bench-nano-generate.json
	$(BIN)/python -m evidence.masked_attention --output $(RESULTS)/masked-attention.json

results: dev ## Train and measure again what docs/results.md shows (seven hours on two cores, two more without runs/nano-mixed; resumable)
	$(BIN)/python -m evidence.trainings.run

clean: ## Remove everything these targets made, .venv included
	rm -rf .venv .venv-versions dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
