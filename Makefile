# Every target sets itself up in .venv first; nothing is installed elsewhere.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test test-slow test-gpu lint sweep clean

demo: .venv/.installed  ## pack the embedded data set, train configs/quickstart.yaml, report
	@$(RUN) -m pipeline.shard digits
	@$(RUN) -m trainer.run configs/quickstart.yaml

test: .venv/.installed  ## the tests, in under ten minutes on two cores
	@$(RUN) -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile

test-slow: .venv/.installed  ## the tests that take minutes
	@$(RUN) -m pytest -m slow

test-gpu: .venv/.installed  ## the tests that need a CUDA device
	@$(RUN) -m pytest -m gpu

lint: .venv/.installed  ## style and import order
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

sweep: .venv/.installed  ## what each resolution costs and buys, on the embedded data set or a packed EMNIST
	@$(RUN) benchmarks/resolution_sweep.py

clean:  ## remove the environment
	rm -rf .venv

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: found $$($(PYTHON) --version), expected Python 3.11 or newer. HINT: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into .venv (several GB, a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@
