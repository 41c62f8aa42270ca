"""No access outside an array: compute-sanitizer's memcheck over one case of each Hopper kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import memcheck_cases
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs CUDA's compute-sanitizer")
def test_memcheck_is_clean():
    # each array an allocation of its own, so that what lies beyond is nobody's; the kernels that are ours alone
    setting = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "PYTHONPATH": str(ROOT)}
    checker = ["compute-sanitizer", "--kernel-name", "kernel_substring=mosaic_gpu"]
    command = [*checker, sys.executable, memcheck_cases.__file__]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-2000:]
    assert set(memcheck_cases.cases()) <= set(done.stdout.splitlines())
