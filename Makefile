# Every target makes the environment on first use; PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Where it is set, each process that a test starts compiles again all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-oldest test-slow check bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

SHAPES := data/shapes
DEMO := runs/demo
# At native aspect ratio, and squares of as many tokens.
SETTINGS := --max-tokens 9,16,25,36 --square 48,64,80,96

demo: $(INSTALLED)
	$(BIN)/navit-clip data shapes --output $(SHAPES) --hard --train 60000
	$(BIN)/navit-clip data train_tokenizer --shards $(SHAPES)/train \
		--captions json.captions json.names json.short --vocab-size 256 --model-type bpe \
		--output $(DEMO)/tokenizer.model
	$(BIN)/navit-clip train --config demo
	$(BIN)/navit-clip eval zeroshot --model $(DEMO)/model --data $(SHAPES)/zeroshot \
		--templates $(SHAPES)/templates.txt $(SETTINGS) \
		--output $(DEMO)/eval/zeroshot.json --report $(DEMO)/eval/zeroshot.html \
		--curve $(DEMO)/eval/zeroshot.png
	$(BIN)/navit-clip eval retrieval --model $(DEMO)/model --images $(SHAPES)/retrieval/images \
		--captions $(SHAPES)/retrieval/captions.json $(SETTINGS) \
		--output $(DEMO)/eval/retrieval.json --report $(DEMO)/eval/retrieval.html \
		--gallery $(DEMO)/eval/gallery.png
	$(BIN)/navit-clip report $(DEMO)
	@echo
	@$(BIN)/navit-clip eval summary $(DEMO)/eval

# Files of tests in processes beside each other; tests/conftest.py says in how many.
TEST = -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python $(TEST)

# The oldest PyTorch that pyproject.toml allows. Its Triton's interpreter fails with a newer NumPy.
OLDEST := .venv.oldest

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(OLDEST)
	$(OLDEST)/bin/python -m pip install "torch==2.11.0" "torchvision==0.26.0" "numpy<2.4" -e ".[dev]"
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(TEST)

# Minutes each; before a release.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Photos with captions: SHARDS="tars or folders", or those beside the checkout. open_clip's trainer
# and loader, which need an older webdataset than there is, have an environment of their own.
GIVEN := $(if $(SHARDS),--shards $(SHARDS))
PHOTOS := $(or $(GIVEN),--shards ../shared/data/coco-train)
OUT := benchmarks/out
PEER := .venv.peer
MEASURE = $(BIN)/python -m benchmarks.$(1) --output $(OUT)/$(1).json

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install -e ".[bench]"
	touch $@

$(PEER)/.installed:
	$(PYTHON) -m venv --upgrade-deps $(PEER)
	$(PEER)/bin/python -m pip install "open_clip_torch[training]"
	touch $@

bench: $(VENV)/.bench $(PEER)/.installed
	$(BIN)/python -m benchmarks.needs $(PHOTOS) --peer-python $(PEER)/bin/python
	$(call MEASURE,attention)
	$(call MEASURE,packing) $(GIVEN)
	$(call MEASURE,loader) $(PHOTOS) --peer-python $(PEER)/bin/python
	$(call MEASURE,loader_memory)
	$(call MEASURE,loss)
	$(call MEASURE,exchange)
	$(call MEASURE,step) $(GIVEN)
	$(call MEASURE,towers) --compile $(GIVEN)
	$(call MEASURE,sweep)
	$(call MEASURE,end_to_end) $(PHOTOS) --peer-python $(PEER)/bin/python
	$(call MEASURE,evaluation)
	$(call MEASURE,serving) $(GIVEN)
	$(BIN)/python -m benchmarks.plot --results $(OUT)
	$(BIN)/python -m benchmarks.tables --results $(OUT)
