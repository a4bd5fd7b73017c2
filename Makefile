# make train and make test need only Python 3.11-3.13; everything else comes from requirements.txt into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed
EXTRAS = $(VENV)/.extras

.PHONY: train test bench lint format lock site clean-logs help
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "Error: Python %d.%d is not supported. Use 3.11 to 3.13: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

$(EXTRAS): $(READY) requirements-extras.txt
	$(BIN)/python -m pip install --quiet -r requirements-extras.txt
	@touch $@

train: $(READY) ## set up .venv and run the main job: DiffFit adapts a small DiT to new pictures
	$(BIN)/python src/train.py $(ARGS)

test: $(EXTRAS) ## set up .venv with the optional packages and run the tests
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

bench: $(READY) ## set up .venv and measure speed: tables of ratios on this machine's device
	$(BIN)/python benchmarks/all.py $(ARGS)

lint: $(READY) ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY) ## ruff, changing files
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: $(EXTRAS) ## write requirements.lock, the versions in .venv, which the tests ran with, and from it uv.lock
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m pip list --format=freeze --exclude-editable | grep -v -E '^(uv|pip|setuptools)=' > $(VENV)/versions.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" -c $(VENV)/versions.txt requirements.txt requirements-extras.txt -o requirements.lock
	sed -nE 's/^([^ ;#]+==[^ ;]+).*/--upgrade-package=\1/p' requirements.lock | xargs $(BIN)/uv lock --quiet

site: $(READY) ## build the documentation as a site into build/site
	$(BIN)/python -m pip install --quiet "zensical>=0.0.70,<1"
	$(BIN)/zensical build

clean-logs: ## delete all runs
	find logs -mindepth 1 -not -name .gitkeep -delete
