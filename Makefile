# `make tour` shows what this is; `make test` checks everything. Both set up .venv first, and only once.
#
# On Linux the plain torch wheel carries CUDA. To save gigabytes, give pip the place of PyTorch's CPU wheels:
#     make tour PIP_EXTRA_INDEX_URL=...        (PyTorch's installation page, compute platform CPU, has it)
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' requirements.lock)
TORCHVISION := 0.28.0# the one for this torch
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help tour test portable fuzz torchvision lab lint notebooks recipes readme results bench peers llama vllm ray load compat clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' Makefile | expand -t 16

tour: .venv/.installed ## a real vision-language model, shrunk, in under 3 minutes; writes tour.html
	@$(BIN)/mmrecipes tour

# Two tests, and two notebooks, at once, of one thread each: with more threads than cores PyTorch slows down many times. What
# notebooks time is then not what they would measure alone, and nothing that is checked depends on it.
test: lint ## lint, unit tests, every recipe alone, every notebook
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval notebooks

# What PyTorch and oneDNN are held back to, as on lesser CPUs. PyTorch still sees which instructions the CPU has, so oneDNN must
# keep VNNI where there is VNNI: below it, its 8-bit sums overflow, which PyTorch then does not expect.
portable: .venv/.installed ## every notebook as on three other CPUs: AVX2, one thread; no vectors; AVX-512 with VNNI (by hand)
	@ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-cell-timeout=900 notebooks
	@ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 $(BIN)/python -m pytest --nbval --nbval-cell-timeout=900 notebooks
	@ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI OMP_NUM_THREADS=2 $(BIN)/python -m pytest --nbval --nbval-cell-timeout=900 notebooks

fuzz: .venv/.installed ## property tests on new examples, a thousand each (by hand)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile=random -m hypothesis tests

# Beside .venv, which has none. num2words is what SmolVLM's whole processor needs besides.
torchvision: .venv/.installed ## processors give the same with torchvision as without, every family (by hand)
	@$(BIN)/pip install -qq --no-deps --upgrade --target .venv-torchvision torchvision==$(TORCHVISION) num2words docopt
	@OMP_NUM_THREADS=1 $(BIN)/python tools/torchvision_check.py .venv-torchvision

lab: .venv/.installed ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=. notebooks

lint: .venv/.installed ## style, notebook hygiene, generated files in step
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/python tools/hygiene.py $(NOTEBOOKS)
	@$(BIN)/python tools/recipes.py --check
	@$(BIN)/python tools/readme.py --check

notebooks: .venv/.installed ## execute every notebook in place (or N=notebooks/00_start_here.ipynb alone)
	@$(BIN)/ruff format --quiet notebooks
	@env -u MODEL $(BIN)/python tools/run_notebooks.py $(N)
	@$(BIN)/python tools/recipes.py
	@$(BIN)/python tools/readme.py

recipes: .venv/.installed ## extract recipes/*.py from the notebooks
	@$(BIN)/python tools/recipes.py

readme: .venv/.installed ## fill the generated parts of README.md and of the notebooks' first cells
	@$(BIN)/python tools/readme.py

results: .venv/.installed ## measure what results/ and the README say, on this machine
	@$(BIN)/python benchmarks/results.py
	@$(BIN)/python tools/readme.py

bench: .venv/.installed ## the real-size twin in every runtime, beside the peers: about an hour
	@$(BIN)/python benchmarks/bench.py
	@$(BIN)/python tools/readme.py

# No cache: a wheel built with other flags, or for another CPU, would be taken for this one's.
peers: .venv-peers/.installed ## llama.cpp for `make bench`, built from source in an environment of its own: 10 minutes (by hand)

.venv-peers/.installed: benchmarks/peers.txt requirements.lock
	@echo "building llama.cpp for this CPU into .venv-peers: about 10 CPU-minutes, once"
	@test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	@CMAKE_ARGS=-DGGML_NATIVE=ON .venv-peers/bin/pip install -qq --no-cache-dir -r benchmarks/peers.txt
	@touch $@

# Where its AMX kernels end in an illegal instruction: make llama LLAMA_FLAGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON ..." without AMX.
LLAMA_FLAGS ?= -DGGML_NATIVE=ON

llama: .venv-peers/bin/llama-server ## llama.cpp's server for benchmarks/serve_speed.py, from the same source: 20 minutes (by hand)

.venv-peers/bin/llama-server: .venv-peers/.installed
	@rm -rf .venv-peers/source && mkdir .venv-peers/source
	@cd .venv-peers/source && ../bin/pip download -qq --no-deps --no-binary :all: $$(grep ^llama-cpp-python ../../benchmarks/peers.txt)
	@cd .venv-peers/source && tar -xzf *.tar.gz --strip-components=1
	@cd .venv-peers/source && cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF $(LLAMA_FLAGS) \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF > cmake.log
	@cmake --build .venv-peers/source/build --target llama-server --parallel > .venv-peers/source/build.log
	@cp .venv-peers/source/build/bin/llama-server $@

# 3 GB. Its torch is the lock's; torchvision and its like, which vLLM asks for, want CUDA's, and it runs without them.
vllm: .venv/.installed .venv-vllm/.installed ## mini-vlm as W8A8 and W4A16 in vLLM's server, in an environment of its own (by hand)
	@$(BIN)/python benchmarks/vllm_check.py

.venv-vllm/.installed: benchmarks/vllm.txt requirements.lock
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install -qq torch==$(TORCH)
	@.venv-vllm/bin/pip install -qq -r benchmarks/vllm.txt
	@.venv-vllm/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

load: .venv/.installed ## mmrecipes serve under load and faults, 40 minutes: results/serve.json (by hand)
	@$(BIN)/python benchmarks/serve.py

ray: .venv-ray/.installed ## Ray Serve for benchmarks/scale_out.py, in an environment of its own (by hand)

.venv-ray/.installed: benchmarks/ray.txt requirements.lock
	@test -x .venv-ray/bin/pip || $(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/pip install -qq -r benchmarks/ray.txt
	@touch $@

compat: .venv/.installed ## every family of models through every technique and runtime: about an hour (by hand)
	@$(BIN)/python tools/compat.py

clean: ## remove what was generated; .venv and runs/ (training checkpoints) stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis tour.html
	find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Building matplotlib's font list here keeps its message out of the first notebook.
.venv/.installed: requirements.lock pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		f"mmrecipes needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 (or where yours is)")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "installing torch $(TORCH) and $$(grep -c == requirements.lock) packages into .venv: a few minutes, once"
	@$(BIN)/pip install -qq torch==$(TORCH)
	@$(BIN)/pip install -qq --no-deps -r requirements.lock
	@$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import matplotlib.font_manager'
	@touch $@
