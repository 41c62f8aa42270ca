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

    Raises ValueError for shapes that don't fit each other, NotImplementedError where `why_not` gives a reason.
    """
    (T, A), kernel = rows.shape, kernels[0]
    alike = len({(each.shape, each.dtype) for each in kernels}) == 1 and kernel.ndim == 3 and kernel.shape[1] == A
    if not alike or chosen.ndim != 1 or chosen.dtype != jnp.int32 or not T or chosen.size % T:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (rows, chosen, *kernels))
        raise ValueError(
            "products: needs rows (T, A), chosen (R,) int32 with R a multiple of T, and kernels (E, A, N) of one "
            f"shape; got {given}"
        )
    reason = why_not(kernel)
    if reason is not None:
        raise NotImplementedError(f"products: can't take kernels {kernel.dtype}{list(kernel.shape)}: {reason}")
    return mosaic_gpu.products(rows, chosen, kernels)
