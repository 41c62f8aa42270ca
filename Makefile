# make demo | test | test-tpu | quick | long | lint | types.  Each makes what it needs; a second call skips what is done.
# ACCELERATOR=cuda13 or tpu installs that build of jax.
ACCELERATOR ?= cpu
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(ACCELERATOR)

.PHONY: demo test test-tpu quick long lint types setup clean
setup: $(STAMP)

$(VENV)/.installed-%: requirements.txt pyproject.toml tools/make_venv.sh
	@sh tools/make_venv.sh $(VENV) $*
	@touch $@

demo: $(STAMP)
	$(PYTHON) experiments/demo.py

# Three processes on two cores: many a test waits for a process of its own.
test: $(STAMP)
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long and not gpu and not tpu"

# Compiles for TPU on any machine: libtpu (0.7 GB, of jax 0.11.2's tpu extra) needs no TPU for that. It lies apart:
# installed beside jax it would look for a TPU, and complain, in every later command.
LIBTPU := $(VENV)/libtpu-0.0.48.1
$(LIBTPU): | $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ libtpu==0.0.48.1

test-tpu: $(STAMP) $(LIBTPU)
	PYTHONPATH=$(LIBTPU) JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(PYTHON) -m pytest -m tpu tests/test_tpu.py tests/test_compile_ahead_tpu.py

quick: $(STAMP)
	$(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not long and not gpu and not tpu"

long: $(STAMP)
	$(PYTHON) -m pytest -m long

lint: $(STAMP)
	$(PYTHON) -m ruff check .

types: $(STAMP)
	$(PYTHON) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
