"""Which row tiles a grouped product has, and in which order a kernel takes them: a few small XLA operations.

A tile is 192 or 128 rows (fewer where groups have few) that start at a multiple of 8, as the copy engine wants them; a
group's tiles start at the last such multiple before the group's own first row, so only its first and last tile hold
rows of others. Groups of many rows are made of both heights, so that a group's last tile ends within 64 rows of it.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROWS = 128
TALL = 192
WIDTH = 16  # row tiles in a sweep: their rows stay in the cache while the columns pass
TALL_WIDTH = 10  # the same of tall ones
_ALIGN = 8
_LARGE = 4  # times the mean
_MANY = 2048  # rows in all, of which tiles of both heights are enough to be dealt evenly


def tile_rows(M: int, E: int) -> int:
    """Rows in a tile, where M rows fall on E groups: few where weights are what is moved, and rows beside them cost;
    TALL, with tiles of ROWS among them, where groups have many."""
    if M <= 24 * E:
        return 32 if M <= 8 * E else 64
    few = M < ROWS * E or (M < _MANY and M <= TALL * E)
    return ROWS if few else TALL


def heights(units, least=min):
    """(high, low): how many tiles of 192 and of 128 hold `units` of 64, an int, or i32 by jnp.minimum; they are full,
    but that one unit has a low tile of its own."""
    low = least(-units % 3, units)
    return (units - 2 * low + 1) // 3, low


def most_low(E: int) -> int:
    """How many tiles of ROWS there can be beside tall ones: the last so many of the table."""
    return 2 * (E + 1)


def row_tiles(starts: jax.Array, ends: jax.Array, M: int, tail: bool = True) -> tuple[jax.Array, jax.Array]:
    """How many row tiles there are, (1,) i32, and the tiles, (T, 7) i32, T a bound known beforehand.

    Where `tile_rows` is TALL there are two lists, one of 192 rows a tile and behind it one of 128, `most_low`: counts
    (2,). The columns: group (E: rows past the sum, which are to become zeros), first row / 8, the first and the last
    + 1 of the tile's rows that are the group's, the sweep that the tile belongs to: its first tile within the list and
    how many of the list there are, and its place among all sweeps. A sweep is tiles of one group, at most WIDTH, or
    TALL_WIDTH tall ones with the group's low ones in the last. starts, ends (E,) i32: the groups' rows. Without `tail`
    rows past the sum have no tiles.
    """
    E = ends.shape[0]
    rows = tile_rows(M, E)
    starts = jnp.append(starts, ends[-1])
    ends = jnp.append(ends, jnp.int32(M) if tail else ends[-1])
    first = starts // _ALIGN * _ALIGN
    needed = jnp.where(ends > starts, ends - first, 0)
    if rows < TALL:
        most = (M + (rows + _ALIGN - 2) * (E + 1)) // rows + 1
        return _tiles(starts, ends, first, -(-needed // rows), rows, most, WIDTH)
    high, low = heights(-(-needed // 64), jnp.minimum)
    sweeps = jnp.maximum(-(-high // TALL_WIDTH), 1)
    before = jnp.cumsum(sweeps, dtype=jnp.int32) - sweeps
    most = (M + (63 + _ALIGN - 1) * (E + 1)) // TALL
    lists = (
        _tiles(starts, ends, first, high, TALL, most, TALL_WIDTH, before),
        _tiles(starts, ends, first + TALL * high, low, ROWS, most_low(E), WIDTH, before + sweeps - 1),
    )
    counts, tiles = zip(*lists, strict=True)
    return jnp.concatenate(counts), jnp.concatenate(tiles)


def _tiles(starts, ends, first, count, rows: int, most: int, width: int, order=0):
    """A list of `row_tiles`: of every group `count` tiles of `rows` from row `first` on; order: its first sweep's."""
    stop = jnp.cumsum(count, dtype=jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.sum(stop[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)  # no searchsorted: it fails in shard_map
    per_group = jnp.stack([starts, ends, first, count, stop - count, jnp.broadcast_to(order, count.shape)], axis=1)
    start, end, row, tiles, begin, order = per_group[jnp.minimum(group, len(count) - 1)].T
    row += (tile - begin) * rows
    sweeps = jnp.maximum(-(-tiles // width), 1)
    size = jnp.maximum(-(-tiles // sweeps), 1)
    nth = (tile - begin) // size
    columns = [
        group,
        row // _ALIGN,
        jnp.maximum(start - row, 0),
        jnp.minimum(end - row, rows),
        begin + nth * size,
        jnp.maximum(jnp.minimum(size, tiles - nth * size), 1),
        order + nth,
    ]
    return stop[-1:], jnp.stack(columns, axis=1)


def by_size(starts: jax.Array, ends: jax.Array) -> jax.Array:
    """The groups, largest first: the order in which a weight gradient takes them; behind them how many are large, of
    more than _LARGE times the mean rows. (E + 1,) i32."""
    sizes = ends - starts
    large = jnp.sum(sizes > _LARGE * jnp.sum(sizes) // len(sizes), dtype=jnp.int32)
    return jnp.append(jnp.argsort(-sizes).astype(jnp.int32), large)


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


def own_turns(count, columns: int):
    """Turns of `count` tiles whose last column is taken by two tiles at once, 2p and 2p + 1: one of them alone too."""
    return count * (columns - 1) + lax.div(count + 1, jnp.int32(2))


def own_sweep(lin, columns):
    """A tile of the sweep that the turn `lin` belongs to: a pair is of the sweep of its second tile, so that a sweep
    which begins with tile f has (columns - 1) f + floor(f / 2) turns before it. The turn of a last tile alone gives the
    one after it, for the caller to bound."""
    return lax.div(2 * lin + 1, 2 * columns - 1)


def place_own(lin, sweep, size, columns: int):
    """`place`, by the turns of `own_turns`; in the last column the first tile of a pair."""
    before = lax.div(sweep, jnp.int32(2))
    within = lin - (sweep * (columns - 1) + before)
    whole = size * (columns - 1)
    tile = jnp.where(within < whole, sweep + lax.rem(within, size), 2 * (before + within - whole))
    return tile, jnp.where(within < whole, lax.div(within, size), columns - 1)
