# Everything a checkout needs: `make demo` and `make test` set themselves up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM ?= .venv-vllm
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-all test-vllm test-vllm-smallest bench-vllm bench-score bench-rounding bench-train bench-scale bench-cache bench-weigh bench-rules bench-gpu lint docs data clean

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

# What only the slow tests need.
$(VENV)/.installed-all: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[ray]'
	@touch $@

test-all: $(VENV)/.installed-all  ## the slow ones too
	@$(BIN)/python -m pytest -q -n 2 --dist loadscope

# vLLM built for CPUs, beside prift, in an environment of its own. What vLLM declares and does not
# need here is left out, triton of 1 GB among it: see constraints-vllm.txt.
$(VLLM)/.installed: pyproject.toml constraints.txt constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints.txt $(TORCH)
	$(VLLM)/bin/pip install -q -c constraints.txt -e . pytest hypothesis
	$(VLLM)/bin/pip install -q -c constraints.txt --no-deps -r constraints-vllm.txt
	@touch $@

test-vllm: $(VLLM)/.installed  ## the vLLM backend, on a CPU, with engines of its own
	@$(VLLM)/bin/python -m pytest -q tests/vllm

test-vllm-smallest: $(VLLM)/.installed  ## of those what CI runs: one engine
	@$(VLLM)/bin/python -m pytest -q tests/vllm/test_smallest.py

bench-vllm: $(VLLM)/.installed  ## the vLLM backend against vLLM itself, and against transformers
	@$(VLLM)/bin/python -m benchmarks.vllm --json bench-vllm.json

bench-score: $(VENV)/.installed  ## what the statistics cost on top of the forward pass
	@$(BIN)/python -m benchmarks.score --json bench-score.json

bench-rounding: $(VENV)/.installed  ## what rounding and the counting of ties do to the weights
	@$(BIN)/python -m benchmarks.rounding --json bench-rounding.json

bench-scale: $(VENV)/.installed  ## 10,000 and 100,000 sequences: memory and time
	@$(BIN)/python -m benchmarks.scale --json bench-scale.json

bench-cache: $(VENV)/.installed  ## a cache of a million sequences: bytes, and the time of everything
	@$(BIN)/python -m benchmarks.cache --json bench-cache.json

bench-weigh: $(VENV)/.installed  ## prift weigh on 10,000 and 100,000 sequences: time and memory
	@$(BIN)/python -m benchmarks.weigh --json bench-weigh.json

# On a CUDA machine whose own python has torch, transformers, accelerate, pyarrow, rich,
# click, pytest and hypothesis; and vllm and psutil, for the last lines.
bench-gpu:  ## the tests of the CUDA paths, then stages 1 and 2 on random-weight 1.5B and 7B models
	$(PYTHON) -m pytest -q -m 'not slow' tests/test_stats.py tests/test_fold.py \
	  tests/test_packing.py tests/test_prompts.py tests/test_hf.py tests/test_products.py \
	  tests/test_fused.py tests/test_chunk.py tests/test_loss.py
	$(PYTHON) -m benchmarks.gpu --json bench-gpu.json
	$(PYTHON) -m benchmarks.gpu_train --json bench-gpu-train.json
	$(PYTHON) -m benchmarks.rules --device cuda --shapes 1.5B --json bench-gpu-rules.json
	! $(PYTHON) -c 'import vllm' || $(PYTHON) -m pytest -q tests/vllm/test_smallest.py \
	  tests/vllm/test_parity.py tests/vllm/test_v2_runner.py tests/vllm/test_command.py
	! $(PYTHON) -c 'import vllm' || $(PYTHON) -m benchmarks.vllm --rows 2000 --memory-rows 0 \
	  --json bench-gpu-vllm.json

bench-rules: $(VENV)/.installed  ## what each rule adds to a training step
	@$(BIN)/python -m benchmarks.rules --json bench-rules.json

# What only `make bench-train` compares with.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	@touch $@

bench-train: $(VENV)/.installed-bench  ## a training step, and whole trainers, against their peers
	@$(BIN)/python -m benchmarks.train --json bench-train.json

lint: $(VENV)/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(VENV)/.installed  ## writes docs/cli.md from --help
	@$(BIN)/python -m prift_cli.docs > docs/cli.md

data: $(VENV)/.installed  ## makes the embedded model and demonstrations anew; about 40 minutes
	$(BIN)/python data/make_demo.py
	$(BIN)/python data/pretrain.py

clean:
	rm -rf $(VENV) $(VLLM) demo build *.egg-info .pytest_cache .hypothesis .ruff_cache
