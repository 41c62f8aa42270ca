"""Grouped products on Hopper, in Mosaic GPU: persistent blocks, one warp that loads, two warpgroups that multiply.

The loading warp runs ahead through a ring of shared-memory stages, over tile boundaries, so that the loads of the next
tile hide behind the multiplication of this one. The warpgroups take turns: each has tiles of its own, 192 × 128 or
128 × 128, and stores one while the other multiplies. The two blocks of a cluster take neighbouring columns of the same
rows, which the copy engine sends to both, or the last 128 columns of a row tile each. README.md draws it.

Limits: Hopper; bfloat16 or float16; K and N multiples of 64.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import hopper, schedule, tilings
from pallas_kernels.grouped_matmul.hopper import COLUMNS, Tiling
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.vary import vary_alike

_ROWS, _TALL = schedule.ROWS, schedule.TALL
_STEP = hopper.STEP
_LONG = 64  # steps: sums of 4096 terms, from which on what a round of tiles reads is more than the cache holds


def why_not(lhs, rhs, transpose_rhs: bool) -> str | None:
    """None where `forward` and `drhs` run these; else what they would need."""
    del transpose_rhs  # either way round
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return "it needs bfloat16 or float16"
    if rhs.shape[1] % 64 or rhs.shape[2] % 64:
        return "it needs K and N in multiples of 64"
    return None if _hopper() else "it needs a Hopper GPU"


def _hopper() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def forward(lhs, rhs, group_sizes, metadata: GroupMetadata, transpose_rhs, out_dtype, tiles: Tiling | None = None):
    """(M, K) × (E, K, N) -> (M, N); with transpose_rhs, rhs is (E, N, K), read as it lies."""
    del group_sizes
    M, N = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    rows = schedule.tile_rows(M, rhs.shape[0])
    t = here(tiles or tilings.pick("forward", rows, lhs.shape[1]), lhs, metadata.spare)
    spare = -M % 8  # the copy engine takes rows in eights
    table = row_tiles(metadata, M)
    # 64 columns alone lie otherwise than 64 of 128
    weights = ((COLUMNS, _STEP),) if transpose_rhs else ((_STEP, COLUMNS), (2, _STEP, COLUMNS // 2))
    out = jax.ShapeDtypeStruct((hopper.stored_rows(M), N), out_dtype)
    body = functools.partial(_forward_kernel, t, transpose_rhs)
    stage = {"a": (max(rows, 64), _STEP), "b": weights}
    kernel = hopper.launch("grouped_matmul", body, t, out, stage, lhs.dtype)
    result = kernel(*table, jnp.pad(lhs, ((0, spare), (0, 0))), rhs)[:M]
    return vary_alike(result, lhs)[0]  # the kernel's own type knows of no mesh


def drhs(lhs, grad, group_sizes, metadata: GroupMetadata, out_dtype, tiles: Tiling | None = None):
    """(M, K), (M, N) -> (E, K, N): each group's lhsᵀ · grad."""
    del group_sizes
    return drhs_of(((lhs, grad, metadata),), out_dtype, tiles)


def drhs_of(parts, out_dtype, tiles: Tiling | None = None):
    """`drhs` of groups whose rows are in several arrays: parts of (lhs (M, K), grad (M, N), metadata), summed in one
    accumulator. Multiprocessors are left as the first one's metadata says."""
    (lhs, grad, metadata), E = parts[0], parts[0][2].ends.shape[0]
    M, K, N = sum(lhs.shape[0] for lhs, _, _ in parts), lhs.shape[1], grad.shape[1]
    t = here(tiles or tilings.pick("drhs", _ROWS, M // max(E, 1)), lhs, metadata.spare)
    out = jax.ShapeDtypeStruct((E, K, N), out_dtype)
    both = len(drhs_heights(K)) == 2
    # a lower tile's stage lies in the same memory as a tall one's, in rows of its own width
    rows = ((_STEP, _TALL), (_STEP * _TALL // _ROWS, _ROWS)) if both else (_STEP, *drhs_heights(K))
    stage = {"a": rows, "b": (_STEP, COLUMNS)}
    body = functools.partial(_drhs_kernel, t)
    kernel = hopper.launch("grouped_matmul_drhs", body, t, out, stage, lhs.dtype, rows_of_others=False)
    order = metadata.by_size if len(parts) == 1 else None
    if order is None:
        starts, ends = (sum(getattr(m, name) for _, _, m in parts) for name in ("starts", "ends"))
        order = schedule.by_size(starts, ends)
    args = [order]
    for lhs, grad, metadata in parts:
        spare = ((0, -lhs.shape[0] % 8), (0, 0))  # the copy engine takes rows in eights
        args += [metadata.starts, metadata.ends, jnp.pad(lhs, spare), jnp.pad(grad, spare)]
    return vary_alike(kernel(*args), lhs)[0]


def row_tiles(metadata: GroupMetadata, M: int):
    """`schedule.row_tiles` of the metadata."""
    return metadata.row_tiles or schedule.row_tiles(metadata.starts, metadata.ends, M, metadata.tail)


def here(t: Tiling, lhs, spare: int) -> Tiling:
    """`t` as it runs here: inside shard_map or not, and with `spare` of the GPU's multiprocessors left free."""
    varies = bool(jax.typeof(lhs).manual_axis_type.varying)
    return dataclasses.replace(t, blocks=t.blocks - spare, one_warp=t.one_warp and not varies)


def _forward_kernel(t: Tiling, transpose_rhs, count, tiles, lhs, rhs, out, *, a, b, staging, plain, ready, free):
    E, N, depth = rhs.shape[0], out.shape[1], lhs.shape[1] // _STEP
    columns = pl.cdiv(N, 2 * COLUMNS)
    # few rows are all that is loaded; a product reads 64 for them, and what it makes of the others is not stored
    box = hopper.box(lhs.shape[0], E)
    heights, plan = hopper.walk_rows(t, count, tiles, a.shape[1], E, columns, N)

    def stage(slot, width):
        """Of weights, as they lie in rhs."""
        if transpose_rhs:
            return b.at[slot, pl.ds(0, width)]
        return b[0].at[slot] if width == COLUMNS else b[1].at[slot, 0]

    def load(tile, k, slot, barrier):
        step = pl.ds(k * _STEP, _STEP)
        hopper.load_rows(lhs, tile, step, heights, box, N, a.at[slot], barrier)

        def weights(first, width):
            at = (pl.ds(first, width), step) if transpose_rhs else (step, pl.ds(first, width))
            plgpu.copy_gmem_to_smem(rhs.at[hopper.weights_of(tile, E), *at], stage(slot, width), barrier)

        hopper.place_columns(tile, heights, N, weights)

    def compute(wg, tile, accumulate):
        def multiply(first, width, rows):
            def operands(_, slot):
                weights = stage(slot, width)
                return ((a.at[slot, pl.ds(0, rows)], weights.transpose((1, 0)) if transpose_rhs else weights),)

            def store(acc):
                at, pieces = (tile.row * 8, first), (staging.at[wg], plain.at[wg])
                acc = hopper.nobodys_zeros(acc.astype(out.dtype), tile, E, heights, N)
                hopper.store_rows(acc, out, at, tile.start, tile.stop, *pieces)

            accumulate(operands, store, ((rows, width),))

        def of(height):
            hopper.place_columns(tile, heights, N, functools.partial(multiply, rows=height))

        hopper.by_height(tile, heights, of)

    steps = lambda tile: jnp.where(tile.lead < E, depth, 0)  # noqa: E731
    # 1.2% faster in the mean at Mixtral, DeepSeek-V3 and Kimi; of weights read transposed nothing was gained
    alternate = depth >= _LONG and len(heights) == 2 and not transpose_rhs
    hopper.pipeline(t, plan, steps, load, compute, ready, free, alternate)


def _drhs_kernel(t: Tiling, by_size, *refs, a, b, staging, ready, free):
    *operands, out = refs
    parts = [operands[i : i + 4] for i in range(0, len(operands), 4)]  # starts, ends, lhs, grad
    E, K, N = out.shape
    heights, plan = _walk_drhs(t, by_size, parts, E, K, pl.cdiv(N, 2 * COLUMNS))

    def left(slot, height):
        if len(heights) == 1:
            return a.at[slot]
        return a[0].at[slot] if height == _TALL else a[1].at[slot, pl.ds(0, _STEP)]

    def rows_of(tile):
        return [tile[i : i + 3] for i in range(3, len(tile) - 1, 3)]

    def steps_of(eighth, start, end):
        return jnp.where(end > start, lax.div(end - eighth * 8 + (_STEP - 1), jnp.int32(_STEP)), 0)

    def steps(tile):
        return sum(steps_of(*rows) for rows in rows_of(tile))

    def load(tile, k, slot, barrier):
        _, first, column, *_ = tile

        def take(eighth, k, lhs, grad):
            rows = pl.ds((eighth + k * 8) * 8, _STEP)

            def of(height):
                source, target = lhs.at[rows, pl.ds(first * 64, height)], left(slot, height)
                plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes="pair")

            hopper.by_height(tile, heights, of)
            plgpu.copy_gmem_to_smem(grad.at[rows, pl.ds(hopper.first_column(column), COLUMNS)], b.at[slot], barrier)

        before = jnp.int32(0)
        for turn, (rows, (_, _, lhs, grad)) in enumerate(zip(rows_of(tile), parts, strict=True)):
            some = functools.partial(take, rows[0], k - before, lhs, grad)
            count = steps_of(*rows)
            if len(parts) == 1:
                some()
            else:
                last = turn == len(parts) - 1
                pl.when((k >= before) & (last | (k < before + count)))(some)
            before += count

    def compute(wg, tile, accumulate):
        group, first, column, *_ = tile

        def stage_rows(k):
            """Where the k-th stage begins, and the first and last + 1 of its part's rows."""
            (eighth, start, end), *others = rows_of(tile)
            row, before = eighth * 8 + k * _STEP, steps_of(eighth, start, end)
            for eighth, first, last in others:
                late = k >= before
                row = jnp.where(late, eighth * 8 + (k - before) * _STEP, row)
                start, end = jnp.where(late, first, start), jnp.where(late, last, end)
                before += steps_of(eighth, first, last)
            return row, start, end

        def factors(k, slot, height):
            row, start, end = stage_rows(k)
            rows = left(slot, height)

            def mask():
                _keep_rows((rows, b.at[slot]), start - row, end - row)
                plgpu.commit_smem()

            pl.when((row < start) | (row + _STEP > end))(mask)
            return ((rows.transpose((1, 0)), b.at[slot]),)

        def store(acc):
            for r in range(0, acc.shape[0], 64):
                at = first * 64 + r, hopper.first_column(column)
                hopper.store_whole(acc[r : r + 64].astype(out.dtype), out.at[group], at, staging.at[wg], r)

        def of(height):
            accumulate(functools.partial(factors, height=height), store, ((height, COLUMNS),))

        hopper.by_height(tile, heights, of)

    hopper.pipeline(t, plan, steps, load, compute, ready, free)


def _walk_drhs(t: Tiling, by_size, parts, E: int, K: int, columns: int):
    """(heights of the tiles, `tiles` of `hopper.pipeline`) over a weight gradient's tiles: the groups largest first.

    Tall tiles, and low ones for the rest of K. Large groups have low ones alone where K is made of them: a group with a
    third of all rows has fewer tall ones than there are clusters, each half as long as a cluster's share of everything.

    A tile's scalars: group, first row of K / 64, column, of every part its first row / 8, first row and last + 1, and
    last, whether it is a tall one of two heights.
    """
    units, heights, turn = pl.cdiv(K, 64), drhs_heights(K), schedule.back_and_forth
    high, low = schedule.heights(units)
    lows = units // 2 if high and not units % 2 else 0  # tiles of a large group
    large = by_size[E] if lows else jnp.int32(0)
    sweeps, of_large = max(pl.cdiv(high, schedule.TALL_WIDTH), 1), max(pl.cdiv(lows, schedule.WIDTH), 1)
    most = max(sweeps, of_large)

    def place(lin, before, each, sweeps, skipped=0):
        """Of groups after the `before` first, with `each` tiles a group: a tile's place in the order, its group's place
        by size, its number and column. sweeps: of a group; skipped: how many of its sweeps come before these."""
        sweep = max(pl.cdiv(each, sweeps), 1)
        nth = jnp.minimum(lax.div(lin, jnp.int32(max(each, 1) * columns)), E - 1)
        within = lin - nth * (each * columns)
        of = lax.div(within, jnp.int32(sweep * columns))
        tile, column = schedule.place(within, of * sweep, jnp.clip(each - of * sweep, 1, sweep), columns)
        return ((before + nth) * most + of + skipped) * columns + column, before + nth, tile, column

    def tall(lin):
        order, nth, tile, column = place(lin, large, high, sweeps)
        return order, (nth, tile * (_TALL // 64), column)

    def flat(lin):
        of_them = large * (lows * columns)
        order, nth, tile, column = place(lin - of_them, large, low, 1, sweeps - 1)
        found = order, nth, high * (_TALL // 64) + tile * (_ROWS // 64), column
        if lows:
            order, nth, tile, column = place(lin, 0, lows, of_large)
            its = order, nth, tile * (_ROWS // 64), column
            order, *what = (jnp.where(lin < of_them, one, other) for one, other in zip(its, found, strict=True))
            return order, what
        return order, found[1:]

    def scalars(nth, first, column, tall):
        group = by_size[jnp.minimum(nth, E - 1)]
        rows = [(lax.div(starts[group], jnp.int32(8)), starts[group], ends[group]) for starts, ends, *_ in parts]
        return group, first, column, *(number for part in rows for number in part), tall

    others = E - large
    if len(heights) == 2:
        counts = others * (high * columns), large * (lows * columns) + others * (low * columns)
        return heights, hopper.dealt_both(t, list(zip(counts, (tall, flat), strict=True)), scalars, turn)
    count, head = (high, tall) if high else (low, flat)
    alone = functools.partial(scalars, tall=jnp.int32(0))
    return heights, hopper.dealt(t, E * columns * count, lambda lin: alone(*head(lin)[1]), turn)


def drhs_heights(K: int) -> tuple[int, ...]:
    """Of a weight gradient's tiles, the tallest first."""
    units = pl.cdiv(K, 64)
    high, low = schedule.heights(units)
    # of low ones alone, for large groups, where K is made of them
    return tuple(rows for rows, some in ((_TALL, high), (_ROWS, low or not units % 2)) if some)


def _keep_rows(refs, start, stop):
    """Zeros in the other rows of stages (64, 128) or (64, 192); start is below 8, since a group's first stage begins
    with it.

    Only the rows around an end are read; the threads' accesses are of 16 bytes.
    """
    # four pieces of 8 × 64 are what a layout of 16 bytes a thread fills
    _keep_rows_of([ref.at[:, pl.ds(0, 128)] for ref in refs], (16, 128), start, stop)
    narrow = [ref.at[:, pl.ds(128, 64)] for ref in refs if ref.shape[1] == _TALL]
    if narrow:
        _keep_rows_of(narrow, (32, 64), start, stop)


def _keep_rows_of(refs, shape, start, stop):
    """`_keep_rows`, so many rows at once."""
    rows = shape[0]
    layout = plgpu.Layout.SMEM_GMEM_COPY(shape, refs[0].dtype, 128)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

    def part(i):
        return [ref.at[pl.ds(i * rows, rows)] for ref in refs]

    def mask(i):
        inside = (row >= start - i * rows) & (row < stop - i * rows)
        values = [plgpu.load(ref, layout=layout) for ref in part(i)]
        for ref, value in zip(part(i), values, strict=True):
            ref[...] = jnp.where(inside, value, jnp.zeros_like(value))

    def clear(i, _):
        for ref in part(i):
            ref[...] = plgpu.layout_cast(jnp.zeros(shape, ref.dtype), layout)

    def tail():
        last = lax.div(stop, jnp.int32(rows))
        mask(last)
        lax.fori_loop(last + 1, _STEP // rows, clear, None)

    pl.when(start > 0)(lambda: mask(0))
    pl.when(stop < _STEP)(tail)
