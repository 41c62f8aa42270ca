"""Grouped products on TPU, in Mosaic TPU: weights, rows and results cross the memory bus about once each.

The grid is one list of steps. A *visit* is a block of rows and one of the groups in it (a block that two groups share
has two visits). A *sweep* is a run of visits of one group; its steps go down its rows, then on to the next column of
the weights. The first column fetches the rows and keeps them in VMEM for the others, so a sweep reads its rows and its
weights once. Where rows are much wider than results, the columns are of K instead (*deep*): every step fetches its part
of the rows, and what is kept is the results' sums. Where VMEM holds a group's whole weights there is one column and
nothing to keep. README.md has the bytes.

Limits: TPU with 64 MiB of VMEM or more (v5e, v5p, v6e, 7x); bfloat16 or float32; K and N multiples of 128.
"""

import dataclasses
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata

_LANES = 128
_PIECE = 512  # columns multiplied at a time
_VMEM = 64 << 20  # of the smallest chips that this is for: v5p and 7x
# the table's rows, one column a visit
_GROUP, _BLOCK, _START, _STOP, _FIRST, _COUNT, _OPEN, _FETCH = range(8)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """rows in a block, width of a column (of K if deep), how many blocks of rows a sweep keeps (0: one column)."""

    rows: int
    width: int
    keep: int
    deep: bool = False


def why_not(lhs, rhs, transpose_rhs: bool) -> str | None:
    """None where `forward` and `drhs` run these; else what they would need."""
    del transpose_rhs  # either way round
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return "it needs bfloat16 or float32"
    if rhs.shape[1] % _LANES or rhs.shape[2] % _LANES:
        return f"it needs K and N in multiples of {_LANES}"
    vmem = _vmem()
    if vmem is None or vmem < _VMEM:
        return "it needs a TPU v5e, v5p, v6e or 7x"
    shape = lhs.shape[0], rhs.shape[0], *rhs.shape[1:], lhs.dtype.itemsize
    tilings = [forward_tiling(*shape, vmem), forward_tiling(*_turned(shape), vmem), drhs_tiling(*shape, vmem)]
    return None if all(tilings) else "it needs narrower K or N: no block of columns fits in VMEM"


def _turned(shape):
    M, E, K, N, itemsize = shape
    return M, E, N, K, itemsize


def _vmem() -> int | None:
    """Bytes of VMEM of the TPU that is traced for, or None."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # no TPU
        return None


def forward(lhs, rhs, group_sizes, metadata: GroupMetadata, transpose_rhs, out_dtype, tiling: Tiling | None = None):
    """(M, K) × (E, K, N) -> (M, N); with transpose_rhs, rhs is (E, N, K), read as it lies."""
    del group_sizes
    (M, K), E, N = lhs.shape, rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    t = tiling or forward_tiling(M, E, K, N, lhs.dtype.itemsize, _vmem() or _VMEM)
    table, visits = row_visits(metadata, M, t)
    in_specs, out_spec = forward_specs(t, K, N, transpose_rhs)
    columns = pl.cdiv(K if t.deep else N, t.width)
    kept = (t.keep, t.rows, N if t.deep else K) if t.keep else (1, 8, _LANES)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, t, columns, transpose_rhs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(visits * columns,),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[
                pltpu.VMEM((1, t.rows, N) if t.deep else (columns, t.rows, t.width), out_dtype),
                pltpu.VMEM(kept, jnp.float32 if t.deep else lhs.dtype),
            ],
        ),
        **_common("grouped_matmul", (M, N), out_dtype, lhs),
    )
    return call(table, lhs, rhs)


def drhs(lhs, grad, group_sizes, metadata: GroupMetadata, out_dtype, tiling: Tiling | None = None):
    """(M, K), (M, N) -> (E, K, N): each group's lhsᵀ · grad; exact zeros for an empty group."""
    (M, K), N, (E,) = lhs.shape, grad.shape[1], group_sizes.shape
    t = tiling or drhs_tiling(M, E, K, N, lhs.dtype.itemsize, _vmem() or _VMEM)
    table, visits = row_visits(metadata, M, t, gradient=True)
    in_specs, out_spec = drhs_specs(t, K, N)
    narrow, wide = min(K, N), max(K, N)
    columns = pl.cdiv(wide, t.width)
    sums = (t.width, N) if K > N else (K, t.width)
    kept = (t.keep, t.rows, narrow) if t.keep else (1, 8, _LANES)
    call = pl.pallas_call(
        functools.partial(_drhs_kernel, columns, t.keep, K > N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(visits * columns,),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[
                pltpu.VMEM(sums, jnp.float32),
                pltpu.VMEM(kept, lhs.dtype),
            ],
        ),
        **_common("grouped_matmul_drhs", (E, K, N), out_dtype, lhs),
    )
    return call(table, grad, lhs) if K > N else call(table, lhs, grad)


def _common(name, shape, dtype, lhs) -> dict:
    return {
        "name": name,
        "out_shape": jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(lhs).manual_axis_type),
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=(_vmem() or _VMEM) // 16 * 15
        ),
    }


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


def _place(step, table, columns: int):
    """(visit, column, place in the sweep, the sweep's last visit) of a step."""
    some = jnp.minimum(lax.div(step, jnp.int32(columns)), table.shape[1] - 1)
    first, count = table[_FIRST, some], table[_COUNT, some]
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
        return jnp.where(table[_STOP, visit] > table[_START, visit], column, columns - 1)

    def lhs(step, table):
        visit, column, _, last = _place(step, table, columns)
        if t.deep:
            return table[_FETCH, visit], used_column(visit, column, table)
        return table[_FETCH, jnp.where(column == 0, visit, last)], _zero()

    def rhs(step, table):
        visit, column, _, _ = _place(step, table, columns)
        column = used_column(visit, column, table)
        return table[_GROUP, visit], *((column, _zero()) if t.deep != transpose_rhs else (_zero(), column))

    def out(step, table):
        # a block that the next visit completes is not written yet: stay at the block written last
        visit, column, place, _ = _place(step, table, columns)
        block, waits = table[_BLOCK, visit], table[_OPEN, visit]
        if t.deep:
            early = table[_BLOCK, visit - place] - 1
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
        visit, column, place, last = _place(step, table, columns)
        return table[_FETCH, jnp.where((column == 0) | (place >= t.keep), visit, last)], _zero()

    def wide(step, table):
        visit, column, _, _ = _place(step, table, columns)
        return table[_FETCH, visit], jnp.where(table[_STOP, visit] > table[_START, visit], column, columns - 1)

    def out(step, table):
        visit, column, _, _ = _place(step, table, columns)
        return table[_GROUP, visit], *((column, _zero()) if K > N else (_zero(), column))

    in_specs = [pl.BlockSpec((t.rows, min(K, N)), narrow), pl.BlockSpec((t.rows, t.width), wide)]
    return in_specs, pl.BlockSpec((None, t.width, N) if K > N else (None, K, t.width), out)


# ---- The kernels.


def _forward_kernel(t, columns, transpose_rhs, table, lhs, rhs, out, carry, kept):
    visit, column, place, _ = _place(pl.program_id(0), table, columns)
    start, stop, waits = table[_START, visit], table[_STOP, visit], table[_OPEN, visit]
    done = column == columns - 1 if t.deep else True
    if t.keep and not t.deep:

        @pl.when(column == 0)
        def _():
            kept[place] = lhs[...]

    def store(at, product):
        row = lax.broadcasted_iota(jnp.int32, product.shape, 0)
        before = carry.at[0 if t.deep else column, :, at]
        value = jnp.where(row < start, before[...].astype(jnp.float32), jnp.where(row < stop, product, 0))

        @pl.when(done & (waits == 1))
        def _():
            before[...] = value.astype(out.dtype)

        @pl.when(done & (waits == 0))
        def _():
            out[:, at] = value.astype(out.dtype)

    def some_columns(at):
        @pl.when(stop > start)
        def _():
            rows = kept[place] if t.keep and not t.deep else lhs[...]
            product = _dot(rows, rhs[at, :] if transpose_rhs else rhs[:, at], 1, 1 if transpose_rhs else 0)
            if t.deep:
                product += jnp.where(column > 0, kept[place, :, at], 0)
                kept[place, :, at] = product
            store(at, product)

        @pl.when(stop <= start)
        def _():
            store(at, jnp.zeros((out.shape[0], at.size), jnp.float32))

    _for_columns(out.shape[1], some_columns)


def _drhs_kernel(columns, keep, wide_first, table, narrow, wide, out, sums, kept):
    visit, column, place, last = _place(pl.program_id(0), table, columns)
    start, stop = table[_START, visit], table[_STOP, visit]

    def members(rows):
        row = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where((row >= start) & (row < stop), rows.astype(jnp.float32), 0).astype(rows.dtype)

    @pl.when(place == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def add(its):
        def some_columns(at):
            mine = members(wide[:, at])
            if wide_first:
                sums[at, :] += _dot(mine, its, 0, 0)
            else:
                sums[:, at] += _dot(its, mine, 0, 0)

        _for_columns(wide.shape[1], some_columns)

    if keep:

        @pl.when((column == 0) & (place < keep))
        def _():
            kept[place] = members(narrow[...])

        @pl.when((stop > start) & (place < keep))
        def _():
            add(kept[place])

    @pl.when((stop > start) & (place >= keep))
    def _():
        add(members(narrow[...]))

    @pl.when(visit == last)
    def _():
        out[...] = sums[...].astype(out.dtype)


def _dot(a, b, a_axis: int, b_axis: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _for_columns(width: int, step) -> None:
    """step(slice) over pieces of the columns: less to unroll and to hold than the whole."""
    piece = next(size for size in (_PIECE, 384, 256, _LANES) if width % size == 0)

    @pl.loop(0, width // piece)
    def _(i):
        step(pl.ds(pl.multiple_of(i * piece, piece), piece))


# ---- Which blocks fit.


@functools.cache
def forward_tiling(M: int, E: int, K: int, N: int, itemsize: int, vmem: int) -> Tiling | None:
    """All columns at once where a group's weights fit; else columns that leave room for the rows of a sweep."""
    deep = itemsize * K > 4 * N  # a row of float32 sums takes less than a row of lhs

    def used(rows, width):
        inside, across = (width, N) if deep else (K, width)
        blocks = inside * across + rows * (inside + across)
        # two of each, since the next is fetched meanwhile; the carried rows; products in float32
        return itemsize * (2 * blocks + rows * N) + 8 * rows * _PIECE

    most = _rows(M, E)
    if used(most, K if deep else N) <= _room(vmem):
        return Tiling(most, N, 0)
    return _fit(M, E, K if deep else N, 4 * N if deep else itemsize * K, used, vmem, deep)


@functools.cache
def drhs_tiling(M: int, E: int, K: int, N: int, itemsize: int, vmem: int) -> Tiling | None:
    """As forward_tiling; the narrower of the two operands is the one that a sweep keeps."""
    narrow, wide = min(K, N), max(K, N)

    def used(rows, width):
        result, blocks = narrow * width, rows * (narrow + width)
        return itemsize * 2 * (result + blocks) + 4 * (result + rows * narrow) + 4 * narrow * _PIECE

    most = _rows(M, E)
    if used(most, wide) <= _room(vmem):
        return Tiling(most, wide, 0)
    return _fit(M, E, wide, narrow * itemsize, used, vmem)


def _room(vmem: int) -> int:
    return vmem // 8 * 7  # the rest is the compiler's


def _rows(M: int, E: int) -> int:
    mean = M // E
    return min(256 if mean >= 1024 else 128 if mean >= 64 else 32, -(-M // 16) * 16)


def _fit(M: int, E: int, wide: int, row_bytes: int, used, vmem: int, deep: bool = False) -> Tiling | None:
    most, fits = _rows(M, E), []
    for rows, width in itertools.product((most, max(most // 2, 16)), (_PIECE, _PIECE // 2, _LANES)):
        keep = min((_room(vmem) - used(rows, width)) // (rows * row_bytes), pl.cdiv(M, rows) + 1)
        if keep > 0 and not (deep and wide % width):
            fits.append(Tiling(rows, width, keep, deep))
    fits = [t for t in fits if t.width > _LANES] or fits  # the narrowest leaves a multiply unit half empty
    for share in (4, 2, 1):  # groups are uneven: room for four times the mean group if there is
        for t in fits:
            if t.keep * t.rows >= min(share * M // E, M):
                return t
    return max(fits, key=lambda t: t.keep * t.rows, default=None)
