"""What `lax.ragged_all_to_all` does, by all_gather, for a platform where XLA doesn't have it."""

import jax.numpy as jnp
from jax import lax

from moejax import ragged


def install(monkeypatch) -> None:
    monkeypatch.setattr(ragged, "check_platform", lambda: None)
    monkeypatch.setattr(ragged, "move", move)


def move(rows, room, first, sizes, to, coming, axis):
    """From all devices' rows and what they say of them, as in the documentation of ragged_all_to_all; `coming` in vain,
    but for NaN where it isn't what is sent."""
    rows, first, sizes, to = (lax.all_gather(a, axis) for a in (rows, first, sizes, to))
    S, E = sizes.shape
    each = E // S
    me = lax.axis_index(axis)
    first, sizes, to = (lax.dynamic_slice_in_dim(a, me * each, each, axis=1).reshape(E) for a in (first, sizes, to))
    source = jnp.arange(E, dtype=jnp.int32) // each
    place = jnp.arange(room, dtype=jnp.int32)[:, None]
    inside = (place >= to[None]) & (place < (to + sizes)[None])  # (R, E)
    row = jnp.sum(jnp.where(inside, (source * rows.shape[1] + first - to)[None] + place, 0), axis=1)
    found = jnp.where(inside.any(axis=1)[:, None], rows.reshape(-1, rows.shape[-1])[row], 0)
    true = (inside.sum(axis=1) <= 1).all() & (sizes == coming).all() & (to + sizes <= room).all()
    return jnp.where(true, found, jnp.nan)
