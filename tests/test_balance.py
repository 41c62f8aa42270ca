"""Balance losses and the bias rule by hand, and on a mesh that splits the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax import balance, routing
from moejax.errors import UserError

THREE = np.array([True, True, True])


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-6)


# ---- counts


def test_expert_counts_leave_out_what_was_not_chosen():
    experts = np.array([[0, 2], [2, 1], [0, 1]], np.int32)
    chosen = np.array([[1, 1], [1, 0], [0, 0]], bool)
    assert balance.expert_counts(experts, chosen, 4).tolist() == [1, 0, 2, 0]
    assert balance.expert_counts(experts[None], chosen[None], 4).dtype == jnp.int32


# ---- load balance

load_balance = jax.jit(balance.load_balance_loss)


def test_load_balance_loss_by_hand():
    scores = np.array([[0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2]], np.float32)
    # P = (0.5, 0.3, 0.1, 0.1); counts (2, 1, 0, 0): f = (2/3, 1/3, 0, 0); 4 · (0.5 · 2/3 + 0.3 / 3) = 4 · 0.43333
    close(load_balance(scores, np.array([2, 1, 0, 0], np.int32), THREE), 1.7333333)
    # the last token masked: P = (0.6, 0.3, 0.05, 0.05); counts (2, 0, 0, 0): 4 · 0.6
    close(load_balance(scores, np.array([2, 0, 0, 0], np.int32), np.array([True, True, False])), 2.4)
    # the same with K = 2, twice the counts: Σ f = 1 makes the value independent of K
    close(load_balance(scores, np.array([4, 2, 0, 0], np.int32), THREE), 1.7333333)


def test_load_balance_loss_is_1_when_uniform_and_e_when_collapsed():
    even = np.full((3, 4), 0.25, np.float32)
    counts = np.array([5, 1, 0, 0], np.int32)
    close(load_balance(even, counts, THREE), 1.0)  # P uniform: whatever f
    one = np.tile(np.array([0, 1, 0, 0], np.float32), (3, 1))
    close(load_balance(one, np.full(4, 3, np.int32), THREE), 1.0)  # f uniform: whatever P
    close(load_balance(one, np.array([0, 3, 0, 0], np.int32), THREE), 4.0)


def test_load_balance_loss_normalises_sigmoid_scores():
    scores = np.array([[0.9, 0.3], [0.1, 0.3], [0.2, 0.2]], np.float32)
    # rows become (0.75, 0.25), (0.25, 0.75), (0.5, 0.5): P = (0.5, 0.5)
    close(balance.mean_scores(scores, THREE), [0.5, 0.5])
    close(load_balance(scores, np.array([3, 0], np.int32), THREE), 1.0)


def test_load_balance_loss_pulls_through_the_scores_alone():
    scores = np.full((3, 2), 0.5, np.float32)
    gradient = jax.jit(jax.grad(balance.load_balance_loss, argnums=(0, 1)))(scores, np.array([3.0, 0.0], "f"), THREE)
    # d/ds_0 of 2 · mean(s_0 / (s_0 + s_1)) = 2 / 3 · 0.5 / 1² = 1/3 per token, and the opposite for s_1
    close(gradient[0], np.tile([1 / 3, -1 / 3], (3, 1)))
    assert gradient[1].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["load", "sequence", "z", "importance", "probability"])
def test_everything_masked_gives_zero_and_finite_gradients(name):
    nothing = np.zeros((2, 3), bool)
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    experts = np.zeros((2, 3, 1), np.int32)

    def loss(logits):
        scores = jax.nn.softmax(logits)
        return {
            "load": lambda: balance.load_balance_loss(scores, jnp.zeros(4, jnp.int32), nothing),
            "sequence": lambda: balance.sequence_balance_loss(scores, experts, nothing[..., None], nothing),
            "z": lambda: balance.router_z_loss(logits, nothing),
            "importance": lambda: balance.importance_loss(scores, nothing),
            "probability": lambda: balance.load_loss(logits, routing.Noise(logits, jnp.ones_like(logits)), 1, nothing),
        }[name]()

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0 and np.isfinite(gradient).all()


def test_sequence_balance_loss_is_the_mean_over_sequences():
    # sequence 0 collapses onto expert 0 with P = (0.8, 0.2): 2 · 0.8 = 1.6; sequence 1 is split evenly: 1
    scores = np.array([[[0.9, 0.1], [0.7, 0.3]], [[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5]] * 2], np.float32)
    experts = np.array([[[0], [0]], [[0], [1]], [[0], [0]]], np.int32)
    mask = np.array([[True, True], [True, True], [False, False]])
    loss = jax.jit(balance.sequence_balance_loss)(scores, experts, mask[..., None], mask)
    close(loss, 1.3)  # (1.6 + 1) / 2: the third sequence is padding
    # over the batch as one: f = (3/4, 1/4), P = (0.7, 0.3): 2 · (0.525 + 0.075) = 1.2, another number
    counts = balance.expert_counts(experts, mask[..., None], 2)
    close(load_balance(scores, counts, mask), 1.2)


# ---- z-loss


def test_router_z_loss_by_hand():
    logits = np.log(np.array([[1, 1, 2], [1, 0.5, 0.5], [9, 9, 9]], np.float32))
    # log-sum-exp: log 4, log 2, (masked): (1.3862944² + 0.6931472²) / 2 = (1.9218121 + 0.4804530) / 2
    close(balance.router_z_loss(logits, np.array([True, True, False])), 1.2011326)


# ---- V-MoE


def test_importance_loss_by_hand():
    scores = np.array([[0.5, 0.5, 0.0], [0.1, 0.1, 0.8], [0.9, 0.0, 0.1]], np.float32)
    # importance (1.5, 0.6, 0.9), mean 1, variance (0.25 + 0.16 + 0.01) / 3
    close(balance.importance_loss(scores, THREE), 0.14)
    # without the last token (0.6, 0.6, 0.8): mean 2/3, variance (2 · 0.0044444 + 0.0177778) / 3 = 0.0088889; / (4/9)
    close(balance.importance_loss(scores, np.array([True, True, False])), 0.02)


def test_load_loss_by_hand():
    logits = np.array([[1.0, 0.0, -1.0]], np.float32)
    noise = routing.Noise(jnp.array([[0.5, 1.0, -1.0]]), jnp.full((1, 3), 0.5))
    # K = 2: the second largest noisy logit is 0.5. P = 1 − Φ((0.5 − h) / 0.5) for h = 1, 0, −1:
    # Φ(1) = 0.8413447, Φ(−1) = 0.1586553, Φ(−3) = 0.0013499; mean 0.3337833,
    # variance (0.5075614² + 0.1751280² + 0.3324334²) / 3 = (0.2576186 + 0.0306698 + 0.1105120) / 3 = 0.1329335
    one = np.array([True])
    close(balance.load_loss(logits, noise, 2, one), 0.1329335 / 0.3337833**2)
    # K = 1: threshold 1.0: Φ(0) = 0.5, Φ(−2) = 0.0227501, Φ(−4) = 0.0000317; mean 0.1742606
    # variance (0.3257394² + 0.1515105² + 0.1742289²) / 3 = 0.0531400
    np.testing.assert_allclose(balance.load_loss(logits, noise, 1, one), 0.0531400 / 0.1742606**2, rtol=1e-4)


def test_load_loss_reaches_the_router_and_needs_noise():
    logits = np.array([[1.0, 0.0, -1.0]], np.float32)
    one = np.array([True])

    def loss(logits):
        r = routing.vmoe(logits, experts_per_token=1, mask=one, key=jax.random.key(0))
        return balance.load_loss(logits, r.noise, 1, one)

    assert np.abs(jax.jit(jax.grad(loss))(logits)).max() > 1e-3
    quiet = routing.vmoe(logits, experts_per_token=1, mask=one)
    with pytest.raises(UserError, match="needs a noisy router"):
        balance.load_loss(logits, quiet.noise, 1, one)


# ---- the bias rule


def test_bias_update_by_hand():
    bias = np.array([0.0, 0.5, -0.5, 0.1], np.float32)
    # mean(5, 1, 3, 3) = 3: the overloaded expert goes down, the underloaded up, the others stay
    updated = balance.bias_update(bias, np.array([5, 1, 3, 3], np.int32), 0.001)
    close(updated, [-0.001, 0.501, -0.5, 0.1])
    # layers are independent
    layers = balance.bias_update(np.stack([bias, bias]), np.array([[5, 1, 3, 3], [0, 0, 0, 4]], np.int32), 0.001)
    close(layers, [updated, [0.001, 0.501, -0.499, 0.099]])
    # nothing routed: nothing moves
    np.testing.assert_array_equal(balance.bias_update(bias, np.zeros(4, np.int32), 0.001), bias)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 2**20), min_size=6, max_size=6), st.permutations(range(6)))
def test_bias_update_follows_a_permutation_and_never_overshoots(counts, order):
    counts, order = np.array(counts, np.int32), np.array(order)
    step = np.asarray(balance.bias_update(np.zeros(6, np.float32), counts, 1.0))
    np.testing.assert_array_equal(balance.bias_update(np.zeros(6, np.float32), counts[order], 1.0), step[order])
    assert step[counts.argmax()] <= 0 <= step[counts.argmin()]


def test_the_bias_rule_evens_out_a_skewed_router():
    """MaxVio of a fixed skewed router falls below 0.1 under the rule alone."""
    logits = jax.random.normal(jax.random.key(0), (512, 8)) + jnp.linspace(-1, 1, 8)[None]
    mask = jnp.ones(512, bool)

    def step(bias, _):
        r = routing.sigmoid_top_k(logits, experts_per_token=2, mask=mask, bias=bias)
        counts = balance.expert_counts(r.experts, r.keep, 8)
        return balance.bias_update(bias, counts, 0.01), jnp.max(counts) / 128 - 1

    _, violation = jax.jit(lambda bias: jax.lax.scan(step, bias, None, length=150))(jnp.zeros(8))
    assert violation[0] > 0.5 and violation[-20:].mean() < 0.1


# ---- the global batch


def test_losses_over_a_split_batch_are_those_of_the_whole():
    """On a mesh that splits tokens, f and P are global: a mean of per-device losses would be another number."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    # each device's tokens prefer another expert, so that the per-device losses are far from the global one
    logits = rng.normal(size=(64, 8)).astype(np.float32) + 5 * np.repeat(np.eye(8, dtype=np.float32), 8, axis=0)
    mask = rng.random(64) < 0.9

    def losses(logits, mask):
        r = routing.top_k(logits, experts_per_token=2, mask=mask)
        counts = balance.expert_counts(r.experts, r.keep, 8)
        return {
            "counts": counts,
            "load": balance.load_balance_loss(r.scores, counts, mask),
            "z": balance.router_z_loss(logits, mask),
            "importance": balance.importance_loss(r.scores, mask),
            "bias": balance.bias_update(jnp.zeros(8), counts, 0.001),
        }

    whole = jax.jit(losses)(logits, mask)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    split = jax.jit(losses, in_shardings=(rows, rows))(logits, mask)
    np.testing.assert_array_equal(split["counts"], whole["counts"])
    np.testing.assert_array_equal(split["bias"], whole["bias"])
    jax.tree.map(close, split, whole)
    per_device = [jax.jit(losses)(logits[i : i + 8], mask[i : i + 8])["load"] for i in range(0, 64, 8)]
    assert np.mean(per_device) > 2 * whole["load"]
