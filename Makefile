# Each target sets up what it needs. PYTHON is the interpreter that the environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml gatedkernels/_schemas.py

.PHONY: demo test test-slow bench bench-check lint clean
.DEFAULT_GOAL := demo

# PyTorch first, then the package against it: the libraries serve any PyTorch (stable ABI), and this downloads it once.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "torch>=2.11" torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[train,bench,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/gatedkernels demo

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# The type checker reads the packages as they are installed, models and training inside.
	rm -rf build/typed && mkdir -p build/typed && cp -r gatedkernels build/typed/
	cp -r models training build/typed/gatedkernels/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p gatedkernels

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark
	$(BIN)/python -m bench.report

bench-check: $(VENV)/installed
	$(BIN)/python -m bench.check

clean:
	rm -rf $(VENV) build dist *.egg-info gatedkernels/*.so
