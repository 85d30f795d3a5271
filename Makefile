# Needs Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE :=  # many commands start: modules are compiled once

.PHONY: quickstart test lint format bench compat docs zoo clean

quickstart: .venv/ready  ## merge the tiny model family, verify and score the result
	HF_HUB_OFFLINE=1 $(BIN)/mergetool run quickstart --output out/quickstart

test: lint  ## lint, types and all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## side by side with mergekit; make bench ARGS=--small for a quick look
	$(BIN)/python evals/bench/bench.py $(ARGS)

compat: .venv/ready  ## results in transformers 4.57, in an environment that the first run makes
	$(BIN)/python -m evals.compat.transformers4 $(ARGS)

docs: .venv/ready  ## the pages of the merge methods, from their signatures
	$(BIN)/python docs/pages.py

zoo: .venv/ready  ## train the tiny model family again
	$(BIN)/python evals/zoo/train.py --out out/zoo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

clean:
	rm -rf .venv out
