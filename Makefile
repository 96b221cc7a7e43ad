# Each target sets up what it needs, in an environment of its own. `make help` lists the targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= out
# The oldest Python that pyproject.toml claims, by name, or where pyenv installs it.
PYTHON_OLDEST ?= $(firstword $(shell python3.10 -c "import sys; print(sys.executable)" 2>/dev/null) \
  $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10) python3.10)
PYTHON_NEWEST ?= $(PYTHON)
COMPILERS ?=
ADAPTERS := peft==0.21.2 accelerate==1.15.0 psutil==7.2.2
ROBOTICS := lerobot==0.4.4 draccus==0.10.0 mergedeep==1.3.4 typing-inspect==0.9.0 einops==0.8.2
ROBOTICS_WITHOUT := accelerate datasets deepdiff imageio serial torchvision transformers \
  lerobot.datasets lerobot.policies.groot lerobot.policies.xvla

# Without an NVIDIA GPU, torch's CPU build spares gigabytes of CUDA libraries. Where pip is
# configured to find wheels in a folder (find-links), nothing is added, and pip's own settings decide.
# To choose yourself: make TORCH_SOURCE="--index-url ..." test
ifndef TORCH_SOURCE
ifeq ($(shell uname -s)$(shell command -v nvidia-smi)$(shell $(PYTHON) -m pip config list 2>/dev/null | grep find-links),Linux)
TORCH_SOURCE := --extra-index-url https://download.pytorch.org/whl/cpu
endif
endif

NATIVE := $(wildcard kernels/csrc/*)
SAMPLE := --steps 20 -n 60 --seed 0

.PHONY: help sample verify test test-slow test-oldest test-newest test-adapters test-robotics gpu gpu-rehearsal predict bench bench-avx2 bench-compare docs lint types wheel-check sanitize \
  same-bits build-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH_SOURCE) torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,bench,lint,docs]"
	touch $@

# The two ends of what pyproject.toml claims: see docs/VERSIONS.md.
.venv-oldest/.installed: pyproject.toml setup.py constraints-oldest.txt $(NATIVE)
	test -x .venv-oldest/bin/python || $(PYTHON_OLDEST) -m venv .venv-oldest || \
	  { echo "test-oldest needs Python 3.10: make test-oldest PYTHON_OLDEST=/path/to/python3.10"; exit 1; }
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt $(TORCH_SOURCE) torch
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[test,bench]"
	touch $@

.venv-newest/.installed: pyproject.toml setup.py $(NATIVE)
	test -x .venv-newest/bin/python || $(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade $(TORCH_SOURCE) torch
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test,bench]"
	touch $@

# Its requirements are not installed: they pin older versions of torch and diffusers, and load gigabytes of data tools.
.venv-robotics/.installed: Makefile tools/borrowed_environment.py | $(VENV)/.installed
	rm -rf .venv-robotics
	$(BIN)/python tools/borrowed_environment.py .venv-robotics $(ROBOTICS) $(addprefix --stand-in ,$(ROBOTICS_WITHOUT))
	touch $@

# With accelerate installed, diffusers loads weights in another way: the other tests run as without it.
.venv-adapters/.installed: Makefile tools/borrowed_environment.py | $(VENV)/.installed
	rm -rf .venv-adapters
	$(BIN)/python tools/borrowed_environment.py .venv-adapters $(ADAPTERS)
	touch $@

sample: $(VENV)/.installed ## draw a labelled grid of pictures with the model that ships here: out/grid.png
	mkdir -p $(OUT)
	$(BIN)/ddim-fast sample $(SAMPLE) --out $(OUT)/grid.png --trajectory $(OUT)/trajectory.gif

verify: $(VENV)/.installed ## check every backend against the paper, Triton's without a GPU: out/verify-*.html
	mkdir -p $(OUT)
	failed=0; for backend in cpu reference triton; do \
	  $(BIN)/ddim-fast verify $$backend --json $(OUT)/verify-$$backend.json --html $(OUT)/verify-$$backend.html || failed=1; \
	done; exit $$failed

test: $(VENV)/.installed ## run the tests, one process per processor
	$(BIN)/pytest -n auto

test-slow: $(VENV)/.installed ## run the long sweeps
	$(BIN)/pytest -m slow -n auto

test-oldest: .venv-oldest/.installed ## run the tests on the oldest versions that pyproject.toml claims (downloads gigabytes)
	.venv-oldest/bin/python tools/versions.py
	.venv-oldest/bin/pytest -n auto

test-newest: .venv-newest/.installed ## run the tests on the newest released versions (downloads gigabytes)
	.venv-newest/bin/python tools/versions.py
	.venv-newest/bin/pytest -n auto

test-adapters: .venv-adapters/.installed ## run the tests against peft and accelerate
	.venv-adapters/bin/python -m pytest -m adapters tests/integrations/test_adapters_and_offload.py

test-robotics: .venv-robotics/.installed ## run the tests against lerobot's policies
	.venv-robotics/bin/python -m pytest -m robotics tests/integrations/test_lerobot.py

gpu: $(VENV)/.installed ## run and time everything that needs a CUDA device: out/gpu/gpu.json
	OUT=$(OUT)/gpu PYTHON=$(abspath $(BIN)/python) tools/gpu_run.sh --minutes 60

gpu-rehearsal: $(VENV)/.installed ## run that on the CPU, from a bare copy, with stand-ins for the device: no number means anything
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	  git ls-files --cached --others --exclude-standard | tar cf - -T - | tar xf - -C "$$copy" && \
	  cp kernels/_cpu_step*.so "$$copy/kernels/" && \
	  OUT=$(abspath $(OUT))/gpu-rehearsal PYTHON=$(abspath $(BIN)/python) "$$copy/tools/gpu_run.sh" --rehearse

predict: $(VENV)/.installed ## count the GPU kernels' machine code, and predict their share of bandwidth: no GPU needed
	$(BIN)/python -m ddim_fast.gpu_lab.machine_code

bench: $(VENV)/.installed ## time the step, loops and whole pipelines against PyTorch, torch.compile and diffusers: out/bench.json
	mkdir -p $(OUT)
	$(BIN)/pytest benchmarks --benchmark-json=$(OUT)/bench.json

# Code that torch.compile has kept for one instruction set gives wrong results, or crashes, under another.
bench-avx2: $(VENV)/.installed ## the same as on a processor without AVX-512
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 DDIM_FAST_INSTRUCTION_SET=avx2 \
	  TORCHINDUCTOR_CACHE_DIR=$(abspath $(OUT))/inductor-avx2 $(MAKE) bench

bench-compare: $(VENV)/.installed ## compare A=before.json with B=after.json: what got slower or faster
	$(BIN)/python benchmarks/compare.py $(A) $(B)

lint: $(VENV)/.installed types ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## check the types of the package and of a user's script with mypy
	tools/check_types.sh $(BIN)

docs: $(VENV)/.installed ## build these pages and the reference as a site, strictly: out/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going -q docs $(OUT)/docs

wheel-check: $(VENV)/.installed ## build the sdist and the wheel, and use the wheel outside the repository
	tools/check_wheel.sh $(BIN)/python

sanitize: $(VENV)/.installed ## run the tests of the C++ kernel under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh $(BIN)

same-bits: ## compare all instruction sets of the C++ kernel bit by bit, AVX-512 emulated by AVX2 (needs only a C++ compiler)
	tools/same_bits.sh

build-check: $(VENV)/.installed ## compile the C++ kernel with gcc, old and new clang, and for aarch64: no warnings allowed
	tools/build_check.sh $(BIN)/python $(COMPILERS)

clean: ## remove everything that was built
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-adapters .venv-robotics build dist out *.egg-info kernels/*.so
