"""From a router's decision to rows sorted by expert, and back. Moves rows; knows no router and no expert.

    plan(decision, E) -> Plan;  gather(x (T, D), plan) -> rows (R, D);  combine(rows, plan, T) -> (T, D)
    dense(x, decision, expert_fn) is the slow obvious way to the same result, and the oracle of every fast one.

Rows move by gathers alone, in both directions and in both gradients: a scatter of rows compiles slowly for TPU, adds in
no fixed order on GPU and runs a row at a time on CPU. Only integers are ever scattered.

Letters: T tokens, D model width, E experts, K experts per token, C places per expert, R expert rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moejax.errors import UserError
from moejax.routing import ExpertChoice, Routing
from pallas_kernels import combine as kernels
from pallas_kernels.search import count_below
from pallas_kernels.vary import vary_alike

Array = jax.Array

_LARGEST = 2**31 - 1  # of int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where rows come from and go back to.

    token (R,) i32, weight (R,) f32: the token of each row and its gate, rows sorted by expert (in token choice, then by
    token); no weight where experts applied the gates. group_sizes (E,) i32. Rows past its sum have token 0 and weight
    0; nothing reads them.
    The way back is one of two. Token choice: slot (T, K) i32, the row of each choice, R where it has none. Expert
    choice, where a token has any number of rows: order (R,) i32, the rows ordered by token, those without one last; and
    offsets (T+1,) i32, token t owning order[offsets[t]:offsets[t+1]].
    """

    token: Array
    weight: Array | None
    group_sizes: Array
    slot: Array | None = None
    order: Array | None = None
    offsets: Array | None = None


def flatten(decision, num_tokens: int):
    """A decision of N routing groups (leading axis N) as one decision over all T = num_tokens tokens.

    Routing: every field (N, T/N, …) becomes (T, …). ExpertChoice: tokens and weights (N, E, C) become (E, N·C) with
    token numbers in 0 … T − 1, and scores (T, E).
    """
    if isinstance(decision, Routing):
        return jax.tree.map(lambda a: a.reshape(num_tokens, *a.shape[2:]), decision)
    groups, num_experts, _ = decision.tokens.shape
    first = (jnp.arange(groups, dtype=decision.tokens.dtype) * (num_tokens // groups))[:, None, None]

    def by_expert(a):
        return jnp.swapaxes(a, 0, 1).reshape(num_experts, -1)

    return ExpertChoice(
        by_expert(decision.tokens + first), by_expert(decision.weights), decision.scores.reshape(num_tokens, -1)
    )


def plan(decision: Routing | ExpertChoice, num_experts: int) -> Plan:
    """The plan of a decision over T tokens.

    A `Routing` with experts (T, K) gives R = T·K rows, of which those not kept are left out: the sum of group_sizes is
    the number kept. An `ExpertChoice` with tokens (E, R/E), ids in [0, T), gives every expert R/E rows; its empty
    places (weight 0) are computed and count for nothing. Gradients reach decision.weights.
    """
    with jax.named_scope("plan"):
        if isinstance(decision, Routing):
            return _plan_tokens(decision, num_experts)
        return _plan_experts(decision, num_experts)


def _plan_tokens(routing: Routing, num_experts: int) -> Plan:
    T, K = routing.experts.shape
    R = T * K
    expert = jnp.where(routing.keep, routing.experts, num_experts).reshape(R).astype(jnp.int32)
    choice, boundaries = _kept(_sort_by(expert, num_experts))  # choice = token · K + k of each row
    real = jnp.arange(R, dtype=jnp.int32) < boundaries[-1]
    row = _invert(choice)
    slot, token = _kept((jnp.where(row < boundaries[-1], row, R).reshape(T, K), jnp.where(real, choice // K, 0)))
    weights = routing.weights.astype(jnp.float32).reshape(R)
    weight = _permute(*vary_alike(weights, choice, slot.reshape(R), real))
    return Plan(token=token, weight=weight, group_sizes=jnp.diff(boundaries), slot=slot)


def _plan_experts(choice: ExpertChoice, num_experts: int) -> Plan:
    if choice.tokens.shape[0] != num_experts:
        raise UserError(
            f"dispatch.plan: expert choice over {choice.tokens.shape[0]} experts, but the layer has {num_experts}; "
            "give both the same number"
        )
    T = choice.scores.shape[0]
    weight = choice.weights.astype(jnp.float32).reshape(-1)
    token = choice.tokens.reshape(-1).astype(jnp.int32)
    order, offsets = _kept(_sort_by(jnp.where(weight != 0, token, T), T))
    sizes = jnp.full((num_experts,), choice.tokens.shape[1], jnp.int32)
    return Plan(token=token, weight=weight, group_sizes=sizes, order=order, offsets=offsets)


def _kept(arrays: Any) -> Any:
    """By a name for `jax.checkpoint`: small arrays that took a sort to make."""
    return jax.tree.map(lambda a: checkpoint_name(a, "routing"), arrays)


def _sort_by(key: Array, count: int) -> tuple[Array, Array]:
    """Stable order (R,) of key (R,) in [0, count], and boundaries (count+1,): key c is order[boundaries[c]:…[c+1]].

    Key and position are packed into one int32, which XLA sorts 1.5-2 times faster than pairs and, unlike a counting
    sort, without an (R, E) array: on 2 CPU cores 0.6 ms at R = 16384, E = 64 against 1.5 ms, 5 ms at 131072, 256
    against 86.
    """
    R = key.shape[0]
    position = jnp.arange(R, dtype=jnp.int32)
    values = jnp.arange(count + 1, dtype=jnp.int32)
    if (count + 1) * R - 1 <= _LARGEST:
        packed = jnp.sort(key * R + position)
        return packed % R, count_below(packed, values * R)
    sorted_key, order = lax.sort((key, position), num_keys=1, is_stable=True)
    return order, count_below(sorted_key, values)


def _invert(permutation: Array) -> Array:
    position = jnp.arange(permutation.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(permutation).at[permutation].set(position, unique_indices=True)


@jax.custom_vjp
def _permute(weights: Array, choice: Array, slot: Array, real: Array) -> Array:
    """weights (R,) in the order of rows, 0 past the sum; its gradient is a gather the other way."""
    return jnp.where(real, weights[choice], 0)


def _permute_backward(slot, grad):
    # grad holds a sum over each row of experts. Without a barrier XLA may make each sum in the one thread that wants
    # it, 0.9 ms a layer of OLMoE's sizes on an H200.
    grad = lax.optimization_barrier(grad)
    return grad.at[slot].get(mode="fill", fill_value=0), None, None, None


_permute.defvjp(lambda weights, choice, slot, real: (_permute(weights, choice, slot, real), slot), _permute_backward)


def gather(x: Array, plan: Plan) -> Array:
    """x (T, D) -> rows (R, D), sorted by expert. Its gradient sums a token's rows in float32, by gathers."""
    with jax.named_scope("dispatch"):
        if plan.slot is not None and _by_kernels(plan, x):
            return kernels.spread(x, plan.slot, plan.token.shape[0])
        return _gather(x.shape[0], *vary_alike(x, plan))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(num_tokens, x, plan):
    return _rows(x, plan.token)


def _gather_forward(num_tokens, x, plan):
    return _rows(x, plan.token), plan


def _gather_backward(num_tokens, plan, grad):
    return _sum_rows(grad, plan, num_tokens, None), None


_gather.defvjp(_gather_forward, _gather_backward)


def combine(rows: Array, plan: Plan, num_tokens: int) -> Array:
    """rows (R, D) -> (T, D) in rows' dtype: each token's rows times their gates, summed in float32.

    Tokens without a row come out zero. Gradients reach rows and plan.weight; a plan without weights has gates of 1.
    """
    with jax.named_scope("combine"):
        if plan.slot is not None and _by_kernels(plan, rows):
            return kernels.combine(rows, plan.slot, plan.weight)
        rows, plan = vary_alike(rows, plan)
        return _combine(num_tokens, rows, plan.weight, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(num_tokens, rows, weight, plan):
    return _sum_rows(rows, plan, num_tokens, weight)


def _combine_forward(num_tokens, rows, weight, plan):
    return _sum_rows(rows, plan, num_tokens, weight), (rows, weight, plan)


def _combine_backward(num_tokens, residuals, grad):
    rows, weight, plan = residuals
    grads = _rows(grad, plan.token).astype(jnp.float32)
    # Rows past the sum hold anything, NaN included; weight 0 alone would let it through.
    real = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(plan.group_sizes)
    if weight is None:
        return jnp.where(real[:, None], grads, 0).astype(rows.dtype), None, None
    dweight = jnp.where(real, jnp.sum(rows.astype(jnp.float32) * grads, axis=1), 0)
    drows = jnp.where(real, weight, 0)[:, None] * grads
    return drows.astype(rows.dtype), dweight, None


_combine.defvjp(_combine_forward, _combine_backward)


def _by_kernels(plan: Plan, x: Array) -> bool:
    """On a GPU: half the bytes of XLA's gathers. They leave rows past the sum as the memory was; nothing reads them."""
    return kernels.pick(jax.ShapeDtypeStruct((plan.token.shape[0], x.shape[1]), x.dtype)) != "xla"


def _rows(x: Array, token: Array) -> Array:
    return x.at[token].get(mode="clip")


def _sum_rows(rows: Array, plan: Plan, num_tokens: int, weight: Array | None) -> Array:
    """(R, D) -> (T, D) in rows' dtype: each token's rows, times weight (R,) if given, summed in float32."""

    def term(row: Array, there: Array) -> Array:
        value = _rows(rows, row).astype(jnp.float32)
        if weight is not None:
            value = value * _rows(weight, row)[:, None]
        return jnp.where(there[:, None], value, 0)

    if plan.slot is not None:
        R = rows.shape[0]
        total = term(plan.slot[:, 0], plan.slot[:, 0] < R)
        for k in range(1, plan.slot.shape[1]):
            total += term(plan.slot[:, k], plan.slot[:, k] < R)
        return total.astype(rows.dtype)

    assert plan.order is not None and plan.offsets is not None
    order, first, count = plan.order, plan.offsets[:-1], jnp.diff(plan.offsets)
    zeros = vary_alike(jnp.zeros((num_tokens, rows.shape[1]), jnp.float32), rows)[0]

    def add(n: Array, total: Array) -> Array:
        return total + term(_rows(order, first + n), n < count)

    return lax.fori_loop(0, jnp.max(count), add, zeros).astype(rows.dtype)


def dense(x: Array, decision: Routing | ExpertChoice, expert_fn: Callable[[Array], Array]) -> Array:
    """Every expert on every token, masked by the gates: the oracle. x (T, D) -> (T, D) in x's dtype.

    expert_fn(x (T, D)) -> (E, T, D): all experts on all tokens.
    """
    outputs = expert_fn(x)
    gates = token_gates(decision, outputs.shape[0], x.shape[0])
    return jnp.einsum("te,etd->td", gates, outputs.astype(jnp.float32)).astype(x.dtype)


def token_gates(decision: Routing | ExpertChoice, num_experts: int, num_tokens: int) -> Array:
    """The decision as gates (T, E) f32, 0 where token and expert don't meet."""
    if isinstance(decision, Routing):
        kept = jnp.where(decision.keep, decision.experts, -1)  # one_hot of -1 is zeros
        chosen = jax.nn.one_hot(kept, num_experts, dtype=jnp.float32)
        return jnp.einsum("tke,tk->te", chosen, decision.weights.astype(jnp.float32))
    chosen = jax.nn.one_hot(decision.tokens, num_tokens, dtype=jnp.float32)
    return jnp.einsum("ect,ec->te", chosen, decision.weights.astype(jnp.float32))
