"""Grouped products on TPU, in Mosaic TPU: weights, rows and results cross the memory bus about once each.

A *sweep* takes some rows of one group through one column of its weights after another (`tpu_blocks`). The first column
fetches the rows and keeps them in VMEM for the others, so a sweep reads its rows and its weights once. Where rows are
much wider than results, the columns are of K instead (*deep*): every step fetches its part of the rows, and what is
kept is the results' sums. Where VMEM holds a group's whole weights there is one column and nothing to keep.

A block of rows that two groups share is written once, by the last of them: until then what the others have made of it
waits in `carry`. README.md has the bytes.

Limits: TPU with 64 MiB of VMEM or more (v5e, v5p, v6e, 7x); bfloat16 or float32; K and N multiples of 128.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import tpu_blocks
from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.grouped_matmul.tpu_blocks import LANES, OPEN, PIECE, START, STOP, Tiling

_VMEM = 64 << 20  # of the smallest chips that this is for: v5p and 7x


def why_not(lhs, rhs, transpose_rhs: bool) -> str | None:
    """None where `forward` and `drhs` run these; else what they would need."""
    del transpose_rhs  # either way round
    if lhs.dtype not in (jnp.bfloat16, jnp.float32):
        return "it needs bfloat16 or float32"
    if rhs.shape[1] % LANES or rhs.shape[2] % LANES:
        return f"it needs K and N in multiples of {LANES}"
    vmem = _vmem()
    if vmem is None or vmem < _VMEM:
        return "it needs a TPU v5e, v5p, v6e or 7x"
    M, (E, K, N), size = lhs.shape[0], rhs.shape, lhs.dtype.itemsize
    try:
        # a float32 result is the most that the forward product may be asked for
        tpu_blocks.forward_tiling(M, E, K, N, size, 4, vmem)
        tpu_blocks.forward_tiling(M, E, N, K, size, 4, vmem)
        tpu_blocks.drhs_tiling(M, E, K, N, size, vmem)
    except NotImplementedError as error:
        return str(error)
    return None


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
    t = tiling or _forward_tiling(M, E, K, N, lhs.dtype, out_dtype)
    table, visits = tpu_blocks.row_visits(metadata, M, t)
    in_specs, out_spec = tpu_blocks.forward_specs(t, K, N, transpose_rhs)
    columns = pl.cdiv(K if t.deep else N, t.width)
    kept = (t.keep, t.rows, N if t.deep else K) if t.keep else (1, 8, LANES)
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
    t = tiling or tpu_blocks.drhs_tiling(M, E, K, N, lhs.dtype.itemsize, _vmem() or _VMEM)
    table, visits = tpu_blocks.row_visits(metadata, M, t, gradient=True)
    in_specs, out_spec = tpu_blocks.drhs_specs(t, K, N)
    narrow, wide = min(K, N), max(K, N)
    columns = pl.cdiv(wide, t.width)
    sums = (t.width, N) if K > N else (K, t.width)
    kept = (t.keep, t.rows, narrow) if t.keep else (1, 8, LANES)
    call = pl.pallas_call(
        functools.partial(_drhs_kernel, columns, t.keep, K > N),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(visits * columns,),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32), pltpu.VMEM(kept, lhs.dtype)],
        ),
        **_common("grouped_matmul_drhs", (E, K, N), out_dtype, lhs),
    )
    return call(table, grad, lhs) if K > N else call(table, lhs, grad)


def _forward_tiling(M, E, K, N, dtype, out_dtype) -> Tiling:
    return tpu_blocks.forward_tiling(M, E, K, N, dtype.itemsize, jnp.dtype(out_dtype).itemsize, _vmem() or _VMEM)


def _common(name, shape, dtype, lhs) -> dict:
    return {
        "name": name,
        "out_shape": jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(lhs).manual_axis_type),
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=(_vmem() or _VMEM) // 64 * 63
        ),
    }


# ---- The kernels.


def _forward_kernel(t, columns, transpose_rhs, table, lhs, rhs, out, carry, kept):
    visit, column, place, _ = tpu_blocks.place_of(pl.program_id(0), table, columns)
    start, stop, waits = table[START, visit], table[STOP, visit], table[OPEN, visit]
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
    visit, column, place, last = tpu_blocks.place_of(pl.program_id(0), table, columns)
    start, stop = table[START, visit], table[STOP, visit]

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
    piece = next(size for size in (PIECE, 384, 256, LANES) if width % size == 0)

    @pl.loop(0, width // piece)
    def _(i):
        step(pl.ds(pl.multiple_of(i * piece, piece), piece))
