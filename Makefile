# `make up` runs Weft, `make test` proves it. Each installs what it needs first, into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install up test lint format bench reproduce clean

install: .venv/installed

# torch comes first and pinned: an unpinned one brings gigabytes of CUDA libraries.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

up: install
	$(BIN)/weft up

test: install
	$(BIN)/pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m lab.mesh

reproduce: install
	$(BIN)/python -m lab.reproduce

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
