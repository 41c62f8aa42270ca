"""The k largest entries of each row, found in registers, in Mosaic GPU.

A block takes 64 rows; four neighbouring threads hold two of them in the layout of a warpgroup's products, so that a
row's largest entry is a pass over a thread's own numbers and two exchanges among the four.

Limits: Hopper; float32; T a multiple of 64, E of 8, at most 256; k at most 32.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.plain_kernel import run

_ROWS = 64
_MOST = 256  # entries of a row: more would leave the registers
_ROUNDS = 32  # each is code of its own to compile


def why_not(scores, k: int) -> str | None:
    """None where the kernel here takes scores (T, E), which may be a shape and dtype alone; else what it needs."""
    if scores.dtype != jnp.float32:
        return "it needs float32"
    if scores.shape[0] % _ROWS or scores.shape[1] % 8 or scores.shape[1] > _MOST or 0 in scores.shape:
        return f"it needs T in multiples of {_ROWS} and E of 8, at most {_MOST}"
    if k > _ROUNDS:
        return f"it needs k of at most {_ROUNDS}"
    return None if grouped._hopper() else "it needs a Hopper GPU"


def top_k(scores, k):
    """(T, E) -> (T, k) f32, (T, k) i32."""
    T, E = scores.shape

    def body(scores, values, indices):
        rows = pl.ds(lax.axis_index("block") * _ROWS, _ROWS)
        left = plgpu.load(scores.at[rows, :], layout=plgpu.Layout.WGMMA, optimized=False)
        number = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (_ROWS, E), 1), plgpu.Layout.WGMMA)
        taken = jnp.zeros((_ROWS, E), jnp.int32)
        for i in range(k):
            free = taken == 0
            largest = jnp.max(jnp.where(free, left, -jnp.inf), axis=1)
            # not "== largest": a NaN compares false with everything, and an index has to come out of every row
            behind = left < _across(largest, E)
            index = jnp.min(jnp.where(free & ~behind, number, E), axis=1)
            values[rows, i] = largest
            indices[rows, i] = index
            taken = jnp.where(number == _across(index, E), 1, taken)

    shapes = tuple(jax.ShapeDtypeStruct((T, k), dtype) for dtype in (jnp.float32, jnp.int32))
    return run("select_top_k", body, {"block": T // _ROWS}, shapes, scores)


def _across(column, E):
    return lax.broadcast_in_dim(column, (_ROWS, E), (0,))
