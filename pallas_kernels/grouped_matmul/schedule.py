"""Which row tiles a grouped product has, and in which order a kernel takes them: a few small XLA operations.

A tile is 128 rows (fewer where groups have few) that start at a multiple of 8, as the copy engine wants them; a group's
tiles start at the last such multiple before the group's own first row, so only its first and last tile hold rows of
others.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 128
WIDTH = 16  # row tiles in a sweep: their rows stay in the cache while the columns pass
_ALIGN = 8


def tile_rows(M: int, E: int) -> int:
    """Rows in a tile, where M rows fall on E groups: few where weights are what is moved, and rows beside them cost."""
    return 32 if M <= 8 * E else 64 if M <= 24 * E else ROWS


def row_tiles(starts: jax.Array, ends: jax.Array, M: int, tail: bool = True) -> tuple[jax.Array, jax.Array]:
    """How many row tiles there are, (1,) i32, and the tiles, (T, 6) i32, T a bound known beforehand.

    The columns: group (E: rows past the sum, which are to become zeros), first row / 8, the first and the last + 1 of
    the tile's rows that are the group's, and the sweep that the tile belongs to: its first tile and how many there are.
    A sweep is at most WIDTH tiles of one group. starts, ends (E,) i32: the groups' rows. Without `tail` rows past the
    sum have no tiles.
    """
    E = ends.shape[0]
    rows = tile_rows(M, E)
    starts = jnp.append(starts, ends[-1])
    ends = jnp.append(ends, jnp.int32(M) if tail else ends[-1])
    aligned = starts // _ALIGN * _ALIGN
    count = jnp.where(ends > starts, -(-(ends - aligned) // rows), 0)
    stop = jnp.cumsum(count, dtype=jnp.int32)

    tile = jnp.arange((M + (rows + _ALIGN - 2) * (E + 1)) // rows + 1, dtype=jnp.int32)
    group = jnp.sum(stop[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)  # no searchsorted: it fails in shard_map
    per_group = jnp.stack([starts, ends, aligned, count, stop - count], axis=1)
    start, end, first_row, tiles, begin = per_group[jnp.minimum(group, E)].T
    row = first_row + (tile - begin) * rows
    sweeps = jnp.maximum(-(-tiles // WIDTH), 1)
    size = jnp.maximum(-(-tiles // sweeps), 1)
    sweep = (tile - begin) // size * size
    columns = [
        group,
        row // _ALIGN,
        jnp.maximum(start - row, 0),
        jnp.minimum(end - row, rows),
        begin + sweep,
        jnp.maximum(jnp.minimum(size, tiles - sweep), 1),
    ]
    return stop[-1:], jnp.stack(columns, axis=1)


def by_size(starts: jax.Array, ends: jax.Array) -> jax.Array:
    """The groups, largest first, (E,) i32: the order in which a weight gradient takes them."""
    return jnp.argsort(starts - ends).astype(jnp.int32)


def round_robin(i, cluster, clusters: int):
    """The number of the tile that a cluster takes as its i-th, from 0: they take one each, always in the same order."""
    return i * clusters + cluster


def back_and_forth(i, cluster, clusters: int):
    """`round_robin`, but every second round from the last cluster to the first.

    Where tiles come largest first, that evens out what the clusters sum to.
    """
    return i * clusters + jnp.where(lax.rem(i, jnp.int32(2)) == 0, cluster, clusters - 1 - cluster)


def turns(count, nth, clusters: int):
    """How many of `count` tiles are a cluster's, of which nth(i) is its i-th: one of each whole round, and of the rest
    if it is there."""
    rounds = lax.div(jnp.int32(count), jnp.int32(clusters))
    return rounds + (nth(rounds) < count).astype(jnp.int32)


def halves(count, clusters: int):
    """(turns, whole): how many turns the clusters take at `count` tiles, and from which on a turn is half a tile.

    A last round that would leave half the clusters and more without a tile is taken in halves, two clusters a tile.
    """
    rest = lax.rem(count, jnp.int32(clusters))
    split = jnp.where(2 * rest <= clusters, rest, 0)
    return count + split, count - split


def half_of(lin, whole):
    """(tile, half) of a turn: half 0 is all of the tile, 1 and 2 its first and second half."""
    late = jnp.maximum(lin - whole, 0)
    tile = jnp.where(lin < whole, lin, whole + lax.div(late, jnp.int32(2)))
    return tile, jnp.where(lin < whole, 0, 1 + lax.rem(late, jnp.int32(2)))


def place(lin, sweep, size, columns: int):
    """(tile, column) of the linear index `lin` within its sweep: down the rows first, then on to the next column."""
    within = lin - sweep * columns
    return sweep + lax.rem(within, size), lax.div(within, size)
