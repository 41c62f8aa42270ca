"""What the remote copies do, by all_gather and take, for devices that have no remote references."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.remote_exchange import mosaic_gpu


def install(monkeypatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda rows: None)
    monkeypatch.setattr(mosaic_gpu, "send", send)
    monkeypatch.setattr(mosaic_gpu, "collect", collect)


def send(x, source, starts, slot=None, *, axis, beside=0):
    """(T, D), (R,) -> (R, D); NaN where nothing comes, which nothing may read; with slot (R, K), (R·K, D)."""
    came = lax.all_gather(x, axis, tiled=True).at[source].get(mode="fill", fill_value=jnp.nan)
    if slot is None:
        return came
    return jnp.full((slot.size, x.shape[1]), jnp.nan, x.dtype).at[slot].set(came[:, None], mode="drop")


def collect(y, places, *, axis, beside=0):
    """(R, D), (T, S) -> (T, D)."""
    everyone = lax.all_gather(y, axis)
    found = [everyone[s].at[places[:, s]].get(mode="fill", fill_value=0) for s in range(places.shape[1])]
    return jax.tree.reduce(jnp.add, [part.astype(jnp.float32) for part in found]).astype(y.dtype)
