# Every target makes .venv when it is not there yet. `make` alone lists the targets.
#
#   make demo PYTHON=python3.12      another Python (3.11 or newer)
#   make demo-real TIME=10m          another time for the compression
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo      PyTorch without CUDA, a much smaller download

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TIME = 20m
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# The matrices of the small models here are too small to share among threads; processes run side by side instead.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help demo demo-real test fuzz check house docs bench-quality bench-ablation bench-pareto bench-speed bench-inference bench-memory bench-tiny bench-real kills clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.ready  ## compress the model in demo/model at two sizes and compare what they write
	@PATH="$(abspath $(BIN)):$$PATH" bash demo/demo.sh

demo-real: $(VENV)/.ready-bench  ## fetch a real chat model, compress it within TIME=20m, and chat before and after
	@PATH="$(abspath $(BIN)):$$PATH" TIME="$(TIME)" bash demo/real.sh

test: $(VENV)/.ready  ## run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(VENV)/.ready  ## damage every kind of input in 20,000 ways; each must end with success or one clear line
	$(BIN)/python -m fuzz

check: $(VENV)/.ready  ## lint, formatting, types, import floors, the tables of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python docs/recipe_table.py --check
	$(BIN)/python docs/tree.py --check
	$(BIN)/python docs/architectures.py --check

house: $(VENV)/.ready  ## measure the shape of the code: entries, the longest function, parameters, names
	$(BIN)/python bench/house.py

docs: $(VENV)/.ready-docs  ## write the recipe table and build the documentation in site/
	$(BIN)/python docs/recipe_table.py
	$(BIN)/python docs/tree.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-quality: $(VENV)/.ready  ## loss and generated text of every recipe at six sizes, into bench/results/ (hours)
	$(ONE_THREAD) $(BIN)/python bench/quality.py

bench-ablation: $(VENV)/.ready  ## each part of the default recipe off and on, into bench/results/ (hours)
	$(ONE_THREAD) $(BIN)/python bench/ablation.py

bench-pareto: $(VENV)/.ready  ## quality against bytes: bits by linear, one width, fewer numbers, into bench/results/ (an hour)
	$(ONE_THREAD) $(BIN)/python bench/pareto.py

bench-speed: $(VENV)/.ready  ## how near compressing comes to the machine's limit, into bench/results/
	$(ONE_THREAD) $(BIN)/python bench/speed.py
	$(ONE_THREAD) $(BIN)/python bench/compiled.py
	$(ONE_THREAD) $(BIN)/python bench/decompositions.py

bench-inference: $(VENV)/.ready  ## compressed against dense in use, into bench/results/
	$(ONE_THREAD) $(BIN)/python bench/inference.py

bench-tiny: $(VENV)/.ready  ## train small models of five kinds and make them smaller, into bench/results/ (hours)
	$(ONE_THREAD) $(BIN)/python bench/tiny_models.py

bench-real: $(VENV)/.ready  ## recipes compared on SmolLM2, Whisper-base and MiniLM, into bench/results/ (hours, or a GPU)
	$(BIN)/python bench/real.py

bench-memory: $(VENV)/.ready  ## peak memory against depth, into bench/results/
	$(ONE_THREAD) $(BIN)/python bench/memory.py

kills: $(VENV)/.ready  ## kill runs at random instants, 80 times, and compare every file of the results
	$(ONE_THREAD) $(BIN)/python bench/kills.py

clean:  ## remove what the targets made, .venv excepted
	rm -rf demo/out site dist build ci-artefacts .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests fuzz bench docs demo -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV) (once, a few minutes; PyTorch is large)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch>=2.6"
	$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(INSTALL) -e ".[bench]"
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(INSTALL) -e ".[docs]"
	@touch $@
