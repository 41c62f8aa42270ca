"""Binary search that also runs inside `shard_map`, where `jnp.searchsorted` fails (jax 0.11.2)."""

import jax
import jax.numpy as jnp


def count_below(ordered: jax.Array, values: jax.Array) -> jax.Array:
    """How many of ordered (N,), ascending, lie below each of values (C,): i32 (C,). N must be at least 1."""
    (N,) = ordered.shape
    count = jnp.zeros_like(values, dtype=jnp.int32)
    for bit in reversed(range(N.bit_length())):
        more = count + (1 << bit)
        fits = (more <= N) & (ordered.at[more - 1].get(mode="clip") < values)
        count = jnp.where(fits, more, count)
    return count
