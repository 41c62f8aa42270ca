"""The gated feed-forward of experts over sorted rows, with gate, up and the activation in one kernel.

Letters: M rows, E groups (experts), D and F the widths outside and inside.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_ffn import mosaic_gpu
from pallas_kernels.grouped_matmul import GroupMetadata, group_metadata, grouped_matmul, named, pick
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.grouped_matmul.metadata import check_metadata
from pallas_kernels.vary import vary_alike

__all__ = ["ACTIVATIONS", "activation_gradients", "check", "gated_ffn"]

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}  # gelu: the tanh form


def gated_ffn(
    rows: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    *,
    activation: str = "silu",
    scale: jax.Array | None = None,
    metadata: GroupMetadata | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """(activation(rows · gate) ∘ (rows · up)) · down, each row with its group's weights (Shazeer 2020, equation 6).

    rows (M, D) sorted by group; gate, up (E, D, F) and down (E, F, D), all of one dtype; group_sizes (E,) i32. Returns
    (M, D) of that dtype. Differentiable in rows, weights and scale. Rows past the sum of group_sizes are never read,
    come out as zeros and take no part in a gradient; by metadata without a tail they and their gradients are undefined.
    Once and in reverse mode, as `grouped_matmul`.

    scale (M,) f32 multiplies each row of what goes into `down`, before it is rounded: a gate applied so needs no result
    of `down` for its gradient.

    metadata: `group_metadata(group_sizes, M)`. implementation: of `grouped_matmul`; with "mosaic_gpu" the products with
    gate and up and the activation are one kernel, which stores the two products only for a backward pass, and the
    gradient of rows another; with any other, plain products. What products give has the checkpoint name "experts", for
    `jax.checkpoint` to keep.

    Raises ValueError for shapes, dtypes or an activation that don't fit, NotImplementedError as `grouped_matmul`.
    """
    rows, gate, up, down, group_sizes = (jnp.asarray(a) for a in (rows, gate, up, down, group_sizes))
    check(rows, gate, up, down, group_sizes, activation)
    scale = None if scale is None else jnp.asarray(scale)
    if scale is not None and (scale.shape != rows.shape[:1] or scale.dtype != jnp.float32):
        raise ValueError(f"gated_ffn: scale must be float32 ({rows.shape[0]},); got {scale.dtype}{list(scale.shape)}")
    name = named(implementation, rows, gate) if implementation else pick(rows, gate)
    if 0 in (*rows.shape, *gate.shape):
        return vary_alike(jnp.zeros(rows.shape, rows.dtype), rows, gate)[0]
    if metadata is None:
        metadata = group_metadata(group_sizes, rows.shape[0])
    check_metadata("gated_ffn", metadata, group_sizes)
    if name == "mosaic_gpu":
        out = _block(activation, *vary_alike(rows, gate, up, down, scale, group_sizes, metadata))
    else:
        product = functools.partial(
            grouped_matmul, group_sizes=group_sizes, metadata=metadata, implementation=implementation
        )
        a, b = (checkpoint_name(product(rows, weights), "experts") for weights in (gate, up))
        out = product(_gated(activation, a, b, scale), down)
    return checkpoint_name(out, "experts")


def check(rows, gate, up, down, group_sizes, activation) -> None:
    """ValueError unless these are operands of `gated_ffn`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_ffn: unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"gated_ffn: group_sizes must be int32; got {group_sizes.dtype}")
    shapes = [tuple(a.shape) for a in (rows, gate, up, down, group_sizes)]
    if rows.ndim == 2 and gate.ndim == 3:
        E, D, F = gate.shape
        if shapes == [(rows.shape[0], D), (E, D, F), (E, D, F), (E, F, D), (E,)]:
            if len({a.dtype for a in (rows, gate, up, down)}) == 1:
                return
            dtypes = ", ".join(str(a.dtype) for a in (rows, gate, up, down))
            raise ValueError(f"gated_ffn: rows, gate, up and down must have one dtype; got {dtypes}: cast the weights")
    raise ValueError(
        "gated_ffn: rows, gate, up, down, group_sizes must be (M, D), (E, D, F), (E, D, F), (E, F, D), (E,); "
        f"got {', '.join(map(str, shapes))}"
    )


def _gated(activation, a, b, scale):
    """Rounded once, at the end: so are the gradients of a and b, and not at all the sums that are scale's."""
    gated = ACTIVATIONS[activation](a.astype(jnp.float32)) * b.astype(jnp.float32)
    if scale is not None:
        gated *= scale[:, None]
    return gated.astype(a.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(activation, rows, gate, up, down, scale, group_sizes, metadata):
    (hidden,) = mosaic_gpu.hidden(activation, rows, gate, up, metadata, keep=False, scale=scale)
    return products.forward(hidden, down, group_sizes, metadata, False, rows.dtype)


def _block_forward(activation, rows, gate, up, down, scale, group_sizes, metadata):
    hidden, *kept = mosaic_gpu.hidden(activation, rows, gate, up, metadata, keep=True, scale=scale)
    a, b = (checkpoint_name(x, "experts") for x in kept)
    out = products.forward(hidden, down, group_sizes, metadata, False, rows.dtype)
    return out, (rows, gate, up, down, scale, group_sizes, metadata, a, b)


def _block_backward(activation, residuals, grad):
    rows, gate, up, down, scale, group_sizes, metadata, a, b = residuals
    grad = grad.astype(rows.dtype)
    dhidden = products.forward(grad, down, group_sizes, metadata, True, rows.dtype)
    # What went into down isn't kept: the elementwise pass that has a and b at hand gives it again.
    hidden, *grads, dscale = activation_gradients(activation, a, b, scale, dhidden, metadata)
    weight_gradient = functools.partial(products.drhs, group_sizes=group_sizes, metadata=metadata, out_dtype=gate.dtype)
    ddown = weight_gradient(hidden, grad)
    drows = mosaic_gpu.dlhs(grads, (gate, up), metadata)
    dgate, dup = (weight_gradient(rows, each) for each in grads)
    return drows, dgate, dup, ddown, dscale, None, None


def activation_gradients(activation, a, b, scale, dhidden, metadata):
    """(hidden, da, db, dscale or None), (M, F) and (M,), of `_gated`'s arguments and its result's gradient dhidden;
    with dhidden six arrays of (M, F), of which without a tail some are empty."""
    if not metadata.tail and a.shape[1] % 128 == 0:
        *found, dscale = (*mosaic_gpu.gradients(activation, a, b, dhidden, metadata, scale), None)[:4]
        return *found, dscale
    hidden, pull = jax.vjp(functools.partial(_gated, activation), a, b, scale)
    return hidden, *pull(dhidden)


_block.defvjp(_block_forward, _block_backward)
