# Two commands are all a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The kernels must compile with what torch 2.11 comes with, too: a Triton aside, for the tests alone.
SECOND_TRITON := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton-3.6

.PHONY: help demo test lint format wheel clean

help:
	@echo "make demo    generate and compare videos of the embedded model: dense, AdaSpa, Digest, random"
	@echo "make test    format, lint, types and all tests"
	@echo "make wheel   build the wheel and try it in an environment of its own"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove environments and outputs"

$(VENV)/.user: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(INSTALL) --editable ".[dev]"
	$(SECOND_TRITON) "triton==3.6.0; sys_platform == 'linux'"
	@touch $@

demo: $(VENV)/.user
	$(BIN)/diffsparse evaluate --model tiny --strategy adaspa,digest,random --sparsity 0.8 --prompts 2 --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd $(VENV)-wheel && bin/diffsparse doctor

clean:
	rm -rf $(VENV) $(VENV)-wheel dist out .pytest_cache .mypy_cache .ruff_cache
