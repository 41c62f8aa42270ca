"""The gated feed-forward of experts over sorted rows, with gate, up and the activation in one kernel.

Letters: M rows, E groups (experts), D and F the widths outside and inside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.combine import combine
from pallas_kernels.gated_ffn import mosaic_gpu
from pallas_kernels.grouped_matmul import GroupMetadata, group_metadata, grouped_matmul, named, pick
from pallas_kernels.grouped_matmul import mosaic_gpu as products
from pallas_kernels.grouped_matmul.metadata import check_metadata
from pallas_kernels.vary import vary_alike

__all__ = ["ACTIVATIONS", "gated_ffn"]

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
    tokens: jax.Array | None = None,
    slot: jax.Array | None = None,
    aside: int = 0,
    metadata: GroupMetadata | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """(activation(rows · gate) ∘ (rows · up)) · down, each row with its group's weights (Shazeer 2020, equation 6).

    rows (M, D) sorted by group; gate, up (E, D, F) and down (E, F, D), all of one dtype; group_sizes (E,) i32. Returns
    (M, D) of that dtype. Differentiable in rows, weights and scale. Rows past the sum of group_sizes are never read,
    come out as zeros and take no part in a gradient; by metadata without a tail they and their gradients are undefined.
    Once and in reverse mode, as `grouped_matmul`.

    scale (M,) f32 multiplies each row of what goes into `down`, before it is rounded: a gate applied so needs no result
    of `down` for its gradient. tokens (T, D) and slot (T, K) i32: rows are `combine.spread`(tokens, slot, M), and the
    gradient is that of tokens, which are never read; rows get none. With "mosaic_gpu" a backward pass then makes it
    before those of gate and up, which leave `aside` multiprocessors, an even number, to what is done with it meanwhile.

    metadata: `group_metadata(group_sizes, M)`. implementation: of `grouped_matmul`; with "mosaic_gpu" the products with
    gate and up and the activation are one kernel, which stores the two products only for a backward pass, and the
    gradient of rows another; with any other, plain products. What products give has the checkpoint name "experts", for
    `jax.checkpoint` to keep.

    Raises ValueError for shapes, dtypes or an activation that don't fit, NotImplementedError as `grouped_matmul`.
    """
    rows, gate, up, down, group_sizes = (jnp.asarray(a) for a in (rows, gate, up, down, group_sizes))
    _check(rows, gate, up, down, group_sizes, activation)
    _check_tokens(rows, tokens, slot)
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
        args = vary_alike(rows, tokens, slot, gate, up, down, scale, group_sizes, metadata)
        out = _block(activation, aside, *args)
    else:
        rows = rows if tokens is None else _of_tokens(*vary_alike(rows, tokens, slot))
        product = functools.partial(
            grouped_matmul, group_sizes=group_sizes, metadata=metadata, implementation=implementation
        )
        a, b = (checkpoint_name(product(rows, weights), "experts") for weights in (gate, up))
        out = product(_gated(activation, a, b, scale), down)
    return checkpoint_name(out, "experts")


def _check(rows, gate, up, down, group_sizes, activation) -> None:
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


def _check_tokens(rows, tokens, slot) -> None:
    if (tokens is None) != (slot is None):
        raise ValueError("gated_ffn: tokens and slot go together; give both or neither")
    if tokens is None:
        return
    T, D = tokens.shape[0], rows.shape[1]
    if tokens.shape != (T, D) or tokens.dtype != rows.dtype or slot.shape[:-1] != (T,) or slot.dtype != jnp.int32:
        raise ValueError(
            f"gated_ffn: tokens must be {rows.dtype}(T, {D}) and slot int32(T, K); got "
            f"{tokens.dtype}{list(tokens.shape)} and {slot.dtype}{list(slot.shape)}"
        )


def _gated(activation, a, b, scale):
    """Rounded once, at the end: so are the gradients of a and b, and not at all the sums that are scale's."""
    gated = ACTIVATIONS[activation](a.astype(jnp.float32)) * b.astype(jnp.float32)
    if scale is not None:
        gated *= scale[:, None]
    return gated.astype(a.dtype)


@jax.custom_vjp
def _of_tokens(rows, tokens, slot):
    """rows, with the gradient of spread(tokens, slot)."""
    return rows


_of_tokens.defvjp(lambda rows, _, slot: (rows, slot), lambda slot, grad: (None, combine(grad, slot, None), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _block(activation, aside, rows, tokens, slot, gate, up, down, scale, group_sizes, metadata):
    (hidden,) = mosaic_gpu.hidden(activation, rows, gate, up, metadata, keep=False, scale=scale)
    return products.forward(hidden, down, group_sizes, metadata, False, rows.dtype)


def _block_forward(activation, aside, rows, tokens, slot, gate, up, down, scale, group_sizes, metadata):
    hidden, *kept = mosaic_gpu.hidden(activation, rows, gate, up, metadata, keep=True, scale=scale)
    a, b = (checkpoint_name(x, "experts") for x in kept)
    out = products.forward(hidden, down, group_sizes, metadata, False, rows.dtype)
    return out, (rows, slot, gate, up, down, scale, group_sizes, metadata, a, b)


def _block_backward(activation, aside, residuals, grad):
    rows, slot, gate, up, down, scale, group_sizes, metadata, a, b = residuals
    grad = grad.astype(rows.dtype)
    dhidden = products.forward(grad, down, group_sizes, metadata, True, rows.dtype)
    # What went into down isn't kept: the elementwise pass that has a and b at hand gives it again.
    hidden, *grads, dscale = _activation_gradients(activation, a, b, scale, dhidden, metadata)
    weight_gradient = functools.partial(products.drhs, group_sizes=group_sizes, out_dtype=gate.dtype)
    ddown = weight_gradient(hidden, grad, metadata=metadata)
    if slot is not None:  # a kernel that leaves no room would wait for what has the tokens' gradient
        ddown, *grads = jax.lax.optimization_barrier((ddown, *grads))
    dx = mosaic_gpu.dlhs(grads, (gate, up), metadata)
    if slot is not None:
        with jax.named_scope("dispatch"):
            dx = combine(dx, slot, None)
        dx, rows, *grads = jax.lax.optimization_barrier((dx, rows, *grads))
        metadata = dataclasses.replace(metadata, spare=max(metadata.spare, aside))
    dgate, dup = (weight_gradient(rows, each, metadata=metadata) for each in grads)
    of_rows, of_tokens = (dx, None) if slot is None else (None, dx)
    return of_rows, of_tokens, None, dgate, dup, ddown, dscale, None, None


def _activation_gradients(activation, a, b, scale, dhidden, metadata):
    """(hidden, da, db, dscale or None); with dhidden six arrays of (M, F), of which without a tail some are empty."""
    if not metadata.tail and a.shape[1] % 128 == 0:
        *found, dscale = (*mosaic_gpu.gradients(activation, a, b, dhidden, metadata, scale), None)[:4]
        return *found, dscale
    hidden, pull = jax.vjp(functools.partial(_gated, activation), a, b, scale)
    return hidden, *pull(dhidden)


_block.defvjp(_block_forward, _block_backward)
