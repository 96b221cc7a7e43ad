# Each target does the set-up that it needs, in its own environment. `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= out

# Without an NVIDIA GPU, torch's CPU build spares gigabytes of CUDA libraries. Where pip is configured with wheels of its own
# (find-links), those are used. To choose yourself: make TORCH_SOURCE="--index-url ..." test
ifndef TORCH_SOURCE
ifeq ($(shell uname -s)$(shell command -v nvidia-smi)$(shell $(PYTHON) -m pip config list 2>/dev/null | grep find-links),Linux)
TORCH_SOURCE := --extra-index-url https://download.pytorch.org/whl/cpu
endif
endif

NATIVE := $(wildcard kernels/csrc/*)
SAMPLE := --steps 20 -n 60 --seed 0

.PHONY: help sample verify test test-slow gpu predict bench bench-compare lint wheel-check sanitize same-bits clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_SOURCE) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,bench]"
	touch $@

sample: $(VENV)/.installed ## draw a labelled grid of pictures with the model that ships here: out/grid.png
	mkdir -p $(OUT)
	$(BIN)/ddim-fast sample $(SAMPLE) --out $(OUT)/grid.png --trajectory $(OUT)/trajectory.gif

verify: $(VENV)/.installed ## hold every backend against the paper, Triton's without a GPU: out/verify-*.html
	mkdir -p $(OUT)
	failed=0; for backend in cpu reference triton; do \
	  $(BIN)/ddim-fast verify $$backend --json $(OUT)/verify-$$backend.json --html $(OUT)/verify-$$backend.html || failed=1; \
	done; exit $$failed

test: $(VENV)/.installed ## run the tests, a process per processor
	$(BIN)/pytest -n auto

test-slow: $(VENV)/.installed ## run the long sweeps
	$(BIN)/pytest -m slow -n auto

gpu: $(VENV)/.installed ## run everything that needs a CUDA device, and time it: out/gpu.json
	mkdir -p $(OUT)
	DDIM_FAST_REQUIRE_GPU=1 $(BIN)/pytest -m gpu
	DDIM_FAST_REQUIRE_GPU=1 $(BIN)/python -m benchmarks.gpu --json $(OUT)/gpu.json

predict: $(VENV)/.installed ## count the GPU kernels' machine code, and predict their share of bandwidth: no GPU needed
	$(BIN)/python -m ddim_fast.gpu_lab.machine_code

bench: $(VENV)/.installed ## time the step, loops and whole pipelines against PyTorch, torch.compile and diffusers: out/bench.json
	mkdir -p $(OUT)
	$(BIN)/pytest benchmarks --benchmark-json=$(OUT)/bench.json

bench-compare: $(VENV)/.installed ## say what got slower or faster from A=before.json to B=after.json
	$(BIN)/python benchmarks/compare.py $(A) $(B)

lint: $(VENV)/.installed ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel-check: $(VENV)/.installed ## build the sdist and the wheel, and use the wheel outside the repository
	tools/check_wheel.sh $(BIN)/python

sanitize: $(VENV)/.installed ## run the tests of the C++ kernel under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh $(BIN)

same-bits: ## compare all instruction sets of the C++ kernel bit by bit, AVX-512 emulated by AVX2 (needs a C++ compiler only)
	tools/same_bits.sh

clean: ## remove everything that was built
	rm -rf $(VENV) build dist out *.egg-info kernels/*.so
