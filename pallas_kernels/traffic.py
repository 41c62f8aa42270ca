"""How many bytes a Pallas TPU kernel moves between memory and the chip, from its own grid and index maps.

    python -m pallas_kernels.traffic [--shape training,decode|olmoe-1b-7b,…]

Prints, for VMEM of 64 and 128 MiB, each named product's bytes as a multiple of the least, a column for each way that
rows fall on experts: uniform, Dirichlet, Zipf, all on one, a quarter empty. All shapes take minutes.
"""

import argparse
import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import group_metadata, tpu_blocks
from pallas_kernels.shapes import NAMES, SIZES, group_sizes, listed, named

_row_visits = jax.jit(tpu_blocks.row_visits, static_argnums=(1, 2), static_argnames="gradient")
_metadata = jax.jit(group_metadata, static_argnums=1)
_forward_specs, _drhs_specs = functools.cache(tpu_blocks.forward_specs), functools.cache(tpu_blocks.drhs_specs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _indices(index_map, steps: int, scalars) -> jax.Array:
    return jax.vmap(lambda step: jnp.stack(index_map(step, *scalars)))(jnp.arange(steps, dtype=jnp.int32))


def bytes_moved(steps: int, spec, array, *scalars) -> int:
    """Bytes that one operand of a kernel moves over a grid of `steps`: a block moves whenever its index changes.

    spec: the operand's BlockSpec, whose index map takes the step and the prefetched `scalars`; array: its shape and
    dtype. An input's block is fetched when its index differs from the step before; an output's is written when its
    index differs from the step after: the same count. Of a block that sticks out of the array, what is inside counts.
    """
    if not steps:
        return 0
    # compiled once for all sizes of groups: up to a power of two of steps, of which those past the grid are left out
    index = np.asarray(_indices(spec.index_map, 1 << (steps - 1).bit_length(), scalars), np.int64)[:steps]
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
    return itemsize * (rows * K + used * K * N + M * N)


def grouped_matmul_bytes(op: str, M: int, K: int, N: int, sizes, vmem: int, tiling=None, itemsize: int = 2) -> int:
    """Bytes that `mosaic_tpu` moves for one product of `grouped_matmul`, on a chip with vmem bytes of VMEM.

    op as for least_bytes, of the forward shapes (M, K) × (E, K, N); sizes (E,).
    """
    dtype, E = {2: jnp.bfloat16, 4: jnp.float32}[itemsize], len(sizes)
    metadata = _metadata(jnp.asarray(sizes, jnp.int32), M)
    if op == "drhs":
        tiling = tiling or tpu_blocks.drhs_tiling(M, E, K, N, itemsize, vmem)
        table, visits = _row_visits(metadata, M, tiling, gradient=True)
        inputs, out = _drhs_specs(tiling, K, N)
        shapes, columns = [(M, min(K, N)), (M, max(K, N)), (E, K, N)], pl.cdiv(max(K, N), tiling.width)
    else:
        K, N = (N, K) if op == "dlhs" else (K, N)
        tiling = tiling or tpu_blocks.forward_tiling(M, E, K, N, itemsize, itemsize, vmem)
        table, visits = _row_visits(metadata, M, tiling)
        inputs, out = _forward_specs(tiling, K, N, transpose_rhs=False)
        shapes, columns = [(M, K), (E, K, N), (M, N)], pl.cdiv(K if tiling.deep else N, tiling.width)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    moved = [bytes_moved(int(visits) * columns, *pair, table) for pair in zip([*inputs, out], arrays, strict=True)]
    return sum(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="training,decode", type=listed("shape", NAMES))
    flags = parser.parse_args()
    for mib, (name, shape), part in itertools.product((64, 128), named(flags.shape).items(), ("up", "down")):
        M, E, K, N = shape.product(part)
        for op in ("forward", "dlhs", "drhs"):
            ratios = []
            for kind in SIZES:
                sizes = group_sizes(kind, M, E)
                ratios.append(grouped_matmul_bytes(op, M, K, N, sizes, mib << 20) / least_bytes(op, sizes, M, K, N))
            print(f"{mib} MiB {name} {part} {op}: " + " ".join(f"{ratio:.3f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
