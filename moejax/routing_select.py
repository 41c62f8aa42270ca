"""Row-wise selection that a mesh can split: the k largest of each row, and the small gathers around it.

`lax.top_k` is not partitioned under an Auto mesh: it all-gathers its operand. Everything here is elementwise work and
reductions over the expert axis, which XLA splits over tokens by itself, so no `shard_map` is needed. On one GPU, where
there is nothing to split, a kernel selects.
Letters: T tokens, E experts, K experts per token.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax import sharding
from moejax.errors import UserError
from pallas_kernels import top_k

Array = jax.Array

_PAIRS = 2**22  # entries of a row times all rows' entries, up to which a GPU compares every pair


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def select_top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest entries of each row: (values (…, k) in scores.dtype, indices (…, k) i32), largest first.

    scores: (…, E), floating point; a tie goes to the lower index, as in `lax.top_k`. The indices of one row are always
    distinct, also among entries of -inf or NaN. The gradient reaches `scores` through the values.
    Raises UserError when k is not in 1 … E.

    k rounds of "largest of what is left". On 2 CPU cores at T=8192: 3 ms at E=64, K=8 (`lax.top_k` 6, a sort 17) and
    0.2 ms at E=16, K=1 (0.4 and 3.7). On one Hopper GPU all rounds are one kernel (`pallas_kernels.top_k`).
    """
    return _select(scores, k)


def _select(scores: Array, k: int) -> tuple[Array, Array]:
    num_experts = scores.shape[-1]
    if not 1 <= k <= num_experts:
        raise UserError(f"{k} experts per token of {num_experts} experts: choose between 1 and {num_experts}")
    if jax.default_backend() == "gpu" and scores.size * num_experts <= _PAIRS:
        return _by_rank(scores, k)
    rows = jax.ShapeDtypeStruct((scores.size // num_experts, num_experts), scores.dtype)
    if sharding.on_one_device() and top_k.why_not(rows, k) is None:
        values, indices = top_k.top_k(scores.reshape(rows.shape), k)
        return values.reshape(*scores.shape[:-1], k), indices.reshape(*scores.shape[:-1], k)
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)

    def one_round(taken, _):
        largest = jnp.max(jnp.where(taken, -jnp.inf, scores), axis=-1, keepdims=True)
        # not "== largest": a NaN compares false with everything, and an index has to come out of every row
        index = jnp.min(jnp.where(taken | (scores < largest), num_experts, ids), axis=-1)
        return taken | (ids == index[..., None]), (largest[..., 0], index)

    # all False, but made from `scores`, so that inside a shard_map it varies over the same mesh axes
    nothing_taken = scores < -jnp.inf
    # Unrolled, the rounds are one kernel each on an accelerator; on CPU they only take longer to compile.
    unroll = 2 if jax.default_backend() == "cpu" else 8
    _, (values, indices) = jax.lax.scan(one_round, nothing_taken, None, length=k, unroll=min(k, unroll))
    return jnp.moveaxis(values, 0, -1), jnp.moveaxis(indices, 0, -1)


def _by_rank(scores: Array, k: int) -> tuple[Array, Array]:
    """The same by counting, for each entry, those that come before it: three operations on a GPU, and not 2k."""
    number = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores.astype(jnp.float32)), jnp.int32)
    key = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # in the order of the numbers; a NaN has a place too
    mine, other = key[..., :, None], key[..., None, :]
    earlier = (other > mine) | ((other == mine) & (number[..., None, :] < number[..., :, None]))
    rank = jnp.sum(earlier, axis=-1, dtype=jnp.int32)
    place = jnp.arange(k, dtype=jnp.int32).reshape((1,) * (scores.ndim - 1) + (k, 1))
    chosen = rank[..., None, :] == place
    indices = jnp.sum(jnp.where(chosen, number[..., None, :], 0), axis=-1, dtype=jnp.int32)
    values = jnp.sum(jnp.where(chosen, scores[..., None, :], jnp.zeros((), scores.dtype)), axis=-1)
    return values, indices


def _select_fwd(scores, k):
    values, indices = _select(scores, k)
    indices = checkpoint_name(indices, "routing")  # or rematerialization would choose again
    return (values, indices), (indices, _width(scores))


def _select_bwd(k, residuals, cotangents):
    indices, width = residuals
    return (spread(cotangents[0], indices, width.shape[-1]),)


select_top_k.defvjp(_select_fwd, _select_bwd)


@jax.custom_vjp
def pick(scores: Array, indices: Array) -> Array:
    """scores (…, E) at indices (…, K): (…, K). Like `jnp.take_along_axis`, but its gradient is not a scatter."""
    return jnp.take_along_axis(scores, indices, axis=-1)


def _pick_fwd(scores, indices):
    return pick(scores, indices), (indices, _width(scores))


def _pick_bwd(residuals, cotangent):
    indices, width = residuals
    return spread(cotangent, indices, width.shape[-1]), None


pick.defvjp(_pick_fwd, _pick_bwd)


def _width(scores: Array) -> Array:
    """An empty (0, E) array: what the backward pass needs of `scores` is its width, and a residual is an array."""
    return jnp.zeros((0, scores.shape[-1]))


def spread(values: Array, indices: Array, num_experts: int) -> Array:
    """The transpose of `pick`: (…, E) with values[…, k] added at indices[…, k].

    One fused elementwise pass over K: 0.25 ms at T=8192, E=64, K=8 where a sum over a (T, K, E) one-hot takes 2.8.
    """
    terms = [
        jnp.where(chosen, values[..., k, None], jnp.zeros((), values.dtype))
        for k, chosen in enumerate(_one_hots(indices, num_experts))
    ]
    return functools.reduce(operator.add, terms)


def multi_hot(indices: Array, keep: Array, num_experts: int) -> Array:
    """(…, E) bool: which experts each token selected. indices (…, K) i32; keep (…, K) bool: the choices that count."""
    terms = [chosen & keep[..., k, None] for k, chosen in enumerate(_one_hots(indices, num_experts))]
    return functools.reduce(operator.or_, terms)


def _one_hots(indices: Array, num_experts: int) -> list[Array]:
    shape = (*indices.shape[:-1], num_experts)
    ids = jax.lax.broadcasted_iota(indices.dtype, shape, len(shape) - 1)
    return [indices[..., k, None] == ids for k in range(indices.shape[-1])]


def rank_in_expert(experts: Array, counted: Array, num_experts: int) -> Array:
    """How many earlier counted entries chose the same expert: (N,) i32, from experts (N,) i32 and counted (N,) bool.

    A counting sort's first half, in blocks of 32: pairs inside a block, plus the counts of the blocks before. A
    cumulative sum over the (N, E) one-hot takes 45 ms at N=65536, E=64, a sort 6, this 1.
    """
    block = 32
    n = experts.shape[0]
    # what isn't counted goes to an expert that does not exist
    ids = jnp.where(counted, experts, num_experts)
    ids = jnp.pad(ids, (0, -n % block), constant_values=num_experts).reshape(-1, block)
    earlier = jnp.tril(jnp.ones((block, block), bool), -1)
    inside = jnp.sum((ids[:, :, None] == ids[:, None, :]) & earlier[None], axis=-1, dtype=jnp.int32)
    of_block = jnp.sum(ids[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None], axis=1, dtype=jnp.int32)
    before = jnp.cumsum(of_block, axis=0) - of_block
    before = jnp.take_along_axis(before, jnp.minimum(ids, num_experts - 1), axis=1)
    return (inside + before).reshape(-1)[:n]
