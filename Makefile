# Commands for a fresh machine, all of which set everything up first (in .venv):
#   make run     render street scenes, train an expert and apprentices, compare them (runs/distill)
#   make test    run the tests but for the slow ones
#   make docs    build the guides and the API reference, build/docs/index.html
# Others: make lint, make clean. PYTHON chooses the interpreter (3.10 or newer), TORCH the torch to install.

PYTHON ?= python3
TORCH ?= torch torchvision
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml Makefile

.PHONY: run test lint docs clean env

run: env
	$(BIN)/rakd distill --study scenes --jobs 2

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

docs: env
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --fresh-env docs build/docs

env: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools numpy
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[train,pretrained,waymo,bench,dev,docs]'
	$(BIN)/python -m rakd_ops
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rakd_ops/*.so rakd_ops/_build_info.py
