"""A layer by every way of exchange, on every mesh, with every router, is that of one device; so is a training step."""

import dataclasses
import functools
import itertools

import emulated_ragged
import emulated_remote
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from test_exchange import small_mesh, step_on

from moejax import sharding, train_step
from moejax.moe import MoE

MESHES = ((("data", 2), ("expert", 4)), (("expert", 8),), (("fsdp", 4), ("expert", 2)), (("expert", 4), ("tensor", 2)))
EIGHT_EXPERTS = ("top_k", "aux_free")
ROUTERS = tuple(name for name in small.ROUTERS if name != "dense")
WAYS = ("gather", "all_to_all", "ragged", "remote")


def product(always):
    """(mesh, router, way, chunks): every way on every mesh with every router, wherever experts divide; in one chunk and
    in two by turns, of ways and of routers. always(mesh, router, way): whether every run of the suite takes it."""
    for mesh, (i, router), (j, way) in itertools.product(MESHES, enumerate(ROUTERS), enumerate(WAYS)):
        if way != "gather" and router == "expert_choice":
            continue  # a mistake of the user
        if dict(mesh)["expert"] == 8 and router not in EIGHT_EXPERTS:
            continue  # four experts
        # a device of 8 has one row of the batch, which expert choice leaves whole
        chunks = 1 if router == "expert_choice" else 1 + (i + j) % 2
        seldom = () if always(mesh, router, way) else (pytest.mark.long,)
        name = "-".join([*(f"{axis}{size}" for axis, size in mesh), router, way, str(chunks)])
        yield pytest.param(mesh, router, way, chunks, marks=(pytest.mark.slow, *seldom), id=name)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulated_ragged.install(monkeypatch)
    emulated_remote.install(monkeypatch)


def layer_with(router: str, way: str | None = None, chunks: int = 1) -> MoE:
    config = dataclasses.replace(small.ROUTERS[router], exchange=way, exchange_chunks=chunks)
    return MoE(config, hidden=16, mode="train")


@functools.lru_cache
def start(router: str):
    """A layer's boxed variables, x and what goes with it; the same for every way of exchange."""
    batch, keys = small.batch(padded=3), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*batch["tokens"].shape, 32), jnp.float32)
    arguments = x, batch["tokens"], batch["mask"]
    return jax.jit(layer_with(router).init)({"params": keys[1], "routing": keys[2]}, *arguments), arguments, keys[2]


@functools.lru_cache
def layer_on(sizes: tuple[tuple[str, int], ...], router: str, way: str | None, chunks: int = 1):
    """y, losses, gradients of both in x and all parameters, counts, biases after the rule and overflow of one layer."""
    layer = layer_with(router, way, chunks)
    boxed, arguments, key = start(router)
    mesh = small_mesh(dict(sizes))
    arguments = jax.device_put(arguments, sharding.batch_sharding(mesh))
    variables = jax.device_put(nn.unbox(boxed), sharding.shardings(mesh, boxed))
    params, state = variables["params"], variables.get("router_state", {})

    def run(params, state, x, tokens, mask):
        def objective(params, x):
            variables = {"params": params, "router_state": state}
            (y, losses), sown = layer.apply(
                variables, x, tokens, mask, rngs={"routing": key}, mutable=["intermediates"]
            )
            wave = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
            return jnp.sum(y * wave) + sum(losses.values()), (y, losses, sown["intermediates"]["routing"])

        grads, (y, losses, tallies) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)
        moved = train_step.moved_biases(state, tallies["selected"][None], 0.01)
        return (y, losses, grads), tallies["selected"], moved, tallies.get("overflow")

    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(run)(params, state, *arguments))


def two_routers_or_2x4(mesh, router, way) -> bool:
    return router in EIGHT_EXPERTS or mesh == MESHES[0]


@pytest.mark.parametrize(("mesh", "router", "way", "chunks"), list(product(two_routers_or_2x4)))
def test_a_layer_is_that_of_one_device(mesh, router, way, chunks):
    """Outputs, losses and gradients of x and all parameters to 1e-5; counts and biases, moved by signs, exactly;
    nothing overflows."""
    values, counts, bias, _ = layer_on((("data", 1),), router, None)
    found = layer_on(mesh, router, way, chunks)
    assert small.largest_difference(values, found[0]) < 1e-5
    np.testing.assert_array_equal(counts, found[1])
    jax.tree.map(np.testing.assert_array_equal, bias, found[2])
    if way != "gather":
        np.testing.assert_array_equal(found[3], 0)


@pytest.mark.parametrize(("mesh", "router", "way", "chunks"), list(product(lambda *case: False)))
def test_a_step_is_that_of_one_device(mesh, router, way, chunks):
    """Loss and gradients of all parameters to 1e-5; counts and biases, moved by signs, exactly; nothing overflows."""
    loss, grads, counts, bias, _ = step_on((("data", 1),), router, None)
    found = step_on(mesh, router, way, chunks)
    assert small.largest_difference((loss, grads), found[:2]) < 1e-5
    np.testing.assert_array_equal(counts, found[2])
    jax.tree.map(np.testing.assert_array_equal, bias, found[3])
    if way != "gather":
        np.testing.assert_array_equal(found[4], [0, 0])
