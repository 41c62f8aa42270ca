#!/bin/sh
# usage: make_venv.sh VENV ACCELERATOR.  Finds a Python >= 3.12, makes VENV, installs the requirements and the project.
set -eu
venv=$1
accelerator=$2

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
  for name in python3.13 python3.12 python3; do
    # `command -v` may find a pyenv shim that answers only inside a pyenv project: ask it, don't trust the name.
    if command -v "$name" >/dev/null 2>&1 && fits "$name"; then command -v "$name"; return; fi
  done
  for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if [ -x "$path" ] && fits "$path"; then echo "$path"; return; fi
  done
}

case "$accelerator" in cpu|cuda12|cuda13|tpu) ;; *)
  echo "ACCELERATOR=$accelerator is not known; use cpu, cuda12, cuda13 or tpu" >&2; exit 2;;
esac
if [ ! -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
  python=$(find_python)
  if [ -z "$python" ]; then
    echo "moejax needs Python 3.12 or newer (with venv); found none as python3.13, python3.12, python3 or under pyenv: install one and run make again" >&2
    exit 2
  fi
  echo "making $venv with $python"
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
if [ "$accelerator" != cpu ]; then
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "jax[$accelerator]==$("$venv/bin/python" -c 'import jax; print(jax.__version__)')"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --config-settings editable_mode=compat --editable .
