"""Statistics by hand, their additivity over microbatches, and on a mesh that splits the batch."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import routing, routing_stats

tallies = jax.jit(routing_stats.tallies)
summarise = jax.jit(routing_stats.summarise)


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-6)


def make_routing(experts, weights, keep, num_experts=4):
    experts, weights, keep = np.array(experts, np.int32), np.array(weights, np.float32), np.array(keep, bool)
    scores = np.full((*experts.shape[:-1], num_experts), 1 / num_experts, np.float32)
    return routing.Routing(experts, weights, scores, keep)


def test_statistics_by_hand():
    # token 2's second choice has lost its place, token 3 gave up its second choice (weight 0), token 4 is padding
    r = make_routing(
        [[0, 1], [0, 1], [0, 2], [1, 2], [3, 2]],
        [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.0], [0.5, 0.5]],
        [[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]],
    )
    counted = tallies(r, np.array([True, True, True, True, False]))
    assert counted["selected"].tolist() == [3, 3, 1, 0]
    assert (int(counted["dropped"]), int(counted["assignments"])) == (1, 8)  # 4 tokens · 2, the one given up too
    close(counted["gate"], [2.1, 1.6, 0.0, 0.0])  # 0.6 + 0.7 + 0.8, 0.4 + 0.3 + 0.9; what was dropped has no gate
    assert counted["together"].tolist() == [[3, 2, 1, 0], [2, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    s = summarise(counted)
    close(s["load"], [3 / 7, 3 / 7, 1 / 7, 0])
    close(s["max_violation"], 5 / 7)  # mean 7/4: (3 − 1.75) / 1.75
    # −(2 · 3/7 · ln(3/7) + 1/7 · ln(1/7)) = 0.7262553 + 0.2779872; / ln 4 = 1.3862944
    close(s["entropy"], 1.0042425 / 1.3862944)
    close(s["dropped_fraction"], 1 / 8)
    close(s["gate_share"], [2.1 / 3.7, 1.6 / 3.7, 0, 0])
    close(s["coactivation"], [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def test_extremes():
    even = summarise(tallies(make_routing([[0], [1], [2], [3]], np.ones((4, 1)), np.ones((4, 1))), np.ones(4, bool)))
    assert (float(even["max_violation"]), float(even["dropped_fraction"])) == (0, 0)
    close(even["entropy"], 1)
    one = summarise(tallies(make_routing([[2]] * 4, np.ones((4, 1)), np.ones((4, 1))), np.ones(4, bool)))
    assert (float(one["max_violation"]), float(one["entropy"])) == (3, 0)  # (4 − 1) / 1
    nothing = summarise(tallies(make_routing([[2]] * 4, np.ones((4, 1)), np.zeros((4, 1))), np.zeros(4, bool)))
    assert all(not np.any(value) for value in nothing.values())


def test_max_violation_is_taken_before_capacity():
    r = make_routing([[0], [0], [0], [1]], np.ones((4, 1)), np.ones((4, 1)))
    s = summarise(tallies(routing.with_capacity(r, 1), np.ones(4, bool)))
    close(s["max_violation"], 2)  # (3 − 1) / 1, though each expert holds one row
    close(s["dropped_fraction"], 0.5)


def test_expert_choice_by_hand():
    # two groups of three tokens, three experts with two places; the last token of group 1 is padding
    decision = routing.ExpertChoice(
        np.array([[[0, 1], [0, 1], [0, 1]], [[0, 1], [1, 0], [1, 2]]], np.int32),
        np.array([[[0.5, 0.4], [0.3, 0.3], [0.2, 0.1]], [[0.6, 0.2], [0.5, 0.1], [0.3, 0.0]]], np.float32),
        np.full((2, 3, 3), 1 / 3, np.float32),
    )
    mask = np.array([[True, True, True], [True, True, False]])
    counted = tallies(decision, mask)
    # group 0: tokens 0 and 1 have all experts, token 2 none; group 1: token 0 experts 0, 1; token 1 all three
    assert counted["selected"].tolist() == [4, 4, 3]
    assert (int(counted["dropped"]), int(counted["assignments"])) == (1, 5)  # of 5 tokens
    close(counted["gate"], [1.7, 1.2, 0.6])
    assert counted["together"].tolist() == [[4, 4, 3], [4, 4, 3], [3, 3, 3]]
    close(summarise(counted)["dropped_fraction"], 0.2)


def random_decision(seed, shape):
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.normal(size=(*shape, 4)), axis=-1)[..., :2].astype(np.int32)
    mask = rng.random(shape) < 0.8
    weights = rng.random(experts.shape).astype(np.float32) + np.float32(0.1)
    scores = np.full((*shape, 4), 0.25, np.float32)
    return routing.Routing(experts, weights, scores, mask[..., None] & (rng.random(experts.shape) < 0.7)), mask


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_tallies_add_up_over_microbatches_and_agree_with_a_loop(seed):
    decision, mask = random_decision(seed, (4, 6))
    whole = tallies(decision, mask)
    halves = [tallies(jax.tree.map(lambda a, i=i: a[i : i + 2], decision), mask[i : i + 2]) for i in (0, 2)]
    summed = jax.tree.map(lambda a, b: a + b, *halves)
    for name in whole:
        (close if name == "gate" else np.testing.assert_array_equal)(summed[name], whole[name])
    selected, together, gate = np.zeros(4, int), np.zeros((4, 4), int), np.zeros(4)
    for place in zip(*np.nonzero(mask), strict=True):
        chosen = decision.experts[place]
        selected[chosen] += 1
        together[np.ix_(chosen, chosen)] += 1
        gate[chosen] += decision.weights[place] * decision.keep[place]
    np.testing.assert_array_equal(whole["selected"], selected)
    np.testing.assert_array_equal(whole["together"], together)
    close(whole["gate"], gate)
    assert whole["dropped"] == (mask[..., None] & ~decision.keep).sum() and whole["assignments"] == 2 * mask.sum()


def test_statistics_on_a_mesh_that_splits_the_batch_are_those_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    decision, mask = random_decision(0, (16, 6))
    whole = tallies(decision, mask)
    split = jax.jit(routing_stats.tallies, in_shardings=(rows, rows))(decision, mask)
    for name in whole:
        (close if name == "gate" else np.testing.assert_array_equal)(split[name], whole[name])
    chosen = jax.tree.map(lambda w: w[None], random_expert_choice())
    whole = tallies(chosen, np.ones((1, 8, 6), bool))
    one_axis = NamedSharding(mesh, PartitionSpec(None, "data"))
    split = jax.jit(routing_stats.tallies, in_shardings=(one_axis, one_axis))(chosen, np.ones((1, 8, 6), bool))
    jax.tree.map(close, split, whole)


def random_expert_choice():
    logits = jax.random.normal(jax.random.key(0), (8, 6, 4))
    choose = jax.vmap(lambda logits: routing.expert_choice(logits, experts_per_token=2, mask=jnp.ones(6, bool)))
    return jax.jit(choose)(logits)


def test_summaries_keep_the_layer_axis():
    layers = [tallies(*random_decision(seed, (4, 6))) for seed in (0, 1)]
    stacked = summarise(jax.tree.map(lambda *a: jnp.stack(a), *layers))
    for i, layer in enumerate(layers):
        for name, value in summarise(layer).items():
            close(stacked[name][i], value)


def test_dead_experts_are_named_in_one_line():
    load = np.array([[3, 0, 5, 0], [1, 1, 1, 1], [0, 8, 1, 1]])
    assert routing_stats.dead_experts(load).tolist() == (load == 0).tolist()
    assert routing_stats.dead_line(load, 100) == (
        "warning: 3 dead experts, without a token in the last 100 steps (layer 0: 1, 3; layer 2: 0)"
    )
    assert routing_stats.dead_line(load[1:], 20).startswith("warning: 1 dead expert, without a token in the last 20")
    assert routing_stats.dead_line(load[1:2], 100) is None
    # a layer that routed nothing at all, such as before the first step, isn't dead
    assert routing_stats.dead_line(np.zeros((2, 4)), 100) is None
