PYTHON ?= python3
WORKERS ?= 4
OUT ?= runs/gpu
N ?= 100

# The tests' environment has the development tools; the demo's has what a user gets.
.PHONY: demo test test-all test-lowest fuzz drill lint docs gpu clean

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

# Models layer by layer, and those with state between their layers, with the lowest transformers that is allowed
# (huggingface-hub and what that needs are of its time). It lacks the architectures that came later.
test-lowest: build/lowest/ready
	PYTHONPATH=build/lowest $(PYTEST) tests/model/test_architectures.py tests/commands/test_carried_state.py \
	  -k "not lfm3" -m "not long" $(ARGS)

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
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[eval,experts,recover,report]'
	touch $@

.venv-test/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --constraint constraints.txt torch
	.venv-test/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

build/lowest/ready: .venv-test/ready
	.venv-test/bin/pip install --quiet --no-deps --upgrade --target build/lowest \
	  "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml).*" "huggingface-hub<2" \
	  "httpx<1" "httpcore<2" h11 "anyio<5"
	touch $@

clean:
	rm -rf .venv .venv-test build runs
