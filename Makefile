# make demo    set up, replay two scenarios in simulation and on this machine, compare, explain
# make test    set up, run the suite
# Each works first on a fresh clone and makes its own .venv; the next call starts at once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# More for pytest: make test ARGS="-k fence -x"
ARGS   ?=
# Test processes side by side; make test JOBS=0 is one after the other, with what tests print (ARGS=-s)
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -lt 4 ] && echo $$n || echo 4)
# Where torch comes from. A CPU-only machine that fetches it from PyPI gets a CUDA runtime along with it; spare that with
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Empty where there is a GPU: then torch and nixl are the newest that the ranges allow.
CONSTRAIN = $(if $(shell ls /dev/nvidia[0-9]* 2>/dev/null || nvidia-smi -L 2>/dev/null),,-c constraints-cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-compare bench-peer bench-controller fast compare-long scenarios-real search hardware hardware-bundle clean demo-vllm test-vllm bench-vllm

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3
	@echo "Also: setup, lint, format, bench, bench-peer, bench-controller, fast, search, compare-long, scenarios-real, clean"
	@echo "On hardware: hardware, hardware-bundle"
	@echo "With vLLM, in a venv of its own: demo-vllm, test-vllm, bench-vllm"

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvmove needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "could not make $(VENV): is python3-venv installed?"; exit 1; }
	@echo "installing kvmove into $(VENV) (once; the real world's torch and nixl are about 1 GB)"
	@$(PIP) install -qq $(CONSTRAIN) -e ".[dev,service,report]"
	@{ $(PIP) install -qq $(CONSTRAIN) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy pyzmq \
	   && $(PIP) install -qq $(CONSTRAIN) -e ".[real]"; } \
	 || echo "the real world is not installed: torch or nixl has no build for this machine. Simulation works; real runs say so and are skipped."
	@touch $@

demo: $(VENV)/.stamp
	@$(BIN)/kvmove demo

# Two vLLM engines and a prompt that moves from one to the other, in a venv of its own; and the same as a suite.
VLLM   := .venv-vllm

$(VLLM)/.stamp: examples/vllm/venv.sh pyproject.toml
	@TORCH_INDEX=$(TORCH_INDEX) sh examples/vllm/venv.sh $(VLLM) $(PYTHON)
	@touch $@

demo-vllm: $(VLLM)/.stamp
	@$(VLLM)/bin/python -m examples.vllm.demo $(ARGS)

test-vllm: $(VLLM)/.stamp
	$(VLLM)/bin/python -m pytest tests/vllm --timeout 600 $(ARGS)

# Time to first token: cold, moved, local; and what moves cost an engine at work. For a machine that does nothing else.
bench-vllm: $(VLLM)/.stamp
	@$(VLLM)/bin/python -m examples.vllm.ttft $(ARGS)
	@$(VLLM)/bin/python -m examples.vllm.busy

test: $(VENV)/.stamp
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check kvmove tests/cli tests/test_imports.py setup.py
	$(BIN)/mypy kvcore kvsim kvreal kvmove

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format kvmove tests/cli tests/test_imports.py setup.py

# What is in tests/bench, saved under .benchmarks/. `make bench-compare` runs it again beside the last saved run: which
# became slower, and by how much. BENCH names a part of it: make bench-compare BENCH=tests/bench/test_pools.py
BENCH ?= tests/bench
bench: $(VENV)/.stamp
	$(BIN)/python -m pytest $(BENCH) -o addopts="--import-mode=importlib" --benchmark-only --benchmark-autosave -s $(ARGS)

bench-compare: $(VENV)/.stamp
	$(BIN)/python -m pytest $(BENCH) -o addopts="--import-mode=importlib" --benchmark-only --benchmark-autosave \
	  --benchmark-compare --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

# The reference, LMCache 0.5.6 on a CPU, in an environment of its own: `kvmove bench` has it beside us from then on. It is
# fetched from PyPI, is of no use to anything else, and goes with `rm -r .venv-reference`.
PEER ?= .venv-reference
bench-peer: $(PEER)/.stamp
	@echo "the reference is in $(PEER):" \
	  "$(if $(filter .venv-reference,$(PEER)),\`kvmove bench\` finds it there,export KVMOVE_REFERENCE_PYTHON=$(abspath $(PEER))/bin/python)"

$(PEER)/.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the reference needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make bench-peer PYTHON=python3.12")'
	@$(PYTHON) -m venv $(PEER) || { echo "could not make $(PEER): is python3-venv installed?"; exit 1; }
	@echo "installing the reference, LMCache 0.5.6 with torch and NIXL, into $(PEER) (once; some minutes, 2 to 6 GB)"
	@$(PEER)/bin/python -m pip --disable-pip-version-check install -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0 \
	 && $(PEER)/bin/python -m pip --disable-pip-version-check install -qq nixl==1.5.1 lmcache==0.5.6 \
	 || { echo "the reference is not installed: see above. What is there already is used when this is run again."; exit 1; }
	@LMCACHE_LOG_LEVEL=WARNING $(PEER)/bin/python -c "import lmcache.v1.cache_engine" \
	 || { echo "the reference does not start here: see above. \`kvmove bench\` goes on without it."; exit 1; }
	@touch $@

# The controller, beside LMCache 0.5.6 in the same run where `make bench-peer` has brought it. Prints ratios. The last one asserts: 64 clients while instances restart.
bench-controller: $(VENV)/.stamp
	$(BIN)/python -m pytest tests/bench/test_controller_speed.py tests/bench/test_controller_load.py \
	  -o addopts="--import-mode=importlib" -s $(ARGS)

# The compiled form of the core, in build/fast, and the suite on it. The source tree stays pure.
fast: $(VENV)/.stamp
	@rm -rf build/fast && mkdir -p build/fast
	@cp -r kvcore kvsim kvreal kvmove scenarios profiles docs tests *.md setup.py pyproject.toml Makefile build/fast/
	cd build/fast && KVMOVE_COMPILE=1 ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/fast && PYTHONPATH=$(CURDIR)/build/fast ../../$(BIN)/python -m kvmove --version
	cd build/fast && PYTHONPATH=$(CURDIR)/build/fast ../../$(BIN)/python -m pytest -n $(JOBS) -m "not real" $(ARGS)

search: $(VENV)/.stamp
	@$(BIN)/kvmove search $(ARGS)

# Thousands of generated scenarios: tiny and whole ones simulated, whole ones on real processes and compared. `make test`
# does 340 and 34. What fails is shrunk to out/swarm. COUNT and REAL say how many; SEED where the swarm begins.
compare-long: $(VENV)/.stamp
	$(BIN)/kvmove swarm --count $(or $(COUNT),40000) --seed $(or $(SEED),0)
	$(BIN)/kvmove swarm --size whole --count $(or $(COUNT),10000) --seed $(or $(SEED),0)
	KVMOVE_EXAMPLES=$(or $(EXAMPLES),2000) KVMOVE_REAL_EXAMPLES=$(or $(REAL),300) \
	  $(BIN)/python -m pytest tests/compare --timeout 7200 -s $(ARGS)

# Every scenario file on real processes, those too that wait long for a node to be found dead.
scenarios-real: $(VENV)/.stamp
	KVMOVE_REAL_ALL=1 $(BIN)/python -m pytest tests/real/test_scenarios.py $(ARGS)

# What this machine can do, all of it (docs/hardware-suite.md): some minutes a transport. Its report goes to out/hardware.
hardware: $(VENV)/.stamp
	@mkdir -p out/hardware
	$(BIN)/python -m pytest tests/hardware --junitxml out/hardware/suite.xml --hardware-json out/hardware/suite.json $(ARGS)

# One archive of it for a machine without a network, run here once if there is such a Python (BUNDLE_PYTHON names one).
hardware-bundle: $(VENV)/.stamp
	$(BIN)/python tests/hardware/bundle.py --python $(or $(BUNDLE_FOR),3.12) --cuda $(or $(CUDA),13) \
	  --check --quick -q --transports socket,nixl $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
