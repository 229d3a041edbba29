# `make demo` and `make test` work from nothing on a fresh machine: they make the environment in .venv first.
# After that they only install again when pyproject.toml or constraints.txt has changed.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Two test processes with one thread each: more threads than cores make torch several times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

OLDEST := 0.40
OLDER := $(VENV)/older-diffusers

OUT ?= demo
ARGS ?=

.PHONY: help demo test lint types docs unit older-diffusers wheel clean
.NOTPARALLEL:

help:
	@echo 'make demo    make a video with dense and with sparse attention; prints the path of the report'
	@echo '             (make demo ARGS="--density 0.1" OUT=folder)'
	@echo 'make test    everything that must hold: lint, types, docs, unit, older-diffusers'
	@echo 'make lint    ruff, check and format        make types   pyright'
	@echo 'make docs    build the pages into site/    make unit    pytest'
	@echo 'make wheel   build the wheel into dist/    make clean   remove the environment and what was built'

# Threads that wait for one that another program has pushed aside soon give their core away (docs/getting-started.md).
demo: $(VENV)/.installed-demo
	GOMP_SPINCOUNT=3000 $(BIN)/openvsa generate --out $(OUT) $(ARGS)

test: lint types docs unit older-diffusers

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The Triton interpreter is chosen when triton is imported, so its tests have a process of their own.
unit: $(VENV)/.installed-dev
	@command -v chromium >/dev/null || scripts/apt_install.sh chromium
	TRITON_INTERPRET=1 $(PYTEST) -m triton
	$(PYTEST) -m 'not triton'

# The integration again, with the oldest Diffusers that pyproject.toml allows.
older-diffusers: $(VENV)/.installed-older-diffusers
	PYTHONPATH=$(OLDER) $(BIN)/python -c 'import diffusers; assert diffusers.__version__.startswith("$(OLDEST)")'
	PYTHONPATH=$(OLDER) $(PYTEST) -m 'not triton' tests/integrations

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist site

# torch goes in first, pinned, so that nothing installed after it can pull a different build.
$(VENV)/.installed-torch: constraints.txt
	@scripts/venv.sh $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.installed-demo: pyproject.toml $(VENV)/.installed-torch
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-torch
	$(PIP) -e '.[demo,train,triton,hopper,test,docs,dev]'
	@touch $@

$(VENV)/.installed-older-diffusers: Makefile $(VENV)/.installed-dev
	rm -rf $(OLDER)
	$(PIP) 'httpx<1'  # which newer ones no longer ask for
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $(OLDER) 'diffusers==$(OLDEST).*'
	@touch $@
