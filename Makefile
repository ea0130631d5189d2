# make demo     a trained student from nothing but Python (11 to 13 minutes on 2 cores)
# make test     install, then every test
# make quick    ruff and the tests that are done in a minute, for daily work
# make coverage what of the packages every test together reaches, lines and branches
# make check    linters, types and tests, as CI runs them
# make results  what the docs report and takes minutes; then their tables, from docs/results

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo test coverage quick lint style types check results constraints clean
.DEFAULT_GOAL := install

install: $(STAMP)

# What is never imported needn't be compiled: that saves more than half a minute. uv needs a third of pip's time, but
# knows nothing of pip's settings: where it can't be had, or reaches no index, pip does it all; and pip chooses torch.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
ALL := -c constraints.txt -e '.[dev,spacy-model,paint,faiss]'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	{ $(PIP) -c constraints.txt uv torch && $(BIN)/python -m uv pip install --quiet $(ALL); } || $(PIP) $(ALL)
	touch $(STAMP)

demo: install
	$(BIN)/dream run --name demo --config configs/demo.yaml

# Two test processes with one thread each are quicker than one with two.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered
	$(BIN)/python -m coverage json --quiet -o - | PYTHONPATH=tests $(BIN)/python -m support.covered

lint: style types

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

QUICK := batches calibration comparison_numbers comparison_report contamination figures find_weights from_scripts house \
         judge metrics model prompts rows run speech_metrics text_metrics traces

quick: style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

check: lint test

results: install
	$(BIN)/dream bench all --out docs/results/bench.json
	$(BIN)/python -m bench.figures

# Pins what is installed now: bare versions, so that any build of a package (CPU, CUDA) will do.
constraints: install
	{ echo '# Every package of a tested environment. Use: pip install -c constraints.txt'; \
	  echo '# Made by: make constraints'; \
	  $(BIN)/python -m pip list --format=freeze --exclude pip --exclude setuptools --exclude dreaming-student \
	    | sed -E 's/\+[A-Za-z0-9.]+$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .coverage* build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
