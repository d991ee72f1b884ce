# Every command does its own set-up from a bare Python 3.11: a virtual environment with the exact
# versions of constraints.txt, made at the first call and left alone by the next ones.
#   make demo ARGS="--samples 4"     make test ARGS="-k spade"     make test PYTHON=python3.12

PYTHON ?= python3
ARGS ?=
# How many processes run the tests, with one thread each. Files stay whole: their tests share models.
# They run in the order of their names, so that the docstrings, quick files, come last. xdist would
# put files of few tests there: those on the real model, each as long as a hundred of the others.
WORKERS ?= 2
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
VENV := .venv
VENV_TL39 := .venv-tl39
VENV_FLOORS := .venv-floors

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test house bench bench-rules bench-claims bench-exits bench-deal bench-alternate bench-in-context bench-in-context-forms bench-layerskip lint format types docs notebooks \
    test-tl39 test-floors clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*##  */\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed  ## the main job: SPADE beside the logit lens on a real model
	$(VENV)/bin/spade-lens demo $(ARGS)

test: $(VENV)/.with-dev  ## all tests, docstring examples included
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

# HookedTransformer lives in another environment; its records join the same file.
bench: $(VENV)/.with-bench $(VENV_TL39)/.installed  ## the speed table, also written to benchmarks/results.json
	$(VENV)/bin/python benchmarks/speed.py $(ARGS)
	$(VENV_TL39)/bin/python benchmarks/speed.py $(ARGS)

bench-exits: $(VENV)/.installed  ## early exit on eight tasks with every control, also written to benchmarks/early_exit.csv (two hours)
	$(VENV)/bin/python benchmarks/early_exit.py $(ARGS)

bench-rules: $(VENV)/.with-bench  ## a patching sweep beside the same by hooks on whole forwards
	$(VENV)/bin/python benchmarks/rules.py $(ARGS)

bench-claims: $(VENV)/.installed  ## the claims about rule vectors, also written to benchmarks/claims.csv and the docs (hours)
	$(VENV)/bin/python benchmarks/claims.py $(ARGS)
	$(VENV)/bin/python benchmarks/claims_page.py

bench-deal: $(VENV)/.installed  ## text searched by a heuristic, beside its rivals (half an hour)
	$(VENV)/bin/python benchmarks/deal.py $(ARGS)
	$(VENV)/bin/python benchmarks/deal_layers.py

bench-alternate: $(VENV)/.installed  ## fine-tuning and preferences by turns, with and without a penalty (a quarter of an hour)
	$(VENV)/bin/python benchmarks/alternate.py $(ARGS)

bench-in-context: $(VENV)/.installed  ## small transformers that learn in context, beside what is exact (6 CPU minutes a seed)
	$(VENV)/bin/python benchmarks/in_context.py $(ARGS)

bench-in-context-forms: $(VENV)/.installed  ## the same of mixtures and trajectories, and of other sizes (an hour)
	$(VENV)/bin/python benchmarks/in_context_forms.py $(ARGS)

bench-layerskip: $(VENV)/.installed  ## byte-level models with and without LayerSkip's recipe (an hour)
	$(VENV)/bin/python benchmarks/layerskip.py $(ARGS)

lint: $(VENV)/.with-dev  ## ruff: rules and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.with-dev  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

house: $(VENV)/.with-dev  ## the import graph, the front door, the words of docstrings and pages: seconds
	$(VENV)/bin/python -m pytest -q tests/test_house.py tests/test_english.py
	$(VENV)/bin/python tests/house.py
	$(VENV)/bin/python docs/english.py

types: $(VENV)/.with-dev  ## mypy, on the package and on a program that uses it
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/typed_use.py

docs: $(VENV)/.with-docs  ## the pages, in docs/_build/html
	$(VENV)/bin/python benchmarks/claims_page.py --check
	$(VENV)/bin/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# --nbmake runs the notebooks and leaves their stored outputs as they are.
notebooks: $(VENV)/.with-dev $(VENV)/.with-notebooks  ## run every notebook from top to bottom
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --nbmake --nbmake-timeout=900 $(SIDE_BY_SIDE) notebooks $(ARGS)

test-tl39: $(VENV_TL39)/.installed  ## the tests of the models once more, with transformer-lens 3.9.0
	OMP_NUM_THREADS=1 $(VENV_TL39)/bin/python -m pytest $(SIDE_BY_SIDE) tests/models $(ARGS)

# Not part of .ci/run: the oldest torch comes with several GB of CUDA libraries. Two tests ask for an
# exact 0 that torch 2.6 rounds to 5e-7 and 1e-9.
test-floors: $(VENV_FLOORS)/.installed  ## all tests with the lowest torch, transformers and einops allowed
	$(VENV_FLOORS)/bin/python -m pytest $(ARGS) \
	    --deselect tests/lenses/test_linear.py::test_is_the_model_at_the_last_layer \
	    --deselect tests/lenses/fitting/test_fit.py::test_a_descent_that_does_not_help_is_undone

clean:  ## forget environments, caches and built pages
	rm -rf $(VENV) $(VENV_TL39) $(VENV_FLOORS) docs/_build docs/notebooks dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp files say what an environment holds; they are older than the two files that decide it
# as soon as one of these changes, and pip then adds what is missing.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(new_environment)
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.with-%: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@

# The last release of transformer-lens with HookedTransformer, all else as pinned.
$(VENV_TL39)/.installed: pyproject.toml constraints.txt
	$(new_environment)
	sed 's/^transformer-lens==.*/transformer-lens==3.9.0/' constraints.txt > $(@D)/constraints.txt
	$(VENV_TL39)/bin/python -m pip install -c $(@D)/constraints.txt -e '.[dev]'
	@touch $@

# The floors that pyproject.toml names for what decides the numbers; pip chooses all else.
$(VENV_FLOORS)/.installed: pyproject.toml
	$(new_environment)
	sed -nE 's/^    "(torch|transformers|transformer-lens|einops)>=([0-9.]+).*/\1==\2/p' pyproject.toml > $(@D)/constraints.txt
	$(VENV_FLOORS)/bin/python -m pip install -c $(@D)/constraints.txt -e '.[dev]'
	@touch $@

define new_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
    echo "spade_lens needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
@echo "Setting up $(@D) (once; two minutes and more, with the downloads)"
@$(PYTHON) -m venv $(@D)
endef
