"""The gated feed-forward's own products on Hopper: gate and up with the activation between, and the gradient of both.

The pipeline is `grouped_matmul`'s. In `hidden` the operands change places: a block multiplies 64 columns of gate and 64
of up, turned, by a tile of rows, turned, so that one stage's traffic and instructions are those of a plain product
(128 columns of weights, 192 or 128 rows), a thread ends with gate and up of the same element, and weights that lie
apart need no copy side by side. Its results are turned back on their way to memory.

Limits: those of `grouped_matmul.mosaic_gpu`.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import plain_kernel
from pallas_kernels.combine.mosaic_gpu import load, widest
from pallas_kernels.grouped_matmul import hopper, schedule, tilings
from pallas_kernels.grouped_matmul.hopper import COLUMNS, Tiling
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.mosaic_gpu import here, row_tiles
from pallas_kernels.vary import vary_alike

_STEP, _HALF = hopper.STEP, 64


def _sigmoid(x):
    root = lax.rsqrt(1 + jnp.exp(-x))  # one instruction, where a division is many
    return root * root


_GELU = 1.5957691216057308  # 2 · sqrt(2 / π), of its tanh form


def _inside_gelu(x):
    return _GELU * (x + 0.044715 * x * x * x)


ACTIVATIONS = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * _sigmoid(_inside_gelu(x)),
    "relu": lambda x: jnp.maximum(x, 0),
}


def _slope(x, inside, inside_slope):
    """x · sigmoid(inside) and its derivative."""
    share = _sigmoid(inside)
    return x * share, share + x * share * (1 - share) * inside_slope


_SLOPES = {
    "silu": lambda x: _slope(x, x, 1.0),
    "gelu": lambda x: _slope(x, _inside_gelu(x), _GELU * (1 + 3 * 0.044715 * x * x)),
    "relu": lambda x: (jnp.maximum(x, 0), jnp.where(x > 0, jnp.ones_like(x), jnp.zeros_like(x))),
}


def hidden(activation, rows, gate, up, metadata: GroupMetadata, keep: bool, scale=None, tiles: Tiling | None = None):
    """(activation(rows · gate) ∘ (rows · up)), (M, F) of rows' dtype; keep: the two products (M, F) as well.

    rows (M, D) sorted by group, gate and up (E, D, F); scale (M,) f32: what each row of the first result is multiplied
    by, before it is rounded. Rows past the sum come out as zeros, or undefined by metadata without a tail.
    """
    M, F = rows.shape[0], gate.shape[2]
    in_tile = schedule.tile_rows(M, gate.shape[0])
    t = here(tiles or tilings.pick("forward", in_tile, rows.shape[1]), rows, metadata.spare)
    spare = -M % 8
    out = (jax.ShapeDtypeStruct((hopper.stored_rows(M), F), rows.dtype),) * (3 if keep else 1)
    stage = {"a": (max(in_tile, 64), _STEP), "b": (_STEP, _HALF), "c": (_STEP, _HALF)}
    body = functools.partial(_hidden_kernel, t, ACTIVATIONS[activation], 1 + 2 * keep, scale is not None)
    kernel = hopper.launch("gated_ffn_hidden", body, t, out, stage, rows.dtype, approximate=True)
    # a tile reads its rows' scales whole, also where the rows end before it
    scales = () if scale is None else (jnp.pad(scale, (0, spare + schedule.TALL)),)
    results = kernel(*row_tiles(metadata, M), jnp.pad(rows, ((0, spare), (0, 0))), gate, up, *scales)
    return tuple(vary_alike(result[:M], rows)[0] for result in results)


def _hidden_kernel(
    t: Tiling, activation, outputs, scaled, count, tiles, rows, gate, up, *refs, a, b, c, staging, plain, ready, free
):
    scales, outs = refs[:scaled], refs[scaled : scaled + outputs]
    E, depth = gate.shape[0], rows.shape[1] // _STEP
    columns = pl.cdiv(gate.shape[2], 2 * _HALF)
    box = hopper.box(rows.shape[0], E)
    heights, plan = hopper.walk_rows(t, count, tiles, a.shape[1], E, columns)

    def first_column(column):
        return (column * 2 + lax.axis_index("pair")) * _HALF

    def load(tile, k, slot, barrier):
        step, wide = pl.ds(k * _STEP, _STEP), pl.ds(first_column(tile.column), _HALF)
        hopper.load_rows(rows, tile, step, heights, box, 1, a.at[slot], barrier)
        plgpu.copy_gmem_to_smem(gate.at[tile.group, step, wide], b.at[slot], barrier)
        plgpu.copy_gmem_to_smem(up.at[tile.group, step, wide], c.at[slot], barrier)

    def compute(wg, tile, accumulate):
        hopper.by_height(tile, heights, lambda height: multiply(wg, tile, accumulate, height))

    def multiply(wg, tile, accumulate, height):
        def operands(_, slot):
            turned = a.at[slot, pl.ds(0, height)].transpose((1, 0))
            return (b.at[slot].transpose((1, 0)), turned), (c.at[slot].transpose((1, 0)), turned)

        def store(gated, other):
            for r in range(0, height, 64):  # a piece at a time: registers hold the sums and little more
                piece(r, gated[:, r : r + 64], other[:, r : r + 64])

        def piece(r, gated, other):
            at, whole = (tile.row * 8 + r, first_column(tile.column)), activation(gated) * other
            for scale in scales:
                mine = scale.at[pl.ds(tile.row * 8 + r, 64)]
                by_row = plgpu.load(mine, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)  # from global memory
                whole *= lax.broadcast_in_dim(by_row, whole.shape, (1,))
            for n, (out, value) in enumerate(zip(outs, (whole, gated, other)[:outputs], strict=True)):
                value, turn = value.astype(out.dtype), r * outputs + n * 64
                here = tile.start - r, tile.stop - r, staging.at[wg], plain.at[wg]
                hopper.store_rows(value, out, at, *here, turn=turn, turned=True)

        accumulate(operands, store, ((_HALF, height),) * 2)

    steps = lambda tile: jnp.where(tile.lead < E, depth, 0)  # noqa: E731
    hopper.pipeline(t, plan, steps, load, compute, ready, free)


def dlhs(grads, weights, metadata: GroupMetadata, tiles: Tiling | None = None):
    """grads[0] · weights[0]ᵀ + grads[1] · weights[1]ᵀ, summed in one accumulator: (M, F) twice, (E, D, F) -> (M, D)."""
    first, M, D = grads[0], grads[0].shape[0], weights[0].shape[1]
    in_tile = schedule.tile_rows(M, weights[0].shape[0])
    t = here(tiles or tilings.pick("forward", in_tile, 2 * first.shape[1]), first, metadata.spare)
    spare = -M % 8
    out = jax.ShapeDtypeStruct((hopper.stored_rows(M), D), first.dtype)
    stage = {"a": (max(in_tile, 64), _STEP), "b": (COLUMNS, _STEP)}
    kernel = hopper.launch("gated_ffn_dlhs", functools.partial(_dlhs_kernel, t), t, out, stage, first.dtype)
    padded = (jnp.pad(grad, ((0, spare), (0, 0))) for grad in grads)
    return vary_alike(kernel(*row_tiles(metadata, M), *padded, *weights)[:M], first)[0]


def _dlhs_kernel(t: Tiling, count, tiles, dgate, dup, gate, up, out, *, a, b, staging, plain, ready, free):
    E, D, F = gate.shape
    depth, columns = F // _STEP, pl.cdiv(D, 2 * COLUMNS)
    box = hopper.box(dgate.shape[0], E)
    heights, plan = hopper.walk_rows(t, count, tiles, a.shape[1], E, columns, D)

    def load(tile, k, slot, barrier):
        def take(rows, weights, k):
            step = pl.ds(k * _STEP, _STEP)
            hopper.load_rows(rows, tile, step, heights, box, D, a.at[slot], barrier)

            def some(first, width):
                its = weights.at[hopper.weights_of(tile, E), pl.ds(first, width), step]
                plgpu.copy_gmem_to_smem(its, b.at[slot, pl.ds(0, width)], barrier)

            hopper.place_columns(tile, heights, D, some)

        pl.when(k < depth)(lambda: take(dgate, gate, k))
        pl.when(k >= depth)(lambda: take(dup, up, k - depth))

    def compute(wg, tile, accumulate):
        def multiply(first, width, rows):
            def store(acc):
                at, pieces = (tile.row * 8, first), (staging.at[wg], plain.at[wg])
                acc = hopper.nobodys_zeros(acc.astype(out.dtype), tile, E, heights, D)
                hopper.store_rows(acc, out, at, tile.start, tile.stop, *pieces)

            def operands(_, slot):
                return ((a.at[slot, pl.ds(0, rows)], b.at[slot, pl.ds(0, width)].transpose((1, 0))),)

            accumulate(operands, store, ((rows, width),))

        def of(height):
            hopper.place_columns(tile, heights, D, functools.partial(multiply, rows=height))

        hopper.by_height(tile, heights, of)

    steps = lambda tile: jnp.where(tile.lead < E, 2 * depth, 0)  # noqa: E731
    hopper.pipeline(t, plan, steps, load, compute, ready, free)


def _row_blocks(metadata: GroupMetadata) -> int:
    """Of `gradients`: some for each multiprocessor that it has."""
    return (Tiling.blocks - metadata.spare) * 16


def gradients(activation, a, b, dhidden, metadata: GroupMetadata, scale=None):
    """What goes into `down` and, of the gradient of that, the gradients of a, b and, where there is a scale, of scale.

    a, b, dhidden (M, F), scale (M,) f32 -> (hidden, da, db) (M, F) and dscale (M,) f32, of rows up to the sum; those
    past it are left as the memory was, and nothing is spent on them. F in multiples of 128.
    """
    (M, F), scaled = a.shape, scale is not None
    width, blocks = widest(F), _row_blocks(metadata)

    def body(ends, *refs):
        (a, b, dhidden, *scales), (hidden, da, db, *dscales) = refs[: 3 + scaled], refs[3 + scaled :]
        block = lax.axis_index("block")

        def row(i, _):
            r = block + i * blocks
            total = jnp.zeros((width,), jnp.float32)
            for first in range(0, F, width):
                at = r, pl.ds(first, width)
                x, y, grad = load(a.at[at]), load(b.at[at]), load(dhidden.at[at])
                active, slope = _SLOPES[activation](x)
                gated = active * y
                total += grad * gated
                for scale in scales:
                    gated, grad = gated * scale[r], grad * scale[r]
                for out, value in ((hidden, gated), (da, grad * y * slope), (db, grad * active)):
                    out[at] = value.astype(out.dtype)
            for dscale in dscales:
                dscale[r] = jnp.sum(total)

        lax.fori_loop(0, lax.div(ends[ends.shape[0] - 1] - block + blocks - 1, jnp.int32(blocks)), row, None)

    shapes = (jax.ShapeDtypeStruct((M, F), a.dtype),) * 3 + (jax.ShapeDtypeStruct((M,), jnp.float32),) * scaled
    args = metadata.ends, a, b, dhidden, *((scale,) if scaled else ())
    return plain_kernel.run("gated_ffn_gradients", body, {"block": blocks}, shapes, *args, approximate=True)
