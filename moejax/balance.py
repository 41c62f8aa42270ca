"""Balance losses and the bias rule: what keeps experts evenly used.

Every function takes the whole batch with any leading axes (written T) and means over its unmasked tokens. Call them
outside `shard_map`: token sums are then sums over all devices, as the papers define them. Nothing is weighted here.
Letters: T tokens, E experts, K experts per token, B sequences, L length.
"""

import jax
import jax.numpy as jnp

from moejax.errors import UserError
from moejax.routing import Noise
from moejax.routing_select import multi_hot, select_top_k

Array = jax.Array


def expert_counts(experts: Array, chosen: Array, num_experts: int) -> Array:
    """How many choices fall on each expert: (E,) i32. experts (T, K) i32 with distinct rows, chosen (T, K) bool.

    `routing.chosen` gives the choices before capacity, `Routing.keep` those after. A sum of multi-hot rows, without a
    scatter: 0.2 ms at T=8192, E=64, K=8 on CPU, as `jnp.bincount`.
    """
    hits = multi_hot(experts, chosen, num_experts)
    return jnp.sum(hits, axis=tuple(range(hits.ndim - 1)), dtype=jnp.int32)


def mean_scores(scores: Array, mask: Array) -> Array:
    """P (E,) f32: the mean over unmasked tokens of each row's scores divided by their sum; 0 when all are masked.

    scores (T, E) f32: softmax scores sum to 1 already, sigmoid affinities are normalised here (DeepSeek-V3, eq. 19).
    """
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return _token_sum(share, mask) / jnp.maximum(jnp.sum(mask), 1).astype(scores.dtype)


def load_balance_loss(scores: Array, counts: Array, mask: Array) -> Array:
    """E · Σ_i f_i P_i, a scalar: 1 when f or P is uniform, E when all goes to one expert (Switch, eq. 4-6).

    f_i = counts_i / Σ counts: the share of the choices, before capacity, that fall on expert i; counts (E,), no
    gradient. P = `mean_scores`(scores (T, E) f32, mask (T,) bool). 0 when every token is masked. With Σ f = 1 the value
    does not grow with K: papers that count f per token have K times this.
    """
    load = jax.lax.stop_gradient(counts).astype(scores.dtype)
    load = load / jnp.maximum(jnp.sum(load), 1.0)
    return counts.shape[-1] * jnp.sum(load * mean_scores(scores, mask))


def sequence_balance_loss(scores: Array, experts: Array, chosen: Array, mask: Array) -> Array:
    """`load_balance_loss` of each sequence by itself, then the mean over sequences (DeepSeek-V3, eq. 17-20).

    scores (B, L, E) f32, experts and chosen (B, L, K), mask (B, L). Sequences that are masked throughout don't count.
    """

    def one(scores, experts, chosen, mask):
        return load_balance_loss(scores, expert_counts(experts, chosen, scores.shape[-1]), mask)

    used = jnp.any(mask, axis=-1)
    return jnp.sum(jax.vmap(one)(scores, experts, chosen, mask)) / jnp.maximum(jnp.sum(used), 1).astype(scores.dtype)


def router_z_loss(logits: Array, mask: Array) -> Array:
    """Mean over tokens of (log Σ_i exp h_i)², a scalar (ST-MoE, Zoph et al. 2022, eq. 5). logits (T, E) f32."""
    z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(jnp.where(mask, z * z, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(logits.dtype)


def importance_loss(scores: Array, mask: Array) -> Array:
    """(std / mean)² over experts of Σ_t scores_t, a scalar (V-MoE's importance loss, Riquelme et al. 2021).

    scores (T, E) f32: the noiseless softmax. std is the population's. V-MoE adds half of it and half of `load_loss`.
    """
    return _squared_variation(_token_sum(scores, mask))


def load_loss(logits: Array, noise: Noise | None, experts_per_token: int, mask: Array) -> Array:
    """(std / mean)² over experts of the expected load, a scalar (V-MoE's load loss; Shazeer et al. 2017, eq. 8-10).

    load_i = Σ_t P(logits_i + new noise ≥ the K-th largest noisy logit of t) = Σ_t 1 − Φ((threshold − logits_i) / std).
    logits (T, E) f32 without noise; noise: `Routing.noise`. Raises UserError when there is none: a router without noise
    has no load that is smooth in its parameters.
    """
    if noise is None:
        raise UserError("the load loss needs a noisy router: choose moejax.routing:vmoe or noisy_top_k, or weight it 0")
    ranked, _ = select_top_k(noise.logits, experts_per_token)
    threshold = ranked[..., -1:]
    wins = jax.scipy.stats.norm.sf((threshold - logits) / noise.std)
    return _squared_variation(_token_sum(wins, mask))


def bias_update(bias: Array, counts: Array, rate: float) -> Array:
    """The selection bias after a step: b_i + rate · sign(mean(counts) − counts_i).

    Loss-free balancing (Wang et al. 2024, algorithm 1; DeepSeek-V3 has rate 1e-3, then 0). bias (…, E) f32; counts
    (…, E): choices over the step's global batch, all microbatches together. Leading axes are layers.
    """
    counts = counts.astype(bias.dtype)
    return bias + rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)


def _token_sum(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask[..., None], values, 0.0), axis=tuple(range(values.ndim - 1)))


def _squared_variation(totals: Array) -> Array:
    mean = jnp.mean(totals)
    return jnp.mean(jnp.square(totals - mean)) / (jnp.square(mean) + 1e-20)
