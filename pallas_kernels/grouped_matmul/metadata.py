"""Where each group's rows lie: computed once per layer, read by every product of it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import checkify


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupMetadata:
    """Rows [starts[e], ends[e]) belong to group e. starts, ends (E,) i32; rows from ends[-1] on belong to none."""

    starts: jax.Array
    ends: jax.Array


def group_metadata(group_sizes: jax.Array, M: int) -> GroupMetadata:
    """Metadata of group_sizes (E,) i32 over M rows, for every `grouped_matmul` that shares them.

    Sizes must not be negative nor sum to more than M; under `checkify` (user checks) that is checked.
    """
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    checkify.debug_check(
        jnp.all(group_sizes >= 0) & (ends[-1] <= M),
        "group_sizes {sizes} must not be negative nor sum to more than the {rows} rows of lhs",
        sizes=group_sizes,
        rows=jnp.int32(M),
    )
    return GroupMetadata(starts=ends - group_sizes, ends=ends)
