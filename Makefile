# Each target sets up what it needs. PYTHON is the interpreter that the environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml gatedkernels/_schemas.py

.PHONY: demo test test-slow sanitize bench bench-check bench-gpu bench-gpu-training aot aot-all lint clean
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

# The CPU operators with gcc's sanitizers, in a copy of the packages: the library in use stays as it is.
SANITIZED := build/sanitize
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/installed
	mkdir -p $(SANITIZED)
	rm -rf $(addprefix $(SANITIZED)/,gatedkernels models training tests)
	cp -r gatedkernels models training tests pyproject.toml $(SANITIZED)/
	rm -f $(SANITIZED)/gatedkernels/*.so
	GATEDKERNELS_SANITIZE=1 GATEDKERNELS_CUDA=0 $(BIN)/python setup.py -q build_ext \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	cd $(SANITIZED) && PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(RUNTIMES)" \
		$(CURDIR)/$(BIN)/python -m pytest -q -x -p no:cacheprovider -m "not slow and not gpu" \
		--ignore tests/ops/test_cuda_host.py --ignore tests/ops/test_triton.py tests/ops tests/test_inference.py

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

# The Triton kernels, compiled for chips that are not there: registers, shared memory, spills, matrix units. Each kernel
# and each tile once for a chip; aot-all has them all for every type of number.
aot: $(VENV)/installed
	$(BIN)/python bench/aot.py

aot-all: $(VENV)/installed
	$(BIN)/python bench/aot.py --all

# All with another release, which needs nothing else: make aot-3.6.
aot-%:
	test -x build/triton-$*/bin/python || $(PYTHON) -m venv build/triton-$*
	build/triton-$*/bin/pip install --quiet "triton==$*.*"
	build/triton-$*/bin/python bench/aot.py --all

# On a machine with a GPU: offline, with that machine's python and PyTorch, from a bare checkout.
OUT ?= build/gpu
PARTS ?= all
bench-gpu:
	$(PYTHON) -m bench.gpu --out $(OUT) $(PARTS)

TRAINING_OUT ?= build/gpu-training
SECONDS ?= 1800
bench-gpu-training:
	$(PYTHON) -m bench.gpu_training --out $(TRAINING_OUT) --data-dir $(DATA_DIR) --seconds $(SECONDS) $(OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info gatedkernels/*.so
