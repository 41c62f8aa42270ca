# make demo | test | test-tpu | quick | lint | types.  Each makes what it needs; a second call skips what is done.
# ACCELERATOR=cuda13 or tpu installs that build of jax.
ACCELERATOR ?= cpu
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(ACCELERATOR)

.PHONY: demo test test-tpu quick lint types setup clean
setup: $(STAMP)

$(VENV)/.installed-%: requirements.txt pyproject.toml tools/make_venv.sh
	@sh tools/make_venv.sh $(VENV) $*
	@touch $@

demo: $(STAMP)
	$(PYTHON) experiments/demo.py

test: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not gpu and not tpu"

# Compiles for TPU on any machine: adds jax's TPU build (libtpu, 0.7 GB), which needs no TPU to compile.
test-tpu: $(VENV)/.installed-tpu
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(PYTHON) -m pytest -m tpu tests/test_tpu.py

quick: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not tpu"

lint: $(STAMP)
	$(PYTHON) -m ruff check .

types: $(STAMP)
	$(PYTHON) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
