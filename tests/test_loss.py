"""The cross-entropy in pieces against the plain one: values, gradients, and what the program holds."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import loss, models, sharding

TINY = Path(__file__).parent / "data" / "hf_tiny"
B, L, D, V = 4, 12, 8, 40


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel = jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, L), 0, V)
    return x, kernel, targets, jax.random.bernoulli(keys[3], 0.7, (B, L))


def capped(logits):
    return 3.0 * jnp.tanh(logits / 3.0)


def value_and_gradients(x, kernel, targets, mask, scale, pieces):
    # Divided, as a step does, so that the gradient that comes in is not 1.
    def mean(x, kernel):
        return loss.of_hidden(x, kernel, targets, mask, scale, pieces) / 7.0

    return jax.value_and_grad(mean, argnums=(0, 1))(x, kernel)


@pytest.mark.parametrize("scale", [lambda logits: logits, capped], ids=["plain", "capped"])
@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_pieces_make_no_difference(inputs, scale, pieces):
    x, kernel, targets, mask = inputs
    plain = loss.cross_entropy(scale(x @ kernel), targets, mask)
    total = jax.jit(loss.of_hidden, static_argnums=(4, 5))(*inputs, scale, pieces)
    np.testing.assert_allclose(total, plain, rtol=1e-6)
    one = value_and_gradients(*inputs, scale, 1)
    many = value_and_gradients(*inputs, scale, pieces)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), many, one)


def test_by_hand():
    # Two tokens, D = V = 2, logits (ln 3, 0) and (0, 0): p = 3/4 and 1/2; the second token is masked in `masked`.
    x = jnp.array([[[jnp.log(3.0), 0.0], [0.0, 0.0]]])
    kernel, targets = jnp.eye(2), jnp.array([[0, 1]])
    both = loss.of_hidden(x, kernel, targets, jnp.ones((1, 2), bool), pieces=2)
    np.testing.assert_allclose(both, -np.log(3 / 4) - np.log(1 / 2), rtol=1e-6)
    masked = loss.of_hidden(x, kernel, targets, jnp.array([[True, False]]), pieces=2)
    np.testing.assert_allclose(masked, -np.log(3 / 4), rtol=1e-6)


def test_gradients_have_the_dtypes_of_what_they_are_of(inputs):
    x, kernel, targets, mask = inputs
    low = x.astype(jnp.bfloat16)
    _, (dx, dkernel) = value_and_gradients(low, kernel, targets, mask, capped, 4)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
    _, (want_dx, want_dkernel) = value_and_gradients(low, kernel, targets, mask, capped, 1)
    dx, want_dx = dx.astype(jnp.float32), want_dx.astype(jnp.float32)
    np.testing.assert_allclose(dx, want_dx, atol=0.02)
    # Roundings of single entries cancel, a common factor does not: bfloat16's 1/7 is 0.2% off.
    assert abs(jnp.vdot(dx, want_dx) / jnp.vdot(want_dx, want_dx) - 1) < 5e-4
    np.testing.assert_allclose(dkernel, want_dkernel, atol=0.02)


def test_no_array_of_all_logits_is_held(inputs):
    def program(pieces):
        step = jax.jit(functools.partial(value_and_gradients, scale=capped, pieces=pieces))
        return step.lower(*inputs).compile().as_text()

    whole = re.compile(rf"f32\[(?:{B},{L}|{B * L}|\d+,{B},\d+),{V}\]")
    assert whole.search(program(1))
    assert not whole.search(program(3))


def test_on_a_mesh_each_device_keeps_its_rows(inputs):
    x, kernel, targets, mask = inputs
    plain = value_and_gradients(*inputs, capped, 1)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "expert": 1, "tensor": 2})
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, rows) for a in (x, targets, mask)]
        step = jax.jit(functools.partial(value_and_gradients, scale=capped, pieces=3))
        compiled = step.lower(placed[0], kernel, *placed[1:]).compile()
        got = compiled(placed[0], kernel, *placed[1:])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, plain)
    # One row of each piece of 4 on each device: logits (1, 4, V), never those of another device's rows.
    assert f"f32[{B},{L // 3},{V}]" not in compiled.as_text()


def test_a_published_family_in_pieces(monkeypatch):
    """Its head comes as a method of a bound module."""
    model, variables = models.load_hf(TINY / "olmoe")
    tokens = np.random.default_rng(0).integers(0, 128, (2, 8)).astype(np.int32)

    def total(params):
        return model.apply({"params": params}, tokens, targets=tokens, mask=np.ones((2, 8), bool))

    whole = jax.jit(jax.value_and_grad(total))(variables["params"])
    monkeypatch.setattr(loss, "LARGEST", 300)  # 2 · 8 · 128 logits: eight pieces
    pieces = jax.jit(jax.value_and_grad(lambda params: total(params)))(variables["params"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), pieces, whole)


def test_number_of_pieces(monkeypatch):
    monkeypatch.setattr(loss, "LARGEST", 1000)
    assert loss.number_of_pieces(2, 10, 50) == 1  # 2 · 10 · 50 = 1000
    assert loss.number_of_pieces(2, 12, 50) == 2  # 1200, and 600 in halves
    assert loss.number_of_pieces(4, 9, 100) == 9  # thirds are 1200 each, ninths 400: nothing between divides 9
    assert loss.number_of_pieces(30, 4, 100) == 4  # 3000 in one place: more than fits, but no fewer is possible
    monkeypatch.setattr(loss.sharding, "platform", lambda: "gpu")
    assert loss.number_of_pieces(4, 9, 100) == 3  # thirds of 1200 of the 2000 that a GPU holds
