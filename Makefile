# make demo   set up, make a small Qwen3.5-MoE checkpoint, quantize it, load it, compare logits
# make test   set up and run the tests
# make lint   ruff, as CI runs it

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python tests/demo.py demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt pytest hypothesis peft ruff
	touch $@

clean:
	rm -rf $(VENV) demo
