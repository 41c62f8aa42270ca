"""Rows read where they are, by plain 16-byte reads through remote references, in Mosaic GPU.

A fixed number of blocks takes rows in turn: `send` is a gather by the device that receives, `collect` a sum of rows of
several devices. Rows that are read, and not written, on the other side keep every write at home: written through remote
references they moved at 40 GB/s between two H200, read so at 260 to 270, which is what the link gave a copy of equal
pieces. The runtime lets no kernel begin before all devices have come to it, so what peers hold is written; at the end
each block tells every device that it is done, and block 0 stays until all blocks of all devices have, so that nobody
takes back memory that is being read. Only one block ever waits: blocks that have found no room on the GPU yet can't be
waited for in vain, and other kernels, NCCL's too, find room beside it.

Limits: Hopper; the devices of one process; bfloat16, float16 or float32; D a multiple of 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.vary import vary_alike

_WIDEST = 4096  # bytes of a row that a block holds in registers
_THREADS = 128
BLOCKS = 132 * 16


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if rows.shape[1] % _THREADS or 0 in rows.shape:
        return "it needs rows, and a width in multiples of 128"
    if not products._hopper():
        return "it needs Hopper GPUs"
    return None if jax.process_count() == 1 else "it needs all devices in one process, on one host"


def send(x, source, axis):
    """(T, D), (R,) -> (R, D): row source of all devices' tokens; the rows with a source come first."""
    (T, D), R, S = x.shape, source.shape[0], lax.axis_size(axis)
    width = _width(D, x.dtype)
    count = jnp.sum(source < S * T, dtype=jnp.int32, keepdims=True)

    def move(r, columns, source, count, x, out):
        there = plgpu.remote_ref(x, _name(axis, lax.div(source[r], jnp.int32(T))))
        row = lax.rem(source[r], jnp.int32(T))
        out[r, columns] = plgpu.load(there.at[row, columns], layout=_layout(width))

    def rows(source, count, x, out):
        return count[0]

    shape = jax.ShapeDtypeStruct((R, D), x.dtype)
    return _call("send_rows", move, rows, R, width, axis, shape, source, count, x)


def collect(y, places, axis):
    """(R, D), (T, S) -> (T, D): the sum of rows `places` of the devices, in float32."""
    (R, D), (T, S) = y.shape, places.shape
    width = _width(D, jnp.float32)

    def move(t, columns, places, y, out):
        me = lax.axis_index(axis)
        total = jnp.zeros((width,), jnp.float32)
        for device in range(S):
            row = places[t * S + device]
            there = row < R
            # what isn't there is read here, off the link
            rows_of = plgpu.remote_ref(y, _name(axis, jnp.where(there, jnp.int32(device), me)))
            value = plgpu.load(rows_of.at[jnp.minimum(row, R - 1), columns], layout=_layout(width))
            value = value.astype(jnp.float32)
            total += jnp.where(there, value, jnp.zeros_like(value))
        out[t, columns] = total.astype(out.dtype)

    shape = jax.ShapeDtypeStruct((T, D), y.dtype)
    return _call("collect_rows", move, lambda *_: T, T, width, axis, shape, places.reshape(-1), y)


def _name(axis, device):
    return {axis: jnp.int32(device)}


def _width(D: int, dtype) -> int:
    """The most columns that divide D, fill whole vectors and stay in a thread's registers."""
    unit = _THREADS * _vector(D)
    widest = max(_WIDEST // jnp.dtype(dtype).itemsize, unit)
    return max(width for width in range(unit, widest + 1, unit) if D % width == 0)


def _vector(D: int) -> int:
    """Neighbouring columns of a thread: up to eight, a power of two."""
    return min(D // _THREADS & -(D // _THREADS), 8)


def _layout(width: int):
    return plgpu.Layout.WG_STRIDED((width,), vec_size=_vector(width))


def _call(name, move, rows, most, width, axis, shape, *args):
    """`move` for every piece of `width` columns of rows(…) ≤ most rows, then word to all devices that it is done."""
    chunks = shape.shape[1] // width
    blocks, S = min(BLOCKS, most * chunks), lax.axis_size(axis)

    def body(*refs):
        done = pl.get_global(plgpu.SemaphoreType.REGULAR)
        block = lax.axis_index("block")

        def step(i, _):
            piece = block + i * blocks
            move(lax.div(piece, jnp.int32(chunks)), pl.ds(lax.rem(piece, jnp.int32(chunks)) * width, width), *refs)

        mine = lax.div(rows(*refs) * chunks - block + blocks - 1, jnp.int32(blocks))
        lax.fori_loop(0, mine, step, None)
        for device in range(S):
            pl.semaphore_signal(done, device_id=_name(axis, device))
        pl.when(block == 0)(functools.partial(pl.semaphore_wait, done, value=S * blocks, decrement=False))

    kernel = plgpu.kernel(
        body,
        out_type=shape,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # the kernel's own types know of no mesh
    return jax.tree.map(lambda out: vary_alike(out, args[0])[0], kernel(*args))
