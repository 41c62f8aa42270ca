"""gated_ffn: the padded blocks against the plain composition of three grouped products, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.errors import UserError
from moejax.experts import ACTIVATIONS, gated_ffn
from pallas_kernels.grouped_matmul import group_metadata

D, F = 6, 4


def operands(R, E, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (R, D), (E, D, F), (E, D, F), (E, F, D), (R, D)
    return tuple(jnp.asarray(rng.normal(size=shape) * 0.5, dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("implementation", "activation"))
def value_and_grads(rows, gate, up, down, grad, sizes, implementation=None, activation="silu"):
    ffn = functools.partial(gated_ffn, group_sizes=sizes, implementation=implementation, activation=activation)
    out, pull = jax.vjp(ffn, rows, gate, up, down)
    return out, *pull(grad)


def assert_same(got, want, rtol=1e-5):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(np.abs(theirs).max(), 1e-30))


def test_by_hand():
    """relu(x · gate) · (x · up) · down with 1 × 1 experts: [2, 3, 5] and [-1, 1, 1]."""
    weights = ([[[2.0]], [[-1.0]]], [[[3.0]], [[1.0]]], [[[5.0]], [[1.0]]])
    rows = jnp.array([[1.0], [-1.0], [2.0], [-2.0], [7.0]])
    sizes = jnp.array([2, 2], jnp.int32)
    out = gated_ffn(rows, *map(jnp.array, weights), sizes, activation="relu")
    # 2·3·5; relu(-2) = 0; relu(-2) = 0; relu(2) · (-2) · 1; past the sum
    np.testing.assert_array_equal(out, [[30.0], [0.0], [0.0], [-4.0], [0.0]])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 170), min_size=4, max_size=4))
@example([0, 0, 170, 0])
@example([0, 0, 0, 0])
def test_blocks_match_three_products(cuts):
    """170 rows over 4 experts: a base of 48 each, the rest in windows of 64; NaN past the sum."""
    sizes = np.diff([0, *sorted(cuts)]).astype(np.int32)
    rows, *weights, grad = operands(170, 4)
    past = (np.arange(170) >= sizes.sum())[:, None]
    rows, grad = jnp.where(past, jnp.nan, rows), jnp.where(past, jnp.nan, grad)
    got = value_and_grads(rows, *weights, grad, sizes, implementation="blocks")
    assert_same(got, value_and_grads(rows, *weights, grad, sizes, implementation="reference"))
    for dweight in got[2:]:
        assert not np.any(np.asarray(dweight)[sizes == 0])


@pytest.mark.parametrize("R, sizes", [(1, [1]), (3, [0, 1, 0, 0, 2]), (66, [66]), (4, [0, 0])])
def test_small(R, sizes):
    sizes = jnp.array(sizes, jnp.int32)
    args = *operands(R, sizes.shape[0]), sizes
    assert_same(value_and_grads(*args), value_and_grads(*args, implementation="reference"))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 20), min_size=11, max_size=11))
@example([0] * 11)
@example([0, 0, 17, *[18] * 8])  # one group of 17 rows: three windows, the last of one row
def test_fewer_than_two_rows_a_group(cuts):
    """As when decoding: 20 rows over 12 experts, in windows of 8."""
    sizes = np.diff([0, *sorted(cuts), 20]).astype(np.int32)
    args = *operands(20, 12), sizes
    assert_same(value_and_grads(*args, implementation="blocks"), value_and_grads(*args, implementation="reference"))


@pytest.mark.parametrize("width, hidden", [(4, 6), (5, 5)])
def test_experts_as_wide_as_the_model_or_wider(width, hidden):
    """Weight gradients are summed in another orientation where F is not less than D."""
    rng = np.random.default_rng(1)
    shapes = (90, width), (3, width, hidden), (3, width, hidden), (3, hidden, width), (90, width)
    args = *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), jnp.array([75, 0, 10], jnp.int32)
    assert_same(value_and_grads(*args), value_and_grads(*args, implementation="reference"))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.keys() - {"silu"}))
def test_activations(activation):
    args = *operands(80, 3), jnp.array([70, 0, 8], jnp.int32)
    want = value_and_grads(*args, implementation="reference", activation=activation)
    assert_same(value_and_grads(*args, activation=activation), want)


def test_bfloat16():
    args = operands(80, 3, jnp.bfloat16)
    sizes = jnp.array([70, 0, 8], jnp.int32)
    got = value_and_grads(*args, sizes)
    assert {a.dtype for a in got} == {jnp.dtype(jnp.bfloat16)}
    # bf16 keeps 8 bits; four roundings stand between the rows and the gradient of gate
    want = value_and_grads(*(a.astype(jnp.float32) for a in args), sizes, implementation="reference")
    assert_same([a.astype(jnp.float32) for a in got], want, rtol=2**-6)


def test_inside_scan_and_remat():
    rows, *weights, grad = operands(70, 2)
    sizes = jnp.array([65, 3], jnp.int32)
    metadata = group_metadata(sizes, 70)

    @functools.partial(jax.jit, static_argnames=("scanned", "implementation"))
    def grads(rows, weights, scanned, implementation):
        def loss(rows, weights):
            def step(x, _):
                y = gated_ffn(x, *weights, sizes, metadata=metadata, implementation=implementation)
                return x + y, None

            if scanned:
                return jnp.sum(grad * jax.lax.scan(jax.checkpoint(step), rows, None, length=2)[0])
            return jnp.sum(grad * step(step(rows, None)[0], None)[0])

        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(rows, weights))

    assert_same(grads(rows, weights, True, "blocks"), grads(rows, weights, False, "reference"))


def test_unknown_activation():
    rows, *weights, _ = operands(4, 2)
    with pytest.raises(UserError, match="unknown activation 'swish'; there are silu, gelu, relu"):
        gated_ffn(rows, *weights, jnp.array([2, 2], jnp.int32), activation="swish")


def test_bad_operands():
    rows, gate, up, down, _ = operands(4, 2)
    sizes = jnp.array([2, 2], jnp.int32)
    with pytest.raises(UserError, match=r"must be \(R, D\).* got \(4, 6\), .*\(2, 6, 4\), \(2,\)"):
        gated_ffn(rows, gate, up, jnp.swapaxes(down, 1, 2), sizes)
    with pytest.raises(UserError, match="one dtype; got bfloat16, float32, float32, float32: cast the weights"):
        gated_ffn(rows.astype(jnp.bfloat16), gate, up, down, sizes)
