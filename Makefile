# make demo: sets everything up, then runs the whole chain on CPU.   make test: sets everything up, then tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadscope --durations 30

.PHONY: env demo showcase test test-full lint bench clean

env: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make env PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env
	$(BIN)/python tools/demo.py recipes/demo.yaml

showcase: env
	$(BIN)/python benchmarks/showcase.py

# Under 10 minutes on two cores. Three workers: a test waits for its processes a third of the time.
test: env
	$(PYTEST) --numprocesses 3 -m "not slow and not slurm"

# What make test leaves out: kills, Slurm, long runs.
test-full: env
	$(PYTEST) --numprocesses 2 -m "slow or slurm" --timeout 1800

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: env
	for script in $(filter-out $(addprefix benchmarks/,showcase.py surprise.py clock.py published.py),$(wildcard benchmarks/*.py)); do OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
