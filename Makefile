# make demo, make test: each makes .venv when there is none, and renews it when what it was made from has changed.
#
#   make test PYTHON=python3.12                 another Python (3.11 or newer)
#   make test TORCH='torch==2.13.0+cpu'         another build of torch: give pip its index by PIP_INDEX_URL or
#                                               PIP_EXTRA_INDEX_URL, or a wheel file instead of a version

# The first Python outside of .venv that is new enough and can make environments.
PYTHON ?= $(shell for python in $$(type -aP python3.11 python3.12 python3); do \
	case $$python in ($(CURDIR)/.venv/*) continue;; esac; \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
TORCH ?= torch==2.13.0
NEWEST_CORE := 0.19.2
CORE_TESTS := tests/model tests/train tests/checkpoint tests/evaluate tests/parity tests/run tests/integrations \
	tests/test_compatibility.py tests/test_core_compat.py

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp says where and with which torch the environment was made. One that was moved, cut short while it was made,
# or does not start is made anew; another one is brought up to date.
STAMP := .venv/.installed
WANTED := $(CURDIR) $(TORCH)
FOUND := $(shell test ! -e .venv/.installing && .venv/bin/python -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null)

.PHONY: help demo test test-docs test-slow test-gpu test-core test-harness lint docs clean
ifneq ($(FOUND),$(WANTED))
.PHONY: $(STAMP)
endif

help:
	@echo 'make demo        train a small model on the Python standard library in five minutes, and see what it can do'
	@echo 'make test        run the tests'
	@echo 'make test-docs   run every command of the documentation'
	@echo 'make test-slow   run the slow tests as well'
	@echo 'make test-gpu    run the tests that need a CUDA device'
	@echo 'make test-core   run the tests that meet megatron-core on its newest release (Python 3.12)'
	@echo 'make test-harness  install lm-evaluation-harness (450 MB) into .venv, run the tests that need it'
	@echo 'make lint        formatting, lint, types, architecture'
	@echo 'make docs        the documentation as a site: build/site/index.html'
	@echo 'make clean       remove .venv, caches and build outputs (runs/ and corpus/ stay)'

$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer with venv found: say make PYTHON=/path/to/python' >&2; exit 1; }
	@if [ -e .venv/.installing ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1 \
			|| { [ -e $(STAMP) ] && ! grep -qF '$(CURDIR) ' $(STAMP); }; then \
		echo 'making .venv with $(PYTHON) and $(TORCH)'; $(PYTHON) -m venv --clear .venv; \
	fi
	@touch .venv/.installing
	@echo 'installing $(TORCH), then megatron-core and what the tests need: minutes, by the speed of the network'
	.venv/bin/python -m pip install '$(TORCH)'
	.venv/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@echo '$(WANTED)' > $(STAMP)
	@rm .venv/.installing

demo: $(STAMP)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" bash examples/tiny/demo.sh

# Two at a time: many wait for processes, and each of those has one thread.
test: $(STAMP)
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-docs: $(STAMP)
	.venv/bin/python -m pytest -m 'not gpu' tests/test_docs.py tests/test_speedrun.py

test-slow: $(STAMP)
	.venv/bin/python -m pytest -m 'not gpu'

test-gpu: $(STAMP)
	.venv/bin/python -m pytest -m gpu

# The newest megatron-core, which needs Python 3.12, in an environment of its own; a torch with CUDA is several GB.
test-core: $(STAMP)
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
		|| { echo 'megatron-core $(NEWEST_CORE) needs Python 3.12: say make test-core PYTHON=/path/to/python3.12' >&2; exit 1; }
	test -x .venv-core/bin/python || '$(PYTHON)' -m venv .venv-core
	.venv-core/bin/python -m pip install -q '$(TORCH)'
	sed 's/^megatron-core==.*/megatron-core==$(NEWEST_CORE)/' constraints.txt > .venv-core/constraints.txt
	.venv-core/bin/python -m pip install -q -c .venv-core/constraints.txt -e '.[dev]'
	OTHER_PYTHON=.venv/bin/python .venv-core/bin/python -m pytest $(CORE_TESTS)

test-harness: $(STAMP)
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev,eval]'
	.venv/bin/python -m pytest tests/evaluate/test_harness.py -m 'not gpu'

lint: $(STAMP)
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

.venv/.docs: $(STAMP)
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-core build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
