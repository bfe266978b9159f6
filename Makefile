# Everything a newcomer or a contributor types; `make help` lists it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Many tests wait for processes that they started, so two files of tests at a time keep two processors busy; 0: one by one.
TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench clean

help: ## Show what can be made.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "trimtab needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[demo,test]'
	@touch $@

setup: $(INSTALLED) ## Make a virtual environment with everything pinned.

demo: $(INSTALLED) ## Watch a pipeline learn from late labels on real data (about 3 minutes).
	$(BIN)/trimtab demo

test: $(INSTALLED) ## Run all tests; real Kafka needs Java 17 and Maven; the console Chromium, Prometheus and PostgreSQL their packages.
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: $(INSTALLED) ## Lint, types, and the order of the rooms.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_rooms.py

format: $(INSTALLED) ## Put the code into its one format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## Install what the benchmarks compare with; see benchmarks/README.md.
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'

clean: ## Remove what was made.
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-report
