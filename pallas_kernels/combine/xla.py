"""The obvious way, and the oracle: gathers, one for each of a token's K choices."""

import jax.numpy as jnp


def why_not(rows) -> None:
    """It takes everything."""


def combine(rows, slot, weight):
    """(R, D), (T, K), (R,) or None -> (T, D)."""
    R = rows.shape[0]
    total = jnp.zeros((slot.shape[0], rows.shape[1]), jnp.float32)
    for k in range(slot.shape[1]):
        row = slot[:, k]
        value = rows.at[row].get(mode="clip").astype(jnp.float32)
        if weight is not None:
            value = value * weight.at[row].get(mode="clip")[:, None]
        total += jnp.where((row < R)[:, None], value, 0)
    return total.astype(rows.dtype)


def spread(x, slot, num_rows):
    """(T, D), (T, K) -> (num_rows, D); rows in no slot are zeros."""
    return jnp.take(x, _token(slot, num_rows), axis=0, mode="fill", fill_value=0)


def combine_gradients(rows, slot, weight, grad):
    """The gradients of rows (R, D) and weight (R,), both 0 in rows that no slot points to."""
    token = _token(slot, rows.shape[0])
    there = token < slot.shape[0]
    grads = jnp.take(grad, token, axis=0, mode="clip").astype(jnp.float32)
    dweight = jnp.where(there, jnp.sum(rows.astype(jnp.float32) * grads, axis=1), 0)
    return jnp.where(there[:, None], weight[:, None] * grads, 0).astype(rows.dtype), dweight


def _token(slot, num_rows):
    """The token of each row, T where it has none."""
    T, K = slot.shape
    token = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, K))
    return jnp.full((num_rows,), T, jnp.int32).at[slot].set(token, mode="drop")
