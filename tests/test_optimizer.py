"""Schedules by hand, and which rule treats which parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import optimizer
from moejax.config import OptimizerConfig

KEY = jax.random.key(0)


def rates(steps, **fields) -> list[float]:
    schedule = optimizer.schedule(OptimizerConfig(learning_rate=1.0, decay_steps=100, **fields))
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def test_warm_up_is_linear_and_the_first_step_counts():
    # (step + 1) / 4: 1/4, 2/4, 3/4, 1, then the schedule
    np.testing.assert_allclose(rates(range(6), schedule="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rates((0,), schedule="constant", warmup_steps=0), [1])


def test_cosine_by_hand():
    # From step 20 to 100: progress 0, 1/4, 1/2, 1; 0.1 + 0.45 · (1 + cos(π p)): 1, 0.1 + 0.45·1.70711, 0.55, 0.1
    got = rates((20, 40, 60, 100, 1000), schedule="cosine", warmup_steps=20)
    np.testing.assert_allclose(got, [1.0, 0.868198, 0.55, 0.1, 0.1], rtol=1e-5)


def test_wsd_by_hand():
    # Flat to step 80; then 1 − 0.9 · (step − 80) / 20
    got = rates((50, 80, 90, 100, 150), schedule="wsd", warmup_steps=10)
    np.testing.assert_allclose(got, [1, 1, 0.55, 0.1, 0.1], rtol=1e-5)


def test_deepseekmoe_steps_by_hand():
    # 0.316 at 80% and again at 90%: 0.316² = 0.099856
    got = rates((79, 80, 89, 90, 200), schedule="steps", warmup_steps=10)
    np.testing.assert_allclose(got, [1, 0.316, 0.316, 0.099856, 0.099856], rtol=1e-5)


def test_the_horizon_must_be_settled():
    with pytest.raises(ValueError, match="decay_steps"):
        optimizer.make(OptimizerConfig())


def tree(leaf):
    """The parameters of a scanned sparse model: 2 layers, D 8, H 2, hd 4, E 3, F 4, V 16."""
    return {
        "embedding": {"embedding": leaf(16, 8)},
        "layers": {
            "attention": {
                "query": leaf(2, 8, 2, 4),
                "out": leaf(2, 2, 4, 8),
                "query_norm": {"scale": leaf(2, 4)},
            },
            "ffn_norm": {"scale": leaf(2, 8)},
            "moe": {"router": leaf(2, 8, 3), "gate": leaf(2, 3, 8, 4), "down": leaf(2, 3, 4, 8)},
        },
        "unembedding": leaf(8, 16),
    }


def random_tree(seed: int):
    keys = iter(jax.random.split(jax.random.key(seed), 32))
    return tree(lambda *shape: jax.random.normal(next(keys), shape))


def config(**fields) -> OptimizerConfig:
    defaults = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, decay_steps=10, weight_decay=0.0, clip_norm=None
    )
    return dataclasses.replace(defaults, **fields)


def step(configuration: OptimizerConfig, grads, params):
    tx = optimizer.make(configuration)
    return jax.jit(lambda g, p: optimizer.apply(tx, g, tx.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weight_decay_falls_on_matrices_alone(name):
    params = tree(lambda *shape: jnp.ones(shape))
    # The gradient is zero, so the update is −rate · decay · p = −0.1 · 0.5 · 1 where there is decay, 0 elsewhere.
    after = step(config(name=name, weight_decay=0.5), jax.tree.map(jnp.zeros_like, params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        last = path[-1].key
        adams = name == "muon" and last in ("embedding", "unembedding", "router")
        wanted = 1.0 if last == "scale" or adams else 0.95
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, err_msg=str(path))


def test_adamw_by_hand():
    # The first Adam step is m̂ / (√v̂ + eps) = g / |g| = ±1, whatever the size: p − 0.1 · sign(g)
    params = {"gate": jnp.array([[1.0, 2.0]])}
    after = step(config(name="adamw"), {"gate": jnp.array([[3.0, -0.5]])}, params)
    np.testing.assert_allclose(after["gate"], [[0.9, 2.1]], rtol=1e-5)


def test_clipping_by_the_global_norm():
    # The norm of (3, 4) is 5; clipped to 1 it is (0.6, 0.8)
    tx = optimizer.make(config(clip_norm=1.0))
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = tx.update(grads, tx.init(grads), grads)
    b1 = config().betas[0]
    (mu,) = [s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    np.testing.assert_allclose(mu["a"] / (1 - b1), [0.6], rtol=1e-5)
    np.testing.assert_allclose(mu["b"] / (1 - b1), [0.8], rtol=1e-5)


@jax.jit
def muon_of_one(gradient):
    """Muon of a single matrix by optax itself: the oracle for stacks."""
    tx = optax.contrib.muon(0.1, consistent_rms=0.2)
    with jax.numpy_dtype_promotion("standard"):
        update, _ = tx.update({"x": gradient}, tx.init({"x": gradient}), {"x": gradient})
    return update["x"]


def test_muon_treats_every_layer_and_expert_as_its_own_matrix():
    params, grads = random_tree(0), random_tree(1)
    after = step(config(name="muon"), grads, params)
    change = jax.tree.map(jnp.subtract, after, params)["layers"]
    grads = grads["layers"]
    for layer in range(2):
        for expert in range(3):
            for name in ("gate", "down"):
                wanted = muon_of_one(grads["moe"][name][layer, expert])
                np.testing.assert_allclose(change["moe"][name][layer, expert], wanted, atol=1e-5)
        # (D, H, hd) is a D × H·hd matrix, (H, hd, D) an H·hd × D one
        wanted = muon_of_one(grads["attention"]["query"][layer].reshape(8, 8))
        np.testing.assert_allclose(change["attention"]["query"][layer].reshape(8, 8), wanted, atol=1e-5)
        wanted = muon_of_one(grads["attention"]["out"][layer].reshape(8, 8))
        np.testing.assert_allclose(change["attention"]["out"][layer].reshape(8, 8), wanted, atol=1e-5)


def test_muon_leaves_tables_the_router_and_norms_to_adam():
    params, grads = random_tree(0), random_tree(1)
    after = step(config(name="muon"), grads, params)
    change = jax.tree.map(lambda a, b: jnp.abs(a - b), after, params)
    for leaf in (change["embedding"]["embedding"], change["unembedding"], change["layers"]["moe"]["router"]):
        # optax pairs Muon with Adam in Nesterov's form. Its first step has one size, whatever the gradient:
        # b1 · (1 − b1) / (1 − b1²) + (1 − b1) / (1 − b1) = 0.9 · 0.1 / 0.19 + 1 = 1.473684, times the rate.
        np.testing.assert_allclose(leaf, 0.1473684, rtol=1e-4)
    assert np.std(change["layers"]["moe"]["gate"]) > 1e-3  # Muon's sizes differ


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_every_optimizer_descends_under_strict_promotion(name):
    target = random_tree(2)
    tx = optimizer.make(config(name=name, learning_rate=0.03, clip_norm=1.0))

    def loss(params):
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    @jax.jit
    def descend(params, state):
        return optimizer.apply(tx, jax.grad(loss)(params), state, params)

    params = random_tree(3)
    state, before = tx.init(params), loss(params)
    for _ in range(30):
        params, state = descend(params, state)
    assert loss(params) < 0.7 * before
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
