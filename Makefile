# `make demo` and `make test` set everything up by themselves. CUDA=1 installs and uses the CUDA set.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: setup demo test test-fast test-gpu lint docs clean

KIND := $(if $(CUDA),cuda,cpu)
PYTHON := $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
SOURCES := constraints/$(KIND).txt pyproject.toml $(wildcard setup_env/*)
STAMP := .venv/ready-$(KIND)-$(shell cat $(SOURCES) | sha256sum | cut -c1-16)

setup: $(STAMP)

# The stamp lies inside the environment and is named after what the environment was made from.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "make setup: needs Python 3.11 as python3.11, python3 or python on the PATH" >&2; exit 2; }
	setup_env/install.sh $(PYTHON) $(KIND)
	rm -f .venv/ready-*
	touch $@

# Two processes, each with its own files: most of what a stack test costs is the start of processes that wait.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

demo: setup
	.venv/bin/python -m launch.train recipe=quickstart

test: setup
	.venv/bin/python -m pytest -m "not gpu" $(PARALLEL) --durations=15

# Tests that start no process.
test-fast: setup
	.venv/bin/python -m pytest tests/unit $(PARALLEL) --durations=10

# What finds the most comes first. No test begins after 330 s, and none may take more than 150: 8 minutes in all.
test-gpu: setup
	.venv/bin/python -m pytest -m gpu tests/gpu --timeout=120 --session-timeout=330 --durations=15

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: setup
	.venv/bin/python docs/config_reference.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
