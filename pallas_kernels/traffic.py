"""How many bytes a Pallas TPU kernel moves between memory and the chip, from its own grid and index maps."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def bytes_moved(steps: int, spec, array, *scalars) -> int:
    """Bytes that one operand of a kernel moves over a grid of `steps`: a block moves whenever its index changes.

    spec: the operand's BlockSpec, whose index map takes the step and the prefetched `scalars`; array: its shape and
    dtype. An input's block is fetched when its index differs from the step before; an output's is written when its
    index differs from the step after: the same count. Of a block that sticks out of the array, what is inside counts.
    """
    if not steps:
        return 0
    index = jax.vmap(lambda step: jnp.stack(spec.index_map(step, *scalars)))(jnp.arange(steps, dtype=jnp.int32))
    index = np.asarray(index, np.int64)
    moved = index[np.append(True, np.any(index[1:] != index[:-1], axis=1))]
    block = np.array([size or 1 for size in spec.block_shape])
    inside = np.clip(np.array(array.shape) - moved * block, 0, block)
    return int(np.prod(inside, axis=1).sum()) * jnp.dtype(array.dtype).itemsize


def least_bytes(op: str, group_sizes, M: int, K: int, N: int, itemsize: int = 2) -> int:
    """The least a grouped product can move: needed rows, used groups' weights, and the result, once each.

    op: "forward" or "dlhs", (M, K) × (E, K, N) -> (M, N), or "drhs", (M, K), (M, N) -> (E, K, N).
    """
    sizes = np.asarray(group_sizes, np.int64)
    rows, used, E = int(sizes.sum()), int(np.count_nonzero(sizes)), len(sizes)
    if op == "drhs":
        return itemsize * (rows * (K + N) + E * K * N)
    return itemsize * (math.prod((rows, K)) + used * K * N + M * N)
