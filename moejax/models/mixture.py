"""The pieces of a sparse FFN for families whose experts `MoE` does not have: biased ones, ones fed scaled tokens.

Composed of the same pure functions: a router, `dispatch`, and one `shard_map` over the batch. Letters: B batch, L
length, T tokens, D model width, E experts, K experts per token.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moejax import balance, dispatch, layers, routing, routing_stats, sharding
from moejax.models import parts


def router_logits(module: nn.Module, x: jax.Array, num_experts: int) -> jax.Array:
    """float32 logits (B, L, E) of x (B, L, D) by the parameter `router` (D, E)."""
    kernel = layers.parameter(module, "router", parts.INIT, (x.shape[-1], num_experts), ("embed", "router_experts"))
    wide = x.astype(jnp.float32)
    return jnp.einsum("bld,de->ble", wide, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def route(module: nn.Module, logits: jax.Array, inputs: parts.Inputs, router, **options):
    """The decision (leading axis B) of `router` on logits (B, L, E), and the unweighted losses; sows the tallies."""
    mask = inputs.mask
    decision = jax.vmap(lambda logits, mask: router(logits, mask=mask, **options))(logits, mask)
    tallies = routing_stats.tallies(lax.stop_gradient(decision), mask)
    module.sow("intermediates", "routing", tallies, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    losses = {
        "router_z_loss": balance.router_z_loss(logits, mask),
        "load_balance_loss": balance.load_balance_loss(decision.scores, tallies["selected"], mask),
    }
    return decision, losses


def over_rows(x: jax.Array, decision: routing.Routing, weights: dict[str, jax.Array], experts) -> jax.Array:
    """`experts(tokens (T, D), plan, weights) -> (T, D)` on each device's part of x (B, L, D); weights are gathered."""
    run = functools.partial(_local, experts)
    axes = sharding.batch_axes()
    if not axes:
        return run(x, decision, weights)
    rows = PartitionSpec(axes)

    def local(x, decision, weights):
        # Replicated going in, different on each device coming back: the cast's transpose is the sum over devices.
        return run(x, decision, jax.tree.map(lambda w: lax.pcast(w, axes, to="varying"), weights))

    specs = (rows, rows, PartitionSpec())
    return jax.shard_map(local, in_specs=specs, out_specs=rows, axis_names=set(axes))(x, decision, weights)


def _local(experts, x, decision, weights):
    tokens = x.reshape(-1, x.shape[-1])
    flat = jax.tree.map(lambda a: a.reshape(tokens.shape[0], *a.shape[2:]), decision)
    plan = dispatch.plan(flat, decision.scores.shape[-1])
    return experts(tokens, plan, weights).reshape(x.shape)
