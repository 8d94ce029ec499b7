# make demo: sets up the environment, then runs the whole chain on CPU.   make test: sets it up, then runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadscope --no-loadscope-reorder --durations 30
# Containers often set it. Then every process would compile all its imports, including PyTorch, again.
unexport PYTHONDONTWRITEBYTECODE
# The user's value of PYTHON; empty for the default.
ASKED := $(if $(filter file default undefined,$(origin PYTHON)),,$(PYTHON))

.PHONY: env dev python demo check-demo showcase test test-full lint bench clean

# env: what running needs; dev: also what tests and checks need (transformers, deepspeed, torchcodec, pytest …).
env: python $(VENV)/.ready

dev: env $(VENV)/.ready-dev

python:
	@command -v "$(PYTHON)" >/dev/null || { echo "make env: no $(PYTHON) here: Python 3.11 or newer is needed (Debian and Ubuntu: apt-get install python3 python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" .ci/check_python.py $(VENV) "$(ASKED)"

# --no-compile: Python compiles files at their first import, and most are never imported.
$(VENV)/.ready: pyproject.toml constraints.txt | python
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) -e '.[dev]'
	touch $@

demo: env
	$(BIN)/python tools/demo.py recipes/demo.yaml

# Checks the demo's table against docs/learning.md, with half of each margin: results differ between CPUs.
check-demo: env
	$(BIN)/python benchmarks/showcase.py --check runs/demo/summary.json

showcase: env
	$(BIN)/python benchmarks/showcase.py

# Three workers on two cores, because a test waits for its processes a third of the time.
test: dev
	$(PYTEST) --numprocesses 3 -m "not slow and not slurm"

# The tests that make test leaves out (kills, Slurm, long runs), and those that need a system package. Four workers on two
# cores: they wait half of the time.
test-full: dev
	$(PYTEST) --numprocesses 4 -m "slow or slurm or system" --timeout 1800

lint: dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

bench: dev
	for script in $(filter-out $(addprefix benchmarks/,showcase.py collapse.py surprise.py clock.py published.py precision.py gpu.py gpu_book.py gpu_rows.py gpu_resume.py),$(wildcard benchmarks/*.py)); do OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
