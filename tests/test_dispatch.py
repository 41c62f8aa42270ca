"""dispatch: the plan by hand, and the whole way there and back against the dense oracle, values and all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from moejax import dispatch
from moejax.errors import UserError
from moejax.experts import gated_ffn
from moejax.routing import ExpertChoice, Routing, with_capacity


def routing(experts, weights, keep, num_experts):
    """A Routing of these (T, K) arrays; nothing here reads the scores."""
    experts = jnp.asarray(experts, jnp.int32)
    scores = jnp.zeros((experts.shape[0], num_experts))
    return Routing(experts, jnp.asarray(weights, jnp.float32), scores, jnp.asarray(keep, bool))


def expert_choice(tokens, weights, num_tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    return ExpertChoice(tokens, jnp.asarray(weights, jnp.float32), jnp.zeros((num_tokens, tokens.shape[0])))


# ---- by hand


def test_plan_of_token_choice_by_hand():
    decision = routing([[2, 0], [0, 1], [2, 1]], [[0.5, 0.25], [0.75, 0.125], [1.0, 2.0]], [[1, 1], [1, 0], [1, 1]], 4)
    plan = dispatch.plan(decision, 4)
    # expert 0: tokens 0 (second choice) and 1; expert 1: token 2, since token 1's choice is dropped; expert 2: 0 and 2
    np.testing.assert_array_equal(plan.group_sizes, [2, 1, 2, 0])
    np.testing.assert_array_equal(plan.token, [0, 1, 2, 0, 2, 0])
    np.testing.assert_array_equal(plan.weight, [0.25, 0.75, 2.0, 0.5, 1.0, 0.0])
    np.testing.assert_array_equal(plan.slot, [[3, 0], [1, 6], [4, 2]])  # 6 = R: no row
    rows = jnp.arange(1.0, 7.0)[:, None]
    # token 0: 0.5 · row 3 + 0.25 · row 0 = 0.5 · 4 + 0.25 · 1; token 1: 0.75 · 2; token 2: 1 · 5 + 2 · 3
    np.testing.assert_array_equal(dispatch.combine(rows, plan, 3), [[2.25], [1.5], [11.0]])


def test_a_plan_without_weights_has_gates_of_one():
    decision = routing([[2, 0], [0, 1], [2, 1]], [[0.5, 0.25], [0.75, 0.125], [1.0, 2.0]], [[1, 1], [1, 0], [1, 1]], 4)
    plan = dataclasses.replace(dispatch.plan(decision, 4), weight=None)
    out, pull = jax.vjp(lambda rows: dispatch.combine(rows, plan, 3), jnp.array([1.0, 2, 3, 4, 5, jnp.nan])[:, None])
    np.testing.assert_array_equal(out, [[4.0 + 1.0], [2.0], [5.0 + 3.0]])  # the rows of the plan above
    # rows of tokens 0, 1, 2, 0, 2; the last has none
    np.testing.assert_array_equal(pull(jnp.array([[10.0], [20.0], [30.0]]))[0][:, 0], [10, 20, 30, 10, 30, 0])


def test_plan_of_expert_choice_by_hand():
    decision = expert_choice([[3, 1], [1, 0]], [[0.5, 0.25], [2.0, 0.0]], 4)
    plan = dispatch.plan(decision, 2)
    np.testing.assert_array_equal(plan.group_sizes, [2, 2])
    np.testing.assert_array_equal(plan.token, [3, 1, 1, 0])
    # token 1 owns rows 1 and 2, token 3 row 0; row 3 is an empty place (weight 0) and comes last
    np.testing.assert_array_equal(plan.order, [1, 2, 0, 3])
    np.testing.assert_array_equal(plan.offsets, [0, 0, 2, 2, 3])
    rows = jnp.arange(1.0, 5.0)[:, None]
    # token 1: 0.25 · row 1 + 2 · row 2 = 0.25 · 2 + 2 · 3; token 3: 0.5 · row 0
    np.testing.assert_array_equal(dispatch.combine(rows, plan, 4), [[0.0], [6.5], [0.0], [0.5]])


def test_dense_by_hand():
    decision = routing([[1, 0], [1, 0]], [[0.5, 2.0], [3.0, 1.0]], [[1, 1], [1, 0]], 3)

    def experts(x):  # expert e multiplies by e + 1
        return x[None] * jnp.arange(1.0, 4.0)[:, None, None]

    # token 0: 10 · (0.5 · 2 + 2 · 1); token 1: 100 · 3 · 2
    np.testing.assert_array_equal(dispatch.dense(jnp.array([[10.0], [100.0]]), decision, experts), [[30.0], [600.0]])


@pytest.mark.parametrize("packed", [True, False])
def test_sort_by(packed, monkeypatch):
    """Both ways: packed, and where key and position don't fit one int32."""
    if not packed:
        monkeypatch.setattr(dispatch, "_LARGEST", 0)
    key = np.random.default_rng(0).integers(0, 8, 100, dtype=np.int32)
    order, boundaries = dispatch._sort_by(jnp.asarray(key), 7)
    np.testing.assert_array_equal(order, np.argsort(key, stable=True))
    np.testing.assert_array_equal(boundaries, np.concatenate([[0], np.cumsum(np.bincount(key, minlength=8))])[:-1])


# ---- against the oracle

D, F = 4, 3


def run(decision, x, weights, params, dense=False):
    """Output, and gradients of x, gates and expert parameters, of a fixed sum."""
    return _run(decision, x, weights, params, dense)


@functools.partial(jax.jit, static_argnames="dense")
def _run(decision, x, weights, params, dense):
    T, E = x.shape[0], params[0].shape[0]

    def mixture(x, weights, params):
        decided = dataclasses.replace(decision, weights=weights)
        if dense:
            return dispatch.dense(x, decided, lambda x: every_expert(x, params))
        plan = dispatch.plan(decided, E)
        rows = gated_ffn(dispatch.gather(x, plan), *params, plan.group_sizes)
        return dispatch.combine(rows, plan, T)

    out, pull = jax.vjp(mixture, x, weights, params)
    return out, *pull(jnp.cos(jnp.arange(T * D, dtype=jnp.float32)).reshape(T, D))


def every_expert(x, params):
    gate, up, down = params
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, gate)) * jnp.einsum("td,edf->etf", x, up)
    return jnp.einsum("etf,efd->etd", hidden, down)


def assert_matches_dense(decision, num_experts, seed=0):
    T = decision.scores.shape[0]
    rng = np.random.default_rng(seed)
    x, gate, up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((T, D), (num_experts, D, F), (num_experts, D, F), (num_experts, F, D))
    )
    args = decision, x, decision.weights, (gate, up, down)
    got, want = jax.tree.leaves(run(*args)), jax.tree.leaves(run(*args, dense=True))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1e-30))


@st.composite
def token_choices(draw, T, K, E):
    """Routings: free, all tokens to the same experts, or half the experts empty; some choices dropped, all or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["free", "same", "half"]))
    if kind == "same":
        experts = np.broadcast_to(rng.permutation(E)[:K], (T, K))
    else:
        some = rng.permutation(E)[: max(K, E // 2)] if kind == "half" else np.arange(E)
        experts = np.stack([rng.permutation(some)[:K] for _ in range(T)])
    keep = rng.random((T, K)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return routing(experts, rng.normal(size=(T, K)), keep, E)


@settings(deadline=None, max_examples=40)
@given(token_choices(23, 2, 5))
def test_token_choice_matches_dense(decision):
    assert_matches_dense(decision, 5)


# Each shape compiles anew, so a few draws by hand: one token; one expert; every expert (the dense mixture); one choice;
# more experts than rows.
@pytest.mark.parametrize("T, K, E", [(1, 2, 3), (6, 1, 1), (9, 4, 4), (7, 1, 4), (3, 2, 16)])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_odd_shapes_match_dense(T, K, E, share):
    rng = np.random.default_rng(T)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    assert_matches_dense(routing(experts, rng.normal(size=(T, K)), rng.random((T, K)) < share, E), E)


@pytest.mark.parametrize("capacity", [1, 4])
def test_capacity_matches_dense_and_leaves_overflow_out(capacity):
    rng = np.random.default_rng(1)
    experts = np.stack([rng.permutation(5)[:2] for _ in range(23)])
    decision = with_capacity(routing(experts, rng.normal(size=(23, 2)), np.ones((23, 2)), 5), capacity)
    sizes = dispatch.plan(decision, 5).group_sizes
    np.testing.assert_array_equal(sizes, np.minimum(np.bincount(experts.ravel(), minlength=5), capacity))
    assert_matches_dense(decision, 5)


@st.composite
def expert_choices(draw, T, C, E):
    """Expert choices over T tokens: free, or every expert the same tokens; some places empty, or all, or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    same = draw(st.booleans())
    tokens = np.stack([(np.arange(C) if same else rng.permutation(T)[:C]) for _ in range(E)])
    empty = rng.random((E, C)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return expert_choice(tokens, np.where(empty, 0, rng.normal(size=(E, C))), T)


@settings(deadline=None, max_examples=25)
@given(expert_choices(11, 5, 4))
def test_expert_choice_matches_dense(decision):
    assert_matches_dense(decision, 4)


@pytest.mark.parametrize("T, C, E", [(1, 1, 3), (6, 6, 2), (8, 1, 4)])
def test_odd_expert_choices_match_dense(T, C, E):
    rng = np.random.default_rng(T)
    tokens = np.stack([rng.permutation(T)[:C] for _ in range(E)])
    assert_matches_dense(expert_choice(tokens, rng.normal(size=(E, C)), T), E)


# ---- properties


@settings(deadline=None, max_examples=25)
@given(token_choices(23, 2, 5))
@example(routing(np.zeros((23, 2)), np.ones((23, 2)), np.zeros((23, 2)), 5))
def test_plan_invariants(decision):
    plan = jax.jit(dispatch.plan, static_argnums=1)(decision, 5)
    kept = np.asarray(decision.keep)
    total = int(kept.sum())
    counts = np.bincount(np.asarray(decision.experts)[kept], minlength=5)
    np.testing.assert_array_equal(plan.group_sizes, counts)
    slot, token, expert = np.asarray(plan.slot), np.asarray(plan.token), np.repeat(np.arange(5), counts)
    assert (slot[~kept] == 46).all() and sorted(slot[kept]) == list(range(total))
    np.testing.assert_array_equal(token[slot[kept]], np.nonzero(kept)[0])
    np.testing.assert_array_equal(expert[slot[kept]], np.asarray(decision.experts)[kept])
    np.testing.assert_array_equal(np.asarray(plan.weight)[slot[kept]], np.asarray(decision.weights)[kept])
    assert not token[total:].any() and not np.asarray(plan.weight)[total:].any()
    for e in range(5):  # stable: an expert's rows in the order of tokens
        assert (np.diff(token[:total][expert == e]) > 0).all()


def test_rows_past_the_sum_are_never_read():
    """Whatever stands there, NaN included, reaches neither an output nor a gradient."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(3)[:2] for _ in range(6)])
    decision = routing(experts, rng.normal(size=(6, 2)), rng.random((6, 2)) < 0.5, 3)
    plan = dispatch.plan(decision, 3)
    past = (jnp.arange(12) >= jnp.sum(plan.group_sizes))[:, None]
    rows = jnp.where(past, jnp.nan, jnp.ones((12, 4)))

    def total(rows, weights):
        plan = dispatch.plan(dataclasses.replace(decision, weights=weights), 3)
        return jnp.sum(dispatch.combine(rows, plan, 6))

    value, (drows, dweights) = jax.value_and_grad(total, argnums=(0, 1))(rows, decision.weights)
    assert np.isfinite(value) and np.isfinite(dweights).all()
    np.testing.assert_array_equal(drows[-1], np.zeros(4))
    _, pull = jax.vjp(lambda x: dispatch.gather(x, plan), jnp.ones((6, 4)))
    np.testing.assert_array_equal(pull(rows)[0], np.broadcast_to(np.asarray(decision.keep).sum(1)[:, None], (6, 4)))


def test_sums_are_float32_in_half_precision():
    """256 + eight ones is 264; added one by one in bf16, whose step is 2 at 256, it would stay 256."""
    decision = routing(np.arange(9)[None], np.ones((1, 9)), np.ones((1, 9)), 9)
    plan = dispatch.plan(decision, 9)
    rows = jnp.array([[256.0]] + [[1.0]] * 8, jnp.bfloat16)
    out = dispatch.combine(rows, plan, 1)
    assert out.dtype == jnp.bfloat16 and out[0, 0] == 264
    _, pull = jax.vjp(lambda x: dispatch.gather(x, plan), jnp.ones((1, 1), jnp.bfloat16))
    assert pull(rows)[0][0, 0] == 264


def test_rows_move_by_gathers_alone():
    """Forward and backward: every scatter that the program holds is one of integers, without an axis of D."""
    decision = routing(np.zeros((16, 2)), np.ones((16, 2)), np.ones((16, 2)), 4)
    params = jnp.ones((4, D, F)), jnp.ones((4, D, F)), jnp.ones((4, F, D))
    jaxpr = str(
        jax.make_jaxpr(functools.partial(_run, dense=False))(decision, jnp.ones((16, D)), decision.weights, params)
    )
    scatters = [line for line in jaxpr.splitlines() if " = scatter" in line]
    assert scatters and all("i32[32]" in line.split(" = ")[0] for line in scatters)


def test_inside_shard_map():
    """Tokens sharded, experts replicated: outputs and every gradient equal those of one device."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(5)[:2] for _ in range(24)])
    decision = routing(experts, rng.normal(size=(24, 2)), rng.random((24, 2)) < 0.8, 5)
    x, gate, up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((24, D), (5, D, F), (5, D, F), (5, F, D))
    )

    def local(x, decision, params):
        plan = dispatch.plan(decision, 5)
        rows = gated_ffn(dispatch.gather(x, plan), *params, plan.group_sizes)
        return dispatch.combine(rows, plan, x.shape[0])

    spec = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)

    def value_and_grads(mixture):
        def loss(x, weights, params):
            y = mixture(x, dataclasses.replace(decision, weights=weights), params)
            return jnp.sum(jnp.sin(y)), y

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, decision.weights, (gate, up, down)))

    for ours, theirs in zip(value_and_grads(sharded), value_and_grads(local), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_expert_choice_over_another_number_of_experts():
    with pytest.raises(UserError, match="expert choice over 2 experts, but the layer has 3"):
        dispatch.plan(expert_choice([[0], [0]], [[1.0], [1.0]], 1), 3)
