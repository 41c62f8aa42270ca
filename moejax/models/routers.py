"""How published families gate their experts, where that differs from the papers' routers in `moejax.routing`.

Selection is `routing`'s. The gates differ at K = 1: a checkpoint that renormalises was trained with the constant 1
there, which `routing` avoids because it has no gradient. T tokens, E experts, K experts per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax import routing
from moejax.routing_select import pick


def softmax_top_k(logits, *, experts_per_token: int, mask, norm: float | None) -> routing.Routing:
    """The K largest of softmax(logits (T, E)); gates p_i, divided by their `norm`-norm (1: they sum to 1) if given."""
    decision = routing.top_k(logits, experts_per_token=experts_per_token, mask=mask, renormalize=False)
    if norm is None:
        return decision
    total = jnp.sum(decision.weights**norm, axis=-1, keepdims=True) ** (1 / norm)
    return dataclasses.replace(decision, weights=decision.weights / total)


def sigmoid_groups(
    logits, *, experts_per_token: int, mask, groups: int, groups_kept: int, normalize: bool, scale: float, bias=None
) -> routing.Routing:
    """DeepSeek-V3 (2024, eq. 12-16): `routing.group_limited_sigmoid`'s choice by score + bias (E,), gates scale · s_i,
    s_i divided by their sum if `normalize`."""
    decision = routing.group_limited_sigmoid(
        logits, experts_per_token=experts_per_token, mask=mask, groups=groups, groups_kept=groups_kept, bias=bias
    )
    weights = pick(decision.scores, decision.experts)
    if normalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return dataclasses.replace(decision, weights=weights * scale)


def sigmoid_scores(logits, *, experts_per_token: int, mask) -> routing.Routing:
    """The K largest logits (T, E), each with gate sigmoid(logit) (Llama 4)."""
    scores = jax.nn.sigmoid(logits)
    _, experts = routing.select_top_k(logits, experts_per_token)
    keep = jnp.broadcast_to(mask[:, None], experts.shape)
    return routing.Routing(experts, pick(scores, experts), scores, keep)
