"""Causal attention in blocks of queries, for CPUs: scores are made, used and forgotten block by block.

XLA reads and writes a (B, H, L, L) array a dozen times, forward and backward, and computes the half that the mask
throws away. Here a block of queries meets only the keys that it may see, and the backward pass computes the
probabilities again from the logarithm of their sum (Dao 2022, FlashAttention, section 3.1) and keeps none. On two
cores at B 8, L 256, H 8 this takes half the time of `jax.nn.dot_product_attention` (experiments/LOG.md).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_BLOCKS = 4  # of queries: more skip more of what is masked, and make smaller products and a longer program
_LEAST = 32  # queries in a block
_HIDDEN = -1e30  # a score that no key can win with; finite, since infinities make NaNs when subtracted


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, window: int | None) -> jax.Array:
    """As `attention.attend` without sinks and soft cap: q (B, L, H, hd), k and v (B, L, G, hd), G dividing H.

    segment_ids (B, L) int or None; window: keys that a query sees, itself included, or None. Scores and sums are
    float32, probabilities are rounded to v's dtype; returns (B, L, H, hd) in q's dtype.
    """
    return _forward(q, k, v, segment_ids, window)[0]


def _forward(q, k, v, segment_ids, window):
    queries, keys, values = _heads_first(q, k.shape[2]), _swap(k), _swap(v)
    outs, logsums = [], []
    for block in _blocks(q.shape[1], window):
        rows, columns = block
        scores = _scores(queries[:, :, :, rows], keys[:, :, columns], segment_ids, block, window)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outs.append(_product(weights.astype(v.dtype), values[:, :, columns], 3, 2) / total)
        logsums.append(top + jnp.log(total))
    out = _heads_last(jnp.concatenate(outs, axis=3)).astype(q.dtype)
    return out, (q, k, v, segment_ids, out, jnp.concatenate(logsums, axis=3))


def _backward(window, residuals, grad):
    q, k, v, segment_ids, out, logsums = residuals
    queries, keys, values = _heads_first(q, k.shape[2]), _swap(k), _swap(v)
    grads = _heads_first(grad, k.shape[2])
    # Σ_m p·dp of a query is its output times its gradient.
    along = jnp.sum(_heads_first(out, k.shape[2]).astype(jnp.float32) * grads.astype(jnp.float32), -1, keepdims=True)
    dqueries = []
    # Kept turned, (B, G, hd, L): with the few columns of a head on the left XLA's product is twice as fast.
    dkeys, dvalues = (jnp.zeros((*y.shape[:2], y.shape[3], y.shape[2]), jnp.float32) for y in (keys, values))
    for block in _blocks(q.shape[1], window):
        rows, columns = block
        query, back = queries[:, :, :, rows], grads[:, :, :, rows]
        scores = _scores(query, keys[:, :, columns], segment_ids, block, window)
        weights = jnp.exp(scores - logsums[:, :, :, rows])
        dweights = _product(back, values[:, :, columns], 3, 3)
        dscores = (weights * (dweights - along[:, :, :, rows])).astype(q.dtype)
        dqueries.append(_product(dscores, keys[:, :, columns], 3, 2))
        dkeys = dkeys.at[..., columns].add(_sum_over_rows(query, dscores))
        dvalues = dvalues.at[..., columns].add(_sum_over_rows(back, weights.astype(v.dtype)))
    scale = q.shape[-1] ** -0.5
    dq = _heads_last(jnp.concatenate(dqueries, axis=3)) * scale
    dk, dv = (jnp.transpose(y, (0, 3, 1, 2)) for y in (dkeys * scale, dvalues))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """(queries, the keys that they may see) of each block."""
    count = max(1, min(_BLOCKS, length // _LEAST))
    edges = [length * i // count for i in range(count + 1)]
    first = [0 if window is None else max(0, start - window + 1) for start in edges[:-1]]
    return [
        (slice(start, stop), slice(key, stop)) for start, stop, key in zip(edges[:-1], edges[1:], first, strict=True)
    ]


def _scores(queries, keys, segment_ids, block: tuple[slice, slice], window: int | None) -> jax.Array:
    """(B, G, H/G, rows, columns) float32, _HIDDEN where a query doesn't see a key."""
    rows, columns = block
    row, column = jnp.arange(rows.start, rows.stop)[:, None], jnp.arange(columns.start, columns.stop)[None, :]
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    seen = seen[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, rows, None] == segment_ids[:, None, columns])
    scores = _product(queries, keys, 3, 3) * queries.shape[-1] ** -0.5
    # Added, not selected: the small mask is then broadcast inside one pass over the scores.
    return scores + jnp.where(seen, 0.0, _HIDDEN).astype(jnp.float32)[:, None, None]


def _product(left, right, left_axis: int, right_axis: int) -> jax.Array:
    """left (B, G, r, rows, n) times right (B, G, …) over its axis `right_axis`; (B, G, r, rows, …) float32."""
    B, G, r, rows, _ = left.shape
    left = left.reshape(B, G, r * rows, -1)  # the heads of a group share their keys: one product for all of them
    dimensions = (((left_axis,), (right_axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32).reshape(B, G, r, rows, -1)


def _sum_over_rows(left, right) -> jax.Array:
    """left (B, G, r, rows, hd), right (B, G, r, rows, m) -> (B, G, hd, m) float32, summed over a group's queries."""
    left, right = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (left, right))
    return lax.dot_general(left, right, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array, groups: int) -> jax.Array:
    """(B, L, H, hd) -> (B, G, H/G, L, hd)."""
    B, L, H, hd = x.shape
    return x.reshape(B, L, groups, H // groups, hd).transpose(0, 2, 3, 1, 4)


def _heads_last(x: jax.Array) -> jax.Array:
    B, G, r, L, hd = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, L, G * r, hd)


def _swap(x: jax.Array) -> jax.Array:
    """(B, L, G, hd) <-> (B, G, L, hd)."""
    return jnp.swapaxes(x, 1, 2)
