"""A matrix read once by plain 16-byte loads, a whole row of it at a time, in Mosaic GPU.

A block takes up to 2048 columns of some rows of one matrix, multiplies each row by its number of x and adds: no thread
waits for another, and enough loads are under way to keep memory busy.

Limits: Hopper; bfloat16, float16 or float32; A a multiple of 16, N of 128.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine.mosaic_gpu import load, widest
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.vary import vary_alike

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
    """(R, A) f32, (R,), (E, A, N) each -> (R, P, N) f32 each."""
    (R, A), (_, _, N) = rows.shape, kernels[0].shape
    width = widest(N)
    chunks = N // width
    parts = _parts(R * chunks, A)
    terms = A // parts

    def body(rows, chosen, *refs):
        weights, outs = refs[: len(kernels)], refs[len(kernels) :]
        block = lax.axis_index("block")
        r, rest = lax.div(block, jnp.int32(parts * chunks)), lax.rem(block, jnp.int32(parts * chunks))
        part, columns = lax.div(rest, jnp.int32(chunks)), pl.ds(lax.rem(rest, jnp.int32(chunks)) * width, width)
        e, first = chosen[r], part * terms
        totals = [jnp.zeros((width,), jnp.float32) for _ in weights]
        for k in range(terms):
            number = rows[r * A + first + k]
            terms_here = (number * load(w.at[e, first + k, columns]) for w in weights)
            totals = [total + term for total, term in zip(totals, terms_here, strict=True)]
        for out, total in zip(outs, totals, strict=True):
            out[r, part, columns] = total

    shape = jax.ShapeDtypeStruct((R, parts, N), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=(shape,) * len(kernels),
        grid=(R * parts * chunks,),
        grid_names=("block",),
        kernel_name="few_rows_products",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # no thread reads what another wrote
        ),
    )
    return tuple(vary_alike(out, rows)[0] for out in kernel(rows.reshape(-1), chosen, *kernels))


def _parts(blocks: int, A: int) -> int:
    """Of each sum: enough for _BLOCKS blocks in all, of no fewer than _TERMS terms each."""
    parts = 1
    while blocks * parts < _BLOCKS and A % (2 * parts) == 0 and A // (2 * parts) >= _TERMS:
        parts *= 2
    return parts
