"""`lax.ragged_dot`. XLA lowers it well on TPU; on CPU and NVIDIA it is a masked dense product, E times the work.

There an infinity or NaN in one group's weights, or in the rows of one group for the gradient of weights, comes out in
other groups' results as well: what is masked is multiplied by zero. No other implementation does that.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.metadata import GroupMetadata


def forward(lhs, rhs, group_sizes, metadata: GroupMetadata, transpose_rhs: bool, out_dtype) -> jax.Array:
    """(M, K) × (E, K, N) -> (M, N); with transpose_rhs, rhs is (E, N, K)."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out = lax.ragged_dot_general(
        _members(lhs, metadata), rhs, group_sizes, dimensions, preferred_element_type=jnp.float32
    )
    # on TPU what stands past the sum is whatever the buffer held
    return _members(out, metadata).astype(out_dtype)


def drhs(lhs, grad, group_sizes, metadata: GroupMetadata, out_dtype) -> jax.Array:
    """(M, K), (M, N) -> (E, K, N): for each group, lhsᵀ · grad over its rows."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    out = lax.ragged_dot_general(
        _members(lhs, metadata),
        _members(grad, metadata),
        group_sizes,
        dimensions,
        preferred_element_type=jnp.float32,
    )
    return out.astype(out_dtype)


def _members(rows, metadata) -> jax.Array:
    return jnp.where((jnp.arange(rows.shape[0], dtype=jnp.int32) < metadata.ends[-1])[:, None], rows, 0)
