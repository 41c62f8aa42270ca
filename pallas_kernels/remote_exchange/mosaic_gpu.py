"""Rows read where they are, through remote references, by the copy engine into shared memory, in Mosaic GPU.

Rows that are read, and not written, on the other side keep every write at home. `send` is a gather by the device that
receives, `collect` a sum of rows of several devices. A worker is a warpgroup with a ring of stages: while some pieces
of rows are on their way into it, the next one goes out, to memory or into a sum. So many bytes are under way that a few
multiprocessors fill the link. The runtime lets no kernel begin before all devices have come to it, so what peers hold
is written; at the end each worker tells every device that it is done, and block 0 stays until all workers of all
devices have, so that nobody takes back memory that is being read. Only one block ever waits: blocks that have found no
room on the GPU yet can't be waited for in vain, and other kernels, NCCL's too, find room beside it.

Beside expert products (`beside`) the kernels go to a stream of their own, one after another, and take no more room than
products leave: no more blocks than multiprocessors, on which no block of products has room beside one of theirs. Why
nobody waits forever: a kernel of products never waits for an exchange while it runs (its stream does, before it
starts), so it ends whatever else there is, and leaves room; of an exchange's blocks only block 0 waits, for blocks that
read and end without waiting; and all devices run one program, so that of the exchanges and of XLA's own collectives the
first in its order that isn't done everywhere waits for no other one. Were there no room at all on one device, block 0
of the others would stay until the products there end, and no longer.

Limits: Hopper; the devices of one process; bfloat16, float16 or float32; D a multiple of 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on

from pallas_kernels.grouped_matmul import SPARE
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.vary import vary_alike

BLOCKS = 132
_WORKERS = 8  # warpgroups of a block: 64 registers a thread
_STAGES = 3  # of a worker's ring, at most: all have 32 barriers together
_STAGE = 9216  # bytes of a stage, at most
_PIECE = 4096  # bytes of a row that are copied at once, at most
_TOGETHER = 4  # pieces in a stage, at most
_THREADS = 128


def why_not(rows) -> str | None:
    """None where the kernels take rows (N, D), which may be a shape and dtype alone; else what they need."""
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return "it needs bfloat16, float16 or float32"
    if rows.shape[1] % _THREADS or 0 in rows.shape:
        return "it needs rows, and a width in multiples of 128"
    if not products._hopper():
        return "it needs Hopper GPUs"
    return None if jax.process_count() == 1 else "it needs all devices in one process, on one host"


def send(x, source, starts, stops, slot=None, *, axis, first=0, beside=0, rows=None):
    """(T, D), (R,), (N,), (N,) -> (R, D): row source of all devices' tokens, of which starts … stops − 1 are those of
    device me + first + j; with slot (R, K) -> (rows, D): each of these to its K places, those below `rows`. Without an
    axis there is one device.

    A worker reads from one device: in their order all devices would read rows from the first one together, then from
    the next.
    """
    (T, D), R, N = x.shape, source.shape[0], starts.shape[0]
    K = 1 if slot is None else slot.shape[1]
    M = R if slot is None else rows
    width = _width(D, x.dtype, _PIECE)
    chunks, together = D // width, min(_STAGE // (width * x.dtype.itemsize), _TOGETHER)

    def work(worker, workers, stream, source, starts, stops, x, *refs):
        *slots, out = refs
        j, offset, step = lax.rem(worker, jnp.int32(N)), lax.div(worker, jnp.int32(N)), workers // N
        device = _neighbour(axis, first + j)
        there, begin = _on(x, axis, device), starts[j]
        pieces = (stops[j] - begin) * chunks
        mine = jnp.where(offset < step, _share(pieces, offset, step), 0)

        def place(i, n):
            """Of the n-th of the i-th pieces; of the last one where there are no more."""
            row, columns = _piece(jnp.clip(offset + (i * together + n) * step, 0, pieces - 1), chunks, width)
            return jnp.clip(begin + row, 0, R - 1), columns

        def rows(i):
            return tuple(source[place(i, n)[0]] - device * T for n in range(together))

        def load(i, rows, stage, barrier):
            for n, row in enumerate(rows):
                _copy(there.at[row, place(i, n)[1]], stage.at[n], barrier)

        def targets(i):
            """Of each piece, the rows of `out` that it goes to, M where it goes nowhere."""
            for n in range(together):
                row, there = place(i, n)[0], i * together + n < mine
                places = [row] if slot is None else [slots[0][row * K + k] for k in range(K)]
                yield tuple(jnp.where(there, to, M) for to in places)

        def finish(i, targets, stage):
            def store(n, row):
                plgpu.copy_smem_to_gmem(stage.at[n], out.at[row, place(i, n)[1]])

            for n, rows in enumerate(targets):
                for row in rows:
                    pl.when(row < M)(functools.partial(store, n, row))

        stream(_share(mine, 0, together), rows, load, lambda i: tuple(targets(i)), finish)

    slots = () if slot is None else (slot.reshape(-1),)
    ring = jax.ShapeDtypeStruct((together, width), x.dtype)
    out = jax.ShapeDtypeStruct((M, D), x.dtype)
    return _call("send_rows", work, N * R * chunks, ring, axis, beside, out, source, starts, stops, x, *slots)


def collect(parts, more=None, *, axis, beside=0, dtype=None):
    """(T, D) of `dtype` or y's: the sum of the rows of every part and of more (T, D) f32, in float32.

    parts: (y (R, D), places (T, N), first), of which row places[:, j] of y of device me − first − j counts, or none.
    """
    T, D = parts[0][1].shape[0], parts[0][0].shape[1]
    kind = parts[0][0].dtype
    dtype = dtype or kind
    # which part, how many rows it has, and how far the device is, of each row of a token
    whose = [(p, y.shape[0], first + j) for p, (y, places, first) in enumerate(parts) for j in range(places.shape[1])]
    N = len(whose)
    width = _width(D, kind, min(_PIECE, _STAGE // N))
    chunks, together = D // width, max(min(_STAGE // (N * width * kind.itemsize), _TOGETHER // N), 1)
    # 16 bytes of the result a thread, next to its neighbour's
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=min(_vector(width), 16 // jnp.dtype(dtype).itemsize))
    pieces = T * chunks

    def work(worker, workers, stream, places, *refs):
        ys, others, out = refs[: len(parts)], refs[len(parts) : -1], refs[-1]
        me, mine = _neighbour(axis, 0), _share(pieces, worker, workers)

        def place(i, n):
            return _piece(jnp.minimum(worker + (i * together + n) * workers, pieces - 1), chunks, width)

        def rows(i):
            return tuple(places[place(i, n)[0] * N + j] for n in range(together) for j in range(N))

        def load(i, rows, stage, barrier):
            for turn, row in enumerate(rows):
                p, R, far = whose[turn % N]
                # what isn't there is read here, off the link
                there = _on(ys[p], axis, jnp.where(row < R, _neighbour(axis, -far), me))
                _copy(there.at[jnp.minimum(row, R - 1), place(i, turn // N)[1]], stage.at[turn], barrier)

        def finish(i, rows, stage):
            totals = []
            for n in range(together):
                total = jnp.zeros((width,), jnp.float32)
                for other in others:
                    total += plgpu.load(other.at[place(i, n)], layout=layout, optimized=False)
                for turn in range(n * N, (n + 1) * N):
                    value = plgpu.load(stage.at[turn], layout=layout).astype(jnp.float32)
                    total += jnp.where(rows[turn] < whose[turn % N][1], value, jnp.zeros_like(value))
                totals.append(total)
            plgpu.commit_smem()  # the copy engine may have the stage again

            def store(n):
                out[place(i, n)] = totals[n].astype(out.dtype)

            for n in range(together):
                pl.when(i * together + n < mine)(functools.partial(store, n))

        stream(_share(mine, 0, together), rows, load, rows, finish)

    ring, out = jax.ShapeDtypeStruct((together * N, width), kind), jax.ShapeDtypeStruct((T, D), dtype)
    places = jnp.concatenate([places for _, places, _ in parts], axis=1).reshape(-1)
    args = places, *(y for y, _, _ in parts), *(() if more is None else (more,))
    return _call("collect_rows", work, pieces, ring, axis, beside, out, *args)


def on_its_stream(run):
    """`run` of arrays as one asynchronous call on a stream that is not the computation's, which goes on meanwhile.

    One result alone: of several, XLA would pick each from the call by another call there.
    """
    return compute_on(run, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device)


def _on(ref, axis, device):
    """`ref` of that device of the axis; the only one's own is no remote reference, which one device may not have."""
    return plgpu.remote_ref(ref, _name(axis, device)) if _devices(axis) > 1 else ref


def _devices(axis) -> int:
    return 1 if axis is None else lax.axis_size(axis)


def _name(axis, device):
    return {axis: jnp.int32(device)}


def _neighbour(axis, offset):
    """The device that is so many places after this one, around all S; offset > −S."""
    S = _devices(axis)
    return lax.rem(lax.axis_index(axis) + (offset + S), jnp.int32(S)) if S > 1 else jnp.int32(0)


def _copy(source, stage, barrier):
    # a plain run of bytes, which takes any device's address; a tiled copy's is fixed before the kernel begins
    plgpu.copy_gmem_to_smem(source, stage, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def _width(D: int, dtype, most: int) -> int:
    """The most columns that divide D in multiples of 128 and have at most so many bytes."""
    widest = max(most // jnp.dtype(dtype).itemsize, _THREADS)
    return max(width for width in range(_THREADS, widest + 1, _THREADS) if D % width == 0)


def _vector(width: int) -> int:
    """Neighbouring columns of a thread: up to eight, a power of two."""
    return min(width // _THREADS & -(width // _THREADS), 8)


def _piece(i, chunks: int, width: int):
    """Row and columns of the i-th piece, `chunks` a row."""
    return lax.div(i, jnp.int32(chunks)), pl.ds(lax.rem(i, jnp.int32(chunks)) * width, width)


def _share(count, first, step):
    """How many of first, first + step, … are below count."""
    return lax.div(jnp.maximum(count - first, 0) + (step - 1), jnp.int32(step))


def _stream(stages, ring, ready, count, whence, load, whither, finish):
    """finish(i, whither(i), stage) for i < count in order, and load(i, whence(i), stage, barrier) some turns before.

    whence, whither: scalars from memory, which are read before they are needed. ring, ready: a stage and its barrier,
    by number.
    """
    ahead = stages - 1

    def start(i, scalars):
        slot = lax.rem(jnp.int32(i), jnp.int32(stages))
        load(i, scalars, ring(slot), ready(slot))

    for i in range(ahead):
        pl.when(i < count)(functools.partial(lambda i: start(i, whence(jnp.int32(i))), i))

    def turn(i, coming):
        following, now = whence(i + ahead + 1), whither(i)

        def next_one():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # it takes the stage that has just gone out
            start(i + ahead, coming)

        pl.when(i + ahead < count)(next_one)
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(ready(slot))
        finish(i, now, ring(slot))
        return following

    lax.fori_loop(0, count, turn, whence(jnp.int32(ahead)))
    plgpu.wait_smem_to_gmem(0)


def _call(name, work, most, stage, axis, beside, out, *args):
    """work(worker, workers, stream, …) of every worker, of which no more than `most` are needed, then word to all
    devices that it is done; stage: of the ring, (copies, columns)."""
    S = _devices(axis)
    stages = min(_STAGES * _STAGE // (stage.size * stage.dtype.itemsize), _STAGES)
    room = BLOCKS if axis is not None else BLOCKS - SPARE  # an exchange may run beside what is none
    blocks = pl.cdiv(min(beside or room, pl.cdiv(max(most, S), _WORKERS)), 2) * 2
    workers = blocks * _WORKERS

    def body(*refs, ring, ready):
        mine = lax.axis_index("warpgroup")
        worker = (lax.axis_index("block") * 2 + lax.axis_index("pair")) * _WORKERS + mine

        own, barrier = (lambda i: ring.at[mine, i]), (lambda i: ready.at[mine * stages + i])
        work(worker, workers, functools.partial(_stream, stages, own, barrier), *refs)
        if S > 1:
            done = pl.get_global(plgpu.SemaphoreType.REGULAR)
            for device in range(S):
                pl.semaphore_signal(done, device_id=_name(axis, device))
            pl.when(worker == 0)(functools.partial(pl.semaphore_wait, done, value=S * workers, decrement=False))

    kernel = plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks // 2,),
        grid_names=("block",),
        # in pairs: a multiprocessor left alone is none to products, a pair of which would wait for the exchange's end
        cluster=(2,),
        cluster_names=("pair",),
        num_threads=_WORKERS,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types={
            "ring": plgpu.SMEM((_WORKERS, stages, *stage.shape), stage.dtype),
            "ready": plgpu.Barrier(num_arrivals=stage.shape[0], num_barriers=_WORKERS * stages),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # the kernel's own types know of no mesh
    return jax.tree.map(lambda out: vary_alike(out, args[0])[0], kernel(*args))
