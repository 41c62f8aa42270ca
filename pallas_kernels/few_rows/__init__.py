"""Products of a few rows, each with a matrix of a stack, when reading the matrices is all that counts: decoding.

Letters: R rows, E matrices, A and N the widths of a matrix, P parts of a sum.

Where groups hold a row or two, a kernel for sorted rows spends more on finding them than on the product. Here nothing
is sorted: row r meets matrix chosen[r], also where two rows choose the same.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.few_rows import mosaic_gpu

__all__ = ["products", "why_not"]

why_not = mosaic_gpu.why_not


def products(rows: jax.Array, chosen: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """rows (R, A) · kernel[chosen] for each kernel (E, A, N) of one shape: parts of the sums, (R, P, N) f32 each.

    rows f32 or half precision, chosen (R,) i32 in [0, E). Whoever reads the parts sums them over P: a pass over few
    numbers, which XLA fuses with what comes next.

    Raises ValueError for shapes that don't fit each other, NotImplementedError where `why_not` gives a reason.
    """
    (R, A), kernel = rows.shape, kernels[0]
    alike = len({(each.shape, each.dtype) for each in kernels}) == 1 and kernel.ndim == 3 and kernel.shape[1] == A
    if not alike or chosen.shape != (R,) or chosen.dtype != jnp.int32:
        given = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (rows, chosen, *kernels))
        raise ValueError(
            f"products: needs rows (R, A), chosen (R,) int32 and kernels (E, A, N) of one shape; got {given}"
        )
    reason = why_not(kernel)
    if reason is not None:
        raise NotImplementedError(f"products: can't take kernels {kernel.dtype}{list(kernel.shape)}: {reason}")
    return mosaic_gpu.products(rows.astype(jnp.float32), chosen, kernels)
