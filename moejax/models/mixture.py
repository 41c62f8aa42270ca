"""The pieces of a sparse FFN for families whose experts `MoE` does not have: biased ones, ones fed scaled tokens.

Composed of the same pure functions: a router, and the rows' way to experts (`expert_parallel`). Letters: B batch, L
length, T tokens, D model width, E experts, K experts per token.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax import lax

from moejax import balance, expert_parallel, layers, routing, routing_stats
from moejax.models import parts


def router_logits(module: nn.Module, x: jax.Array, num_experts: int) -> jax.Array:
    """float32 logits (B, L, E) of x (B, L, D) by the parameter `router` (D, E)."""
    kernel = layers.parameter(module, "router", parts.INIT, (x.shape[-1], num_experts), ("embed", "router_experts"))
    return layers.scores(x, kernel)


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


def over_rows(
    x: jax.Array, decision: routing.Routing, weights: dict[str, jax.Array], apply: Callable | None = None
) -> jax.Array:
    """Σ_k gate · expert(x) for x (B, L, D), where `apply(rows (R, D), weights, group_sizes)` -> (R, D) is what experts
    do with rows sorted by expert; arguments and the way over devices as in `expert_parallel.mixture_and_overflow`."""
    return expert_parallel.mixture(x, decision, weights, num_experts=decision.scores.shape[-1], apply=apply)
