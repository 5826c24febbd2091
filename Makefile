# Two commands: `make demo` explains real inputs into out/, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is installed of PyTorch, and the releases that `make test-versions` takes instead.
TORCH ?= torch
RELEASES ?= 2.9.0 2.14.1 2.15.0
# Tests run in so many processes at a time, of one thread each, but for those that set another number.
WORKERS ?= 2
# A pip before 24.2 does not read the system's certificates, without which no index is reached
# behind a proxy that has its own; pip's own `cert` setting wins over this one.
CERTIFICATES ?= $(firstword $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt))
PIP := REQUESTS_CA_BUNDLE="$${REQUESTS_CA_BUNDLE:-$${CURL_CA_BUNDLE:-$(CERTIFICATES)}}" \
	$(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: demo test lint types imports unit test-versions bench bench-gpu kernels larger accuracy format clean

demo: $(VENV)/installed
	$(BIN)/saliency-fast demo --out out

test: lint types imports unit

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test-installed
	$(BIN)/mypy

imports: $(VENV)/test-installed
	$(BIN)/lint-imports

unit: $(VENV)/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadfile
	$(BIN)/python -m pytest benchmarks --benchmark-disable

# The suite on other releases of PyTorch, with torchvision. Each has a copy of the sources, since C++
# ops fit one release, and an environment of 3 to 7 GB: `make test-torch-2.15.0` takes one of them.
test-versions: $(RELEASES:%=test-torch-%)

test-torch-%:
	mkdir -p build/torch-$*
	git ls-files --cached --others --exclude-standard | tar -cf - -T - | tar -xf - -C build/torch-$*
	grep -vE '^(torch|triton)==' constraints.txt > build/torch-$*/constraints.txt
	touch -r constraints.txt build/torch-$*/constraints.txt
	$(MAKE) -C build/torch-$* unit VENV=.venv TORCH="torch==$* torchvision"

bench: $(VENV)/test-installed
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.end_to_end --device cpu
	$(BIN)/python -m benchmarks.lean
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.requests
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.tables

# What compilers make of the GPU kernels: needs nvcc and Triton, and no GPU.
kernels: $(VENV)/test-installed
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.tables

# Inputs larger than memory: three minutes and 14 GiB.
larger: $(VENV)/test-installed
	$(BIN)/python -m benchmarks.larger

# How far maps are off, how well the estimate tells it, and what metrics say of the built-in models: ten
# minutes more. Then how many samples Captum takes for the same error: half an hour more.
accuracy: $(VENV)/test-installed
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.judged
	$(BIN)/python -m benchmarks.smoothgrad
	$(BIN)/python -m benchmarks.tables

# Uses the Python that runs it, so that a GPU machine's own PyTorch is measured.
bench-gpu:
	$(PYTHON) -m benchmarks.gpu --out benchmarks/results

format: $(VENV)/test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist out *.egg-info saliency_fast/*.so .pytest_cache .ruff_cache .mypy_cache

# Building against the installed torch needs it in the environment, hence no build isolation.
$(VENV)/installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "== 1 of 2: PyTorch into $(VENV). From PyPI on Linux 3 GB with its CUDA libraries: minutes, once."
	$(PIP) $(TORCH) numpy "setuptools>=77" wheel ninja
	@echo "== 2 of 2: saliency_fast, with its C++ ops where a compiler is found: a minute or two."
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/test-installed: $(VENV)/installed
	@echo "== What the tests need into $(VENV): 700 MB, a minute or two, once."
	$(PIP) --no-build-isolation --editable ".[test,benchmark]"
	touch $@
