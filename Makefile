# Two commands are all a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU_SECONDS ?= 480
EMPTY :=
COMMA := ,
CACHES := $(foreach i,2 3 4 5 6,taylor-seer:interval=$(i)) $(foreach t,0.1 0.15 0.2,first-block:threshold=$(t)) \
	$(foreach t,0.03 0.06,mag:threshold=$(t)) \
	$(foreach w,2:warm_up=0.45 3:warm_up=0.45 4:warm_up=0.33,taylor-seer:interval=$(w))
STACKS := digest,tangent$(subst $(EMPTY) ,,$(foreach cache,$(CACHES),$(COMMA)$(cache)/dense$(COMMA)$(cache)/digest$(COMMA)$(cache)/tangent))
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# pip shows its bars on a terminal; elsewhere a line for each large file. A pipe hides its exit code, which a file keeps.
LARGE := (Downloading|Using cached) .* \([0-9.]+ [MG]B\)|Installing collected packages|Successfully installed
INSTALL = install() { $(PIP) --constraint constraints.txt "$$@"; }; \
	if [ -t 1 ]; then install $(1); else { install $(1) || touch $(VENV)/.failed; } | grep --line-buffered -oE '$(LARGE)'; \
	! rm $(VENV)/.failed 2>/dev/null; fi
# The kernels must compile with what torch 2.11 comes with, too: a second Triton, for the tests alone.
SECOND_TRITON := $(PIP) --quiet --no-deps --upgrade --target $(VENV)/triton-3.6
LOWEST := $(PIP) --quiet --upgrade --target $(VENV)/diffusers-0.40

DEMO := taylor-seer:interval=2/dense,digest,taylor-seer:interval=2/digest
DEMO_OUT := $(or $(OUT),out/demo)

# Another Diffusers, ahead of the environment's own: DIFFUSERS=0.40.0, or the newest that pip offers.
WALK := .walk/$(or $(DIFFUSERS),newest)
WALKED ?= tests/library/test_walk.py tests/library/test_identity.py

# A machine with a GPU may have no network and no environment of ours: its own Python, our folders, wheels if carried.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
FOLDERS := .whl/site:.:kernels:pipelines:eval

.PHONY: help demo test docs figures stack stack-tables gpu gpu-wheels gpu-tables walk lint format wheel clean

help:
	@echo "make demo    generate and compare videos of the embedded model: dense, a step cache, sparse attention, both"
	@echo "make test    format, lint, types and all tests"
	@echo "make docs    build the manual into out/site, strictly; every figure and table in it is committed"
	@echo "make stack   measure step caches with and without sparse attention: hours on one core, goes on where it stopped"
	@echo "make stack-tables  write its tables into README.md and docs/stack.md, its chart into docs/figures"
	@echo "make figures draw the figures of the docs, light and dark, into docs/figures; about a minute"
	@echo "make gpu     in some minutes, all that a CUDA device makes of the kernels; GPU_SECONDS=480, OUT=out/gpu"
	@echo "make gpu-wheels  download what runs whole models on a GPU machine that has no network"
	@echo "make gpu-tables  write the tables of eval/results/gpu into README.md and docs/gpu.md"
	@echo "make walk    every transformer class of another Diffusers, and what is new in it; DIFFUSERS=0.40.0, default the newest"
	@echo "make wheel   build the wheel and try it in an environment of its own"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove environments and outputs"

$(VENV)/.user: pyproject.toml constraints.txt
	@echo "installing torch, Diffusers and diffsparse into $(VENV), once: some minutes"
	$(PYTHON) -m venv $(VENV)
	@$(call INSTALL,--editable ".[all]")
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@echo "installing what the tests want into $(VENV), once: some minutes"
	@$(call INSTALL,--editable ".[dev]")
	$(SECOND_TRITON) "triton==3.6.0; sys_platform == 'linux'"
	$(LOWEST) --no-deps diffusers==0.40.0 && $(LOWEST) httpx  # which it wants, and later ones don't
	@touch $@

demo: $(VENV)/.user
	@echo "demo: dense, a step cache, sparse attention, both; under two minutes, on one core"
	@OMP_NUM_THREADS=1 $(BIN)/diffsparse evaluate --model tiny --strategy $(DEMO) --sparsity 0.8 --steps 10 --prompts 2 --out $(DEMO_OUT)
	@echo
	@echo "look at $(DEMO_OUT)/sheet.png, then:"
	@echo "  $(BIN)/diffsparse generate --speed balanced --out first.mp4  # a video, both on"
	@echo "  $(BIN)/diffsparse models  # what else has a name here; make test tries this machine"
	@echo "  README.md, then docs/  # one line of Python puts both on a pipeline of yours"

test: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the manual is in out/site/index.html"

stack: $(VENV)/.user
	for scale in 1 5; do \
		OMP_NUM_THREADS=1 $(BIN)/diffsparse evaluate --strategy "$(STACKS)" --prompts 12 --guidance-scale $$scale \
			--out out/stack-guidance-$$scale && \
		OMP_NUM_THREADS=1 $(BIN)/diffsparse evaluate --strategy taylor-seer:interval=2/digest --sparsity 0.65,0.7 --prompts 12 \
			--guidance-scale $$scale --out out/stack-guidance-$$scale && \
		cp out/stack-guidance-$$scale/results.json eval/results/stack-guidance-$$scale.json || exit; \
	done
	$(MAKE) stack-tables

figures: $(VENV)/.user
	OMP_NUM_THREADS=1 $(BIN)/python -m diffsparse_eval.figures

stack-tables: $(VENV)/.user
	$(BIN)/python -m diffsparse_eval.stack
	$(BIN)/python -m diffsparse_eval.figures chart-stack

gpu:
	@if ls .whl/*.whl >/dev/null 2>&1; then \
		$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --root-user-action ignore \
			--target .whl/site .whl/*.whl; fi
	@PYTHONPATH=$(FOLDERS) $(GPU_PYTHON) -m diffsparse_eval.gpu --out $(or $(OUT),out/gpu) --seconds $(GPU_SECONDS)

gpu-wheels:
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --platform any --python-version 3.12 --dest .whl \
		--constraint constraints.txt diffusers rich ftfy wcwidth lazy-loader platformdirs

gpu-tables: $(VENV)/.user
	$(BIN)/python -m diffsparse_eval.gpu.table

walk: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(WALK) \
		diffusers$(if $(DIFFUSERS),==$(DIFFUSERS))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(WALK) httpx  # older ones want it
	PYTHONPATH=$(WALK):.:kernels:pipelines:eval:tests $(BIN)/python -m support.walk --print
	PYTHONPATH=$(WALK) $(BIN)/pytest -rs $(WALKED)

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls -t dist/*.whl | head -1)[cli]"
	cd $(VENV)-wheel && bin/diffsparse doctor

clean:
	rm -rf $(VENV) $(VENV)-wheel .walk dist out .pytest_cache .mypy_cache .ruff_cache
