"""The gated feed-forward's own products on Hopper: gate and up with the activation between, and the gradient of both.

The pipeline is `grouped_matmul`'s. In `hidden`, the two blocks of a cluster take the two halves of a tile of 128 rows
and both multiply by the same 128 columns of gate and of up, which the copy engine sends to both: two accumulators of
64 × 128 and the same traffic as one of 128 × 128.

Limits: those of `grouped_matmul.mosaic_gpu`.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import hopper, schedule
from pallas_kernels.grouped_matmul.hopper import COLUMNS, Tiling
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.mosaic_gpu import FORWARD, here
from pallas_kernels.vary import vary_alike

_ROWS, _STEP, _HALF = schedule.ROWS, hopper.STEP, 64
HIDDEN = Tiling(stages=5, pieces=1)  # a stage is 40 KiB
ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0),
}


def hidden(activation, rows, gate, up, metadata: GroupMetadata, keep: bool, tiles: Tiling | None = None):
    """(activation(rows · gate) ∘ (rows · up)), (M, F) of rows' dtype; keep: the two products (M, F) as well.

    rows (M, D) sorted by group, gate and up (E, D, F). Rows past the sum come out as zeros.
    """
    M, F = rows.shape[0], gate.shape[2]
    t = here(tiles or HIDDEN, rows)
    spare = -M % 8
    out = (jax.ShapeDtypeStruct((M + spare, F), rows.dtype),) * (3 if keep else 1)
    stage = {"a": (_HALF, _STEP), "b": (_STEP, COLUMNS), "c": (_STEP, COLUMNS)}
    body = functools.partial(_hidden_kernel, t, ACTIVATIONS[activation], 1 + 2 * keep)
    kernel = hopper.launch("gated_ffn_hidden", body, t, out, stage, rows.dtype)
    results = kernel(*_table(metadata, M), jnp.pad(rows, ((0, spare), (0, 0))), gate, up)
    return tuple(vary_alike(result[:M], rows)[0] for result in results)


def _hidden_kernel(t: Tiling, activation, outputs, count, tiles, rows, gate, up, *refs, a, b, c, staging, ready, free):
    outs = refs[:outputs]
    E, depth = gate.shape[0], rows.shape[1] // _STEP
    columns = pl.cdiv(gate.shape[2], COLUMNS)
    half = lax.axis_index("pair") * _HALF
    info = hopper.walk_rows(tiles, columns)

    def load(tile, k, slot, barrier):
        group, row, _, _, column = tile
        step, wide = pl.ds(k * _STEP, _STEP), pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(rows.at[pl.ds(row * 8 + half, _HALF), step], a.at[slot], barrier)
        plgpu.copy_gmem_to_smem(gate.at[group, step, wide], b.at[slot], barrier, collective_axes="pair")
        plgpu.copy_gmem_to_smem(up.at[group, step, wide], c.at[slot], barrier, collective_axes="pair")

    def compute(wg, tile, accumulate):
        _, row, start, stop, column = tile

        def operands(_, slot):
            return (a.at[slot], b.at[slot]), (a.at[slot], c.at[slot])

        def store(gated, plain):
            at = row * 8 + half, column * COLUMNS
            for turn, value in enumerate((activation(gated) * plain, gated, plain)[:outputs]):
                value = value.astype(outs[turn].dtype)
                hopper.store_rows(value, outs[turn], at, start - half, stop - half, *staging[wg], turn=turn * _HALF)

        accumulate(operands, store)

    hopper.pipeline(
        t,
        count[0] * columns,
        info,
        lambda tile: jnp.where(tile[0] < E, depth, 0),
        load,
        compute,
        ready,
        free,
        sums=((_HALF, COLUMNS),) * 2,
    )


def dlhs(grads, weights, metadata: GroupMetadata, tiles: Tiling | None = None):
    """grads[0] · weights[0]ᵀ + grads[1] · weights[1]ᵀ, summed in one accumulator: (M, F) twice, (E, D, F) -> (M, D)."""
    first, M, D = grads[0], grads[0].shape[0], weights[0].shape[1]
    t = here(tiles or FORWARD, first)
    spare = -M % 8
    out = jax.ShapeDtypeStruct((M + spare, D), first.dtype)
    stage = {"a": (_ROWS, _STEP), "b": (COLUMNS, _STEP)}
    kernel = hopper.launch("gated_ffn_dlhs", functools.partial(_dlhs_kernel, t), t, out, stage, first.dtype)
    padded = (jnp.pad(grad, ((0, spare), (0, 0))) for grad in grads)
    return vary_alike(kernel(*_table(metadata, M), *padded, *weights)[:M], first)[0]


def _dlhs_kernel(t: Tiling, count, tiles, dgate, dup, gate, up, out, *, a, b, staging, ready, free):
    E, D, F = gate.shape
    depth, columns = F // _STEP, pl.cdiv(D, 2 * COLUMNS)
    info = hopper.walk_rows(tiles, columns)

    def load(tile, k, slot, barrier):
        group, row, _, _, column = tile

        def take(rows, weights, k):
            step, wide = pl.ds(k * _STEP, _STEP), pl.ds(hopper.first_column(column), COLUMNS)
            here = rows.at[pl.ds(row * 8, _ROWS), step]
            plgpu.copy_gmem_to_smem(here, a.at[slot], barrier, collective_axes="pair")
            plgpu.copy_gmem_to_smem(weights.at[group, wide, step], b.at[slot], barrier)

        pl.when(k < depth)(lambda: take(dgate, gate, k))
        pl.when(k >= depth)(lambda: take(dup, up, k - depth))

    def compute(wg, tile, accumulate):
        _, row, start, stop, column = tile

        def store(acc):
            at = row * 8, hopper.first_column(column)
            hopper.store_rows(acc.astype(out.dtype), out, at, start, stop, *staging[wg])

        accumulate(lambda _, slot: ((a.at[slot], b.at[slot].transpose((1, 0))),), store)

    steps = lambda tile: jnp.where(tile[0] < E, 2 * depth, 0)  # noqa: E731
    hopper.pipeline(t, count[0] * columns, info, steps, load, compute, ready, free)


def _table(metadata: GroupMetadata, M):
    return metadata.row_tiles or schedule.row_tiles(metadata.starts, metadata.ends, M)
