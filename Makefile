# A virtual environment with all that the quickstart and the tests need; any Python from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint types reference notebooks docs check clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/linters: $(VENV)/installed
	$(PIP) -e '.[lint]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python experiments/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Style, spelling and the words of docs/glossary.md.
lint: $(VENV)/linters
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

# No error in base, config, model and flow; elsewhere none beyond .basedpyright/baseline.json, which may only shrink.
types: $(VENV)/linters
	$(BIN)/basedpyright

# Comparisons with PyTorch implementations. This spelling of torch is the CPU build; others download gigabytes of CUDA.
reference: $(VENV)/installed
	$(PIP) 'torch==2.13.0'
	$(PIP) -e '.[reference]'
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m reference

# Two at a time, the last one first: it takes longest by itself. The first start of a kernel on a cold disk may take a minute.
# Toy models compile twice as fast with little of LLVM's optimization.
notebooks: $(VENV)/installed
	$(PIP) -e '.[notebooks]'
	printf '%s\n' notebooks/*.ipynb | sort -r | XLA_FLAGS="--xla_backend_optimization_level=1" \
		xargs -P 2 -n 1 $(BIN)/jupyter execute --startup_timeout=600

# The documentation in site/; a broken link is an error.
docs: $(VENV)/installed
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

# Everything that continuous integration runs.
check:
	.ci/run

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache
