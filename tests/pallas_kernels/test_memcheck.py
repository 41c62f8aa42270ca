"""One case of each Hopper kernel: its name is in the program, and it accesses nothing outside its arrays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import memcheck_cases
import pytest

ROOT = Path(__file__).parents[2]


KERNELS = {
    "grouped_matmul": ("grouped_matmul", "grouped_matmul_drhs"),
    "grouped_matmul, transposed": ("grouped_matmul", "grouped_matmul_drhs"),
    "gated_ffn": ("gated_ffn_hidden", "gated_ffn_dlhs", "grouped_matmul", "grouped_matmul_drhs"),
    "gated_ffn, no tail": ("gated_ffn_hidden", "gated_ffn_gradients", "gated_ffn_dlhs"),
    "grouped_matmul, tall tiles": ("grouped_matmul", "grouped_matmul_drhs"),
    "gated_ffn, tall tiles": ("gated_ffn_hidden", "gated_ffn_dlhs", "grouped_matmul", "grouped_matmul_drhs"),
    "grouped_matmul, pairs of row tiles": ("grouped_matmul", "grouped_matmul_drhs"),
    "grouped_matmul, pairs of low ones": ("grouped_matmul", "grouped_matmul_drhs"),
    "combine": ("spread_rows", "combine_rows", "combine_rows_gradients"),
    "few_rows": ("few_rows_products",),
    "top_k": ("select_top_k",),
    "remote_exchange": ("send_rows", "collect_rows"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", KERNELS)
def test_the_kernels_are_in_the_program(case):
    run, *args = memcheck_cases.cases()[case]
    text = jax.jit(run).lower(*args).compile().as_text()
    assert [name for name in KERNELS[case] if f"{name}_mosaic_gpu" not in text] == []


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs CUDA's compute-sanitizer")
def test_memcheck_is_clean():
    # each array an allocation of its own, so that what lies beyond is nobody's
    setting = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "PYTHONPATH": str(ROOT)}
    command = ["compute-sanitizer", sys.executable, memcheck_cases.__file__]
    done = subprocess.run(command, env=os.environ | setting, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout, done.stdout[-2000:]
    assert set(KERNELS) <= set(done.stdout.splitlines())
