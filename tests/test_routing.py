"""Routers against hand-computed decisions, capacity against a loop, properties of all, and what a mesh does to them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import routing
from moejax.errors import UserError
from moejax.routing_select import pick, rank_in_expert

# every router with the options and inputs it needs, over E = 8
ROUTERS = {
    "switch": {},
    "top_k": {},
    "top_k, not renormalised": {"renormalize": False},
    "sigmoid_top_k": {"bias": np.array([0.0, 0.1, -0.1, 0.0, 0.2, 0.0, 0.0, 0.0], np.float32)},
    "noisy_top_k": {"noise_logits": True},
    "vmoe": {},
    "gshard": {"second": "random"},
    "group_limited_softmax": {"groups": 4, "groups_kept": 2},
    "group_limited_sigmoid": {"groups": 4, "groups_kept": 2, "bias": np.arange(8, dtype=np.float32) * 0.01},
    "hash": {"tokens": True},
    "random": {},
}


def route(name, logits, k, mask=None, key=None, tokens=None):
    options = dict(ROUTERS[name])
    if "groups_kept" in options and k == 8:  # K = E needs every group
        options["groups_kept"] = 4
    if options.get("noise_logits"):
        options["noise_logits"] = 0.5 * logits
    # Every router takes every input of the signature, whether it names it or not.
    options["tokens"] = jnp.arange(logits.shape[0], dtype=jnp.int32) if tokens is None else tokens
    options["key"] = key
    options.setdefault("bias", None)
    mask = jnp.ones(logits.shape[0], bool) if mask is None else mask
    return getattr(routing, name.split(",")[0])(logits, experts_per_token=k, mask=mask, **options)


def logits_of(probabilities):
    return jnp.log(jnp.array(probabilities, jnp.float32))


def sigmoid_logits_of(scores):
    scores = jnp.array(scores, jnp.float32)
    return jnp.log(scores) - jnp.log(1 - scores)


def run(router, logits, **inputs):
    """router(logits, …) under jit, which compiles once where eager mode would compile every operation."""
    traced = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray | jax.Array)}
    static = frozenset(item for item in inputs.items() if item[0] not in traced)
    return compiled(router, static)(logits, traced)


# these programs run for a millisecond: leave out the compiler passes that would take most of the test's time
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


@functools.cache
def compiled(router, static):
    return jit(lambda logits, traced: router(logits, **traced, **dict(static)))


ALL = {"mask": np.array([True])}


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-6)


# ---- by hand


def test_switch_takes_the_best_expert_with_its_probability():
    mask = jnp.array([True, False])
    r = run(routing.switch, logits_of([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]), experts_per_token=1, mask=mask)
    assert r.experts.tolist() == [[1], [0]] and r.keep.tolist() == [[True], [False]]
    close(r.weights, [[0.5], [0.6]])  # the probability itself, not renormalised to 1
    close(r.scores, [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])


def test_top_k_gates_before_and_after_normalisation():
    logits = logits_of([[0.2, 0.5, 0.3]])
    after = run(routing.top_k, logits, experts_per_token=2, **ALL)
    before = run(routing.top_k, logits, experts_per_token=2, renormalize=False, **ALL)
    assert after.experts.tolist() == before.experts.tolist() == [[1, 2]]
    close(before.weights, [[0.5, 0.3]])
    close(after.weights, [[0.625, 0.375]])  # 0.5 / 0.8, 0.3 / 0.8
    # the gate after normalisation is the softmax over the selected logits (Mixtral's form)
    close(after.weights, jax.nn.softmax(logits[:, jnp.array([1, 2])]))


def test_dense_mixture_weights_every_expert_by_its_probability():
    r = run(routing.dense_mixture, logits_of([[0.2, 0.5, 0.3]]), experts_per_token=3, **ALL)
    assert r.experts.tolist() == [[0, 1, 2]] and r.keep.all()
    close(r.weights, [[0.2, 0.5, 0.3]])
    with pytest.raises(UserError, match="set experts_per_token=3"):
        run(routing.dense_mixture, logits_of([[0.2, 0.5, 0.3]]), experts_per_token=2, **ALL)


def test_sigmoid_top_k_selects_with_the_bias_and_weighs_without():
    logits = sigmoid_logits_of([[0.8, 0.6, 0.4, 0.2]])
    bias = jnp.array([0.0, -0.3, 0.0, 0.3])
    # s + b = 0.8, 0.3, 0.4, 0.5: experts 0 and 3; gates 2 · 0.8 / (0.8 + 0.2) and 2 · 0.2 / 1.0
    r = run(routing.sigmoid_top_k, logits, experts_per_token=2, bias=bias, scale=2.0, **ALL)
    assert r.experts.tolist() == [[0, 3]]
    close(r.weights, [[1.6, 0.4]])
    close(r.scores, [[0.8, 0.6, 0.4, 0.2]])
    # without the bias: 0.8 / 1.4 and 0.6 / 1.4; K = 1: the score itself
    close(run(routing.sigmoid_top_k, logits, experts_per_token=2, **ALL).weights, [[0.8 / 1.4, 0.6 / 1.4]])
    close(run(routing.sigmoid_top_k, logits, experts_per_token=1, scale=2.0, **ALL).weights, [[1.6]])


def test_the_selection_bias_gets_no_gradient():
    logits = sigmoid_logits_of([[0.8, 0.6, 0.4, 0.2]])

    def gate(bias):
        return routing.sigmoid_top_k(logits, experts_per_token=2, bias=bias, **ALL).weights[0, 0]

    assert jit(jax.grad(gate))(jnp.zeros(4)).tolist() == [0, 0, 0, 0]


def test_group_limited_softmax_ranks_groups_by_their_best_expert():
    # groups {0, 1}, {2, 3}, {4, 5} score 0.3, 0.25, 0.2: keep the first two; best two experts there are 0 and 2
    logits = logits_of([[0.30, 0.02, 0.25, 0.05, 0.20, 0.18]])
    r = run(routing.group_limited_softmax, logits, experts_per_token=3, groups=3, groups_kept=2, scale=16.0, **ALL)
    assert r.experts.tolist() == [[0, 2, 3]]  # not 4 or 5, though 0.20 and 0.18 are above 0.05
    close(r.weights, [[16 * 0.30, 16 * 0.25, 16 * 0.05]])
    normed = run(
        routing.group_limited_softmax, logits, experts_per_token=2, groups=3, groups_kept=1, renormalize=True, **ALL
    )
    assert normed.experts.tolist() == [[0, 1]]
    close(normed.weights, [[0.30 / 0.32, 0.02 / 0.32]])


def test_group_limited_sigmoid_ranks_groups_by_their_two_best_biased_experts():
    scores = [[0.9, 0.1, 0.1, 0.6, 0.6, 0.1]]
    # {0, 1, 2} has the best expert, but 0.9 + 0.1 < 0.6 + 0.6: the group {3, 4, 5} wins
    r = run(
        routing.group_limited_sigmoid, sigmoid_logits_of(scores), experts_per_token=2, groups=2, groups_kept=1, **ALL
    )
    assert r.experts.tolist() == [[3, 4]]
    close(r.weights, [[0.5, 0.5]])
    # with b_1 = 0.3 the first group has 0.9 + 0.4 > 1.2; gates leave the bias out: 2.5 · 0.9, 2.5 · 0.1
    bias = jnp.array([0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    r = run(
        routing.group_limited_sigmoid,
        sigmoid_logits_of(scores),
        experts_per_token=2,
        groups=2,
        groups_kept=1,
        bias=bias,
        scale=2.5,
        **ALL,
    )
    assert r.experts.tolist() == [[0, 1]]
    close(r.weights, [[2.25, 0.25]])


def test_group_limited_sigmoid_never_leaves_the_kept_groups_when_biases_are_very_negative():
    # zero instead of -inf outside the kept groups would beat s + b = 0.9 - 1 inside
    bias = jnp.full((4,), -1.0)
    logits = sigmoid_logits_of([[0.9, 0.8, 0.3, 0.2]])
    r = run(routing.group_limited_sigmoid, logits, experts_per_token=2, groups=2, groups_kept=1, bias=bias, **ALL)
    assert r.experts.tolist() == [[0, 1]]


def test_gshard_renormalises_and_keeps_the_second_with_twice_its_gate():
    logits = jnp.broadcast_to(logits_of([0.72, 0.08, 0.2]), (20_000, 3))
    mask = jnp.ones(20_000, bool)
    always = run(routing.gshard, logits, experts_per_token=2, mask=mask, key=jax.random.key(0))
    # p_1 + p_2 = 0.92: gates 0.72 / 0.92 and 0.2 / 0.92 = 0.21739
    assert always.experts[0].tolist() == [0, 2] and always.keep.all()
    close(always.weights[0], [0.7826087, 0.2173913])
    drawn = run(routing.gshard, logits, experts_per_token=2, mask=mask, key=jax.random.key(0), second="random")
    assert drawn.keep[:, 0].all()
    # kept with probability 2 · 0.21739 = 0.43478; one standard deviation of the share is 0.0035
    assert abs(float(drawn.keep[:, 1].mean()) - 0.43478) < 0.014
    # what was given up counts as no choice; what lost its place does
    assert (routing.chosen(drawn, mask) == drawn.keep).all()
    limited = limit_one(drawn, 1)
    assert limited.keep.sum() == 2 and routing.chosen(limited, mask).sum() == drawn.keep.sum()
    # a second gate of at least 1/2 of the sum is always kept
    logits = jnp.broadcast_to(logits_of([0.5, 0.5, 1e-9]), (20_000, 3))
    even = run(routing.gshard, logits, experts_per_token=2, mask=mask, key=jax.random.key(1), second="random")
    assert even.keep.all()
    # evaluation is deterministic
    assert run(routing.gshard, logits, experts_per_token=2, mask=mask, second="random").keep.all()
    with pytest.raises(UserError, match="'always' or 'random'"):
        run(routing.gshard, logits, experts_per_token=2, mask=mask, second="sometimes")


def test_noisy_top_k_adds_scaled_normal_noise_and_softmaxes_the_selected():
    logits = jnp.array([[1.0, 2.0, 0.5]])
    noise_logits = jnp.array([[0.0, -1.0, 1.0]])
    key = jax.random.key(3)
    r = run(routing.noisy_top_k, logits, experts_per_token=2, noise_logits=noise_logits, key=key, **ALL)
    # softplus(0, -1, 1) = 0.6931, 0.3133, 1.3133
    std = np.array([[0.69314718, 0.31326169, 1.31326169]])
    noisy = np.asarray(logits) + np.asarray(jax.random.normal(key, (1, 3))) * std
    best = np.argsort(-noisy[0])[:2]
    assert r.experts[0].tolist() == best.tolist()
    close(r.weights[0], np.exp(noisy[0, best]) / np.exp(noisy[0, best]).sum())
    close(r.noise.std, std)
    close(r.noise.logits, noisy)
    close(r.scores, jax.nn.softmax(logits))
    # no key, no noise: softmax over (2.0, 1.0)
    quiet = run(routing.noisy_top_k, logits, experts_per_token=2, noise_logits=noise_logits, **ALL)
    assert quiet.noise is None and quiet.experts.tolist() == [[1, 0]]
    close(quiet.weights, [[0.7310586, 0.2689414]])


def test_vmoe_adds_noise_of_one_over_e_and_keeps_probabilities():
    logits = logits_of([[0.1, 0.2, 0.3, 0.4]])
    quiet = run(routing.vmoe, logits, experts_per_token=2, **ALL)
    assert quiet.experts.tolist() == [[3, 2]] and quiet.noise is None
    close(quiet.weights, [[0.4, 0.3]])
    key = jax.random.key(0)
    noisy = run(routing.vmoe, logits, experts_per_token=2, key=key, **ALL)
    close(noisy.noise.std, np.full((1, 4), 0.25))
    close(noisy.noise.logits, logits + 0.25 * jax.random.normal(key, (1, 4)))
    close(noisy.weights, np.sort(jax.nn.softmax(noisy.noise.logits))[:, ::-1][:, :2])


def test_hash_depends_on_the_token_alone_and_spreads_evenly():
    tokens = jnp.arange(4096, dtype=jnp.int32)
    hashed = functools.partial(run, routing.hash, jnp.zeros((4096, 8)), mask=jnp.ones(4096, bool))
    r = hashed(experts_per_token=2, tokens=tokens)
    assert (hashed(experts_per_token=2, tokens=tokens[::-1]).experts == r.experts[::-1]).all()
    assert (r.experts[:, 0] != r.experts[:, 1]).all()
    close(r.weights, np.full((4096, 2), 0.5))
    # 8192 choices over 8 experts: 1024 each, standard deviation about 28
    assert np.abs(np.bincount(np.asarray(r.experts).ravel(), minlength=8) - 1024).max() < 140
    # another seed is another assignment: two random pairs agree in order with probability 1/56
    assert (hashed(experts_per_token=2, tokens=tokens, seed=1).experts == r.experts).all(axis=1).mean() < 0.05


def test_random_is_uniform_and_fixed_without_a_key():
    random = functools.partial(
        run, routing.random, jnp.zeros((4096, 8)), experts_per_token=2, mask=jnp.ones(4096, bool)
    )
    r = random(key=jax.random.key(1))
    assert np.abs(np.bincount(np.asarray(r.experts).ravel(), minlength=8) - 1024).max() < 140
    assert (random().experts != r.experts).any()
    close(r.weights, np.full((4096, 2), 0.5))


def test_round_robin_gives_every_expert_the_same():
    p = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]
    r = run(routing.round_robin, logits_of(p), experts_per_token=2, mask=jnp.array([True, True, False]))
    assert r.experts.tolist() == [[0, 1], [2, 0], [1, 2]]
    close(r.weights, [[0.7, 0.2], [0.1, 0.6], [0.1, 0.8]])
    assert r.keep.tolist() == [[True, True], [True, True], [False, False]]


def test_expert_choice_takes_the_best_tokens_of_each_expert():
    p = [[0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]
    # C = ceil(1 · 4 · 1 / 2) = 2; expert 0 likes tokens 0 (0.7) and 1 (0.6), expert 1 tokens 2 (0.9) and 3 (0.8)
    r = run(routing.expert_choice, logits_of(p), experts_per_token=1, mask=jnp.ones(4, bool))
    assert r.tokens.tolist() == [[0, 1], [2, 3]]
    close(r.weights, [[0.7, 0.6], [0.9, 0.8]])
    # half again as many places, with token 2 masked: expert 1 takes 3, 1, 0; C = 3
    masked = jnp.array([True, True, False, True])
    r = run(routing.expert_choice, logits_of(p), experts_per_token=1, mask=masked, capacity_factor=1.5)
    assert r.tokens.tolist() == [[0, 1, 3], [3, 1, 0]]
    close(r.weights, [[0.7, 0.6, 0.2], [0.8, 0.4, 0.3]])
    # four places for three tokens: the masked one comes last with weight 0
    r = run(routing.expert_choice, logits_of(p), experts_per_token=1, mask=masked, capacity_factor=2.0)
    assert r.tokens[:, 3].tolist() == [2, 2] and r.weights[:, 3].tolist() == [0, 0]


def test_expert_choice_prefers_any_real_token_to_a_masked_one():
    # the probability of expert 1 underflows to exactly 0 for the real token 1
    logits = jnp.array([[0.0, 0.0], [200.0, 0.0]])
    r = run(routing.expert_choice, logits, experts_per_token=1, mask=jnp.array([False, True]))
    assert r.tokens.tolist() == [[1], [1]] and r.weights[1, 0] == 0


def test_expert_choice_gradient_is_that_of_the_selected_probabilities():
    logits = jax.random.normal(jax.random.key(0), (6, 3))
    mask = jnp.array([True, True, True, False, True, True])

    def through_router(logits):
        r = routing.expert_choice(logits, experts_per_token=1, mask=mask)
        return jnp.sum(r.weights**2)

    r = run(routing.expert_choice, logits, experts_per_token=1, mask=mask)
    taken = np.zeros((6, 3), np.float32)
    np.put_along_axis(taken.T, np.asarray(r.tokens), 1, axis=1)
    expected = jit(jax.grad(lambda logits: jnp.sum((jax.nn.softmax(logits) * taken) ** 2)))(logits)
    close(jit(jax.grad(through_router))(logits), expected)


# ---- capacity

limit = jit(jax.vmap(routing.with_capacity, in_axes=(0, None)))
limit_one = jit(routing.with_capacity)


def test_capacity_is_ceil_of_the_fair_share():
    assert routing.capacity(1.25, 64, 1, 8) == 10
    assert routing.capacity(1.0, 10, 2, 8) == 3  # 20 / 8 = 2.5
    assert routing.capacity(1.1, 100, 1, 10) == 11  # 11.000000000000002 in floating point
    assert routing.capacity(0.01, 4, 1, 8) == 1
    assert routing.capacity(100.0, 4, 1, 8) == 4  # one expert sees a token once at most
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="capacity_factor"):
            routing.capacity(bad, 64, 1, 8)


def make_routing(experts, keep, num_experts):
    experts = jnp.array(experts, jnp.int32)
    return routing.Routing(
        experts, jnp.ones(experts.shape), jnp.ones((experts.shape[0], num_experts)), jnp.array(keep, bool)
    )


def test_capacity_lets_first_choices_go_first():
    # C = 2. First choices of expert 0: tokens 0, 1, 3; token 3 overflows. Second choices of expert 0: token 2, no room.
    # Expert 1: first choice of token 2, then the second of token 0, which fills it; those of 1 and 3 overflow.
    r = make_routing([[0, 1], [0, 1], [1, 0], [0, 1]], np.ones((4, 2)), 2)
    kept = limit_one(r, 2)
    assert kept.keep.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    # masked tokens take no room: without token 0, token 3 fits, and the second choice of token 1
    r = make_routing([[0, 1], [0, 1], [1, 0], [0, 1]], [[0, 0], [1, 1], [1, 1], [1, 1]], 2)
    assert limit_one(r, 2).keep.tolist() == [[False, False], [True, True], [True, False], [True, False]]


def test_with_two_choices_a_later_token_can_push_out_an_earlier_one():
    """The documented exception: first choices go before second ones, so with K > 1 capacity is not causal."""
    before = limit_one(make_routing([[0, 1], [2, 0]], np.ones((2, 2)), 3), 1).keep
    after = limit_one(make_routing([[0, 1], [1, 0]], np.ones((2, 2)), 3), 1).keep
    assert before[0].tolist() == [True, True] and after[0].tolist() == [True, False]


def slow_capacity(experts, keep, capacity, num_experts):
    room = [capacity] * num_experts
    result = np.zeros_like(keep)
    for k in range(experts.shape[1]):
        for t in range(experts.shape[0]):
            if keep[t, k] and room[experts[t, k]]:
                room[experts[t, k]] -= 1
                result[t, k] = True
    return result


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(1, 70), st.floats(0, 1), st.floats(0, 1))
def test_capacity_agrees_with_a_loop(seed, k, capacity, masked, skew):
    rng = np.random.default_rng(seed)
    shape = (2, 70)  # 70 is no multiple of the block inside
    affinity = rng.normal(size=(*shape, 4)) + 20 * skew * np.arange(4)  # skew 1: all choose expert 3 first
    experts = np.argsort(-affinity, axis=-1)[..., :k].astype(np.int32)
    keep = np.broadcast_to((rng.random(shape) >= masked)[..., None], experts.shape)
    decision = routing.Routing(experts, np.ones(experts.shape, np.float32), np.zeros((*shape, 4), np.float32), keep)
    got = np.asarray(limit(decision, capacity).keep)
    for group in range(2):
        np.testing.assert_array_equal(got[group], slow_capacity(experts[group], keep[group], capacity, 4))
    if k == 1:  # causal: the first half decides by itself
        half = jax.tree.map(lambda a: a[:, :35], decision)
        np.testing.assert_array_equal(got[:, :35], limit(half, capacity).keep)


@pytest.mark.parametrize("n", [1, 31, 32, 100])
def test_rank_in_expert_counts_earlier_equals(n):
    rng = np.random.default_rng(n)
    experts, counted = rng.integers(0, 3, n).astype(np.int32), rng.random(n) < 0.7
    got = rank_in_expert(jnp.array(experts), jnp.array(counted), 3)
    expected = [np.sum((experts[:i] == experts[i]) & counted[:i]) for i in range(n)]
    assert np.asarray(got)[counted].tolist() == np.array(expected)[counted].tolist()


# ---- selection

select = jit(routing.select_top_k, static_argnums=1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 10]), st.booleans())
def test_select_top_k_agrees_with_lax_top_k_also_on_ties_and_infinities(seed, k, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (5, 7, 10)).astype(np.float32) if ties else rng.normal(size=(5, 7, 10)).astype("f")
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    values, indices = select(scores, k)
    expected_values, expected_indices = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(indices, expected_indices)


def test_select_top_k_gives_distinct_indices_for_nan_and_refuses_more_than_there_are():
    _, indices = routing.select_top_k(jnp.array([[jnp.nan, 1.0, jnp.nan, 2.0], [-jnp.inf] * 4]), 4)
    assert np.sort(indices).tolist() == [[0, 1, 2, 3]] * 2
    for k in (0, 5):
        with pytest.raises(UserError, match="between 1 and 4"):
            routing.select_top_k(jnp.zeros((2, 4)), k)


def test_gradients_of_select_and_pick_are_those_of_the_gathers():
    scores = jax.random.normal(jax.random.key(0), (3, 5, 8))
    weight = jnp.arange(1.0, 4.0)[None, None]
    indices = jax.lax.top_k(scores, 3)[1][..., ::-1]
    pairs = [
        (lambda s: routing.select_top_k(s, 3)[0], lambda s: jax.lax.top_k(s, 3)[0]),
        (lambda s: pick(s, indices), lambda s: jnp.take_along_axis(s, indices, axis=-1)),
    ]
    for ours, theirs in pairs:
        got, expected = (jit(jax.grad(lambda s, f=f: jnp.sum(weight * f(s) ** 2)))(scores) for f in (ours, theirs))
        np.testing.assert_array_equal(got, expected)


def test_rematerialization_keeps_what_was_selected():
    policy = jax.checkpoint_policies.save_only_these_names("routing")
    chosen = jax.checkpoint(lambda s: routing.select_top_k(s, 3)[0], policy=policy)
    jaxpr = jax.make_jaxpr(jax.grad(lambda s: jnp.sum(chosen(s) ** 2)))(jnp.ones((4, 8)))
    assert str(jaxpr).count("scan[") == 1


@pytest.mark.gpu
def test_select_top_k_is_one_kernel_on_a_gpu():
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 8192, 64)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    def values_and_gradient(select, scores):
        values, indices = select(scores)
        return values, indices, jax.grad(lambda s: jnp.sum(jnp.sin(select(s)[0])))(scores)

    def ours(scores):
        return jax.vmap(lambda s: routing.select_top_k(s, 8))(scores)

    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(values_and_gradient, ours)).lower(scores).compile()
    assert "select_top_k_mosaic_gpu" in compiled.as_text()
    expected = jax.jit(functools.partial(values_and_gradient, lambda s: jax.lax.top_k(s, 8)))(scores)
    jax.tree.map(np.testing.assert_array_equal, compiled(scores), expected)


# ---- properties of all token-choice routers


@functools.partial(jit, static_argnums=1)
def all_routed(logits, k, mask, key):
    """Every router's decision in one program: one compilation instead of eleven."""
    return {name: route(name, logits, k, mask=mask, key=key) for name in ROUTERS}


LOGITS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("mask", [[True, False, True, True, False, True], [False] * 6])
def test_routings_are_well_formed(k, mask):
    """Distinct experts, finite weights, masked tokens off; K = E and everything masked included."""
    check_well_formed(k, np.array(mask))


def test_routing_of_one_token_is_well_formed():
    check_well_formed(2, np.array([True]))


def check_well_formed(k, mask):
    for name, r in all_routed(LOGITS[: mask.size], k, mask, jax.random.key(1)).items():
        assert r.experts.shape == r.weights.shape == r.keep.shape == (mask.size, k), name
        assert (r.experts.dtype, r.weights.dtype, r.scores.dtype, r.keep.dtype) == ("int32", "float32", "float32", bool)
        assert all(len(set(row)) == k and set(row) <= set(range(8)) for row in r.experts.tolist()), name
        assert not np.any(r.keep & ~mask[:, None]) and np.all(r.keep[:, 0] == mask), name
        assert np.isfinite(r.weights).all() and np.all(r.weights >= 0) and np.all(r.weights[:, 0] > 0), name
        assert np.isfinite(r.scores).all() and r.scores.shape == (mask.size, 8), name


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_a_token_is_routed_by_itself(seed, t, training):
    """Changing later tokens changes nothing for earlier ones, in any router, with or without noise."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 8)).astype(np.float32)
    changed = np.where(np.arange(6)[:, None] < t, logits, rng.normal(size=(6, 8)).astype(np.float32))
    key = jax.random.key(seed) if training else None
    pair = [all_routed(x, 2, np.ones(6, bool), key) for x in (logits, changed)]
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_array_equal(a[:t], b[:t])


def test_without_a_key_the_length_of_the_group_changes_nothing():
    long, short = (all_routed(LOGITS[:n], 2, np.ones(n, bool), None) for n in (6, 3))
    for a, b in zip(jax.tree.leaves(long), jax.tree.leaves(short), strict=True):
        np.testing.assert_array_equal(a[:3], b)


@pytest.mark.parametrize("k", [1, 2])
def test_the_router_gets_a_gradient_also_with_one_expert(k):
    weight = np.arange(1, k + 1, dtype=np.float32)[None]

    @jit
    def gradients(logits):
        def gate(logits, name):
            return jnp.sum(route(name, logits, k, key=jax.random.key(1)).weights * weight)

        return {name: jax.grad(gate)(logits, name) for name in ROUTERS}

    for name, gradient in gradients(LOGITS).items():
        if name in ("hash", "random"):
            assert not gradient.any()
        else:
            assert np.isfinite(gradient).all() and np.all(np.abs(gradient).max(axis=-1) > 1e-3), name


def test_group_limits_are_checked():
    limited = functools.partial(routing.group_limited_softmax, jnp.zeros((1, 8)), experts_per_token=6, **ALL)
    with pytest.raises(UserError, match="groups_kept between 3 and 4"):
        limited(groups=4, groups_kept=2)
    with pytest.raises(UserError, match="divisor of 8"):
        limited(groups=3, groups_kept=3)


def test_capacity_one_with_all_tokens_to_one_expert_keeps_the_first():
    logits = jnp.broadcast_to(jnp.array([0.0, 5.0, 0.0]), (4, 3))
    r = routing.with_capacity(routing.switch(logits, experts_per_token=1, mask=jnp.array([False, True, True, True])), 1)
    assert r.keep.tolist() == [[False], [True], [False], [False]]


# ---- on a mesh


def collectives(f, *args):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    text = jit(f, in_shardings=rows).lower(*args).compile().as_text()
    return re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)\(", text)


def test_lax_top_k_gathers_and_select_top_k_does_not():
    scores = jnp.zeros((64, 16))
    # the reason why select_top_k exists; when this fails, jax has learnt to split it
    assert collectives(lambda s: jax.lax.top_k(s, 2), scores) == ["all-gather"]
    assert collectives(lambda s: routing.select_top_k(s, 2), scores) == []
    assert collectives(jax.grad(lambda s: jnp.sum(routing.select_top_k(s, 2)[0] ** 2)), scores) == []


@pytest.mark.parametrize("name", [*ROUTERS, "expert_choice"])
def test_no_router_moves_anything_between_devices(name):
    """Groups are split over devices: router, capacity and gradient need no collective at all, so no (T, E) gather."""

    def decide(logits):
        if name == "expert_choice":
            return routing.expert_choice(logits, experts_per_token=2, mask=jnp.ones(logits.shape[0], bool))
        return routing.with_capacity(route(name, logits, 2), 3)

    def both(logits):
        decision, pull = jax.vjp(lambda x: jax.vmap(decide)(x).weights, logits)
        return jax.vmap(decide)(logits), pull(decision)

    assert collectives(both, jnp.zeros((8, 16, 8))) == []


# ---- dotted names


def test_resolve_finds_functions_here_and_in_the_users_files(tmp_path, monkeypatch):
    assert routing.resolve("moejax.routing:switch") is routing.switch
    (tmp_path / "my_own_router.py").write_text("def route(logits, **inputs):\n    return 'mine'\n")
    monkeypatch.chdir(tmp_path)
    assert routing.resolve("my_own_router:route")(None) == "mine"
    by_path = routing.resolve(str(tmp_path / "my_own_router.py") + ":route")
    assert by_path(None) == "mine" and routing.resolve("my_own_router.py:route") is by_path


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("moejax.routing:swich", r"did you mean 'switch'"),
        ("moejax.rooting:switch", r"no module 'moejax.rooting'"),
        ("no_such_package.x:y", r"no module 'no_such_package'"),
        ("switch", r"form 'module:function'"),
        ("moejax.routing:", r"form 'module:function'"),
        ("moejax.routing:__doc__", r"is a str, not a function"),
        ("missing.py:route", r"no file .*missing.py"),
        ("..:route", r"not the name of a module"),
    ],
)
def test_resolve_says_in_one_line_what_is_wrong(dotted, message):
    with pytest.raises(UserError, match=message) as error:
        routing.resolve(dotted)
    assert "\n" not in str(error.value)


def test_an_error_inside_the_users_file_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_router.py").write_text("import no_such_package_either\n")
    monkeypatch.chdir(tmp_path)
    for dotted in ("broken_router:route", "broken_router.py:route"):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_either"):
            routing.resolve(dotted)
