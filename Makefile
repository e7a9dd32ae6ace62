# `make demo` and `make test` need Python 3.11+ and make; the rest they install into .venv themselves.
PYTHON ?= python3
BIN = .venv/bin
DEMO = build/demo

.PHONY: demo test clean

demo: .venv/installed
	@mkdir -p $(DEMO)
	@rm -f $(DEMO)/feats.h5 $(DEMO)/model.h5
	$(BIN)/vggfeat extract --dataset digits --weights random:A,width=0.25,crop=32 --scales 32,48,64 --out $(DEMO)/feats.h5
	$(BIN)/vggfeat svm --features $(DEMO)/feats.h5 --pool stack --out $(DEMO)/model.h5 --json $(DEMO)/results.json

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

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
