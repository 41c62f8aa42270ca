"""grouped_matmul: every implementation that runs here against the oracle, values and both gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import grouped_matmul as package
from pallas_kernels.grouped_matmul import group_metadata, grouped_matmul, pick
from pallas_kernels.grouped_matmul.blocks import Layout

FAST = ("blocks", "xla")


def operands(M, E, K, N, transpose_rhs=False, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (M, K), (E, N, K) if transpose_rhs else (E, K, N), (M, N)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def poison(rows, sizes):
    """NaN in the rows past the sum."""
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None], rows, jnp.nan)


@functools.partial(jax.jit, static_argnames=("implementation", "transpose_rhs"))
def value_and_grads(lhs, rhs, grad, sizes, implementation, transpose_rhs=False):
    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs, implementation=implementation)

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(grad)


def assert_same(got, want, rtol=1e-5):
    """Within rtol of the largest value."""
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(np.abs(theirs).max(initial=0), 1e-30))


@st.composite
def group_sizes(draw, E, M):
    """Sizes of E groups, summing to at most M: free draws, cuts of [0, M] (some equal: empty groups), or one group."""
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, M), min_size=E, max_size=E)))
        return np.diff([0, *cuts]).astype(np.int32)
    sizes = np.zeros(E, np.int32)
    sizes[draw(st.integers(0, E - 1))] = draw(st.integers(0, M))
    return sizes


@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_by_hand(implementation):
    lhs = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 7.0]])
    rhs = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]], [[0.0, 1.0], [2.0, 0.0]]])
    sizes = jnp.array([1, 0, 2], jnp.int32)
    grad = jnp.array([[1.0, 10.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    out, dlhs, drhs = value_and_grads(lhs, rhs, grad, sizes, implementation)
    # row 0 by the identity; rows 1, 2: [a, b] -> [2b, a]; row 3 belongs to no group
    np.testing.assert_array_equal(out, [[1, 2], [8, 3], [12, 5], [0, 0]])
    # rows 1, 2: g · rhs[2]ᵀ = [g1, 2 g0]
    np.testing.assert_array_equal(dlhs, [[1, 10], [0, 2], [1, 0], [0, 0]])
    # group 0: [1, 2]ᵀ [1, 10]; group 2: [3, 4]ᵀ [1, 0] + [5, 6]ᵀ [0, 1]
    np.testing.assert_array_equal(drhs, [[[1, 10], [2, 20]], [[0, 0], [0, 0]], [[3, 5], [4, 6]]])


# M = 203 over 5 groups: a base of 48 rows each, so larger groups overflow into windows; 203 is off every tile.
@pytest.mark.parametrize("transpose_rhs", (False, True))
@pytest.mark.parametrize("implementation", FAST)
@settings(deadline=None, max_examples=25)
@given(sizes=group_sizes(5, 203))
@example(sizes=np.array([0, 203, 0, 0, 0], np.int32))
@example(sizes=np.array([0, 60, 1, 0, 57], np.int32))
@example(sizes=np.zeros(5, np.int32))
def test_matches_reference(implementation, transpose_rhs, sizes):
    lhs, rhs, grad = operands(203, 5, 12, 20, transpose_rhs)
    lhs, grad = poison(lhs, sizes), poison(grad, sizes)
    want = value_and_grads(lhs, rhs, grad, sizes, "reference", transpose_rhs)
    got = value_and_grads(lhs, rhs, grad, sizes, implementation, transpose_rhs)
    assert_same(got, want)
    assert not np.any(np.asarray(got[2])[sizes == 0])  # exactly zero
    assert not np.any(np.asarray(got[0])[sizes.sum() :]) and not np.any(np.asarray(got[1])[sizes.sum() :])


@pytest.mark.parametrize("sizes, M", [([1], 1), ([0, 1, 0], 1), ([0, 3, 0, 0, 2, 0, 0], 6), ([3], 70), ([0, 0], 3)])
def test_small(sizes, M):
    """Fewer rows than groups (no base: windows alone), one group, one row, no row at all."""
    sizes = jnp.array(sizes, jnp.int32)
    lhs, rhs, grad = operands(M, sizes.shape[0], 3, 2)
    lhs, grad = poison(lhs, sizes), poison(grad, sizes)
    want = value_and_grads(lhs, rhs, grad, sizes, "reference")
    for implementation in FAST:
        assert_same(value_and_grads(lhs, rhs, grad, sizes, implementation), want)


def test_no_rows():
    lhs, rhs, grad = operands(0, 2, 3, 4)
    out, dlhs, drhs = value_and_grads(lhs, rhs, grad, jnp.zeros(2, jnp.int32), "blocks")
    assert out.shape == (0, 4) and dlhs.shape == (0, 3)
    np.testing.assert_array_equal(drhs, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("E, K, N", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_nothing_to_multiply(implementation, E, K, N):
    lhs, rhs, grad = operands(6, E, K, N)
    got = value_and_grads(lhs, rhs, grad, jnp.ones(E, jnp.int32), implementation)
    for ours, shape in zip(got, ((6, N), (6, K), (E, K, N)), strict=True):
        np.testing.assert_array_equal(ours, np.zeros(shape))


def test_operands_of_numpy():
    lhs, rhs, _ = operands(8, 2, 3, 4)
    sizes = np.array([3, 5], np.int32)
    want = grouped_matmul(lhs, rhs, jnp.asarray(sizes))
    np.testing.assert_array_equal(grouped_matmul(np.asarray(lhs), np.asarray(rhs), sizes), want)


def test_blocks_layout_is_what_the_tests_above_mean():
    sizes = jnp.zeros(5, jnp.int32)
    assert Layout.of(203, group_metadata(sizes, 203)).base == 48
    assert Layout.of(4, group_metadata(sizes, 4)).base == 0


@pytest.mark.parametrize("dtype, rtol", [(jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)])
@pytest.mark.parametrize("implementation", FAST)
def test_half_precision(implementation, dtype, rtol):
    sizes = jnp.array([50, 0, 30], jnp.int32)
    args = operands(90, 3, 16, 8, dtype=dtype)
    got = value_and_grads(*args, sizes, implementation)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
    want = value_and_grads(*(a.astype(jnp.float32) for a in args), sizes, "reference")
    assert_same([a.astype(jnp.float32) for a in got], want, rtol)


@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_preferred_element_type(implementation):
    """bf16 operands, float32 out: nothing is rounded on the way out."""
    lhs, rhs, _ = operands(64, 3, 16, 8, dtype=jnp.bfloat16)
    sizes = jnp.array([40, 4, 20], jnp.int32)
    want = grouped_matmul(lhs.astype(jnp.float32), rhs.astype(jnp.float32), sizes, implementation="reference")

    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.float32, implementation=implementation)

    out, pull = jax.vjp(jax.jit(product), lhs, rhs)
    assert_same([out], [want])
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("implementation", ("reference", *FAST))
def test_inside_shard_map(implementation):
    """Rows sharded, weights replicated: the weights' gradient is summed over devices by the cast to varying."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    lhs, rhs, grad = operands(80, 3, 4, 6)
    sizes = jnp.array([[30, 0, 4], [0, 3, 37]], jnp.int32)

    def local(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes[0], implementation=implementation)

    spec = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec(), spec), out_specs=spec)

    @jax.jit
    def run(lhs, rhs, grad):
        out, pull = jax.vjp(lambda lhs, rhs: sharded(lhs, rhs, sizes), lhs, rhs)
        return out, *pull(grad)

    halves = [
        value_and_grads(lhs[i : i + 40], rhs, grad[i : i + 40], s, "reference")
        for i, s in zip((0, 40), sizes, strict=True)
    ]
    (out0, dlhs0, drhs0), (out1, dlhs1, drhs1) = halves
    want = jnp.concatenate([out0, out1]), jnp.concatenate([dlhs0, dlhs1]), drhs0 + drhs1
    assert_same(run(lhs, rhs, grad), want)


@pytest.mark.parametrize("implementation", ("reference", "blocks"))
def test_vmap_is_a_loop(implementation):
    """Over rows, weights and sizes: values and gradients."""
    batches = [operands(8, 2, 3, 4, seed=seed) for seed in range(3)]
    sizes = jnp.array([[3, 5], [0, 6], [8, 0]], jnp.int32)
    run = functools.partial(value_and_grads, implementation=implementation)
    got = jax.vmap(run)(*(jnp.stack(arrays) for arrays in zip(*batches, strict=True)), sizes)
    for i, batch in enumerate(batches):
        assert_same([array[i] for array in got], run(*batch, sizes[i]))


def test_inside_scan_and_remat():
    lhs, rhs, grad = operands(40, 2, 6, 6)
    sizes = jnp.array([7, 30], jnp.int32)
    metadata = group_metadata(sizes, 40)

    @functools.partial(jax.jit, static_argnames=("scanned", "implementation"))
    def grads(lhs, rhs, scanned, implementation):
        def loss(lhs, rhs):
            def step(x, _):
                return jnp.tanh(grouped_matmul(x, rhs, sizes, metadata=metadata, implementation=implementation)), None

            if scanned:
                return jnp.sum(grad * jax.lax.scan(jax.checkpoint(step), lhs, None, length=2)[0])
            return jnp.sum(grad * step(step(lhs, None)[0], None)[0])

        return jax.grad(loss, argnums=(0, 1))(lhs, rhs)

    assert_same(grads(lhs, rhs, True, "blocks"), grads(lhs, rhs, False, "reference"))


def test_blocks_do_not_multiply_every_row_with_every_group():
    """The trap of ragged_dot on CPU: work E times too large. Counted by the compiler on the base, which is all but rare
    overflow; the loop's body, counted once, is eight windows of 64 rows."""
    M, E, K, N = 4096, 64, 32, 32
    lhs, rhs, _ = operands(M, E, K, N)
    sizes = jnp.full(E, M // E, jnp.int32)
    compiled = jax.jit(lambda *a: grouped_matmul(*a, implementation="blocks")).lower(lhs, rhs, sizes).compile()
    assert compiled.cost_analysis()["flops"] < 1.6 * (2 * M * K * N)


# ---- what is picked, and bad input


def test_pick_is_logged_once(caplog):
    package._pick.cache_clear()
    package._log_once.cache_clear()
    lhs, rhs, _ = operands(8, 2, 3, 4)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert pick(lhs, rhs) == "blocks"
        grouped_matmul(lhs, rhs, jnp.array([3, 5], jnp.int32))
        grouped_matmul(lhs[:4], rhs, jnp.array([3, 1], jnp.int32))
    assert caplog.messages == ["grouped_matmul: blocks on cpu"]


def test_named_implementation_runs_or_raises():
    lhs, rhs, _ = operands(8, 2, 3, 4)
    sizes = jnp.array([3, 5], jnp.int32)
    with pytest.raises(ValueError, match="unknown implementation 'fast'; there are reference, blocks"):
        grouped_matmul(lhs, rhs, sizes, implementation="fast")
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu can't take .*implementation='blocks' would"):
        grouped_matmul(lhs, rhs, sizes, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda l, r, s: (l[None], r, s), r"lhs must be \(M, K\)"),
        (lambda l, r, s: (l, r[:, :2], s), r"rhs must be \(E, K, N\)"),
        (lambda l, r, s: (l, r, s[:1]), r"group_sizes \(E,\)"),
        (lambda l, r, s: (l.astype(jnp.bfloat16), r, s), "must both be float32"),
        (lambda l, r, s: (l.astype(jnp.int32), r.astype(jnp.int32), s), "must both be float32"),
        (lambda l, r, s: (l, r, s.astype(jnp.float32)), "group_sizes must be int32"),
        (lambda l, r, s: (l, r, -s), "must not be negative"),
        (lambda l, r, s: (l, r, s * 2), "nor sum to more than the 8 rows"),
    ],
)
def test_bad_operands(change, message):
    lhs, rhs, _ = operands(8, 2, 3, 4)
    with pytest.raises(ValueError, match=message) as error:
        grouped_matmul(*change(lhs, rhs, jnp.array([3, 5], jnp.int32)))
    assert "\n" not in str(error.value)


def test_bad_options():
    lhs, rhs, _ = operands(8, 2, 3, 4)
    sizes = jnp.array([3, 5], jnp.int32)
    with pytest.raises(ValueError, match="preferred_element_type=int32 must be float32, bfloat16 or float16"):
        grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match=r"metadata is of 3 groups and group_sizes of 2; give group_metadata"):
        grouped_matmul(lhs, rhs, sizes, metadata=group_metadata(jnp.array([3, 5, 0], jnp.int32), 8))
    with pytest.raises(ValueError, match=r"group_sizes must be \(E,\) int32; got float32\[2\]"):
        group_metadata(jnp.array([3.0, 5.0]), 8)
    with pytest.raises(ValueError, match="spare=3 must be even"):
        group_metadata(sizes, 8, spare=3)


def test_the_pick_is_of_the_chip_that_is_traced_for(monkeypatch):
    """Two chips of one platform, of which one can't."""
    chip = ["able"]
    monkeypatch.setattr(package, "_PREFERRED", {"cpu": ("mosaic_tpu", "blocks")})
    monkeypatch.setattr(package, "_why_not", lambda name, *_: None if (name, chip[0]) == ("mosaic_tpu", "able") else "")
    package._pick.cache_clear()
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32), jax.ShapeDtypeStruct((2, 128, 128), jnp.float32), False
    assert package._pick("cpu", "able", *shape) == "mosaic_tpu"
    chip[0] = "not able"
    assert package._pick("cpu", "not able", *shape) == "blocks"
    package._pick.cache_clear()


def test_sizes_inside_jit_are_checked_where_jit_is_disabled():
    """`jax.disable_jit` is the switch for looking: here in a scanned and rematerialised layer."""
    lhs, rhs, _ = operands(8, 2, 4, 4)

    @jax.jit
    def run(sizes):
        layer = jax.checkpoint(lambda x, _: (grouped_matmul(x, rhs, sizes, implementation="reference"), None))
        return jax.lax.scan(layer, lhs, None, length=2)[0]

    run(jnp.array([3, 6], jnp.int32))
    with jax.disable_jit():
        run(jnp.array([3, 5], jnp.int32))
        with pytest.raises(ValueError, match=r"sum to more than the 8 rows of lhs; got \[3, 6\]"):
            run(jnp.array([3, 6], jnp.int32))
