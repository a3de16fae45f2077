# make demo       train on real digits and draw some, from nothing but python3 (3.11+), make and git
# make test       the tests (minutes);  make test-slow: the long ones as well;  make lint
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS=... goes to pip, to choose CPU builds of torch and torchvision, say.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONDONTWRITEBYTECODE = 1
PYTEST := $(BIN)/python -m pytest -q -n 2 --basetemp=.pytest_tmp

.PHONY: demo test test-slow lint clean

demo: export TMPDIR = $(CURDIR)/.venv/tmp
# So small a network gains nothing from threads, and loses where they wait for whatever else runs.
demo: export OMP_NUM_THREADS = 1
demo: .venv/installed
	@mkdir -p $(TMPDIR)
	$(BIN)/torchrun --standalone --nproc_per_node=1 train.py --config configs/digits.yaml --run-name digits
	$(BIN)/python sample.py --ckpt results/digits --num-samples 5 --out sample.png
	$(BIN)/python sample_ddp.py --ckpt results/digits --balanced --num-fid-samples 5000 --per-proc-batch-size 500 \
	    --sample-dir results/digits/samples
	$(BIN)/python benchmarks/classifier.py --data-path digits --epochs 20 --out results/digits/classifier.pt
	$(BIN)/python evaluate.py digits \
	    results/digits/samples/DiNext-U-S-digits-0001050-size-8-vae-pixels-cfg-1.0-1-heun-12-fp32-seed-0-balanced-5000.npz \
	    --weights none --training-images digits --classifier results/digits/classifier.pt
	@echo "The picture: $(CURDIR)/sample.png"
	@echo "The run:     $(CURDIR)/results/digits"

test: .venv/installed
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST)

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "DiNext needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install your system's package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) '.[dev,eval,notebooks,track,parquet]'
	@rm -rf build dinext_requirements.egg-info
	@touch $@

clean:
	rm -rf .venv .pytest_tmp .pytest_cache .ruff_cache build
