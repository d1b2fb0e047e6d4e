PYTHON ?= python3

# The tests' environment has the development tools; the demo's has what a user gets.
.PHONY: demo test lint docs clean

demo: .venv/ready
	.venv/bin/shardprune demo

# Half of the tests' time is spent waiting for processes to start: two files at a time are done sooner.
test: .venv-test/ready
	.venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# The pages that are made from the code.
docs: .venv-test/ready
	.venv-test/bin/python -m docs.make_reference docs/reference.md

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
