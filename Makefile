# Every target makes the environment on first use; PYTHON chooses the interpreter for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test check bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

SHAPES := data/shapes
DEMO := runs/demo

demo: $(INSTALLED)
	$(BIN)/python -m navit_clip.data.shapes --output $(SHAPES) --train 60000
	$(BIN)/python -m navit_clip.data.train_tokenizer --shards $(SHAPES)/train \
		--captions json.captions json.names json.short --vocab-size 256 --model-type bpe \
		--output $(DEMO)/tokenizer.model
	$(BIN)/python -m train --config configs/demo.yaml
	$(BIN)/python -m eval zeroshot --model $(DEMO)/model --data $(SHAPES)/zeroshot \
		--templates $(SHAPES)/templates.txt --max-tokens 9,16,25,36 \
		--output $(DEMO)/eval/zeroshot.json
	$(BIN)/python -m eval retrieval --model $(DEMO)/model --images $(SHAPES)/retrieval/images \
		--captions $(SHAPES)/retrieval/captions.json --max-tokens 9,16,25,36 \
		--output $(DEMO)/eval/retrieval.json --gallery $(DEMO)/eval/gallery.png
	@echo
	@$(BIN)/python -m eval summary $(DEMO)/eval

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.attention --output benchmarks/out/attention.json
	$(BIN)/python -m benchmarks.packing --output benchmarks/out/packing.json
	$(BIN)/python -m benchmarks.loader_memory --output benchmarks/out/loader_memory.json
	$(BIN)/python -m benchmarks.loss --output benchmarks/out/loss.json
	$(BIN)/python -m benchmarks.survival --output benchmarks/out/survival.json
