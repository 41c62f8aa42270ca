"""Rows by plain 16-byte reads and writes, which is all that moving rows needs, in Mosaic GPU.

A block takes one token and up to 2048 of its columns, the columns of a token one block after another, so that its K
rows are read or written whole while they are open in memory.

Limits: Hopper; bfloat16, float16 or float32; D a multiple of 128.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.plain_kernel import run

_WIDEST = 2048  # columns of a block
_THREADS = 128


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if rows.shape[1] % 128 or 0 in rows.shape:
        return "it needs rows, and a width in multiples of 128"
    return None if products._hopper() else "it needs a Hopper GPU"


def combine(rows, slot, weight):
    """(R, D), (T, K), (R,) or None -> (T, D)."""
    (R, D), (T, K) = rows.shape, slot.shape
    width = widest(D)

    def body(slot, rows, *refs):
        *weights, out = refs
        t, columns = _place(D, width)
        total = jnp.zeros((width,), jnp.float32)
        for k in range(K):
            row = slot[t * K + k]
            here = jnp.minimum(row, R - 1)
            value = load(rows.at[here, columns])
            if weights:
                value = value * weights[0][here]
            total += jnp.where(row < R, value, jnp.zeros_like(value))
        out[t, columns] = total.astype(out.dtype)

    weights = () if weight is None else (weight,)
    shape = jax.ShapeDtypeStruct((T, D), rows.dtype)
    return run("combine_rows", body, {"block": T * (D // width)}, shape, slot.reshape(-1), rows, *weights)


def spread(x, slot, num_rows):
    """(T, D), (T, K) -> (num_rows, D)."""
    D, (T, K) = x.shape[1], slot.shape
    width = widest(D)

    def body(slot, x, out):
        t, columns = _place(D, width)
        value = plgpu.load(x.at[t, columns], layout=layout(width))
        for k in range(K):
            row = slot[t * K + k]

            def store(row=row):
                out[row, columns] = value

            pl.when(row < num_rows)(store)

    shape = jax.ShapeDtypeStruct((num_rows, D), x.dtype)
    return run("spread_rows", body, {"block": T * (D // width)}, shape, slot.reshape(-1), x)


def combine_gradients(rows, slot, weight, grad):
    """The gradients of rows (R, D) and weight (R,); weight's is 0 where no slot points.

    A block takes one row; a token's K blocks follow one another and find its gradient in the cache.
    """
    (R, D), (T, K) = rows.shape, slot.shape
    width = widest(D)

    def body(slot, rows, weight, grad, drows, dweight):
        choice = lax.axis_index("block")
        t, row = lax.div(choice, jnp.int32(K)), slot[choice]

        def some():
            scale, total = weight[row], jnp.zeros((width,), jnp.float32)
            for first in range(0, D, width):
                columns = pl.ds(first, width)
                value = load(grad.at[t, columns])
                total += load(rows.at[row, columns]) * value
                drows[row, columns] = (scale * value).astype(drows.dtype)
            dweight[choice] = jnp.sum(total)

        def none():
            dweight[choice] = jnp.float32(0)

        lax.cond(row < R, some, none)

    shapes = jax.ShapeDtypeStruct((R, D), rows.dtype), jax.ShapeDtypeStruct((T * K,), jnp.float32)
    slot = slot.reshape(-1)
    args = slot, rows, weight, grad.astype(rows.dtype)
    drows, by_choice = run("combine_rows_gradients", body, {"block": T * K}, shapes, *args)
    dweight = jnp.zeros_like(weight).at[slot].set(by_choice, mode="drop", unique_indices=True)
    return drows, dweight


def _vector(D: int) -> int:
    """Neighbouring columns of a thread: up to eight, a power of two."""
    return min(D // _THREADS & -(D // _THREADS), 8)


def widest(D: int) -> int:
    """The most columns, up to _WIDEST, that divide D and give every thread whole vectors."""
    unit = _THREADS * _vector(D)
    return max(width for width in range(unit, _WIDEST + 1, unit) if D % width == 0)


def layout(width: int):
    return plgpu.Layout.WG_STRIDED((width,), vec_size=_vector(width))


def load(ref):
    return plgpu.load(ref, layout=layout(ref.shape[-1])).astype(jnp.float32)


def _place(D: int, width: int):
    """The block's token and columns."""
    block = lax.axis_index("block")
    chunks = jnp.int32(D // width)
    return lax.div(block, chunks), pl.ds(lax.rem(block, chunks) * width, width)
