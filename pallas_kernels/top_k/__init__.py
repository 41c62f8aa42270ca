"""The k largest entries of each row, for routers: one kernel where XLA makes two of each of k rounds.

Letters: T rows (tokens), E entries of a row (experts), k of them chosen.
"""

import jax

from pallas_kernels.top_k import mosaic_gpu

__all__ = ["top_k", "why_not"]

why_not = mosaic_gpu.why_not


def top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """scores (T, E) f32 -> (values (T, k) f32, indices (T, k) i32), largest first; of equals the lower index first.

    The indices of a row are distinct, also among entries of -inf or NaN; where a row holds a NaN, which are chosen is
    not said. Also under `jax.vmap` and inside `shard_map`; no mesh splits it by itself. No gradient: a caller spreads
    the values' gradient by the indices.

    Raises ValueError for scores that aren't (T, E) or a k not in 1 … E, NotImplementedError where `why_not` gives a
    reason.
    """
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"top_k: needs scores (T, E) and k in 1 … E; got {scores.dtype}{list(scores.shape)} and {k}")
    reason = why_not(scores, k)
    if reason is not None:
        raise NotImplementedError(
            f"top_k: can't take {scores.dtype}{list(scores.shape)}, k {k}: {reason}; jax.lax.top_k would"
        )
    return mosaic_gpu.top_k(scores, k)
