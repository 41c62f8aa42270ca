"""Where each group's rows lie: computed once per layer, read by every product of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import schedule

# Multiprocessors of a GPU's 132 that products leave, on request, to what is to run beside them. A block of theirs takes
# a whole multiprocessor until its product is done: with none left, an exchange of rows would wait for that end. Even,
# for blocks go in pairs; an eighth of the products' speed.
SPARE = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupMetadata:
    """Rows [starts[e], ends[e]) belong to group e. starts, ends (E,) i32; rows from ends[-1] on belong to none.

    Where the platform is a GPU, for the Hopper kernels: row_tiles, `schedule.row_tiles`, and by_size (E + 1,) i32,
    `schedule.by_size`. spare: how many multiprocessors the Hopper kernels leave free, an even number. tail: whether
    rows that belong to none come out as zeros.
    """

    starts: jax.Array
    ends: jax.Array
    row_tiles: tuple[jax.Array, jax.Array] | None = None
    by_size: jax.Array | None = None
    spare: int = dataclasses.field(default=0, metadata={"static": True})
    tail: bool = dataclasses.field(default=True, metadata={"static": True})


def group_metadata(group_sizes: jax.Array, M: int, spare: int = 0, tail: bool = True) -> GroupMetadata:
    """Metadata of group_sizes (E,) i32 over M rows, for every `grouped_matmul` that shares them.

    spare: multiprocessors of a GPU that these products and their gradients leave to others, an even number (`SPARE`).
    tail: False leaves rows past the sum undefined, in results and gradients, and spends no time on them: for M that is
    room for more rows than there are.

    Raises ValueError for sizes that are not (E,) i32, an odd or negative spare and, where the sizes are known (outside
    jit, vmap and shard_map, and inside jit under `jax.disable_jit()`), for negative ones or a sum of more than M. Under
    jit that is not checked: even checkify's debug_check is a use of the sizes that flax's scan takes for a dependency
    of what it broadcasts.
    """
    group_sizes = jnp.asarray(group_sizes)
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be (E,) int32; got {group_sizes.dtype}{list(group_sizes.shape)}")
    if spare < 0 or spare % 2:
        raise ValueError(f"spare={spare} must be even and not negative: multiprocessors are left in pairs")
    if not isinstance(group_sizes, jax.core.Tracer):
        check_sizes(group_sizes, M)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    if jax.default_backend() != "gpu":
        return GroupMetadata(starts, ends, spare=spare, tail=tail)
    tiles = schedule.row_tiles(starts, ends, M, tail)
    return GroupMetadata(starts, ends, tiles, schedule.by_size(starts, ends), spare, tail)


def check_metadata(what: str, metadata: GroupMetadata, group_sizes: jax.Array) -> None:
    """ValueError, begun with `what`, unless the metadata is of as many groups as group_sizes (E,)."""
    if metadata.ends.shape != group_sizes.shape:
        raise ValueError(
            f"{what}: metadata is of {metadata.ends.shape[0]} groups and group_sizes of {group_sizes.shape[0]}; give "
            "group_metadata(group_sizes, M)"
        )


def check_sizes(group_sizes: jax.Array, M: int) -> None:
    """ValueError unless concrete group_sizes (E,) are ≥ 0 and sum to at most M."""
    sizes = np.asarray(group_sizes)
    if sizes.size and (sizes.min() < 0 or sizes.sum() > M):
        raise ValueError(
            f"group_sizes must not be negative nor sum to more than the {M} rows of lhs; got {sizes.tolist()}"
        )
