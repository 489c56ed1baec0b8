PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check perf tables test-slow install

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

# What a table compares its defenses with; nothing is augmented in the tuning of repair methods.
AGAINST := clip+aug
table-tuning: AGAINST := clip
table-defenses: AGAINST := clip clip+aug
table-defenses: BRIEF := yes
table-dose: FIT := dose

TABLES := main stronger triggers attacks dose tuning defenses ablation adaptive

# Hours from nothing; cells whose records are committed are not run again, and a run that is stopped continues.
tables: install $(TABLES:%=table-%)
	$(BIN)/python -m benchmark.report.insert README.md results/reference/main/table.md "main table"
	$(BIN)/python -m benchmark.report.insert README.md results/reference/defenses/brief.md "defenses table"
	$(BIN)/python -m benchmark.report.reproduction docs/reproduction.md docs/metrics.md

table-%: install
	$(BIN)/bench matrix results/reference/$*/grid.toml
	$(BIN)/bench report --results results/reference/$* --format md --out results/reference/$*/table.md
	$(BIN)/bench report --results results/reference/$* --format csv --out results/reference/$*/table.csv
	$(foreach reference,$(AGAINST),$(BIN)/bench report --results results/reference/$* --against $(reference) --out results/reference/$*/against-$(reference).csv &&) true
	$(if $(BRIEF),$(BIN)/bench report --results results/reference/$* --format brief --out results/reference/$*/brief.md)
	$(if $(FIT),$(BIN)/bench report --results results/reference/$* --fit $(FIT) --out results/reference/$*/fit.md)
	$(BIN)/bench report --results results/reference/$* --verify
