"""Rows read where they are, by plain 16-byte reads through remote references, in Mosaic GPU.

A fixed number of blocks takes rows in turn: `send` is a gather by the device that receives, `collect` a sum of rows of
several devices. Rows that are read, and not written, on the other side keep every write at home: written through remote
references they moved at 40 GB/s between two H200, read so at 260 to 270, which is what the link gave a copy of equal
pieces. The runtime lets no kernel begin before all devices have come to it, so what peers hold is written; at the end
each block tells every device that it is done, and block 0 stays until all blocks of all devices have, so that nobody
takes back memory that is being read. Only one block ever waits: blocks that have found no room on the GPU yet can't be
waited for in vain, and other kernels, NCCL's too, find room beside it.

Beside expert products (`beside`) the kernels go to a stream of their own, one after another, and take no more room than
products leave: as many blocks as multiprocessors, of eight warpgroups, whose 1024 threads fill a multiprocessor's
registers together, so that there is one on each. As many small blocks would lie one or two on every multiprocessor, and
products that come after them would find none of their own. Why nobody waits forever: a kernel of products never waits
for an exchange while it runs (its stream does, before it starts), so it ends whatever else there is, and leaves room;
of an exchange's blocks only block 0 waits, for blocks that read and end without waiting; and all devices run one
program, so that of the exchanges and of XLA's own collectives the first in its order that isn't done everywhere waits
for no other one. Were there no room at all on one device, block 0 of the others would stay until the products there
end, and no longer.

Limits: Hopper; the devices of one process; bfloat16, float16 or float32; D a multiple of 128.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on

from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.vary import vary_alike

_WIDEST = 4096  # bytes of a row that a block holds in registers
_THREADS = 128
BLOCKS = 132 * 16
_BESIDE = 8  # warpgroups of a block beside other kernels, with 64 registers a thread


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if rows.shape[1] % _THREADS or 0 in rows.shape:
        return "it needs rows, and a width in multiples of 128"
    if not products._hopper():
        return "it needs Hopper GPUs"
    return None if jax.process_count() == 1 else "it needs all devices in one process, on one host"


def send(x, source, starts, axis, beside=0):
    """(T, D), (R,), (S + 1,) -> (R, D): row source of all devices' tokens, where starts says what comes from whom.

    One row from each device in turn: in order, all devices would read from the first one together, then from the next.
    """
    (T, D), R, S = x.shape, source.shape[0], lax.axis_size(axis)
    width = _width(D, x.dtype)

    def move(i, columns, source, starts, x, out):
        device = lax.rem(i, jnp.int32(S))
        r = starts[device] + lax.div(i, jnp.int32(S))

        def take():
            there = _on(x, axis, device).at[source[r] - device * T, columns]
            out[r, columns] = plgpu.load(there, layout=_layout(width))

        pl.when(r < starts[device + 1])(take)

    def rows(source, starts, x, out):
        return S * functools.reduce(jnp.maximum, (starts[s + 1] - starts[s] for s in range(S)))

    shape = jax.ShapeDtypeStruct((R, D), x.dtype)
    return _call("send_rows", move, rows, S * min(R, T), width, axis, beside, shape, source, starts, x)


def collect(y, places, axis, beside=0):
    """(R, D), (T, S) -> (T, D): the sum of rows `places` of the devices, in float32."""
    (R, D), (T, S) = y.shape, places.shape
    width = _width(D, jnp.float32)

    def move(t, columns, places, y, out):
        me = lax.axis_index(axis) if S > 1 else jnp.int32(0)
        total = jnp.zeros((width,), jnp.float32)
        for device in range(S):
            row = places[t * S + device]
            there = row < R
            # what isn't there is read here, off the link
            rows_of = _on(y, axis, jnp.where(there, jnp.int32(device), me))
            value = plgpu.load(rows_of.at[jnp.minimum(row, R - 1), columns], layout=_layout(width))
            value = value.astype(jnp.float32)
            total += jnp.where(there, value, jnp.zeros_like(value))
        out[t, columns] = total.astype(out.dtype)

    shape = jax.ShapeDtypeStruct((T, D), y.dtype)
    return _call("collect_rows", move, lambda *_: T, T, width, axis, beside, shape, places.reshape(-1), y)


def on_its_stream(run):
    """`run` of arrays as one asynchronous call on a stream that is not the computation's, which goes on meanwhile.

    One result alone: of several, XLA would pick each from the call by another call there.
    """
    return compute_on(run, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)


def _on(ref, axis, device):
    """`ref` of that device of the axis; the only one's own is no remote reference, which one device may not have."""
    return plgpu.remote_ref(ref, _name(axis, device)) if lax.axis_size(axis) > 1 else ref


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


def _call(name, move, rows, most, width, axis, beside, shape, *args):
    """`move` for every piece of `width` columns of rows(…) ≤ most rows, then word to all devices that it is done."""
    chunks, S = shape.shape[1] // width, lax.axis_size(axis)
    side = _BESIDE if beside else 1  # warpgroups of a block, each of which takes pieces in turn
    blocks = min(beside or BLOCKS, pl.cdiv(most * chunks, side))
    workers = blocks * side

    def body(*refs):
        worker = lax.axis_index("block")
        if beside:
            worker = worker * side + lax.axis_index("warpgroup")

        def step(i, _):
            piece = worker + i * workers
            move(lax.div(piece, jnp.int32(chunks)), pl.ds(lax.rem(piece, jnp.int32(chunks)) * width, width), *refs)

        mine = lax.div(rows(*refs) * chunks - worker + workers - 1, jnp.int32(workers))
        lax.fori_loop(0, mine, step, None)
        if S > 1:
            done = pl.get_global(plgpu.SemaphoreType.REGULAR)
            for device in range(S):
                pl.semaphore_signal(done, device_id=_name(axis, device))
            pl.when(worker == 0)(functools.partial(pl.semaphore_wait, done, value=S * workers, decrement=False))

    threads: dict[str, Any] = {"num_threads": side, "thread_name": "warpgroup"} if beside else {}
    kernel = plgpu.kernel(
        body,
        out_type=shape,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **threads,
    )
    # the kernel's own types know of no mesh
    return jax.tree.map(lambda out: vary_alike(out, args[0])[0], kernel(*args))
