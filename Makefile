# `make demo` and `make test` need Python 3.11+ and make; the rest they install into .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
DEMO = build/demo
MINI = runs/mini
ASSETS = vggfeat/assets

.PHONY: demo test mini clean

demo: .venv/installed
	@mkdir -p $(DEMO)
	@rm -f $(DEMO)/*
	$(BIN)/vggfeat extract --dataset digits --weights mini --scales 96,128 --out $(DEMO)/feats.h5
	$(BIN)/vggfeat svm --features $(DEMO)/feats.h5 --pool stack --out $(DEMO)/model.h5 --json $(DEMO)/results.json
	$(BIN)/vggfeat report --features $(DEMO)/feats.h5 --model $(DEMO)/model.h5 --out $(DEMO)/report.html

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

# How the mini weights were made: DATA is ten ImageNet classes squashed to 144x144 pixels, train/WNID and val/WNID.
mini: .venv/installed
	$(BIN)/python -m pretrain.train --net D --recipe mini --data $(DATA) --out $(MINI)
	$(BIN)/python -m pretrain.export $(MINI)/A-112/weights.safetensors --to float16 --out $(ASSETS)/mini-A.safetensors --overwrite
	$(BIN)/python -m pretrain.export $(MINI)/weights.safetensors --to float16 --out $(ASSETS)/mini-D.safetensors --overwrite
	cat $(MINI)/A-112/log.jsonl > $(ASSETS)/mini-A.jsonl
	cat $(MINI)/A-112/log.jsonl $(MINI)/D-112/log.jsonl $(MINI)/D-112-160/log.jsonl > $(ASSETS)/mini-D.jsonl

# Installed anew only when what is required has changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build
