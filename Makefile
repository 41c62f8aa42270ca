# make demo | test | quick | lint | types.  Each makes what it needs; a second call skips what is done.
# ACCELERATOR=cuda13 or tpu installs that build of jax.
ACCELERATOR ?= cpu
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(ACCELERATOR)

.PHONY: demo test quick lint types setup clean
setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml tools/make_venv.sh
	@sh tools/make_venv.sh $(VENV) $(ACCELERATOR)
	@touch $@

demo: $(STAMP)
	$(PYTHON) experiments/demo.py

test: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not gpu and not tpu"

quick: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not tpu"

lint: $(STAMP)
	$(PYTHON) -m ruff check .

types: $(STAMP)
	$(PYTHON) -m mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
