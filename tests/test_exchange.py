"""Experts on several devices against the oracle that runs every expert on every token."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.ad_checkpoint import print_saved_residuals

from moejax import config_checks, exchange, expert_parallel, optimizer, sharding, train_step
from moejax.errors import UserError
from moejax.routing import ExpertChoice, Routing

B, L, D, F, E, K = 8, 4, 8, 16, 8, 2


def inputs(kind: str):
    """x, a decision whose rows fall unevenly on experts, and weights."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, weights = normal(B, L, D), {"gate": normal(E, D, F), "up": normal(E, D, F), "down": normal(E, F, D)}
    scores = jnp.full((B, L, E), 1 / E, jnp.float32)
    if kind == "expert_choice":
        tokens = jnp.asarray(np.stack([[rng.permutation(L)[:2] for _ in range(E)] for _ in range(B)]), jnp.int32)
        return x, ExpertChoice(tokens, normal(B, E, 2), scores), weights
    keep = np.ones((B, L, K), bool)
    if kind == "one_expert":  # all first choices to expert 5, no second ones: all but one device get nothing
        chosen = np.stack([np.full((B, L), 5), np.full((B, L), 0)], -1)
        keep[..., 1] = False
    else:
        chosen = np.argsort(rng.random((B, L, E)), axis=-1)[..., :K]
        keep[rng.random((B, L, K)) < 0.2] = False
    return x, Routing(jnp.asarray(chosen, jnp.int32), normal(B, L, K), scores, jnp.asarray(keep)), weights


def value_and_gradients(layer):
    def objective(x, gates, weights, decision):
        y = layer(x, dataclasses.replace(decision, weights=gates), weights)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"expert": 8}, "uneven"),
        ({"data": 2, "expert": 4}, "uneven"),
        ({"fsdp": 4, "expert": 2}, "uneven"),
        ({"data": 2, "expert": -1}, "one_expert"),
        ({"data": 2, "expert": 4}, "expert_choice"),
    ],
)
def test_gather_equals_the_dense_oracle_in_values_and_gradients(sizes, kind):
    x, decision, weights = inputs(kind)
    arguments = (x, decision.weights, weights, decision)
    (_, wanted), wanted_grads = value_and_gradients(expert_parallel.dense_mixture)(*arguments)
    layer = value_and_gradients(lambda *a: expert_parallel.mixture(*a, num_experts=E, way="gather"))
    with jax.set_mesh(sharding.make_mesh(sizes)):
        (_, y), grads = layer(*arguments)
    assert small.largest_difference(wanted, y) < 1e-5
    assert small.largest_difference(wanted_grads, grads) < 1e-5


def test_the_collectives_are_the_ones_meant_and_expert_weights_stay():
    x, decision, weights = inputs("uneven")
    mesh = sharding.make_mesh({"expert": 4})
    split = jax.NamedSharding(mesh, jax.P("expert"))
    arguments = jax.device_put((x, decision, weights), split)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: expert_parallel.mixture(*a, num_experts=E))
        text = run.lower(*arguments).compile().as_text()
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", text)
    assert f"f32[{B},{L},{D}]" in gathered  # the tokens
    assert not [shape for shape in gathered if f"{D},{F}]" in shape or f"{F},{D}]" in shape]
    assert "reduce-scatter(" in text


def test_copies_of_expert_weights_are_not_kept_for_the_backward_pass(capsys):
    """Kept, those of all devices would be residuals of 8·E experts."""
    x, decision, weights = inputs("uneven")
    with jax.set_mesh(sharding.make_mesh({"data": 2, "fsdp": 4})):
        print_saved_residuals(
            lambda x, weights: expert_parallel.mixture(x, decision, weights, num_experts=E), x, weights
        )
    kept = re.findall(r"^\w+\[([\d,]*)\]", capsys.readouterr().out, re.MULTILINE)
    assert f"{E},{D},{F}" in kept  # the weights as they are
    assert not {f"{8 * E},{D},{F}", f"{8 * E},{F},{D}"} & set(kept)


def test_choices_of_other_devices_are_left_out_and_mine_are_renumbered():
    """Of choices 0, 3 | 2, 1, experts 2 and 3 are here: 3 becomes 1 and 2 becomes 0."""
    experts = jnp.array([[0, 3], [2, 1]], jnp.int32)
    ones = jnp.ones((2, 2), jnp.float32)
    decision = Routing(experts, ones, jnp.ones((2, 4), jnp.float32), jnp.ones((2, 2), bool))
    mine = exchange.local_experts(decision, jnp.int32(2), 2)
    np.testing.assert_array_equal(mine.keep, [[False, True], [True, False]])
    np.testing.assert_array_equal(mine.experts, [[0, 1], [0, 0]])


def test_what_cannot_be_meant_is_one_line():
    with pytest.raises(UserError, match="8 experts can't be shared evenly by the 3 devices"):
        exchange.check_experts(8, 3)
    moe = dataclasses.replace(small.ROUTERS["top_k"], exchange="telepathy")
    with pytest.raises(UserError, match=r"moe\.exchange='telepathy' does not exist; there is gather"):
        config_checks.check_moe(moe)


@pytest.mark.slow
def test_a_step_with_experts_on_four_devices_is_that_of_one():
    """Loss and all gradients to 1e-5; counts and selection biases exactly."""
    settings = small.config(small.ROUTERS["aux_free"])
    model, variables = small.initialised("aux_free")
    tx = optimizer.make(settings.optimizer)
    moe = settings.model.moe
    assert moe is not None

    def step(mesh):
        def run(params, router_state, batch):
            key = jax.random.key(0)
            grads, sums = train_step.gradients(
                train_step.TrainState(jnp.int32(0), params, router_state, None, None),
                batch, key, model=model, moe=moe, microbatches=1,
            )  # fmt: skip
            selected = sums["tallies"]["selected"]
            return sums["total_loss"], grads, selected, train_step.moved_biases(router_state, selected, 0.01)

        shardings = train_step.state_shardings(model, tx, mesh)
        params = jax.device_put(variables["params"], shardings.params)
        router_state = jax.device_put(variables["router_state"], sharding.replicated(mesh))
        with jax.set_mesh(mesh):
            batch = train_step.to_devices(small.batch(padded=3), sharding.batch_sharding(mesh))
            return jax.tree.map(np.asarray, jax.jit(run)(params, router_state, batch))

    loss, grads, counts, bias = step(sharding.make_mesh({}, devices=jax.devices()[:1]))
    found = step(sharding.make_mesh({"data": 2, "expert": 4}))
    assert small.largest_difference((loss, grads), found[:2]) < 1e-5
    assert counts.sum() == 2 * 8 * 13 * 2  # layers · rows · unpadded places · K: nothing dropped
    np.testing.assert_array_equal(counts, found[2])
    jax.tree.map(np.testing.assert_array_equal, bias, found[3])
