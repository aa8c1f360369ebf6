# Needs Python 3.11 or newer, make and pip; everything else is installed into .venv by the first target that needs it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install dev demo test test-versions check-threads check-overhead check-code-lines check-equivalence check-remeasured check-processors check-tiny-families check-vllm lint format type docs wheel wheel-check lmms-check train-nano bench results clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | awk -F '\t' '{ printf "  make %-17s %s\n", $$1, $$2 }'

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

test: dev ## Run all tests, a process for each core (ARGS="-k cache" passes options to pytest, "-n 0" keeps to one)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# Which versions, and what pytest gets: see .ci/test_versions.py.
VERSIONS ?= floor 5.19.0 pin newest newest-torch
test-versions: dev ## Run the tests of the core with other versions of transformers and torch (VERSIONS="5.19.0", ARGS="-k golden")
	$(BIN)/python .ci/test_versions.py --versions "$(VERSIONS)" -- $(ARGS)

check-threads: dev ## Ask one attached model from 8 threads at once (two minutes)
	$(BIN)/python -m evidence.threads --output evidence/results/threads.json

check-overhead: dev ## Measure what the core costs against an earlier commit (20 minutes)
	$(BIN)/python -m evidence.overhead --output evidence/results/overhead.json

check-code-lines: dev ## Count the code lines that a prefill and a decoded token run through
	$(BIN)/python -m evidence.code_lines --base 2881a65 --output evidence/results/code-lines.json

check-equivalence: dev ## Compare 200 ragged batches with their rows, 100 runs without a cache with cached ones (five minutes)
	$(BIN)/python -m evidence.equivalence --output evidence/results/equivalence.json

check-remeasured: dev ## Measure the committed weights of nano anew, and compare (20 minutes)
	$(BIN)/python -m evidence.remeasure --output evidence/results/remeasured.json

lint: dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: dev ## Check types
	$(BIN)/mypy

docs: dev ## Build the docs site into build/site; any warning is an error
	$(BIN)/python -m docs.pages
	$(BIN)/zensical build --strict --clean

wheel: install ## Build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir dist .

wheel-check: wheel ## Install the wheel in an empty environment, and run the demo and the notebooks there
	PYTHON=$(BIN)/python bash .ci/wheel-check

lmms-check: dev ## Run a local task through lmms-eval and the plugin, in an environment of its own
	bash .ci/lmms-check

check-processors: dev ## Test training with the processors that need torchvision, in an environment of its own (two minutes)
	bash .ci/processors-check

check-tiny-families: dev ## Train a tiny Qwen2.5-VL and a tiny LLaVA-NeXT from nothing, and compare (half an hour; resumable)
	bash .ci/processors-check evidence.tiny_families --output evidence/results/tiny-families.json

check-vllm: dev ## Test the vLLM plugin, in an environment of its own (.venv-vllm, 4 GB; ten minutes; ARGS=short takes less)
	bash .ci/vllm-check $(ARGS)

train-nano: dev ## Train the bundled model again, five stages into runs/ (three hours)
	$(BIN)/dynamic-llava train recipes/nano-vision.yaml
	$(BIN)/dynamic-llava train recipes/nano-dense.yaml
	$(BIN)/dynamic-llava train recipes/nano-places.yaml
	$(BIN)/dynamic-llava train recipes/nano-mixed.yaml
	$(BIN)/dynamic-llava train recipes/nano-dynamic.yaml

bench: dev ## Measure again what docs/performance.md shows (half an hour, 16 GB of memory)
	$(BIN)/python -m evidence.replay "bench-*" masked-attention

results: dev ## Train and measure again what docs/results.md shows (seven hours on two cores, two more without runs/nano-mixed; resumable)
	$(BIN)/python -m evidence.trainings.run

clean: ## Remove everything these targets made, .venv included
	rm -rf .venv .venv-versions .venv-processors .venv-vllm build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
