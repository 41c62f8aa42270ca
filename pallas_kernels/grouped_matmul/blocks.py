"""Plain XLA, exact and dropless, for any backend: what each group has of rows, in batched products.

Two parts. The *base*: the first `base` rows of every group as (E, base, K), one batched product with the weights where
they lie. What a group has beyond that, its *overflow*, goes in windows of 64 rows, eight windows (and copies of their
groups' weights) to a batched product, in a loop whose length follows the group sizes. Balanced groups never enter the
loop; one group with all the rows spends it all there. The base costs `9/8 · M` rows of work whatever the sizes: more
would be idle in balanced groups, less would send ordinary unevenness into the slower loop. With fewer than two rows a
group (decoding) there is no base, and windows of four rows go one by one: only the weights of groups that have rows
are read.

An expert block built from `Layout`'s methods (`moejax.experts.gated_ffn`) pads its rows once for all its products.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata
from pallas_kernels.search import count_below
from pallas_kernels.vary import vary_alike

_WINDOW = 64  # rows of a window: below it a product is mostly the reading of weights, above it mostly padding
_WINDOWS = 8  # windows in one batched product: enough for two cores, small enough for their caches
_FEW = 4  # rows of a window when groups have few at best: what counts is reading weights once, and eight take longer


def forward(lhs, rhs, group_sizes, metadata: GroupMetadata, transpose_rhs: bool, out_dtype) -> jax.Array:
    """(M, K) × (E, K, N) -> (M, N); with transpose_rhs, rhs is (E, N, K)."""
    layout = Layout.of(lhs.shape[0], metadata)
    N = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    if layout.base:
        out = layout.unpad(dot(layout.pad(lhs), rhs, out_dtype, transpose_rhs))
    else:
        out = vary_alike(jnp.zeros((lhs.shape[0], N), out_dtype), lhs)[0]

    def step(out, windows):
        product = dot(windows.take(lhs), windows.of_group(rhs), out_dtype, transpose_rhs)
        return windows.each(lambda i, out: windows.put(i, out, product), out)

    return layout.overflow(step, out)


def drhs(lhs, grad, group_sizes, metadata: GroupMetadata, out_dtype) -> jax.Array:
    """(M, K), (M, N) -> (E, K, N): for each group, lhsᵀ · grad over its rows, summed in float32."""
    layout = Layout.of(lhs.shape[0], metadata)
    if layout.base:
        out = dot_rows(layout.pad(lhs), layout.pad(grad))
    else:
        out = vary_alike(jnp.zeros((*group_sizes.shape, lhs.shape[1], grad.shape[1]), jnp.float32), lhs)[0]

    def step(out, windows):
        terms = dot_rows(windows.take(lhs), windows.take(grad))
        return windows.each(lambda i, out: windows.add_to_group(i, out, terms), out)

    return layout.overflow(step, out).astype(out_dtype)


def dot(rows, weights, out_dtype, transpose: bool = False) -> jax.Array:
    """(…, R, K) × (…, K, N) -> (…, R, N), the leading axis a batch; with transpose, weights are (…, N, K)."""
    dimensions = (((2,), (2 if transpose else 1,)), ((0,), (0,)))
    return lax.dot_general(rows, weights, dimensions, preferred_element_type=jnp.float32).astype(out_dtype)


def dot_rows(left, right) -> jax.Array:
    """(…, R, K) × (…, R, N) -> (…, K, N) f32: sums over the rows."""
    return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Windows:
    """n windows of W rows. first (n,) i32: first row; group (n,) i32; member (n, W) bool: rows that count."""

    first: jax.Array
    group: jax.Array
    member: jax.Array

    # Loops and batched slices, not n copies of each operation: those took a third of a model's compile time.

    def take(self, rows: jax.Array) -> jax.Array:
        """(M, D) -> (n, W, D), zeros in the rows that don't count."""
        W = self.member.shape[1]
        slices = jax.vmap(lambda first: lax.dynamic_slice_in_dim(rows, first, W))(self.first)
        return jnp.where(self.member[:, :, None], slices, 0)

    def each[Carry](self, one: Callable[[jax.Array, Carry], Carry], carry: Carry) -> Carry:
        """Folds one(i, carry) over the windows, one after another, since they may share rows and groups."""
        return lax.fori_loop(0, self.first.shape[0], one, carry)

    def put(self, i, rows: jax.Array, values: jax.Array) -> jax.Array:
        """rows (M, D) with values (n, W, D) in the rows of window i that count."""
        first = self.first[i]
        old = lax.dynamic_slice_in_dim(rows, first, self.member.shape[1])
        return lax.dynamic_update_slice_in_dim(rows, jnp.where(self.member[i][:, None], values[i], old), first, 0)

    def of_group(self, weights: jax.Array) -> jax.Array:
        """(E, …) -> (n, …): each window's group."""
        return weights.at[self.group].get(mode="clip")

    def add_to_group(self, i, sums: jax.Array, values: jax.Array) -> jax.Array:
        """sums (E, …) with window i of values (n, …) added to its group."""
        old = lax.dynamic_index_in_dim(sums, self.group[i])
        return lax.dynamic_update_slice_in_dim(sums, old + values[i][None], self.group[i], 0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How M rows of E groups are split into base and overflow. base, window: rows; windows: at a time; all static."""

    rows: int
    base: int
    window: int
    windows: int
    metadata: GroupMetadata

    @classmethod
    def of(cls, M: int, metadata: GroupMetadata) -> "Layout":
        (E,) = metadata.ends.shape
        if M < 2 * E:
            return cls(M, 0, min(_FEW, M), 1, metadata)
        return cls(M, min(M, -(-9 * M // (8 * E * 8)) * 8), min(_WINDOW, M), _WINDOWS, metadata)

    def pad(self, rows: jax.Array) -> jax.Array:
        """(M, D) -> (E, base, D): the first rows of each group, then zeros."""
        place = jnp.arange(self.base, dtype=jnp.int32)[None, :]
        source = self.metadata.starts[:, None] + place
        return jnp.where((source < self.metadata.ends[:, None])[:, :, None], _take(rows, source), 0)

    def unpad(self, padded: jax.Array) -> jax.Array:
        """(E, base, N) -> (M, N): zeros where a row is not in the base."""
        row = jnp.arange(self.rows, dtype=jnp.int32)
        group = count_below(self.metadata.ends, row + 1)
        place = row - self.metadata.starts.at[group].get(mode="clip")
        source = group * self.base + place
        there = (place < self.base) & (row < self.metadata.ends[-1])
        return jnp.where(there[:, None], _take(padded.reshape(-1, padded.shape[-1]), source), 0)

    def overflow[Carry](self, step: Callable[[Carry, Windows], Carry], carry: Carry) -> Carry:
        """Folds step over all windows of the rows beyond the base."""
        if self.base >= self.rows:
            return carry
        beyond = jnp.maximum(self.metadata.ends - self.metadata.starts - self.base, 0)
        ends = jnp.cumsum(-(-beyond // self.window), dtype=jnp.int32)
        starts = ends - -(-beyond // self.window)

        # All windows at once, outside the loop: a handful of small operations in it cost as much as a window of four.
        most = min(self.rows, ends.shape[0] + self.rows // self.window)
        number = jnp.arange(-(-most // self.windows) * self.windows, dtype=jnp.int32)
        group = jnp.sum(number[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
        last = jnp.minimum(group, ends.shape[0] - 1)
        begin = self.metadata.starts[last] + self.base + (number - starts[last]) * self.window
        # the last window may not stick out of the array: it starts earlier, and rows before `begin` don't count
        first = jnp.clip(begin, 0, self.rows - self.window)
        end = jnp.where(number < ends[-1], self.metadata.ends[last], 0)

        def body(i, carry):
            table = (lax.dynamic_slice_in_dim(a, i * self.windows, self.windows) for a in (begin, end, first, last))
            here, there, top, group = table
            row = top[:, None] + jnp.arange(self.window, dtype=jnp.int32)[None, :]
            return step(carry, Windows(top, group, (row >= here[:, None]) & (row < there[:, None])))

        return lax.fori_loop(0, -(-ends[-1] // self.windows), body, carry)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows.at[index].get(mode="clip")
