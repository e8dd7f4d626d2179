# `make demo` and `make test` need nothing but Python 3.11+ and the internet for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt

.PHONY: demo test lint types suite docs install install-dev clean

demo: install
	$(BIN)/umamba demo

test: lint types suite

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

suite: install-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

docs: install-docs
	$(BIN)/mkdocs build --strict

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-docs: $(VENV)/.installed-docs

# torch first, so that pip takes the build that the constraints name and no other.
$(VENV)/.installed: pyproject.toml setup.py constraints/cpu.txt $(wildcard umamba/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info site umamba-demo
