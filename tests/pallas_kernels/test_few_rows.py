"""Products of a few rows with matrices of their own: interpreted, lowered, and on a GPU, against float64."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.few_rows import mosaic_gpu, products
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped


def operands(T, R, E, A, N, count, dtype=jnp.bfloat16):
    """rows, chosen (the first two alike), kernels."""
    rng = np.random.default_rng(R + A)
    chosen = rng.integers(0, E, R).astype(np.int32)
    chosen[1:2] = chosen[0]
    kernels = tuple(jnp.asarray(rng.normal(size=(E, A, N)), dtype) for _ in range(count))
    return jnp.asarray(rng.normal(size=(T, A)), dtype), jnp.asarray(chosen), kernels


def assert_right(found, rows, chosen, kernels):
    wide = np.asarray(rows.astype(jnp.float32), np.float64).repeat(len(chosen) // len(rows), axis=0)
    for parts, kernel in zip(found, kernels, strict=True):
        assert parts.dtype == jnp.float32
        own = np.asarray(kernel.astype(jnp.float32), np.float64)[np.asarray(chosen)]
        wanted = np.einsum("ra,ran->rn", wide, own)
        np.testing.assert_allclose(np.asarray(parts).sum(axis=1), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("T, R, E, A, N, count", [(3, 6, 4, 64, 256, 2), (1, 1, 1, 48, 384, 1)])
def test_interpreted(T, R, E, A, N, count, monkeypatch, capfd):
    monkeypatch.setattr(grouped, "_hopper", lambda: True)
    monkeypatch.setattr(mosaic_gpu, "_BLOCKS", 32)
    args = operands(T, R, E, A, N, count)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.block_until_ready(products(*args))
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    assert found[0].shape[1] > 1
    assert_right(found, *args)


def test_it_lowers(monkeypatch):
    monkeypatch.setattr(grouped, "_hopper", lambda: True)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    kernels = (shape((64, 2048, 1024)),) * 2
    traced = jax.jit(products).trace(shape((1, 2048)), jax.ShapeDtypeStruct((8,), jnp.int32), kernels)
    assert [out.shape for out in traced.out_info] == [(8, 16, 1024)] * 2  # 256 blocks of 128 rows of a matrix
    assert "few_rows_products" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_bad_input():
    rows, chosen, kernels = operands(2, 2, 3, 64, 128, 2)
    with pytest.raises(ValueError, match=r"kernels \(E, A, N\) of one shape; got bfloat16\[2, 64\], int32\[2\]"):
        products(rows, chosen, (kernels[0], kernels[1][:, :, :64]))
    with pytest.raises(ValueError, match=r"chosen \(R,\) int32 with R a multiple of T"):
        products(rows, chosen[:1], kernels)
    with pytest.raises(ValueError, match=r"needs rows \(T, A\)"):
        products(rows[0], chosen, kernels)
    with pytest.raises(ValueError, match=r"needs rows \(T, A\)"):
        products(rows, chosen, ())
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        products(rows, chosen, kernels)
    with pytest.raises(NotImplementedError, match="A in multiples of 16 and N of 128"):
        products(rows, chosen, tuple(kernel[:, :, :64] for kernel in kernels))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, R, E, A, N, count", [(1, 8, 64, 2048, 1024, 2), (8, 8, 64, 1024, 2048, 1), (8, 16, 4, 1408, 2816, 2)]
)
def test_on_a_gpu(T, R, E, A, N, count):
    args = operands(T, R, E, A, N, count)
    run = jax.jit(products)
    found = run(*args)
    assert_right(found, *args)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, run(*args), found)
