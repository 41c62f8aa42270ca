"""Routers: pure functions from logits to a decision. A router knows nothing of how rows move.

    router(logits (T, E) f32, *, experts_per_token, tokens (T,) i32, mask (T,) bool, bias (E,) f32 | None,
           key | None, **options) -> Routing | ExpertChoice

A router takes of these keywords the ones it uses, and is called once per routing group (`MoE` maps it over groups). A
parameter named `noise_logits` (T, E) asks `MoE` for a second kernel; one named `bias` asks for a selection bias, kept
in `router_state`; where the first parameter is named `_logits`, only its shape is read and there is no kernel at all.
Masked (padding) tokens come back with `keep` off. `key` is None outside training, and then every router is
deterministic. Any function of this form, in any file, is a router: its name goes into the config.

Gates are renormalised over the selected experts only where K > 1: at K = 1 the gate would be the constant 1 and the
router would have no gradient, so there the gate is the score itself, whatever the router.

Letters: T tokens (of the group), E experts, K experts per token, C capacity (rows per expert).
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.dotted import resolve
from moejax.errors import UserError
from moejax.routing_select import multi_hot, pick, rank_in_expert, select_top_k

__all__ = [
    "ExpertChoice", "Noise", "Routing", "capacity", "chosen", "dense_mixture", "expert_choice", "group_limited_sigmoid",
    "group_limited_softmax", "gshard", "hash", "multi_hot", "noisy_top_k", "random", "resolve", "select_top_k",
    "sigmoid_top_k", "switch", "top_k", "vmoe", "with_capacity",
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
    tokens, for choices the router gave up (their weight is 0) and, after `with_capacity`, for overflow (their weight
    stays); a choice that isn't kept has no row. noise: what a noisy router added in training, else None.
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
    al. 2020, algorithm 1; V-MoE, Riquelme et al. 2021, without batch prioritised routing). Choices that aren't kept
    take no room. Weights stay as they are. With K > 1, a later token's first choice can push out an earlier token's
    second one: the one place, with expert choice, where the future reaches the past. With K = 1 an earlier token never
    notices.
    """
    num_tokens, k = routing.experts.shape
    flat = routing.experts.T.reshape(-1)
    rank = rank_in_expert(flat, routing.keep.T.reshape(-1), routing.scores.shape[-1])
    rank = rank.reshape(k, num_tokens).T
    return dataclasses.replace(routing, keep=routing.keep & (rank < capacity))


def chosen(routing: Routing, mask: Array) -> Array:
    """(…, K) bool: the choices before any capacity, which losses, the bias rule and the load count; mask (…) bool."""
    return mask[..., None] & (routing.keep | (routing.weights != 0))


# ---- shared by the routers


def _keep(mask: Array, k: int) -> Array:
    return jnp.broadcast_to(mask[:, None], (mask.shape[0], k))


def _renormalize(weights: Array) -> Array:
    """Gates that sum to 1 over the selected; the score itself at K = 1 (see the top of the file)."""
    if weights.shape[-1] == 1:
        return weights
    # sigmoid scores can all underflow to 0
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)


def _router(route: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `route` be called with all the inputs of a router; those it doesn't name are dropped.

    `inspect.signature` still shows what it names, which is how `MoE` knows whether to keep a bias for it.
    """
    unused = {"tokens", "mask", "bias", "key"} - inspect.signature(route).parameters.keys()

    @functools.wraps(route)
    def call(logits: Array, **inputs: Any) -> Any:
        return route(logits, **{name: value for name, value in inputs.items() if name not in unused})

    return call


# ---- token choice


@_router
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


@_router
def switch(logits: Array, *, experts_per_token: int, mask: Array) -> Routing:
    """Switch Transformer (Fedus et al. 2021), eq. 1-2: p = softmax(h), y = p_i E_i(x) for the i of the largest p.

    logits (T, E) f32, mask (T,) bool. The paper has K = 1; with K > 1 (an evaluation with more experts) the gates stay
    the probabilities themselves. Its capacity is `with_capacity`, its input jitter `MoE`'s.
    """
    return top_k(logits, experts_per_token=experts_per_token, mask=mask, renormalize=False)


@_router
def top_k(logits: Array, *, experts_per_token: int, mask: Array, renormalize: bool = True) -> Routing:
    """Softmax top-k. logits (T, E) f32, mask (T,) bool.

    renormalize=True: gates are p_i / Σ_selected p, that is softmax over the selected logits (Mixtral, Jiang et al.
    2024). False: gates are p_i (OLMoE, Muennighoff et al. 2024; DeepSeekMoE, Dai et al. 2024,
    eq. 9-11).
    """
    scores = jax.nn.softmax(logits)
    weights, experts = select_top_k(scores, experts_per_token)
    return Routing(experts, _renormalize(weights) if renormalize else weights, scores, _keep(mask, experts_per_token))


@_router
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


@_router
def noisy_top_k(
    logits: Array, *, experts_per_token: int, mask: Array, noise_logits: Array, key: Array | None = None
) -> Routing:
    """Noisy top-k gating (Shazeer et al. 2017, eq. 3-5).

    H_i = (x·W_g)_i + N(0, 1) · softplus((x·W_noise)_i); gates are softmax over the K largest H. No noise when key is
    None. logits, noise_logits (T, E) f32: x·W_g and x·W_noise; mask (T,) bool. `scores` are softmax(logits), noiseless.
    """
    return _noisy(logits, jax.nn.softplus(noise_logits), experts_per_token, mask, key, renormalize=True)


@_router
def vmoe(
    logits: Array, *, experts_per_token: int, mask: Array, key: Array | None = None, noise_std: float | None = None
) -> Routing:
    """V-MoE (Riquelme et al. 2021, routing): g = TOP_K(softmax(W·x + ε)), ε ~ N(0, 1/E²), gates not renormalised.

    logits (T, E) f32, mask (T,) bool. noise_std replaces 1/E. No noise when key is None. `scores` are softmax(logits),
    noiseless, as its importance loss takes them.
    """
    std = 1 / logits.shape[-1] if noise_std is None else noise_std
    return _noisy(logits, jnp.full_like(logits, std), experts_per_token, mask, key, renormalize=False)


def _noisy(
    logits: Array, std: Array, experts_per_token: int, mask: Array, key: Array | None, renormalize: bool
) -> Routing:
    noise = None
    noisy = logits
    if key is not None:
        noisy = logits + std * jax.random.normal(key, logits.shape, logits.dtype)
        noise = Noise(noisy, std)
    weights, experts = select_top_k(jax.nn.softmax(noisy), experts_per_token)
    weights = _renormalize(weights) if renormalize else weights
    return Routing(experts, weights, jax.nn.softmax(logits), _keep(mask, experts_per_token), noise)


@_router
def gshard(
    logits: Array, *, experts_per_token: int, mask: Array, key: Array | None = None, second: str = "always"
) -> Routing:
    """GShard top-2 (Lepikhin et al. 2020, algorithm 1): gates g_i = p_i / (p_1 + p_2).

    second="always" keeps the second expert, "random" keeps it with probability min(1, 2·g_2), or always when key is
    None. logits (T, E) f32, mask (T,) bool. With K > 2 every choice after the first counts as a second one.
    """
    if second not in ("always", "random"):
        raise UserError(f"gshard: second={second!r} is unknown: give 'always' or 'random'")
    routing = top_k(logits, experts_per_token=experts_per_token, mask=mask)
    if second == "always" or key is None:
        return routing
    draw = jax.random.uniform(key, routing.weights.shape)
    rank = jax.lax.broadcasted_iota(jnp.int32, draw.shape, 1)
    wanted = (rank == 0) | (draw < 2 * routing.weights)
    weights = jnp.where(wanted, routing.weights, 0.0)
    return dataclasses.replace(routing, weights=weights, keep=routing.keep & wanted)


@_router
def group_limited_softmax(
    logits: Array,
    *,
    experts_per_token: int,
    mask: Array,
    groups: int,
    groups_kept: int,
    renormalize: bool = False,
    scale: float = 1.0,
) -> Routing:
    """Group-limited top-k of DeepSeek-V2 (2024, §2.2.2, device-limited): a group's score is its best softmax score.

    The K largest probabilities among the experts of the `groups_kept` best of `groups` equal groups of neighbours;
    gates are scale · p_i (V2: 8 groups keep 3, scale 16; V2-Lite: one group). logits (T, E) f32, mask (T,) bool.
    Raises UserError when E isn't divisible by groups or K experts don't fit into the groups kept.
    """
    scores = jax.nn.softmax(logits)
    limited = _limit_groups(scores, groups, groups_kept, best=1, experts_per_token=experts_per_token)
    weights, experts = select_top_k(limited, experts_per_token)
    weights = (_renormalize(weights) if renormalize else weights) * scale
    return Routing(experts, weights, scores, _keep(mask, experts_per_token))


@_router
def group_limited_sigmoid(
    logits: Array,
    *,
    experts_per_token: int,
    mask: Array,
    groups: int,
    groups_kept: int,
    bias: Array | None = None,
    scale: float = 1.0,
) -> Routing:
    """Group-limited top-k of DeepSeek-V3 (2024, §2.1.2, eq. 12-16, node-limited): `sigmoid_top_k` in the best groups.

    A group's score is the sum of its two best s + b; experts outside the `groups_kept` best groups get -inf (V3: 8
    groups keep 4, scale 2.5). logits (T, E) f32, mask (T,) bool, bias (E,) f32 or None. Errors as the V2 form.
    """
    scores = jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores if bias is None else scores + bias[None, :])
    limited = _limit_groups(biased, groups, groups_kept, best=2, experts_per_token=experts_per_token)
    _, experts = select_top_k(limited, experts_per_token)
    weights = _renormalize(pick(scores, experts)) * scale
    return Routing(experts, weights, scores, _keep(mask, experts_per_token))


def _limit_groups(scores: Array, groups: int, groups_kept: int, best: int, experts_per_token: int) -> Array:
    """scores (T, E) with -inf outside each row's best groups, a group counting the sum of its `best` largest."""
    num_tokens, num_experts = scores.shape
    if groups < 1 or num_experts % groups:
        raise UserError(f"{num_experts} experts don't divide into groups={groups}: give a divisor of {num_experts}")
    size = num_experts // groups
    if not 1 <= groups_kept <= groups or experts_per_token > groups_kept * size:
        raise UserError(
            f"groups_kept={groups_kept} of {groups} groups of {size} experts can't hold {experts_per_token} experts "
            f"per token: give groups_kept between {-(-experts_per_token // size)} and {groups}"
        )
    grouped = scores.reshape(num_tokens, groups, size)
    group_scores = jnp.sum(select_top_k(grouped, min(best, size))[0], axis=-1)
    _, kept = select_top_k(jax.lax.stop_gradient(group_scores), groups_kept)
    allowed = multi_hot(kept, jnp.ones_like(kept, dtype=bool), groups)
    return jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(num_tokens, num_experts)


@_router
def hash(_logits: Array, *, experts_per_token: int, tokens: Array, mask: Array, seed: int = 0) -> Routing:
    """Hash layers (Roller et al. 2021, random hash): the token's id alone decides; gates are 1/K.

    tokens (T,) i32 ids, mask (T,) bool; of _logits (T, E) only the shape is read. The K experts are the K largest of
    a hash of (id, expert, seed), so they are distinct and each equally likely. `scores` are the gates: no gradient.
    """
    num_experts = _logits.shape[-1]
    expert_hash = _mix(jnp.arange(num_experts, dtype=jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 1) % 2**32))
    hashed = _mix(tokens.astype(jnp.uint32)[:, None] * jnp.uint32(0x85EBCA6B) ^ expert_hash[None, :])
    # 24 bits: every value is exact in float32
    _, experts = select_top_k((hashed >> jnp.uint32(8)).astype(jnp.float32), experts_per_token)
    weights = jnp.full(experts.shape, 1 / experts_per_token, _logits.dtype)
    keep = _keep(mask, experts_per_token)
    scores = multi_hot(experts, jnp.ones_like(keep), num_experts).astype(_logits.dtype) / experts_per_token
    return Routing(experts, weights, scores, keep)


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every bit of a uint32 reaches every other."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


@_router
def random(_logits: Array, *, experts_per_token: int, mask: Array, key: Array | None = None) -> Routing:
    """The control: K distinct experts at random, gates 1/K, nothing learned. _logits (T, E): as `hash`.

    When key is None a fixed key is used: position t of every group then always gets the same experts.
    """
    draw = jax.random.uniform(jax.random.key(0) if key is None else key, _logits.shape)
    _, experts = select_top_k(draw, experts_per_token)
    weights = jnp.full(experts.shape, 1 / experts_per_token, _logits.dtype)
    return Routing(experts, weights, jnp.full_like(_logits, 1 / _logits.shape[-1]), _keep(mask, experts_per_token))


@_router
def round_robin(logits: Array, *, experts_per_token: int, mask: Array) -> Routing:
    """Forced balance, for benchmarks: token t takes experts t·K … t·K + K − 1 (mod E), whatever the logits.

    logits (T, E) f32, mask (T,) bool. Gates are softmax(logits) at those experts, so the router has a gradient. Every
    expert gets T·K / E choices, where that is whole.
    """
    T, E = logits.shape
    first = jnp.arange(T, dtype=jnp.int32)[:, None] * experts_per_token
    experts = (first + jnp.arange(experts_per_token, dtype=jnp.int32)[None, :]) % E
    scores = jax.nn.softmax(logits)
    return Routing(experts, pick(scores, experts), scores, _keep(mask, experts_per_token))


# ---- expert choice


@_router
def expert_choice(logits: Array, *, experts_per_token: int, mask: Array, capacity_factor: float = 1.0) -> ExpertChoice:
    """Expert choice (Zhou et al. 2022, eq. 1-2): each expert takes the C tokens of the group that score it highest.

    S = softmax(logits) over experts; G, I = top-C of each column of S; C = ceil(capacity_factor · T · K / E), so the
    paper's c (experts per token on average) is capacity_factor · K. logits (T, E) f32, mask (T,) bool. A tie goes to
    the earlier token. Later tokens of the group decide about earlier ones: it is not causal.
    """
    num_tokens, num_experts = logits.shape
    scores = jax.nn.softmax(logits)
    columns = jnp.where(mask[None, :], scores.T, 0.0)
    rows = capacity(capacity_factor, num_tokens, experts_per_token, num_experts)
    # A sort, because C rounds of select_top_k are too many here and lax.top_k would gather the groups of all devices.
    # Masked tokens come after every other, also after one whose probability underflowed to 0.
    order = jnp.where(mask[None, :], -jax.lax.stop_gradient(columns), 1.0)
    positions = jax.lax.broadcasted_iota(jnp.int32, order.shape, 1)
    _, tokens = jax.lax.sort((order, positions), dimension=1, num_keys=1, is_stable=True)
    tokens = tokens[:, :rows]
    # its gradient scatters one scalar per row: 0.3 ms for 65536 of them on CPU, where a sort back takes 12
    return ExpertChoice(tokens, jnp.take_along_axis(columns, tokens, axis=1), scores)
