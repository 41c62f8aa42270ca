"""Layers that every family shares: lookups and decision scores in the forms that a GPU takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import layers, sharding

V, D, E = 11, 6, 5


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")


def test_sum_by_token_by_hand():
    rows = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0]])
    # token 2 has rows 0, 2 and 3: 1 + 3 + 4; token 0 row 1; token 3 row 4
    found = layers.sum_by_token(jnp.array([2, 0, 2, 2, 3]), rows, 4)
    np.testing.assert_array_equal(found, [[2.0, 20.0], [0.0, 0.0], [8.0, 80.0], [5.0, 50.0]])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, V - 1), min_size=37, max_size=37))
def test_sum_by_token_takes_runs_of_any_length(tokens):
    rows = np.random.default_rng(len(set(tokens))).normal(size=(37, D)).astype(np.float32)
    wanted = np.zeros((V, D))
    np.add.at(wanted, tokens, rows.astype(np.float64))
    found = jax.jit(layers.sum_by_token, static_argnums=2)(jnp.array(tokens, jnp.int32), jnp.array(rows), V)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [None, {"data": 2, "fsdp": 4}])
def test_the_gradient_of_a_lookup_is_the_scatters(as_on_a_gpu, shape):
    key = jax.random.key(0)
    table, seen = jax.random.normal(key, (V, D)), jax.random.normal(key, (8, 16, D))
    tokens = jax.random.randint(key, (8, 16), 0, V)

    def loss(take, table):
        return jnp.sum(jnp.sin(take(table, tokens)) * seen)

    wanted = jax.grad(lambda t: loss(lambda t, i: jnp.take(t, i, axis=0), t))(table)
    with jax.set_mesh(sharding.make_mesh(shape or {}, devices=jax.devices()[: 8 if shape else 1])):
        value, found = jax.jit(jax.value_and_grad(lambda t: loss(layers.lookup, t)))(table)
        program = jax.jit(jax.grad(lambda t: loss(layers.lookup, t))).lower(table).as_text()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert value == pytest.approx(float(loss(lambda t, i: jnp.take(t, i, axis=0), table)), rel=1e-5)
    assert "scatter" not in program


def test_pieces_sum_to_the_number():
    a = jax.random.normal(jax.random.key(0), (64, 3)) * 10.0 ** jnp.array([[-9.0, 0.0, 9.0]])
    for cut in (layers.pieces, jax.jit(layers.pieces)):  # XLA may simplify casts under jit
        found = cut(a)
        assert [piece.dtype for piece in found] == [jnp.bfloat16] * 3
        np.testing.assert_array_equal(sum(piece.astype(jnp.float32) for piece in found), a)
    assert layers.pieces(a.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_by_pieces_are_those_of_float32(as_on_a_gpu, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 64, 96), jnp.bfloat16)
    kernel, seen = jax.random.normal(keys[1], (96, E)).astype(dtype), jax.random.normal(keys[2], (2, 64, E))

    @jax.jit
    def both(x, kernel):
        out, pull = jax.vjp(layers.scores, x, kernel)
        return out, *pull(seen)

    out, dx, dkernel = both(x, kernel)
    assert (out.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, dtype)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, seen)]
    np.testing.assert_allclose(out, wide[0] @ wide[1], rtol=1e-6, atol=1e-5)  # values to 30: float32's rounding
    np.testing.assert_allclose(dx.astype(jnp.float32), wide[2] @ wide[1].T, rtol=2**-8, atol=1e-6)  # bfloat16's
    wanted = np.einsum("bld,ble->de", wide[0], wide[2])
    np.testing.assert_allclose(
        dkernel.astype(jnp.float32), wanted, rtol=2e-6 if dtype == jnp.float32 else 2**-8, atol=2e-5
    )


def test_scores_of_one_row_are_those_of_the_product(as_on_a_gpu):
    """In sixteen parts of a sum, and fewer where the width allows no more."""
    for width in (96, 20):
        keys = jax.random.split(jax.random.key(width), 2)
        x, kernel = jax.random.normal(keys[0], (1, 1, width), jnp.bfloat16), jax.random.normal(keys[1], (width, E))
        wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
        np.testing.assert_allclose(jax.jit(layers.scores)(x, kernel), wanted, rtol=1e-6, atol=1e-5)
