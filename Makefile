PYTHON ?= python3
WORKERS ?= 4
OUT ?= runs/gpu
N ?= 100

# The tests' environment has the development tools; the demo's has what a user gets.
.PHONY: demo test test-all fuzz drill lint docs gpu clean

demo: .venv/ready
	.venv/bin/shardprune demo

# Tests that start and kill processes wait for half of their time: four files at a time keep two cores busy.
PYTEST = .venv-test/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# All but those marked long, which show in further ways what others show in one: another victim, another signal, a
# second search. `make test-all`, which is what CI runs, has them too.
test: .venv-test/ready
	$(PYTEST) -m "not long" $(ARGS)
	@echo "tests marked long were left out: make test-all"

test-all: .venv-test/ready
	$(PYTEST) $(ARGS)

# 1,700 malformed inputs, at random unless a SEED is given; those that end wrongly are kept in runs/fuzz.
fuzz: .venv-test/ready
	.venv-test/bin/python -m tests.fuzz $(if $(SEED),--seed $(SEED)) $(ARGS)

# N kills of drivers and workers at random moments, of runs of every command.
drill: .venv-test/ready
	.venv-test/bin/python -m tests.failures --kills $(N) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# The pages that are made from the code.
docs: .venv-test/ready
	.venv-test/bin/python -m docs.make_reference docs/reference.md
	.venv-test/bin/python -m docs.make_families docs/families.md

# Checks and measurements on one NVIDIA GPU, under nine minutes; the machine's own Python, with its PyTorch.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv-test/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --constraint constraints.txt torch
	.venv-test/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-test runs
