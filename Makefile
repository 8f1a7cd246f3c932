# Two commands matter: `make demo` and `make test`. Both prepare their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test lint format types docs bench bench-gpu test-ray test-lmms test-vllm test-gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/tokensieve demo

test: install lint types
	$(BIN)/python -m pytest -n $(WORKERS) -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/generate.py

bench: install
	$(BIN)/python -m benchmarks.cpu_prefill
	$(BIN)/python -m benchmarks.own_time

bench-gpu:
	$(BIN)/python -m benchmarks.gpu

test-ray: install
	TOKENSIEVE_RAY_TESTS=1 $(BIN)/python -m pytest tests/bridges/test_batch_ray.py -q

test-lmms: install
	$(BIN)/python tests/bridges/lmms_environment.py
	$(BIN)/python -m pytest tests/bridges/test_lmms_eval.py -q

# Exit status 3: the engine cannot be installed here, and a line has said so.
test-vllm:
	@$(PYTHON) tests/bridges/in_vllm/make_environment.py; status=$$?; \
	if [ $$status -eq 3 ]; then exit 0; elif [ $$status -ne 0 ]; then exit $$status; fi; \
	.venv-vllm/bin/python -m pytest tests/bridges/in_vllm -q

test-gpu:
	$(BIN)/python -m pytest tests/gpu -q -m gpu

clean:
	rm -rf $(VENV) .venv-vllm build *.egg-info .pytest_cache .ruff_cache .mypy_cache
