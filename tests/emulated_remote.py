"""What the remote copies do, by all_gather and take, for devices that have no remote references; and the products that
run beside them, by plain ones."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_ffn import ACTIVATIONS
from pallas_kernels.gated_ffn import mosaic_gpu as gated
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.remote_exchange import mosaic_gpu


def install(monkeypatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda rows: None)
    monkeypatch.setattr(mosaic_gpu, "send", send)
    monkeypatch.setattr(mosaic_gpu, "collect", collect)


def install_products(monkeypatch) -> None:
    """The Hopper kernels of `remote_ffn`: NaN in all rows that they leave undefined."""
    monkeypatch.setattr(gated, "hidden", hidden)
    monkeypatch.setattr(gated, "dlhs", lambda grads, weights, metadata: sum(
        forward(grad, weight, None, metadata, True, grad.dtype) for grad, weight in zip(grads, weights, strict=True)
    ))  # fmt: skip
    monkeypatch.setattr(products, "why_not", lambda *_: None)
    monkeypatch.setattr(products, "forward", forward)
    monkeypatch.setattr(products, "drhs_of", drhs_of)


def send(x, source, starts, stops, slot=None, *, axis, first=0, beside=0, rows=None):
    """(T, D), (R,), … -> (R, D); NaN where nothing comes, which nothing may read; with slot (R, K), (rows, D)."""
    if axis is None:
        everyone, me, S = x, 0, 1
    else:
        everyone, me, S = lax.all_gather(x, axis, tiled=True), lax.axis_index(axis), lax.axis_size(axis)
    row, T = jnp.arange(source.shape[0]), x.shape[0]
    there = [(row >= start) & (row < stop) for start, stop in zip(starts, stops, strict=True)]
    owners = [(me + first + j) % S for j in range(len(there))]
    right = jnp.stack([mask & (source // T == owner) for mask, owner in zip(there, owners, strict=True)]).any(0)
    came = everyone.at[source].get(mode="fill", fill_value=jnp.nan)
    came = jnp.where(right[:, None], came, jnp.nan)
    if slot is None:
        return came
    return jnp.full((rows, x.shape[1]), jnp.nan, x.dtype).at[slot].set(came[:, None], mode="drop")


def collect(parts, more=None, *, axis, beside=0, dtype=None):
    """The sum of the rows of parts (y (R, D), places (T, N), first), and of more -> (T, D)."""
    found = [] if more is None else [more]
    for y, places, first in parts:
        everyone = y if axis is None else lax.all_gather(y, axis)
        for j in range(places.shape[1]):
            theirs = y if axis is None else everyone[(lax.axis_index(axis) - first - j) % len(everyone)]
            found.append(theirs.at[places[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32))
    return jax.tree.reduce(jnp.add, found).astype(dtype or parts[0][0].dtype)


def _groups(metadata, M):
    """(E, M): whose each row is."""
    row = jnp.arange(M)[None]
    return (row >= metadata.starts[:, None]) & (row < metadata.ends[:, None])


def forward(lhs, rhs, group_sizes, metadata, transpose_rhs, out_dtype):
    groups = _groups(metadata, lhs.shape[0])
    of_group = "end" if transpose_rhs else "edn"
    lhs = jnp.where(groups.any(0)[:, None], lhs, 0)
    out = jnp.einsum(f"em,md,{of_group}->mn", groups.astype(jnp.float32), lhs, rhs)
    return jnp.where(groups.any(0)[:, None], out, jnp.nan).astype(out_dtype)


def hidden(activation, rows, gate, up, metadata, keep, scale):
    a, b = (forward(rows, weights, None, metadata, False, rows.dtype) for weights in (gate, up))
    out = (ACTIVATIONS[activation](a) * b * scale[:, None]).astype(rows.dtype)
    return (out, a, b) if keep else (out,)


def drhs_of(parts, out_dtype):
    def part(lhs, grad, metadata):
        groups = _groups(metadata, lhs.shape[0])
        lhs, grad = (jnp.where(groups.any(0)[:, None], a, 0) for a in (lhs, grad))
        return jnp.einsum("em,mk,mn->ekn", groups.astype(jnp.float32), lhs, grad)

    return jax.tree.reduce(jnp.add, [part(*each) for each in parts]).astype(out_dtype)
