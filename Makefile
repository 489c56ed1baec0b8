PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check perf tables test-slow install clean-venv

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/bench run --attack backdoor --defense clip --defense clip+aug --defense roclip --defense roclip+aug

test: install
	$(BIN)/pytest

test-slow: install
	$(BIN)/pytest -m slow -n 1

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

perf: install
	$(BIN)/python -m benchmark.perf

tables: install
	$(BIN)/bench matrix results/reference/main/grid.toml
	$(BIN)/bench matrix results/reference/triggers/grid.toml
	$(BIN)/bench matrix results/reference/stronger/grid.toml
	for table in main triggers stronger; do $(BIN)/bench report --results results/reference/$$table --format md --out results/reference/$$table/table.md && $(BIN)/bench report --results results/reference/$$table --format csv --out results/reference/$$table/table.csv || exit 1; done
