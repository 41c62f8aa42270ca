"""Products of a few rows, each with a matrix of a stack, when reading the matrices is all that counts: decoding.

Letters: T rows, R = T·K choices, E matrices, A and N the widths of a matrix, P parts of a sum.

Where groups hold a row or two, a kernel for sorted rows spends more on finding them than on the product. Here nothing
is sorted: row t meets its K matrices chosen[t·K : (t + 1)·K], also where two choices are the same.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.few_rows import mosaic_gpu

__all__ = ["products", "why_not"]

why_not = mosaic_gpu.why_not


def products(rows: jax.Array, chosen: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """rows (T, A) · kernel[chosen] for each kernel (E, A, N) of one shape: parts of the sums, (R, P, N) f32 each.

    rows f32 or half precision, chosen (R,) i32 in [0, E), R a multiple of T. Whoever reads the parts sums them over P:
    a pass over few numbers, which XLA fuses with what comes next.

    No gradient: generation needs none.

    Raises ValueError for shapes that don't fit each other, NotImplementedError where `why_not` gives a reason.
    """
    alike = len({(each.shape, each.dtype) for each in kernels}) == 1 and kernels[0].ndim == 3 and rows.ndim == 2
    fit = alike and kernels[0].shape[1] == rows.shape[1] and jnp.issubdtype(rows.dtype, jnp.floating)
    chose = chosen.ndim == 1 and chosen.dtype == jnp.int32
    if not fit or not chose or not rows.shape[0] or chosen.size % rows.shape[0]:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (rows, chosen, *kernels))
        raise ValueError(
            "products: needs rows (T, A), chosen (R,) int32 with R a multiple of T, and kernels (E, A, N) of one "
            f"shape; got {given}"
        )
    (kernel, *_) = kernels
    reason = why_not(kernel)
    if reason is not None:
        raise NotImplementedError(
            f"products: can't take kernels {kernel.dtype}{list(kernel.shape)}: {reason}; grouped_matmul would"
        )
    return mosaic_gpu.products(rows, chosen, kernels)
