# The commands of this project. Plain equivalents stand in README.md.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# Idle OpenMP threads that spin slow a small machine down several times.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo pipeline test gpu install lint types clean

demo: install  ## GRPO on the built-in questions: about three CPU minutes
	$(BIN)/covo-rl train $(ARGS)

pipeline: install  ## from random weights to a model that reasons, in three stages: half an hour of one core; again goes on
	OMP_NUM_THREADS=1 $(BIN)/python recipes/pipeline.py $(ARGS)

test: install  ## the whole suite, two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

gpu: install  ## tests/gpu on the CUDA device of this machine; without one they are skipped
	$(BIN)/python -m pytest -m gpu -rs tests/gpu $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs .cache
