"""The oracle: one masked dense product per group, in float32. E times the work; for tests and for reading."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.metadata import GroupMetadata


def forward(lhs, rhs, group_sizes, metadata: GroupMetadata, transpose_rhs: bool, out_dtype) -> jax.Array:
    """(M, K) × (E, K, N) -> (M, N); with transpose_rhs, rhs is (E, N, K)."""
    N = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    out = jnp.zeros((lhs.shape[0], N), jnp.float32)
    for e in range(rhs.shape[0]):
        weights = rhs[e].T if transpose_rhs else rhs[e]
        product = jnp.dot(lhs, weights, preferred_element_type=jnp.float32)
        out = jnp.where(_member(lhs, metadata, e), product, out)
    return out.astype(out_dtype)


def drhs(lhs, grad, group_sizes, metadata: GroupMetadata, out_dtype) -> jax.Array:
    """(M, K), (M, N) -> (E, K, N): for each group, lhsᵀ · grad over its rows."""
    groups = []
    for e in range(group_sizes.shape[0]):
        member = _member(lhs, metadata, e)
        # select, not multiply: rows of other groups may hold NaN
        mine, its = jnp.where(member, lhs, 0), jnp.where(member, grad, 0)
        groups.append(jnp.dot(mine.T, its, preferred_element_type=jnp.float32))
    return jnp.stack(groups).astype(out_dtype)


def _member(lhs, metadata, e) -> jax.Array:
    row = jnp.arange(lhs.shape[0], dtype=jnp.int32)
    return ((row >= metadata.starts[e]) & (row < metadata.ends[e]))[:, None]
