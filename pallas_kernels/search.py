"""A search that also runs inside `shard_map`, where `jnp.searchsorted` fails (jax 0.11.2)."""

import jax
import jax.numpy as jnp

_WAYS = 16  # pivots per level: few levels, since every level is another gather to compile and to wait for


def count_below(ordered: jax.Array, values: jax.Array) -> jax.Array:
    """How many of ordered (N,), ascending, lie below each of values (C,): i32 (C,). N must be at least 1."""
    (N,) = ordered.shape
    levels = next(level for level in range(1, 9) if _WAYS**level > N)
    count = jnp.zeros_like(values, dtype=jnp.int32)
    for level in reversed(range(levels)):
        step = _WAYS**level
        more = count[:, None] + jnp.arange(step, _WAYS * step, step, dtype=jnp.int32)[None, :]
        below = (more <= N) & (ordered.at[more - 1].get(mode="clip") < values[:, None])
        count += step * jnp.sum(below, axis=1, dtype=jnp.int32)
    return count
