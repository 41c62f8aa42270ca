"""Which blocks the TPU kernels take at each step of their grid, and how large they are: plain functions of a table.

A *visit* is a block of rows and one of the groups in it (a block that two groups share has two visits). A *sweep* is a
run of visits of one group; its steps go down its rows, then on to the next column of the weights.
"""

import dataclasses
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata

LANES = 128
PIECE = 512  # columns multiplied at a time
# the table's rows, one column a visit
GROUP, BLOCK, START, STOP, FIRST, COUNT, OPEN, FETCH = range(8)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """rows in a block, width of a column (of K if deep), how many blocks of rows a sweep keeps (0: one column)."""

    rows: int
    width: int
    keep: int
    deep: bool = False


# ---- Which block each step takes.


def row_visits(metadata: GroupMetadata, M: int, t: Tiling, gradient: bool = False) -> tuple[jax.Array, jax.Array]:
    """The visits' table, (8, V) i32, V a bound known beforehand, and how many visits there are, () i32.

    Rows of the table: group; block of rows; the first and the last + 1 of the block's rows that are the group's (both
    the same where there is nothing to multiply); the sweep's first visit and how many it has; whether the next visit is
    of the same block; the block of rows to fetch, which stays where none is needed. Forward: groups with rows, then the
    rows past the sum. Gradient: every group, the empty ones too, a sweep each.
    """
    starts, ends, (E,) = metadata.starts, metadata.ends, metadata.ends.shape
    if not gradient:
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, jnp.int32(M))
    blocks = jnp.where(ends > starts, (ends + (t.rows - 1)) // t.rows - starts // t.rows, int(gradient))
    until = jnp.cumsum(blocks, dtype=jnp.int32)
    visit = jnp.arange(pl.cdiv(M, t.rows) + E, dtype=jnp.int32)
    group = jnp.sum(until[None, :] <= visit[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, starts.shape[0] - 1)
    start, end, blocks, begin = jnp.stack([starts, ends, blocks, until - blocks], axis=1)[group].T
    block = jnp.minimum(start // t.rows + visit - begin, (M - 1) // t.rows)
    fetch = block
    if gradient:
        fetch = jnp.where(end > start, block, jnp.maximum(start - 1, 0) // t.rows)
        sweep, size = jnp.zeros_like(visit), jnp.maximum(blocks, 1)
    else:
        total, last = metadata.ends[-1], jnp.sum(metadata.ends < metadata.ends[-1], dtype=jnp.int32)
        fetch = jnp.minimum(block, jnp.maximum(total - 1, 0) // t.rows)
        # of the rows past the sum nothing is multiplied: the group stays and no row is its
        end = jnp.where(group < E, end, start)
        group = jnp.minimum(group, jnp.minimum(last, E - 1))
        sweeps = jnp.maximum(-(-blocks // (t.keep or 1 << 20)), 1)
        size = jnp.maximum(-(-blocks // sweeps), 1)
        sweep = (visit - begin) // size * size
    following = jnp.append(block[1:], -1)
    rows = [
        group,
        block,
        jnp.clip(start - block * t.rows, 0, t.rows),
        jnp.clip(end - block * t.rows, 0, t.rows),
        begin + sweep,
        jnp.maximum(jnp.minimum(size, blocks - sweep), 1),
        ((following == block) & (visit + 1 < until[-1])).astype(jnp.int32),
        fetch,
    ]
    return jnp.stack(rows), until[-1]


def place_of(step, table, columns: int):
    """(visit, column, place in the sweep, the sweep's last visit) of a step."""
    some = jnp.minimum(lax.div(step, jnp.int32(columns)), table.shape[1] - 1)
    first, count = table[FIRST, some], table[COUNT, some]
    within = step - first * columns
    place = lax.rem(within, count)
    visit = jnp.minimum(first + place, table.shape[1] - 1)
    return visit, lax.div(within, count), place, first + count - 1


def _zero():
    return jnp.int32(0)  # made in each index map: they may not capture arrays


def forward_specs(t: Tiling, K: int, N: int, transpose_rhs: bool):
    """([lhs, rhs], out) BlockSpecs."""
    columns = pl.cdiv(K if t.deep else N, t.width)

    def used_column(visit, column, table):  # past the sum no new block is fetched
        return jnp.where(table[STOP, visit] > table[START, visit], column, columns - 1)

    def lhs(step, table):
        visit, column, _, last = place_of(step, table, columns)
        if t.deep:
            return table[FETCH, visit], used_column(visit, column, table)
        return table[FETCH, jnp.where(column == 0, visit, last)], _zero()

    def rhs(step, table):
        visit, column, _, _ = place_of(step, table, columns)
        column = used_column(visit, column, table)
        return table[GROUP, visit], *((column, _zero()) if t.deep != transpose_rhs else (_zero(), column))

    def out(step, table):
        # a block that the next visit completes is not written yet: stay at the block written last
        visit, column, place, _ = place_of(step, table, columns)
        block, waits = table[BLOCK, visit], table[OPEN, visit]
        if t.deep:
            early = table[BLOCK, visit - place] - 1
            return jnp.maximum(jnp.where(column == columns - 1, block - waits, early), 0), _zero()
        none = (waits == 1) & (block == 0)
        before = jnp.where(none, 0, jnp.where(place > 0, column, columns - 1))
        return jnp.maximum(block - waits, 0), jnp.where(waits == 1, before, column)

    deep, wide = (t.width, N) if t.deep else (K, t.width)
    weights = (None, wide, deep) if transpose_rhs else (None, deep, wide)
    in_specs = [pl.BlockSpec((t.rows, deep), lhs), pl.BlockSpec(weights, rhs)]
    return in_specs, pl.BlockSpec((t.rows, wide), out)


def drhs_specs(t: Tiling, K: int, N: int):
    """([the narrower of lhs and grad, the wider], out) BlockSpecs."""
    columns = pl.cdiv(max(K, N), t.width)

    def narrow(step, table):
        visit, column, place, last = place_of(step, table, columns)
        return table[FETCH, jnp.where((column == 0) | (place >= t.keep), visit, last)], _zero()

    def wide(step, table):
        visit, column, _, _ = place_of(step, table, columns)
        return table[FETCH, visit], jnp.where(table[STOP, visit] > table[START, visit], column, columns - 1)

    def out(step, table):
        visit, column, _, _ = place_of(step, table, columns)
        return table[GROUP, visit], *((column, _zero()) if K > N else (_zero(), column))

    in_specs = [pl.BlockSpec((t.rows, min(K, N)), narrow), pl.BlockSpec((t.rows, t.width), wide)]
    return in_specs, pl.BlockSpec((None, t.width, N) if K > N else (None, K, t.width), out)


# ---- Which blocks fit.


@functools.cache
def forward_tiling(M: int, E: int, K: int, N: int, itemsize: int, out_itemsize: int, vmem: int) -> Tiling:
    """All columns at once where a group's weights fit; else columns that leave room for the rows of a sweep."""
    deep = itemsize * K > 4 * N  # a row of float32 sums takes less than a row of lhs

    def used(rows, width):
        inside, across = (width, N) if deep else (K, width)
        # two of each, since the next is fetched meanwhile; the carried rows; products in float32
        fetched = 2 * itemsize * (inside * across + rows * inside)
        return fetched + out_itemsize * rows * (2 * across + N) + 8 * rows * min(PIECE, across)

    most = _rows(M, E)
    if used(most, K if deep else N) <= _room(vmem):
        return Tiling(most, N, 0)
    return _fit(M, E, K if deep else N, 4 * N if deep else itemsize * K, used, vmem, deep)


@functools.cache
def drhs_tiling(M: int, E: int, K: int, N: int, itemsize: int, vmem: int) -> Tiling:
    """As forward_tiling; the narrower of the two operands is the one that a sweep keeps."""
    narrow, wide = min(K, N), max(K, N)

    def used(rows, width):
        result, blocks = narrow * width, rows * (narrow + width)
        return itemsize * 2 * (result + blocks) + 4 * (result + rows * narrow) + 4 * narrow * min(PIECE, width)

    most = _rows(M, E)
    if used(most, wide) <= _room(vmem):
        return Tiling(most, wide, 0)
    return _fit(M, E, wide, narrow * itemsize, used, vmem)


def _room(vmem: int) -> int:
    return vmem // 16 * 15  # of the rest the compiler has what `mosaic_tpu` lets it


def _rows(M: int, E: int) -> int:
    mean = M // E
    return min(256 if mean >= 1024 else 128 if mean >= 64 else 32, max(-(-M // 16), 1) * 16)


def _fit(M: int, E: int, wide: int, row_bytes: int, used, vmem: int, deep: bool = False) -> Tiling:
    most, fits = _rows(M, E), []
    for rows, width in itertools.product((most, max(most // 2, 16)), (PIECE, PIECE // 2, LANES)):
        keep = min((_room(vmem) - used(rows, width)) // (rows * row_bytes), pl.cdiv(M, rows) + 1)
        if keep > 0 and not (deep and wide % width):
            fits.append(Tiling(rows, width, keep, deep))
    fits = [t for t in fits if t.width > LANES] or fits  # the narrowest leaves a multiply unit half empty
    for share in (4, 2):  # groups are uneven: room for four times the mean group if there is, or else for the most rows
        for t in fits:
            if t.keep * t.rows >= min(share * M // E, M):
                return t
    if not fits:
        raise NotImplementedError("it needs a narrower K or N: no block of columns fits in VMEM")
    return max(fits, key=lambda t: t.keep * t.rows)
