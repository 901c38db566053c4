# Every target works alone on a fresh clone: it makes .venv first where that is missing or out of
# date. Needed beforehand: Python 3.10 to 3.13 with its venv module, and make.
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
FAST := not slow and not long and not multiprocess and not gpu and not faults
# A worker takes tests that follow each other, which share their fixtures, and in the end some of
# another's; tests/conftest.py says how many workers there are.
WORKERS := --dist worksteal -n auto
# Bytecode is kept, also where the user's environment says not to: tests start hundreds of processes,
# and each would compile all modules anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest

# ACCEPT=1: a step back of the kernels' machine code is taken over.
AOT = tests/kernels/aot_worker.py --processes $$(nproc) $(if $(ACCEPT),--accept)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-compare test test-long kernels-check faults docs-check lint check format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | \
	while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## make .venv with the tested versions (PYTHON=python3.12 picks another Python)

demo: $(STAMP) ## train a small ViT on a synthetic dataset in minutes, and draw what it learnt
	@$(RUN) -m cjepa_fast.demo

demo-compare: $(STAMP) ## the demo beside I-JEPA, the same without VICReg: curves and a sentence
	@$(RUN) -m cjepa_fast.demo --compare

test: $(STAMP) ## the tests that this machine can run, but for the long ones
	@$(PYTEST) -m "not faults and not long" $(WORKERS)

test-long: $(STAMP) ## the long ones: more ranks, launchers, kills, an installed wheel
	@$(PYTEST) -m "long and not faults" $(WORKERS)

kernels-check: $(STAMP) ## compile every kernel for sm_80, 90 and 100; fails where one got worse
	@PYTHONPATH=tests:. $(RUN) $(AOT) --markdown bench/results/aot.md
ifdef BESIDE  # the Python of an environment with another Triton, such as 3.6.0
	@PYTHONPATH=tests:. $(BESIDE) $(AOT) --arch 90 --shipped --machine bench/results/aot_beside.md
endif

faults: $(STAMP) ## kill runs at 20 moments, on 1 and 2 processes, and compare them with whole ones
	@$(PYTEST) tests/faults

docs-check: $(STAMP) ## run the commands that the documentation shows, on a handful of images
	@OMP_NUM_THREADS=1 PYTHONPATH=tests:. $(RUN) tests/project/docs_check.py

lint: $(STAMP) ## ruff
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

check: lint ## ruff, then the fast tests
	@$(PYTEST) -q -m "$(FAST)" $(WORKERS)

format: $(STAMP) ## let ruff mend and format the code
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(STAMP) ## images/s of the demo's training step on this machine, in a minute
	@$(RUN) bench/throughput.py

clean: ## remove .venv and everything built or cached (runs/ stays)
	@rm -rf $(VENV) $(VENV).* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py constraints.txt scripts/install.sh
	@PYTHON='$(PYTHON)' sh scripts/install.sh '$(MAKECMDGOALS)'

ifdef PYTHON  # .venv may be of another one, however new it is
.PHONY: $(STAMP)
endif
