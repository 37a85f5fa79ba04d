# One script per chore; CI runs the same ones.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, start a router and two engines on the bundled model, and serve on http://127.0.0.1:8000"
	@echo "make test    install, run the test suite"
	@echo "make check   install, lint, format check, types, import contracts"
	@echo "make bench   install, run every CPU benchmark (minutes); results are printed and written to perf/out/"
	@echo "make clean   remove the virtual environment and caches"

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python (3.11 or later)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or later is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/microserve up $(ARGS)

test: install
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests perf examples
	$(BIN)/lint-imports

bench: install
	@mkdir -p perf/out
	@set -e; for subject in prefix_tree scheduler bus transfer subrequests first_token router cpu_engine serving strategies metrics top; do \
	  echo "== $$subject"; $(BIN)/python -m perf.$$subject --json perf/out/$$subject.json; done

clean:
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis perf/out
	find . -name __pycache__ -prune -exec rm -rf {} +
