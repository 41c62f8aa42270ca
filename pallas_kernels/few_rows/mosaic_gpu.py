"""A matrix read once by plain 16-byte loads, a whole row of it at a time, in Mosaic GPU.

A block takes 1024 columns (others where these don't divide N) of some rows of one matrix, multiplies each row by its
number of x and adds: no thread waits for another, and enough loads are under way to keep memory busy. More columns, or
two matrices at once, would be more parts of the sums, which whoever reads them pays for.

Limits: Hopper; bfloat16, float16 or float32; A a multiple of 16, N of 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine.mosaic_gpu import load, widest
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.plain_kernel import run

_WIDTH = 1024  # columns of a block: 16 bytes a thread
_BLOCKS = 256  # at least, where there are terms enough: two for each multiprocessor
_TERMS = 16  # at least, of a part: its result is written and read again


def why_not(kernel) -> str | None:
    """None where the kernel here takes matrices (E, A, N), which may be a shape and dtype alone; else what it needs."""
    if kernel.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if kernel.shape[1] % _TERMS or kernel.shape[2] % 128 or 0 in kernel.shape:
        return f"it needs A in multiples of {_TERMS} and N of 128"
    return None if grouped._hopper() else "it needs a Hopper GPU"


def products(rows, chosen, kernels):
    """(T, A), (R,), (E, A, N) each -> (R, P, N) f32 each."""
    (T, A), (R,), (_, _, N) = rows.shape, chosen.shape, kernels[0].shape
    width = _WIDTH if N % _WIDTH == 0 else widest(N)
    chunks = N // width
    parts = _parts(len(kernels) * R * chunks, A)
    terms = A // parts

    def body(rows, chosen, *refs):
        weights, outs = refs[: len(kernels)], refs[len(kernels) :]
        which, block = lax.axis_index("kernel"), lax.axis_index("block")
        r, rest = lax.div(block, jnp.int32(parts * chunks)), lax.rem(block, jnp.int32(parts * chunks))
        part, columns = lax.div(rest, jnp.int32(chunks)), pl.ds(lax.rem(rest, jnp.int32(chunks)) * width, width)
        e, t, first = chosen[r], lax.div(r, jnp.int32(R // T)), part * terms

        def sum_part(weight, out):
            total = jnp.zeros((width,), jnp.float32)
            for k in range(terms):
                number = rows[t * A + first + k].astype(jnp.float32)
                total += number * load(weight.at[e, first + k, columns])
            out[r, part, columns] = total

        for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            pl.when(which == i)(functools.partial(sum_part, weight, out))

    shape = jax.ShapeDtypeStruct((R, parts, N), jnp.float32)
    grid = {"kernel": len(kernels), "block": R * parts * chunks}
    return run("few_rows_products", body, grid, (shape,) * len(kernels), rows.reshape(-1), chosen, *kernels)


def _parts(blocks: int, A: int) -> int:
    """Of each sum: enough for _BLOCKS blocks in all, of no fewer than _TERMS terms each."""
    parts = 1
    while blocks * parts < _BLOCKS and A % (2 * parts) == 0 and A // (2 * parts) >= _TERMS:
        parts *= 2
    return parts
