# What a checkout can do: `make help`. Python 3.11 or newer and make must be there; each target
# installs what else it needs into .venv, or into a folder of its own under build/.
PYTHON ?= python3
BIN = .venv/bin
MINI = runs/mini
ASSETS = vggfeat/assets

# Processes of a test run: as many as there are cores, 2 GB of free memory for each, at most 8.
CORES = $(shell env -u OMP_NUM_THREADS nproc)
ROOM = $(shell awk '/^MemAvailable/ {print int($$2 / 2000000)}' /proc/meminfo)
PROCESSES = $(shell printf '%s\n' $(CORES) $(ROOM) 8 | sort -n | head -1 | sed s/^0$$/1/)
PYTEST = python -m pytest -n $(PROCESSES) --dist worksteal

# The demo: also what `make dist` tries with the package as it is installed elsewhere.
define DEMO
vggfeat extract --dataset photographs --weights mini --scales 96,128 --out build/demo/feats.h5
vggfeat svm --features build/demo/feats.h5 --pool stack --out build/demo/model.h5 --json build/demo/results.json
vggfeat report --features build/demo/feats.h5 --model build/demo/model.h5 --out build/demo/report.html
endef
export DEMO

.PHONY: help demo lint format types quick test lowest dist docs mini clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z]+:.*## / {printf "make %-8s%s\n", $$1, $$2}' Makefile

demo: .venv/installed  ## features, an SVM and a report of pieces of twelve photographs, in build/demo
	@mkdir -p build/demo
	@rm -f build/demo/*
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh -eux -c "$$DEMO"

lint: .venv/installed-dev  ## ruff: the code's rules and its layout; nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev  ## ruff: mends what it can, and lays the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed-dev  ## mypy, strict
	$(BIN)/mypy

quick: lint  ## lint and the tests that aren't marked slow, up to the first failure
	$(BIN)/$(PYTEST) --exitfirst -m 'not slow'

test: lint types  ## lint, types and every test; with Chromium installed also the pages in a browser
	$(BIN)/$(PYTEST)

lowest: build/lowest/installed  ## every test with the lowest releases that pyproject.toml allows
	build/lowest/bin/$(PYTEST)

dist: .venv/installed-dev  ## sdist and wheel in build/dist; the wheel tried as a user installs it
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/dist

docs: .venv/installed-dev  ## docs/cli.md, made of the commands' own options
	$(BIN)/python -m tests.test_usage

# How the mini weights were made: DATA is ten ImageNet classes squashed to 144x144 pixels, train/WNID and val/WNID.
mini: .venv/installed  ## the mini weights and their logs, made again from the images in DATA
	$(BIN)/python -m pretrain.train --net D --recipe mini --data $(DATA) --out $(MINI)
	$(BIN)/python -m pretrain.export $(MINI)/A-112/weights.safetensors --to float16 --out $(ASSETS)/mini-A.safetensors --overwrite
	$(BIN)/python -m pretrain.export $(MINI)/weights.safetensors --to float16 --out $(ASSETS)/mini-D.safetensors --overwrite
	cat $(MINI)/A-112/log.jsonl > docs/mini-A.jsonl
	cat $(MINI)/A-112/log.jsonl $(MINI)/D-112/log.jsonl $(MINI)/D-112-160/log.jsonl > docs/mini-D.jsonl

clean:  ## .venv and build, away
	rm -rf .venv build

# Installed anew only when what is required has changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

.venv/installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ .venv/installed

build/lowest/installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python .ci/lowest.py > build/lowest/constraints.txt
	build/lowest/bin/pip install --quiet --constraint build/lowest/constraints.txt --editable '.[test]'
	@touch $@
