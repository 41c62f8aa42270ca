"""Routers: pure functions from logits to a decision. A router knows nothing of how rows move.

    router(logits (T, E) f32, *, experts_per_token, tokens (T,) i32, mask (T,) bool, bias (E,) f32 | None,
           key | None, **options) -> Routing | ExpertChoice

A router takes of these keywords the ones it uses, and is called once per routing group (`MoE` maps it over groups). A
parameter named `noise_logits` (T, E) asks `MoE` for a second kernel; one named `bias` asks for a selection bias, kept
in `router_state`. Masked (padding) tokens come back with `keep` off. `key` is None outside training, and then every
router is deterministic. Any function of this form, in any file, is a router: its name goes into the config.

Gates are renormalised over the selected experts only where K > 1: at K = 1 the gate would be the constant 1 and the
router would have no gradient, so there the gate is the score itself, whatever the router.

Letters: T tokens (of the group), E experts, K experts per token, C capacity (rows per expert).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.dotted import resolve
from moejax.errors import UserError
from moejax.routing_select import multi_hot, pick, rank_in_expert, select_top_k

__all__ = [
    "ExpertChoice", "Noise", "Routing", "capacity", "dense_mixture", "multi_hot", "resolve", "select_top_k",
    "sigmoid_top_k", "switch", "top_k", "with_capacity",
]  # fmt: skip

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """What a noisy router added, for `balance.load_loss`: logits (T, E) f32 with the noise, std (T, E) f32 of it."""

    logits: Array
    std: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """A decision in which tokens choose experts.

    experts (T, K) i32, each row distinct, best first. weights (T, K) f32: the gate of each choice. scores (T, E) f32:
    probabilities or affinities before any selection bias, for losses and statistics. keep (T, K) bool: off for masked
    tokens, for choices the router gave up and, after `with_capacity`, for overflow; such a choice has no row, whatever
    its weight. noise: what a noisy router added in training, else None.
    """

    experts: Array
    weights: Array
    scores: Array
    keep: Array
    noise: Noise | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """A decision in which experts choose tokens.

    tokens (E, C) i32: positions in the group, each row distinct. weights (E, C) f32: 0 marks an empty place (a masked
    token). scores (T, E) f32.
    """

    tokens: Array
    weights: Array
    scores: Array


# ---- capacity


def capacity(capacity_factor: float, tokens: int, experts_per_token: int, num_experts: int) -> int:
    """C = ceil(capacity_factor · T · K / E), at least 1 and at most T (the choices of one token are distinct).

    Switch Transformer (Fedus et al. 2021), eq. 3. Raises UserError for a factor that isn't positive.
    """
    if not capacity_factor > 0:
        raise UserError(f"capacity_factor {capacity_factor} leaves no room: give a number above 0, such as 1.25")
    # the small subtraction keeps 1.1 · 100 / 10 = 11.000000000000002 at 11
    rows = math.ceil(capacity_factor * tokens * experts_per_token / num_experts - 1e-9)
    return max(1, min(rows, tokens))


def with_capacity(routing: Routing, capacity: int) -> Routing:
    """The same routing with `keep` off for what doesn't fit: an expert takes at most `capacity` (C) choices.

    First choices of all tokens go before second choices, and so on; inside one rank, by position (GShard, Lepikhin et
    al. 2020, algorithm 1; V-MoE, Riquelme et al. 2021, algorithm 1). Choices that aren't kept take no room. Weights
    stay as they are. With K > 1, a later token's first choice can push out an earlier token's second one: the one
    place, with expert choice, where the future reaches the past. With K = 1 an earlier token never notices.
    """
    num_tokens, k = routing.experts.shape
    flat = routing.experts.T.reshape(-1)
    rank = rank_in_expert(flat, routing.keep.T.reshape(-1), routing.scores.shape[-1])
    rank = rank.reshape(k, num_tokens).T
    return dataclasses.replace(routing, keep=routing.keep & (rank < capacity))


# ---- shared by the routers


def _keep(mask: Array, k: int) -> Array:
    return jnp.broadcast_to(mask[:, None], (mask.shape[0], k))


def _renormalize(weights: Array) -> Array:
    """Gates that sum to 1 over the selected; the score itself at K = 1 (see the top of the file)."""
    if weights.shape[-1] == 1:
        return weights
    # sigmoid scores can all underflow to 0
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)


# ---- token choice


def dense_mixture(logits: Array, *, experts_per_token: int, mask: Array) -> Routing:
    """Every expert on every token (Jacobs et al. 1991, "Adaptive mixtures of local experts"): y = Σ_i p_i E_i(x).

    logits (T, E) f32, mask (T,) bool; K = E. Raises UserError for another K.
    """
    num_tokens, num_experts = logits.shape
    if experts_per_token != num_experts:
        raise UserError(
            f"dense_mixture uses all experts, not {experts_per_token} of {num_experts}: "
            f"set experts_per_token={num_experts}"
        )
    scores = jax.nn.softmax(logits)
    experts = jax.lax.broadcasted_iota(jnp.int32, (num_tokens, num_experts), 1)
    return Routing(experts, scores, scores, _keep(mask, num_experts))


def switch(logits: Array, *, experts_per_token: int, mask: Array) -> Routing:
    """Switch Transformer (Fedus et al. 2021), eq. 1-2: p = softmax(h), y = p_i E_i(x) for the i of the largest p.

    logits (T, E) f32, mask (T,) bool. The paper has K = 1; with K > 1 (an evaluation with more experts) the gates stay
    the probabilities themselves. Its capacity is `with_capacity`, its input jitter `MoE`'s.
    """
    return top_k(logits, experts_per_token=experts_per_token, mask=mask, renormalize=False)


def top_k(logits: Array, *, experts_per_token: int, mask: Array, renormalize: bool = True) -> Routing:
    """Softmax top-k. logits (T, E) f32, mask (T,) bool.

    renormalize=True: gates are p_i / Σ_selected p, that is softmax over the selected logits (Mixtral, Jiang et al.
    2024, eq. in §2.1). False: gates are p_i (OLMoE, Muennighoff et al. 2024, eq. 2; DeepSeekMoE, Dai et al. 2024,
    eq. 9-11).
    """
    scores = jax.nn.softmax(logits)
    weights, experts = select_top_k(scores, experts_per_token)
    return Routing(experts, _renormalize(weights) if renormalize else weights, scores, _keep(mask, experts_per_token))


def sigmoid_top_k(
    logits: Array, *, experts_per_token: int, mask: Array, bias: Array | None = None, scale: float = 1.0
) -> Routing:
    """Sigmoid top-k with a selection bias: auxiliary-loss-free balancing (Wang et al. 2024, eq. 3; DeepSeek-V3 eq. 16).

    s = sigmoid(logits); the K largest of s + b are selected; gates are scale · s_i / Σ_selected s, without b.
    logits (T, E) f32, mask (T,) bool, bias (E,) f32 (`balance.bias_update` moves it) or None for 0.
    """
    scores = jax.nn.sigmoid(logits)
    biased = scores if bias is None else scores + bias[None, :]
    _, experts = select_top_k(jax.lax.stop_gradient(biased), experts_per_token)
    weights = _renormalize(pick(scores, experts)) * scale
    return Routing(experts, weights, scores, _keep(mask, experts_per_token))
