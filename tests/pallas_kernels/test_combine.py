"""Rows to tokens and back: the plain implementation by hand, the kernels interpreted against it, and on a GPU."""

import functools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.combine import combine, mosaic_gpu, pick, spread, xla
from pallas_kernels.grouped_matmul import mosaic_gpu as products


def operands(T, K, D, dtype=jnp.float32, left_out=0, seed=0):
    """rows, slot, weight, grad; the first `left_out` choices have no row, and rows past the rest hold NaN."""
    rng = np.random.default_rng(seed)
    R = T * K
    slot = np.full(R, R, np.int32)
    slot[rng.permutation(R)[left_out:]] = rng.permutation(R - left_out)
    rows = rng.normal(size=(R, D))
    rows[R - left_out :] = np.nan
    weight = jnp.asarray(rng.normal(size=R), jnp.float32)
    return (
        jnp.asarray(rows, dtype),
        jnp.asarray(slot.reshape(T, K)),
        weight,
        jnp.asarray(rng.normal(size=(T, D)), dtype),
    )


def everything(rows, slot, weight, grad, implementation):
    """Both functions' values and gradients, with NaN-free rows alone: (combined, drows, dweight, spread, dx)."""
    out, pull = jax.vjp(lambda r, w: combine(r, slot, w, implementation=implementation), rows, weight)
    there, turned = jax.vjp(lambda x: spread(x, slot, rows.shape[0], implementation=implementation), grad)
    drows, dweight = pull(grad)
    real = jnp.sum(slot < rows.shape[0])
    return out, drows[:real], dweight, there[:real], *turned(rows)


def test_by_hand():
    rows = jnp.array([[1.0, 2.0], [10.0, 20.0], [jnp.nan, jnp.nan], [100.0, 200.0]])
    # token 0: rows 1 and 0; token 1: row 3 alone; row 2 belongs to nobody
    slot = jnp.array([[1, 0], [4, 3]], jnp.int32)
    weight = jnp.array([2.0, 3.0, 5.0, 0.5])
    out, pull = jax.vjp(functools.partial(combine, implementation="xla"), rows, slot, weight)
    np.testing.assert_array_equal(out, [[3 * 10 + 2 * 1, 3 * 20 + 2 * 2], [0.5 * 100, 0.5 * 200]])
    drows, _, dweight = pull(jnp.array([[1.0, 10.0], [4.0, 0.0]]))
    np.testing.assert_array_equal(drows, [[2, 20], [3, 30], [0, 0], [2, 0]])
    np.testing.assert_array_equal(dweight, [1 + 20, 10 + 200, 0, 400])
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    there, pull = jax.vjp(lambda x: spread(x, slot, 4, implementation="xla"), x)
    np.testing.assert_array_equal(there, [[1, 2], [1, 2], [0, 0], [3, 4]])
    np.testing.assert_array_equal(pull(rows)[0], [[11, 22], [100, 200]])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), left_out=st.integers(0, 12))
def test_against_a_loop(seed, left_out):
    """Values and all gradients of 4 tokens of 3 choices, some of them without a row; unused rows hold NaN."""
    rows, slot, weight, grad = (np.asarray(a) for a in operands(4, 3, 8, left_out=left_out, seed=seed))
    real = 12 - left_out
    out, dx, drows, there, dweight = (np.zeros(shape) for shape in ((4, 8), (4, 8), (12, 8), (12, 8), 12))
    for t, k in np.argwhere(slot < 12):
        row = slot[t, k]
        out[t] += weight[row] * rows[row]
        drows[row], dweight[row] = weight[row] * grad[t], rows[row] @ grad[t]
        there[row] = grad[t]
        dx[t] += rows[row]
    got = everything_jitted(rows, slot, weight, grad)
    for ours, want in zip(got, (out, drows, dweight, there, dx), strict=True):
        used = slice(real) if want.shape == (12, 8) else slice(None)  # what lies in rows of no token is undefined
        np.testing.assert_allclose(ours[used], want[used], rtol=1e-5, atol=1e-5)


@jax.jit
def everything_jitted(rows, slot, weight, grad):
    return everything_but_slices(rows, slot, weight, grad, "xla")


def test_tokens_without_rows_are_zero():
    rows = jnp.full((2, 4), jnp.nan)
    assert (combine(rows, jnp.full((3, 1), 2, jnp.int32), None) == 0).all()


@pytest.mark.parametrize("D", [128, 384])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_interpreted(D, dtype, monkeypatch, capfd):
    monkeypatch.setattr(products, "_hopper", lambda: True)
    args = operands(5, 3, D, dtype, left_out=4)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.block_until_ready(everything(*args, "mosaic_gpu"))
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    for ours, want in zip(got, everything(*args, "xla"), strict=True):
        assert ours.dtype == want.dtype
        ours, want = (np.asarray(x.astype(jnp.float32)) for x in (ours, want))
        np.testing.assert_allclose(ours, want, rtol=0, atol=2e-6 * max(np.abs(want).max(), 1))


def test_kernels_lower(monkeypatch):
    monkeypatch.setattr(products, "_hopper", lambda: True)
    shape = jax.ShapeDtypeStruct
    rows, slot, weight = shape((1024, 1536), jnp.bfloat16), shape((128, 8), jnp.int32), shape((1024,), jnp.float32)
    traced = jax.jit(functools.partial(everything_but_slices, implementation="mosaic_gpu"))
    traced = traced.trace(rows, slot, weight, shape((128, 1536), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("combine_rows", "combine_rows_gradients", "spread_rows"):
        assert name in text


def everything_but_slices(rows, slot, weight, grad, implementation):
    out, pull = jax.vjp(lambda r, w: combine(r, slot, w, implementation=implementation), rows, weight)
    there, turned = jax.vjp(lambda x: spread(x, slot, rows.shape[0], implementation=implementation), grad)
    return out, *pull(grad), there, *turned(rows)


def test_no_rows_and_no_tokens():
    rows, slot, weight, _ = operands(4, 2, 128)
    none = jnp.zeros((4, 2), jnp.int32)
    np.testing.assert_array_equal(combine(rows[:0], none, weight[:0]), np.zeros((4, 128)))
    assert combine(rows, slot[:0], weight).shape == (0, 128)
    assert spread(rows[:0], slot[:0], 8).shape == (8, 128)


def test_bad_input():
    rows, slot, weight, grad = operands(4, 2, 128)
    with pytest.raises(ValueError, match=r"weight must be float32 \(8,\); got float32\[4\]"):
        combine(rows, slot, weight[:4])
    with pytest.raises(ValueError, match="unknown implementation 'mosaic'; there are mosaic_gpu, xla"):
        combine(rows, slot, weight, implementation="mosaic")
    with pytest.raises(ValueError, match="x has 3 tokens and slot 4"):
        spread(grad[:3], slot, 8)
    with pytest.raises(ValueError, match=r"floating dtype.* got int32\[8, 128\]"):
        combine(rows.astype(jnp.int32), slot, weight)
    with pytest.raises(ValueError, match=r"slot \(T, K\) int32"):
        combine(rows, slot.astype(jnp.float32), weight)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU; implementation='xla' would"):
        combine(rows, slot, weight, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="width in multiples of 128"):
        combine(rows[:, :8], slot, weight, implementation="mosaic_gpu")
    assert pick(rows) == "xla"
    assert xla.why_not(rows) is None
    assert "rows" in mosaic_gpu.why_not(rows[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", [0, 1000])
@pytest.mark.parametrize("D", [128, 768, 1536, 7168])
def test_on_a_gpu(D, left_out):
    args = operands(500, 8, D, jnp.bfloat16, left_out)
    got = everything(*args, "mosaic_gpu")
    for ours, want in zip(got, everything(*args, "xla"), strict=True):
        ours, want = (np.asarray(x.astype(jnp.float32)) for x in (ours, want))
        assert np.linalg.norm(ours - want) <= 2e-3 * np.linalg.norm(want)
    for _ in range(2):
        again = everything(*args, "mosaic_gpu")
        assert all((a == b).all() for a, b in zip(got, again, strict=True))


PEER = os.environ.get("PEER_PYTHON")


@pytest.mark.gpu
@pytest.mark.skipif(not PEER, reason="needs PEER_PYTHON, an environment's python that has torch")
def test_error_beside_torch(tmp_path):
    """Against float64: the value's and both gradients' error is at most 1.5 times torch's."""
    rows, slot, weight, grad = operands(500, 8, 768, jnp.bfloat16)
    given = {"rows": rows.astype(jnp.float32), "slot": slot, "weight": weight, "grad": grad.astype(jnp.float32)}
    given = {name: np.asarray(a) for name, a in given.items()}
    r, w, g = (np.asarray(given[name], np.float64) for name in ("rows", "weight", "grad"))
    token = np.empty(4000, np.int64)
    token[given["slot"].ravel()] = np.repeat(np.arange(500), 8)
    want = np.einsum("tkd,tk->td", r[given["slot"]], w[given["slot"]]), w[:, None] * g[token], np.sum(r * g[token], 1)
    np.savez(tmp_path / "case.npz", **given, **{f"want_{i}": right for i, right in enumerate(want)})
    script = Path(mosaic_gpu.__file__).parents[1] / "peers" / "torch_errors.py"
    done = subprocess.run([PEER, script, "combine", tmp_path / "case.npz"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    out, pull = jax.vjp(lambda r, w: combine(r, slot, w), rows, weight)
    for ours, right, bound in zip((out, *pull(grad)), want, json.loads(done.stdout), strict=True):
        ours = np.asarray(ours.astype(jnp.float32), np.float64)
        assert np.linalg.norm(ours - right) <= 1.5 * bound * np.linalg.norm(right)
