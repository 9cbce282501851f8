# make demo   set up, make a small Qwen3.5-MoE checkpoint, quantize it, load it, compare logits
# make test   set up and run all tests
# make check  lint and the quick half of the tests, for while you edit
# make lint   ruff, as CI runs it

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A process per core; xdist_group keeps together what depends on its neighbours.
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist loadgroup

# Modules are compiled once for the hundreds of processes that tests start, whatever the shell says.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test check lint clean

demo: $(VENV)/installed
	$(BIN)/python tests/demo.py demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(WORKERS)

check: lint
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt \
		pytest pytest-xdist filelock hypothesis peft ruff matplotlib jinja2 jsonschema playwright
	touch $@

clean:
	rm -rf $(VENV) demo
