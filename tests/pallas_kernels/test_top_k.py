"""The k largest of each row: the kernel interpreted against `lax.top_k`, what it refuses, and on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.top_k import mosaic_gpu, top_k


def scores(T, E, seed=0):
    """Of few numbers, so that many are equal, with infinities of both signs; the first row is -inf alone."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-np.inf, -2.5, -0.0, 0.0, 1e-30, 0.5, 0.75, 1.0, np.inf], (T, E)).astype(np.float32)
    values[T // 2 :] = rng.normal(size=(T - T // 2, E))
    values[0] = -np.inf
    return jnp.asarray(values)


def assert_as_lax(found, given, k):
    # which of 0.0 and -0.0 comes first lax says by sign, a comparison doesn't; no router tells them apart
    values, indices = jax.lax.top_k(jnp.where(given == 0, 0, given), k)
    np.testing.assert_array_equal(found[1], indices)
    np.testing.assert_array_equal(found[0], values)


@pytest.mark.parametrize("T, E, k", [(64, 64, 8), (128, 8, 8), (64, 24, 1), (64, 256, 3)])
def test_interpreted_equals_lax_top_k_also_on_ties_and_infinities(T, E, k):
    given = scores(T, E)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.jit(mosaic_gpu.top_k, static_argnums=1)(given, k)
    assert_as_lax(found, given, k)


def test_interpreted_gives_distinct_indices_for_nan_and_runs_under_vmap():
    given = scores(128, 16).at[5].set(jnp.nan).at[7, ::3].set(jnp.nan).reshape(2, 64, 16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        values, indices = jax.jit(jax.vmap(lambda s: mosaic_gpu.top_k(s, 6)))(given)
    assert all(len(set(row)) == 6 and set(row) <= set(range(16)) for row in indices.reshape(-1, 6).tolist())
    clean = np.delete(np.arange(128), [5, 7])
    found = values.reshape(-1, 6)[clean], indices.reshape(-1, 6)[clean]
    assert_as_lax(found, given.reshape(-1, 16)[clean], 6)


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match=r"needs scores \(T, E\) and k in 1 … E; got float32\[64\] and 1"):
        top_k(jnp.zeros(64), 1)
    for k in (0, 9):
        with pytest.raises(ValueError, match=rf"got float32\[64, 8\] and {k}"):
            top_k(jnp.zeros((64, 8)), k)
    with pytest.raises(NotImplementedError, match=r"float32\[64, 8\], k 2: it needs a Hopper GPU; jax.lax.top_k would"):
        top_k(jnp.zeros((64, 8)), 2)
    monkeypatch.setattr("pallas_kernels.grouped_matmul.mosaic_gpu._hopper", lambda: True)
    assert mosaic_gpu.why_not(jnp.zeros((64, 8)), 2) is None
    assert mosaic_gpu.why_not(jnp.zeros((64, 8), jnp.bfloat16), 2) == "it needs float32"
    for shape in ((63, 8), (64, 12), (64, 264), (0, 8)):
        assert mosaic_gpu.why_not(jnp.zeros(shape), 2) == "it needs T in multiples of 64 and E of 8, at most 256"
    assert mosaic_gpu.why_not(jnp.zeros((64, 64)), 33) == "it needs k of at most 32"


@pytest.mark.gpu
@pytest.mark.parametrize("T, E, k", [(16384, 64, 8), (8192, 128, 8), (1024, 256, 8), (64, 8, 8), (4096, 16, 1)])
def test_on_a_gpu(T, E, k):
    given = scores(T, E)
    run = jax.jit(functools.partial(top_k, k=k))
    found = run(given)
    assert_as_lax(found, given, k)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, run(given), found)


@pytest.mark.gpu
def test_on_a_gpu_with_nan_and_inside_shard_map():
    given = scores(256, 64).at[3].set(jnp.nan).at[9, ::5].set(jnp.nan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    run = jax.shard_map(lambda s: top_k(s, 8), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    values, indices = jax.jit(run)(given)
    assert all(len(set(row)) == 8 and set(row) <= set(range(64)) for row in indices.tolist())
    clean = np.delete(np.arange(256), [3, 9])
    assert_as_lax((values[clean], indices[clean]), given[clean], 8)
