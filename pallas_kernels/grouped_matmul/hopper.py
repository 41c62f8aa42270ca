"""What the Hopper kernels share: the ring of stages, one warp that loads, two warpgroups that multiply, the stores."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import schedule

STEP = 64  # of the summed dimension, a stage
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
_BLOCKS = 132  # streaming multiprocessors of an H100 or H200
COLUMNS = 128  # of one block's tile; a cluster's two blocks have neighbouring ones
_ROUNDS = 32  # of tiles, up to which half of the last one counts


@dataclasses.dataclass(frozen=True)
class Tiling:
    """stages of the ring; pieces: staged (64, 64) pieces of the result, a warpgroup's own, beside one for rows among
    others'; blocks in the grid.

    one_warp: the loads are one warp's; else its whole warpgroup's, as inside shard_map.
    """

    stages: int
    pieces: int
    blocks: int = _BLOCKS
    one_warp: bool = True


def launch(name, body, t: Tiling, out, operands, dtype, approximate=False, rows_of_others=True):
    """The kernel around `body`, with its shared memory; out: one result or several of one dtype.

    rows_of_others: whether a tile can hold rows that aren't to be stored; "plain" is for such, beside "staging".

    approximate: the hardware's own exponentials and logarithms, good to two units in float32's last place.

    operands: name -> shape of what a stage of the ring holds, a copy each, or several shapes of one size, views of one
    memory; `body` gets them by name.
    """
    out_dtype = jax.tree.leaves(out)[0].dtype
    piece = 128 // out_dtype.itemsize  # columns
    swizzled = (plgpu.TilingTransform((8, piece)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    # whole pieces leave swizzled; a piece that has other groups' rows leaves by its own rows, which needs them plain
    staging = {"staging": plgpu.SMEM((2, t.pieces, 64, piece), out_dtype, transforms=swizzled)}
    if rows_of_others:
        staging["plain"] = plgpu.SMEM((2, 64, piece), out_dtype)

    def ring(*shapes):
        views = [plgpu.SMEM((t.stages, *shape), dtype, transforms=_SWIZZLED) for shape in shapes]
        return views[0] if len(views) == 1 else plgpu.RefUnion(*views)

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(t.blocks // 2,),
        grid_names=("block",),
        cluster=(2,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types={
            **{n: ring(*s) if isinstance(s[0], tuple) else ring(s) for n, s in operands.items()},
            **staging,
            "ready": plgpu.Barrier(num_arrivals=len(operands), num_barriers=2 * t.stages),
            "free": plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=1, num_barriers=t.stages),
        },
        # what a warpgroup's threads read of each other's writes, they read after a barrier of ours
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=approximate),
    )


def dealt(t: Tiling, count, info, turn=schedule.round_robin):
    """`tiles` of `pipeline`: this cluster's share of `count` tiles, of which info(lin) gives the scalars.

    turn: which tiles a cluster takes, `schedule.round_robin` or `back_and_forth`.
    """
    clusters = t.blocks // 2
    nth = functools.partial(turn, cluster=lax.axis_index("block"), clusters=clusters)
    return schedule.turns(count, nth, clusters), jnp.int32(0), lambda i: (info(nth(i)), i + 1)


def dealt_both(t: Tiling, lists, info, turn=schedule.round_robin):
    """`dealt` of two lists of tiles, the taller and the lower ones: a cluster gets its share of each, so that none has
    more to multiply, and takes them in one order.

    lists: two of (count, head), where head(lin) -> (place in the order, what info needs). info(…, whether it is of the
    first list) -> a tile's scalars.
    """
    clusters, block = t.blocks // 2, lax.axis_index("block")
    rest = lax.rem(jnp.int32(lists[0][0]), jnp.int32(clusters))
    late = lax.rem(block + clusters - rest, jnp.int32(clusters))  # who has one tall tile less comes first
    lists = [
        (functools.partial(turn, cluster=cluster, clusters=clusters), *one)
        for cluster, one in zip((block, late), lists, strict=True)
    ]

    def next_of(i, nth, count, head):
        place, what = head(nth(i))
        return jnp.where(nth(i) < count, place, jnp.iinfo(jnp.int32).max), what

    def take(state):
        (place, tall), (other, flat) = (next_of(i, *one) for i, one in zip(state, lists, strict=True))
        first = place <= other
        step = first.astype(jnp.int32)
        one = info(*(jnp.where(first, a, b) for a, b in zip(tall, flat, strict=True)), step)
        return one, (state[0] + step, state[1] + 1 - step)

    mine = sum(schedule.turns(count, nth, clusters) for nth, count, _ in lists)
    return mine, (jnp.int32(0), jnp.int32(0)), take


def by_height(tile, heights, body):
    """body(height of the tile), which is one of at most two."""
    if len(heights) == 1:
        return body(heights[0])
    for height, last in zip(heights, (1, 0), strict=True):
        pl.when(tile[-1] == last)(functools.partial(body, height))


def pipeline(t: Tiling, tiles, steps, load, compute, ready, free, alternate=False):
    """Runs this block's share of tiles: the loading warp, and the two compute warpgroups by turns.

    tiles: `dealt` or `dealt_both`: how many, a state, and take(state) -> a tile's scalars and the state after it;
    steps(tile): how many stages it takes; load(tile, k, slot, barrier) fills a slot; compute(warpgroup, tile,
    accumulate), where accumulate(operands, store, sums) multiplies all its steps: operands(k, slot) gives the two
    factors of every accumulator, whose shapes are `sums`, and store takes their values.

    alternate: every second tile's steps are loaded from the last to the first, for what the tile before had last is
    still in the cache; the k of `operands` then isn't that of `load`.
    """
    mine, before, take = tiles

    def slot(step):
        return lax.rem(step, jnp.int32(t.stages))

    def walk(body):
        """body(i, tile, steps before it) for every tile, the next one's scalars on their way meanwhile."""

        def loop(i, carry):
            tile, state, base = carry
            following, state = take(state)
            body(i, tile, base)
            return following, state, base + steps(tile)

        return lax.fori_loop(0, mine, loop, (*take(before), jnp.int32(0)))[2]

    def producer():
        plgpu.set_max_registers(24, action="decrease")

        def loads(i, tile, base):
            odd = lax.rem(i, jnp.int32(2))

            def step(k, _):
                place = slot(base + k)
                pl.when(base + k >= t.stages)(lambda: plgpu.barrier_wait(free.at[place]))
                which = jnp.where(odd == 1, steps(tile) - 1 - k, k) if alternate else k
                load(tile, which, place, ready.at[odd * t.stages + place])

            lax.fori_loop(0, steps(tile), step, None)

        def work():
            total = walk(loads)
            for place in range(t.stages):  # no block leaves while its neighbour may still signal it
                pl.when(total > place)(functools.partial(plgpu.barrier_wait, free.at[place]))

        # the warp map refuses shared memory beside arrays that vary over a mesh axis
        plgpu.warp_map(lambda warp: pl.when(warp == 0)(work)) if t.one_warp else work()

    def consumer(wg):
        plgpu.set_max_registers(240, action="increase")

        def product(i, tile, base):
            def accumulate(operands, store, sums):
                total = steps(tile)

                def step(accs, k):
                    plgpu.barrier_wait(ready.at[wg * t.stages + slot(base + k)])
                    for acc, factors in zip(accs, operands(k, slot(base + k)), strict=True):
                        plgpu.wgmma(acc, *factors)
                    plgpu.wgmma_wait(len(accs))
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot(base + k + (t.stages - 1))]))

                def run(*accs):
                    lax.fori_loop(0, total, lambda k, _: step(accs, k), None)
                    plgpu.wgmma_wait(0)
                    pl.when(total > 0)(lambda: plgpu.barrier_arrive(free.at[slot(base + total + (t.stages - 1))]))
                    store(*(acc[...] for acc in accs))

                pl.run_scoped(run, *(plgpu.ACC(shape) for shape in sums))

            pl.when(lax.rem(i, jnp.int32(2)) == wg)(lambda: compute(wg, tile, accumulate))

        walk(product)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    wg = lax.axis_index("warpgroup")
    lax.cond(wg == 2, producer, lambda: consumer(wg))  # one piece of code for both


class RowTile(NamedTuple):
    """Scalars of a row tile times columns, i32: its group, first row / 8, the first and the last + 1 of its rows that
    count, its pair of columns, and half: 0, or 1 or 2 where it is taken in halves of its columns; None: none is.

    lead: the group by which both blocks of the cluster have products to sum or, from E on, none: the tile's, but where
    each block has a tile of its own (`own_rows`) the first block's. tall: whether it is of the first of two lists.
    """

    group: jax.Array
    row: jax.Array
    start: jax.Array
    stop: jax.Array
    column: jax.Array
    half: jax.Array | None
    lead: jax.Array
    tall: jax.Array


def walk_rows(t: Tiling, counts, tiles, rows: int, E: int, columns: int, N: int = 1):
    """(heights of the tiles, `tiles` of `pipeline`) over the row tiles (T, 7) of `schedule.row_tiles` times `columns`.

    rows: of a stage. A tile's scalars are a `RowTile`.
    """
    if rows == schedule.TALL:
        return (rows, schedule.ROWS), _walk_both(t, counts, tiles, E, columns, own_rows(N, rows))
    turns, whole = in_halves(counts[0] * columns, tiles.shape[0] * columns, N, t)

    def info(lin):
        lin, half = (lin, None) if whole is None else schedule.half_of(lin, whole)
        last = jnp.maximum(counts[0] - 1, 0)
        some = jnp.minimum(lax.div(lin, jnp.int32(columns)), last)
        tile, column = schedule.place(lin, tiles[some, 4], tiles[some, 5], columns)
        group, row, start, stop = (tiles[jnp.minimum(tile, last), i] for i in range(4))
        return RowTile(group, row, start, stop, column, half, group, jnp.int32(0))

    return (rows,), dealt(t, turns, info)


def _walk_both(t: Tiling, counts, tiles, E: int, columns: int, own: bool):
    """`walk_rows` of tall and low tiles; own: `own_rows`."""
    sweep_of, place = (schedule.own_sweep, schedule.place_own) if own else (lax.div, schedule.place)
    turns = [schedule.own_turns(counts[i], columns) if own else counts[i] * columns for i in range(2)]
    firsts = 0, tiles.shape[0] - schedule.most_low(E)

    def head(lin, count, first):
        last = jnp.maximum(count - 1, 0)
        some = first + jnp.minimum(sweep_of(lin, jnp.int32(columns)), last)
        tile, column = place(lin, tiles[some, 4], tiles[some, 5], columns)
        return tiles[some, 6] * columns + column, (first + jnp.minimum(tile, last), column)

    def info(tile, column, tall):
        mine = last = tile
        if own:
            mine = tile + jnp.where(column == columns - 1, lax.axis_index("pair"), 0)
            # also where there is no tall tile, which a turn after the last is taken for
            last = jnp.where(tall == 1, jnp.maximum(counts[0], 1), firsts[1] + counts[1]) - 1
        group, row, start, stop = (tiles[jnp.minimum(mine, last), i] for i in range(4))
        if own:
            start = jnp.where(mine > last, stop, start)  # no rows: of an odd number of tiles the last is alone
        return RowTile(group, row, start, stop, column, None, tiles[tile, 0] if own else group, tall)

    heads = [functools.partial(head, count=counts[i], first=firsts[i]) for i in range(2)]
    return dealt_both(t, list(zip(turns, heads, strict=True)), info)


def box(M: int, E: int) -> int:
    """How many rows a load takes: a tile's, or all M, in sixteens since each block of a pair loads a half."""
    return min(schedule.tile_rows(M, E), pl.cdiv(M, 16) * 16)


def stored_rows(M: int) -> int:
    """Rows of a result: M, in the eights that a swizzled copy takes unless no copy is of 64 rows."""
    return M if M < 64 else pl.cdiv(M, 8) * 8


def load_rows(rows, tile: RowTile, step, heights, most: int, N: int, stage, barrier):
    """A tile's rows, at most `most`, to both blocks of the pair, or to each its own (`own_rows`). Of one that isn't
    tall those up to its last, by 32s or halves of less; beside tall tiles by halves, as the loading warp has no
    registers for more."""

    def take(size):
        source, target = rows.at[pl.ds(tile.row * 8, size), step], stage.at[pl.ds(0, size)]
        both = functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier, collective_axes="pair")
        if not own_rows(N, heights[0]):
            return both()
        last = N // (2 * COLUMNS)
        pl.when(tile.column < last)(both)
        pl.when(tile.column == last)(functools.partial(plgpu.copy_gmem_to_smem, source, target, barrier))

    def of(height):
        size = min(height, most)
        if size == schedule.TALL or size % 32:  # each block loads a half, in eights
            take(size)
        else:
            unit = size // 2 if len(heights) > 1 else min(size // 2, 32)
            for some in range(unit, size + 1, unit):
                pl.when((tile.stop > some - unit) & (tile.stop <= some))(functools.partial(take, some))

    by_height(tile, heights, of)


def weights_of(tile: RowTile, E: int):
    """The group whose weights a tile reads; rows of nobody in a pair whose other tile has a group read some too."""
    return jnp.minimum(tile.group, E - 1)


def nobodys_zeros(acc, tile: RowTile, E: int, heights, N: int):
    """acc, or zeros of rows of nobody, which have products where the other block's tile has a group (`own_rows`)."""
    if not own_rows(N, heights[0]):
        return acc
    return jnp.where(lax.broadcast(tile.group < E, acc.shape), acc, jnp.zeros_like(acc))


def first_column(column, width=COLUMNS):
    """Of this block's tile in the column-th pair."""
    return column * (2 * COLUMNS) + lax.axis_index("pair") * width


def in_halves(count, most: int, N: int, t: Tiling):
    """`schedule.halves` of `count` tiles, of `most` that there may be; a half is 64 columns of each block.

    None where N isn't whole pairs of tiles, or where a last round is too little to compile another product for.
    """
    clusters = t.blocks // 2
    if N % (2 * COLUMNS) or most > _ROUNDS * clusters:
        return count, None
    return schedule.halves(count, clusters)


def own_rows(N: int, rows: int) -> bool:
    """Whether N's last 128 columns are taken by two tall or low tiles at once, one a block, not by 64 columns each."""
    return rows == schedule.TALL and N % (2 * COLUMNS) == COLUMNS


def place_columns(tile: RowTile, heights, N: int, body):
    """body(first column, width) of this block's tile, or of its share of a half; the two blocks share what is left for
    the last pair of N, or have rows of their own there (`own_rows`)."""
    narrow = COLUMNS // 2
    last, rest = divmod(N, 2 * COLUMNS)
    if own_rows(N, heights[0]):
        return body(jnp.where(tile.column == last, last * 2 * COLUMNS, first_column(tile.column)), COLUMNS)
    if rest in (narrow, COLUMNS):
        some, all_of_it, right = tile.column == last, tile.column < last, jnp.int32(0)
    elif tile.half is not None:
        some, all_of_it, right = tile.half > 0, tile.half == 0, jnp.maximum(tile.half - 1, 0)
    else:
        return body(first_column(tile.column), COLUMNS)
    pl.when(some)(lambda: body(first_column(tile.column, narrow) + right * COLUMNS, narrow))
    pl.when(all_of_it)(lambda: body(first_column(tile.column), COLUMNS))


def store_whole(acc, out, at, stages, turn, turned=False):
    """acc (64, …), turned (…, 64), to out's rows and columns from `at` on; turn: how many rows were stored before."""
    row, column = at
    pieces, _, wide = stages.shape
    columns = acc.shape[0 if turned else 1] // wide
    for i in range(columns):
        before = i + turn // 64 * columns  # pieces of this tile, of which the second half's may have been left out
        stage = stages.at[before % pieces]
        plgpu.wait_smem_to_gmem(before if before < pieces else min(1, pieces - 1), wait_read_only=True)
        _stage(acc, i, stage, turned)
        plgpu.copy_smem_to_gmem(stage, out.at[pl.ds(row, 64), pl.ds(column + i * wide, wide)])


def _store_some(acc, out, at, start, stop, stage, turned):
    """Of acc (64, …), turned (…, 64), the rows [start, stop): as many copies as the binary number of rows has ones."""
    row, column = at
    wide = stage.shape[1]
    for i in range(acc.shape[0 if turned else 1] // wide):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _stage(acc, i, stage, turned)
        first = start
        # a copy of one row is a plain run of bytes to the copy engine, which would end in the next row
        inside = column + i * wide < out.shape[1]
        for size in (32, 16, 8, 4, 2, 1):
            target = out.at[pl.ds(row + first, size), pl.ds(column + i * wide, wide)]
            copy = functools.partial(plgpu.copy_smem_to_gmem, stage.at[pl.ds(first, size)], target)
            pl.when((((stop - start) & size) != 0) & inside)(copy)
            first = first + ((stop - start) & size)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _stage(acc, i, stage, turned):
    """The i-th of acc's pieces to `stage` (64, wide), for the copy engine to see."""
    wide = stage.shape[1]
    if turned:
        value = plgpu.layout_cast(acc[i * wide : (i + 1) * wide], plgpu.Layout.WGMMA_TRANSPOSED)
        stage.transpose((1, 0))[...] = value
    else:
        stage[...] = acc[:, i * wide : (i + 1) * wide]
    plgpu.commit_smem()


def store_rows(acc, out, at, start, stop, stages, plain, *, turn=0, turned=False):
    """acc's rows [start, stop), or columns if turned, to out's rows and columns from `at` on; turn: see store_whole."""
    row, column = at
    for r in range(0, acc.shape[1 if turned else 0], 64):
        part, here = (acc[:, r : r + 64] if turned else acc[r : r + 64]), (row + r, column)
        first, last = jnp.maximum(start - r, 0), jnp.minimum(stop - r, 64)
        whole = last - first == 64
        if out.shape[0] >= 64:  # see stored_rows
            pl.when(whole)(functools.partial(store_whole, part, out, here, stages, turn + r, turned))
        some = functools.partial(_store_some, part, out, here, first, last, plain, turned)
        pl.when((last > first) & jnp.logical_not(whole))(some)
