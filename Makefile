PYTHON ?= python3

# The tests' environment has the development tools; the demo's has what a user gets.
.PHONY: demo test lint benchmark clean

demo: .venv/ready
	.venv/bin/shardprune demo

test: .venv-test/ready
	.venv-test/bin/python -m pytest $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

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
