# The commands of this project; `make` lists them. The first one that runs installs the pinned dependencies into .venv.
# Needs Python 3.11 or newer with its venv module, found on the PATH or given: make demo PYTHON=/path/to/python3.12
# .venv is managed by this file: an incomplete setup is started again from scratch.

# Arguments of `make demo`, `make train`, `make serve` and `make test`; to set one: make train TRAIN_ARGS="trainer.max_steps=10"
DEMO_ARGS ?= document=examples/office_memo.txt output_dir=outputs/demo overwrite=true \
  'ask=["When do we move to the new building?","Who collects the boxes?","Who has the list of rooms?","How much is a parking space?","What is the capital of France?"]'
TRAIN_ARGS ?=
SERVE_ARGS ?= --model assets/smollm2-135m
# Three processes for two cores: tests that wait (for workers, signals, files) would leave a tenth of the time idle.
TEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

# Python compiles what is imported and keeps it; having pip compile everything would take 40 s. Many containers set this
# variable, and every command would then compile its imports again.
export PYTHONDONTWRITEBYTECODE :=

VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo memory sleep serve test test-all check train train-smollm2 figures needles bench clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## turn an example document into an adapter and answer questions with it
	$(VENV_PYTHON) -m hypernet base-model fetch smollm2-135m
	$(VENV_PYTHON) generate_adapter.py $(DEMO_ARGS)

memory: $(STAMP) ## one user's memory: told, asked, corrected, forgotten, and proof that it is
	OMP_NUM_THREADS=1 $(VENV_PYTHON) examples/memory_story.py

sleep: $(STAMP) ## one night: what was told by day is in the weights in the morning, behind a gate
	OMP_NUM_THREADS=1 $(VENV_PYTHON) examples/sleep_story.py

serve: $(STAMP) ## serve SmolLM2-135M at http://127.0.0.1:8000; settings: SERVE_ARGS="--model assets/tiny ..."
	$(VENV_PYTHON) -m hypernet base-model fetch smollm2-135m
	$(VENV_PYTHON) -m hypernet serve $(SERVE_ARGS)

test: $(STAMP) ## run the tests
	$(VENV_PYTHON) -m pytest $(TEST_ARGS)

test-all: $(STAMP) ## run the tests with those that tell whole stories, some of them for a minute
	HYPERNET_STORIES=1 $(VENV_PYTHON) -m pytest $(TEST_ARGS)

check: $(STAMP) ## lint (ruff) and check types (mypy)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check --quiet .
	$(VENV_PYTHON) -m mypy

train: $(STAMP) ## train a hypernetwork; settings: TRAIN_ARGS="key=value ..."
	$(VENV_PYTHON) train.py $(TRAIN_ARGS)

train-smollm2: $(STAMP) ## train SmolLM2-135M's hypernetwork, both parts; SQUAD=FILE.json instead of the hub's SQuAD
	$(VENV_PYTHON) train.py experiment=smollm2 ckpt_path=auto $(if $(SQUAD),task.sources.paragraphs.of.path=$(SQUAD))
	$(VENV_PYTHON) train.py experiment=smollm2_keys ckpt_path=auto $(if $(SQUAD),task.sources.paragraphs.path=$(SQUAD))

figures: $(STAMP) ## measure the shipped model and print its scores
	$(VENV_PYTHON) -m benchmarks.tiny_figures

# Each training runs once, and resumes where it was interrupted.
NEEDLES := outputs/niah_tiny_distractors/checkpoint
needles: $(NEEDLES) ## train on needles in a haystack and benchmark: outputs/benchmark_niah (65 minutes)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m benchmarks.run sweep=niah hydra/launcher=joblib hydra.launcher.n_jobs=2
	$(VENV_PYTHON) -m benchmarks.report input_dir=outputs/benchmark_niah output=outputs/benchmark_niah/niah.jsonl \
	  page=outputs/benchmark_niah/niah.html

$(NEEDLES): | outputs/niah_tiny/checkpoint
outputs/niah_tiny/checkpoint: | outputs/tiny_base_model_needles/base_model
$(NEEDLES) outputs/niah_tiny/checkpoint outputs/tiny_base_model_needles/base_model: | $(STAMP)
	$(VENV_PYTHON) train.py experiment=$(notdir $(@D)) ckpt_path=auto $(TRAIN_ARGS)

bench: $(STAMP) ## run the tiny benchmark and write outputs/benchmark/report.html
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m benchmarks.run sweep=tiny hydra/launcher=joblib hydra.launcher.n_jobs=2
	$(VENV_PYTHON) -m benchmarks.report

clean: ## remove .venv and the caches; keep outputs/
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp is ignored if its interpreter no longer runs (system Python replaced, folder moved to another machine).
ifneq ($(shell $(VENV_PYTHON) -c 'import pip; print("ok")' 2>/dev/null),ok)
.PHONY: $(STAMP)
endif

# The stamp is removed before pip starts and written when pip is done, so an interrupted setup never looks finished.
# Only `python -m ...` is called: the scripts in .venv/bin cannot start from a path with a space.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -f $@ ] || ! $(VENV_PYTHON) -c 'import pip' 2>/dev/null; then $(choose_python); \
	  echo "Creating .venv with $$python."; "$$python" -m venv --clear .venv; fi
	@rm -f $@
	@echo "Installing the pinned dependencies into .venv (some minutes the first time)."
	@# Python 3.11 comes with pip 23, which takes 20 s longer to resolve versions. If the upgrade fails, it still works.
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade pip >/dev/null 2>&1 || true
	@# Warnings of pip and setuptools, such as about editable installs, are shown only with an error.
	@$(VENV_PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test,documents,bench,sweep,serve,mcp,postgres,ray,private]' \
	  >.venv/install.log 2>&1 || { cat .venv/install.log >&2; \
	  echo "make: pip could not install the dependencies, see above. Is the package index reachable? Then run make again." >&2; exit 1; }
	@touch $@

# Sets $python, or prints in one line what was found and what to do. 3.11 comes first: constraints.txt was made with it.
# A candidate that does not run at all (a pyenv shim without a version) is skipped.
define choose_python
found=; chosen=; \
if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3.11 python3.12 python3.13 python3 python; fi; \
for python do \
  if ! version=$$("$$python" --version 2>&1); then continue; \
  elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$found $$python is $$version, too old."; \
  elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
    found="$$found $$python has no venv module (Debian, Ubuntu: apt-get install python3-venv)."; \
  else chosen=yes; break; fi; \
done; \
if [ -z "$$chosen" ]; then \
  echo "make: Python 3.11 or newer with its venv module is needed.$${found:- None found: $$*.} Install one (https://www.python.org/downloads/)" \
    "or name yours: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
endef
