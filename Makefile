## make train   build .venv, train configs/tiny.py on real text, write runs/tiny/report.html; again: resume
## make test    build .venv with the test requirements, check style, run the tests that are not long
## make test-jax  the part of `make test` that depends on the version of jax, and whole runs: for a second interpreter
## make chaos   the long tests that kill training processes
## make soak    a server under load for ten minutes, whose HTTP process is killed
## make parity  the long tests against transformers and lm-evaluation-harness, in an environment of their own, .venv-parity
## make meshes  the long tests of every layout on 8 virtual devices
## make tpu     the long tests that compile for TPU topologies, in an environment of their own, .venv-tpu
## make scaling  the long tests of scaling-law experiments: coverage of intervals, sweeps that are killed
## make kernels  the long tests of the Pallas kernels, in .venv-kernels: every case interpreted, and compiled for chips
##              that are not here; needs a Python 3.12, which PYTHON names
## make gpu     on a machine with a Hopper GPU: self-tests, rates of the kernels and training steps, in an environment of its
##              own, .venv-gpu; two calls of 5 minutes, which PART=1 and PART=2 make singly; again: goes on where it was.
##              Needs a Python 3.12, which PYTHON names. Where there is no package index: launch/gpu.sh
## make colabs  execute the notebooks of colabs/ on the smallest sizes, in an environment of its own; SMOKE= runs them in full
## make docs    build the documentation into build/docs, warnings are errors: open build/docs/index.html
## make lint    ruff check, ruff format --check and mypy
## make clean   remove the environments and caches; runs/ stays
##
## PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, ARGS=... adds arguments:
##   make train ARGS=--config.train.steps=100        make test ARGS="tests/data -x"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PART ?= 1 2
SMOKE ?= --smoke
IN_PARALLEL = -n auto --maxprocesses 4 --dist worksteal
IN_VENV = $(VENV)/bin/python

.PHONY: help train test test-jax chaos soak scaling parity meshes tpu kernels gpu colabs docs lint clean environment test-environment

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

train: environment
	$(IN_VENV) -m deepseek_jax.train --config=tiny $(ARGS)

test: lint
	$(IN_VENV) -m pytest $(IN_PARALLEL) $(ARGS)

test-jax: test-environment
	$(IN_VENV) -m pytest $(IN_PARALLEL) -m 'jax_version and not (chaos or parity or meshes or tpu or kernels or scaling or soak)' $(ARGS)

chaos: test-environment
	$(IN_VENV) -m pytest -m chaos $(ARGS)

soak: test-environment
	$(IN_VENV) -m pytest -m soak tests/end_to_end -s -o faulthandler_timeout=0 $(ARGS)

scaling: test-environment
	$(IN_VENV) -m pytest -m scaling tests/scaling -o faulthandler_timeout=0 $(ARGS)

parity:
	@$(PYTHON) .ci/environment.py $(VENV)-parity test parity lm-eval evaluate
	$(VENV)-parity/bin/python -m pytest -m parity $(ARGS)

meshes: test-environment
	XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=32 $(IN_VENV) -m pytest -m meshes -n 2 $(ARGS)

tpu:
	@$(PYTHON) .ci/environment.py $(VENV)-tpu test tpu
	$(VENV)-tpu/bin/python -m pytest -m tpu -o faulthandler_timeout=0 $(ARGS)

kernels:
	@$(PYTHON) .ci/environment.py $(VENV)-kernels test tpu gpu-aot tokamax
	$(VENV)-kernels/bin/python -m pytest -m kernels tests/kernels -n 2 -o faulthandler_timeout=0 $(ARGS)

gpu:
	@$(PYTHON) .ci/environment.py $(VENV)-gpu cuda tokamax
	@status=0; for part in $(PART); do \
	  $(VENV)-gpu/bin/python -m benchmarks.gpu --part=$$part $(ARGS) || status=$$?; \
	  [ $$status -lt 128 ] || break; \
	done; exit $$status

colabs:
	@$(PYTHON) .ci/environment.py $(VENV)-colab colab notebook-tests
	$(VENV)-colab/bin/python colabs/execute.py $(SMOKE) $(ARGS)

# With the test requirements, so that `make test` finds the environment as it left it.
docs:
	@$(PYTHON) .ci/environment.py $(VENV) test docs
	$(IN_VENV) -m sphinx -W --keep-going -n -q docs build/docs $(ARGS)

lint: test-environment
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m mypy

environment:
	@$(PYTHON) .ci/environment.py $(VENV)

test-environment:
	@$(PYTHON) .ci/environment.py $(VENV) test

clean:
	rm -rf $(VENV) $(VENV)-3.12 $(VENV)-colab $(VENV)-parity $(VENV)-kernels $(VENV)-gpu .cache .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find deepseek_jax benchmarks tests configs .ci -name __pycache__ -prune -exec rm -rf {} +
