# Everything a checkout needs: `make demo` and `make test` set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-all bench-score bench-rounding lint docs data clean

# torch first and by itself: any other package that asks for torch would pull another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt $(TORCH)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,dev,peft]'
	@touch $@

demo: $(VENV)/.installed  ## precompute once, train four methods from one cache, compare them
	@$(BIN)/python data/demo.py

test: $(VENV)/.installed  ## every test that is not marked slow
	@$(BIN)/python -m pytest -q -n 2 --dist loadscope -m 'not slow'

test-all: $(VENV)/.installed  ## the slow ones too
	@$(BIN)/python -m pytest -q -n 2 --dist loadscope

bench-score: $(VENV)/.installed  ## what the statistics cost on top of the forward pass
	@$(BIN)/python -m benchmarks.score --json bench-score.json

bench-rounding: $(VENV)/.installed  ## what rounding and the counting of ties do to the weights
	@$(BIN)/python -m benchmarks.rounding --json bench-rounding.json

lint: $(VENV)/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)/.installed  ## writes docs/cli.md from --help
	@$(BIN)/python -m prift_cli.docs > docs/cli.md

data: $(VENV)/.installed  ## makes the embedded model and demonstrations anew; about 40 minutes
	$(BIN)/python data/make_demo.py
	$(BIN)/python data/pretrain.py

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .hypothesis .ruff_cache
