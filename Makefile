# The two commands of the README are `make serve` and `make test`; everything else is for people who change Tandem.
PYTHON ?= python3
BIN := .venv/bin
NICE_PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup serve test lint format bench bench-quick peers-check readme clean evidence-status

serve: .venv/serve.stamp  ## the bundled policy and reward model on http://127.0.0.1:8000 (ARGS="…" is passed on)
	$(BIN)/tandem serve $(ARGS)

test: .venv/dev.stamp .venvs/aot  ## everything CI checks, with the time per area
	$(BIN)/python tests/areas.py $(AREAS)

setup: .venv/dev.stamp  ## .venv with everything that tests and tools need

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.stamp  ## start-up and streaming of the bundled models; `tandem bench --help` has the rest
	$(BIN)/tandem bench startup $(ARGS)

bench-quick: .venv/dev.stamp  ## the figures that a change may move, within three minutes; one more line of results/history.jsonl
	$(BIN)/python -m tandem.benchmarks.quick

peer-%: .venv/dev.stamp  ## another engine in an environment of its own: peer-vllm, -llama.cpp, -ctranslate2, -transformers
	$(BIN)/python -m tandem.benchmarks.peers.setup $*

peers-check: .venv/dev.stamp  ## whether every engine that is set up computes the same model
	$(BIN)/python -m tandem.benchmarks.peers.check $(ARGS)

readme: .venv/dev.stamp  ## README's figures from the records
	$(BIN)/python -m tandem.benchmarks.readme

evidence-%: .venv/dev.stamp  ## what is too heavy for CI; its record lands in docs/evidence/
	$(BIN)/python -m tandem.benchmarks.evidence run $*

evidence-status: .venv/dev.stamp  ## which records are older than the code they are about
	$(BIN)/python -m tandem.benchmarks.evidence status

# A stamp is newer than pyproject.toml when the environment holds what it asks for.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "Tandem needs Python 3.11 to 3.13, not %d.%d: make PYTHON=/path/to/python" % v)'
	@$(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; echo "python3-venv is missing: installing it"; apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv .venv; }

# Without a C++ compiler Tandem runs, but several times slower on a CPU.
.venv/serve.stamp: pyproject.toml $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h) | .venv/bin/python
	@command -v c++ >/dev/null || { echo "a C++ compiler is missing: installing g++"; apt-get update -qq && apt-get install -y -qq g++; } || echo "no C++ compiler: CPUs will compute through PyTorch"
	@echo "Installing Tandem into .venv (once; a minute or two)"
	$(NICE_PIP) -e .
	@touch $@

.venv/dev.stamp: pyproject.toml .venv/serve.stamp
	@echo "Installing the test tools into .venv (once)"
	$(NICE_PIP) -e '.[dev]'
	@touch $@

# The Triton of GPU images with torch 2.11. Kernels are compiled with it, too; it stands beside .venv's packages, on PYTHONPATH.
.venvs/aot: | .venv/dev.stamp
	@echo "Fetching Triton 3.6.0 into .venvs/aot (once)"
	@rm -rf $@.part
	$(NICE_PIP) --no-deps --target $@.part triton==3.6.0
	@mv $@.part $@

clean:
	rm -rf .venv .venvs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
