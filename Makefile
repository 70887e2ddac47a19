# Every target sets itself up in .venv first; nothing is installed elsewhere.
PYTHON ?= python3
SAMPLE ?= 20
SEED ?= 0
MINUTES ?= 8
RUN := .venv/bin/python
LOWER := .venv-lower/bin/python

.PHONY: demo test test-slow test-gpu test-lower device-check mutation lint docs sweep clean

demo: .venv/.installed  ## pack the embedded data set, train configs/quickstart.yaml, report
	@$(RUN) -m pipeline.shard digits
	@$(RUN) -m trainer.run configs/quickstart.yaml

test: .venv/.installed  ## the tests, in about 16 minutes on two cores
	@$(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -rs

test-slow: .venv/.installed  ## the tests that take minutes
	@$(RUN) -m pytest -m slow

# On a machine without a network: with the packages of $(PYTHON), if they suffice.
test-gpu:  ## the tests that need a CUDA device
	@if $(PYTHON) -m pytest -m gpu --collect-only -q -p no:cacheprovider >/dev/null 2>&1; \
	  then $(PYTHON) -m pytest -m gpu -p no:cacheprovider; \
	  else $(MAKE) --no-print-directory .venv/.installed && $(RUN) -m pytest -m gpu; fi

test-lower: .venv-lower/.installed  ## the tests of pipeline and trainer with the lowest supported version of each dependency
	@$(LOWER) -m pytest --numprocesses=auto --dist=loadfile tests/pipeline tests/trainer --ignore=tests/trainer/export

device-check:  ## what this machine lacks, then correctness and speed of its GPU within MINUTES=8, into OUT=dir; no network, as test-gpu
	@python=$(PYTHON); export PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}"; \
	  $$python -c 'import benchmarks.device_check' 2>/dev/null || \
	  { $(MAKE) --no-print-directory .venv/.installed && python=$(RUN); } || exit; \
	  $$python -m trainer.runtime.doctor; $$python benchmarks/device_check.py --minutes $(MINUTES) $(if $(OUT),--out $(OUT))

mutation: .venv/.mutation  ## small changes of core modules that no test notices; MODULES="path ..." SAMPLE=mutants-of-each SEED=...
	@$(RUN) tests/mutation.py --sample $(SAMPLE) --seed $(SEED) $(MODULES)

lint: .venv/.installed  ## style, docstrings and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

docs: .venv/.installed  ## build the documentation site in docs/_build
	@$(RUN) docs/make_config.py
	@$(RUN) -m sphinx -q -W -b html docs docs/_build
	@echo "docs/_build/index.html"

sweep: .venv/.installed  ## measure what each resolution costs and buys, on the digits or a packed EMNIST
	@$(RUN) benchmarks/resolution_sweep.py

clean:  ## remove the environments
	rm -rf .venv .venv-lower

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $$($(PYTHON) --version 2>/dev/null || echo "no program $(PYTHON)")" >&2; \
	  echo "expected: Python 3.11 or newer" >&2; echo "hint: name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into .venv (several GB, a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

.venv/.mutation: .venv/.installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[test,mutation]'
	@touch $@

# Without the servers and browsers of other tests, whose versions would not fit.
.venv-lower/.installed: pyproject.toml
	@echo "installing the lowest supported versions into .venv-lower (several GB)"
	@$(PYTHON) -m venv .venv-lower
	@sed -nE 's/^ *"([A-Za-z0-9-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml > .venv-lower/constraints.txt
	@$(LOWER) -m pip install --quiet --disable-pip-version-check --upgrade setuptools
	@$(LOWER) -m pip install --quiet --disable-pip-version-check --constraint .venv-lower/constraints.txt \
	  --no-build-isolation --editable '.[parquet,tensorboard,tune]' flask flask-cors hypothesis pytest pytest-xdist webdataset
	@touch $@
