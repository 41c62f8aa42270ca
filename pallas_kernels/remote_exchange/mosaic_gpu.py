"""Plain 16-byte reads and writes through remote references, in Mosaic GPU.

A fixed number of blocks takes the tokens in turn: a token's row is read once and written to every device it goes to, or
its rows are read where they are, summed and written at home. The runtime lets no kernel begin before all devices have
come to it, so peers' buffers are there and what they hold is written; at the end each block tells every device that it
is done, and block 0 stays until all blocks of all devices have. Only one block ever waits, so blocks that have found no
room on the GPU yet can't be waited for in vain, and other kernels, NCCL's too, find room beside it.

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

_WIDEST = 16384  # bytes of a row that a block holds in registers
_THREADS = 128
BLOCKS = 132 * 8


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if rows.shape[1] % _THREADS or 0 in rows.shape:
        return "it needs rows, and a width in multiples of 128"
    if not products._hopper():
        return "it needs Hopper GPUs"
    return None if jax.process_count() == 1 else "it needs all devices in one process, on one host"


def send(x, places, rows, axis):
    """(T, D), (T, S) -> (rows, D)."""
    (T, D), S = x.shape, places.shape[1]
    width = _width(D, x.dtype)

    def move(t, columns, places, x, out):
        value = plgpu.load(x.at[t, columns], layout=_layout(width))
        for device in range(S):
            row = places[t * S + device]

            def store(device=device, row=row):
                plgpu.remote_ref(out, _name(axis, device))[row, columns] = value

            pl.when(row < rows)(store)

    shape = jax.ShapeDtypeStruct((rows, D), x.dtype)
    return _call("send_rows", move, T, D // width, S, axis, shape, places.reshape(-1), x)


def collect(y, places, axis):
    """(R, D), (T, S) -> (T, D)."""
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
    return _call("collect_rows", move, T, D // width, S, axis, shape, places.reshape(-1), y)


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


def _call(name, move, T, chunks, S, axis, shape, *args):
    """`move` for every token and piece of its columns, then the word to all devices that all is done."""
    blocks = min(BLOCKS, T * chunks)
    width = shape.shape[1] // chunks

    def body(*refs):
        done = pl.get_global(plgpu.SemaphoreType.REGULAR)
        block = lax.axis_index("block")

        def step(i, _):
            piece = block + i * blocks
            move(lax.div(piece, jnp.int32(chunks)), pl.ds(lax.rem(piece, jnp.int32(chunks)) * width, width), *refs)

        mine = lax.div(T * chunks - block + blocks - 1, jnp.int32(blocks))
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
