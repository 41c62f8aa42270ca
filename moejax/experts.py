"""Gated feed-forward experts over rows sorted by expert.

Letters: R expert rows, D model width, E experts, F expert hidden width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.errors import UserError
from pallas_kernels import gated_ffn as kernels
from pallas_kernels.grouped_matmul import GroupMetadata, group_metadata, grouped_matmul, pick
from pallas_kernels.grouped_matmul.blocks import Layout, Windows, dot, dot_rows
from pallas_kernels.vary import vary_alike

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # the tanh form
    "relu": jax.nn.relu,
}


def gated_ffn(
    rows: Array,
    gate: Array,
    up: Array,
    down: Array,
    group_sizes: Array,
    *,
    activation: str = "silu",
    scale: Array | None = None,
    metadata: GroupMetadata | None = None,
    implementation: str | None = None,
    spare: int = 0,
    tail: bool = True,
) -> Array:
    """(activation(rows · gate) ∘ (rows · up)) · down, each row with its expert's weights (Shazeer 2020, equation 6).

    rows (R, D) sorted by expert; gate, up (E, D, F) and down (E, F, D) of rows' dtype; group_sizes (E,) i32. Returns
    (R, D), zeros past the sum of group_sizes, undefined without `tail`; those rows are never read. Products are summed
    in float32 and rounded to rows' dtype. scale (R,) f32: gates that multiply what goes into `down`; only where
    `takes_scale`.
    metadata: `group_metadata(group_sizes, R)`, shared by the six products of forward and backward. implementation: of
    `grouped_matmul`; with "blocks" (the choice on CPU) rows are padded once for all products. spare and tail: of
    `group_metadata`, where none is given.
    """
    check(rows, gate, up, down, group_sizes, activation)
    with jax.named_scope("experts"):
        if metadata is None:
            metadata = group_metadata(group_sizes, rows.shape[0], spare, tail)
            metadata = jax.tree.map(lambda a: checkpoint_name(a, "routing"), metadata)
        name = implementation or pick(rows, gate)
        if name == "mosaic_gpu":
            return kernels.gated_ffn(
                rows, gate, up, down, group_sizes,
                activation=activation, scale=scale, metadata=metadata, implementation=name,
            )  # fmt: skip
        assert scale is None, f"{name} takes none"
        if rows.shape[0] and name == "blocks":
            return _blocks(activation, *vary_alike(rows, gate, up, down, metadata))
        product = functools.partial(
            grouped_matmul, group_sizes=group_sizes, metadata=metadata, implementation=implementation
        )
        a, b = (checkpoint_name(product(rows, weights), "experts") for weights in (gate, up))
        return checkpoint_name(product(_gated(activation, a, b), down), "experts")


def takes_scale(rows: Array, gate: Array, implementation: str | None = None) -> bool:
    """Whether `gated_ffn` takes gates as `scale` for these operands: where its own kernel applies them, at no cost."""
    return (implementation or pick(rows, gate)) == "mosaic_gpu"


def check(rows, gate, up, down, group_sizes, activation) -> None:
    """UserError unless these are operands of `gated_ffn`."""
    if activation not in ACTIVATIONS:
        raise UserError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    E, D, F = gate.shape
    shapes = [a.shape for a in (rows, gate, up, down, group_sizes)]
    if shapes != [(rows.shape[0], D), (E, D, F), (E, D, F), (E, F, D), (E,)]:
        raise UserError(
            "gated_ffn: rows, gate, up, down, group_sizes must be (R, D), (E, D, F), (E, D, F), (E, F, D), (E,); "
            f"got {', '.join(map(str, shapes))}"
        )
    if len({a.dtype for a in (rows, gate, up, down)}) > 1:
        dtypes = ", ".join(str(a.dtype) for a in (rows, gate, up, down))
        raise UserError(f"gated_ffn: rows, gate, up and down must have one dtype; got {dtypes}: cast the weights")


def _gated(activation: str, gate: Array, up: Array) -> Array:
    return ACTIVATIONS[activation](gate) * up


# ---- The whole block in the layout of grouped_matmul.blocks: padded once, no gather between products.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(activation, rows, gate, up, down, metadata):
    return _blocks_forward(activation, rows, gate, up, down, metadata)[0]


def _blocks_forward(activation, rows, gate, up, down, metadata):
    layout, dtype = Layout.of(rows.shape[0], metadata), rows.dtype

    def block(rows, gate, up, down):
        a, b = dot(rows, gate, dtype), dot(rows, up, dtype)
        return dot(_gated(activation, a, b), down, dtype), a, b

    a = b = None
    out = jnp.zeros_like(rows)
    if layout.base:
        padded, a, b = (checkpoint_name(x, "experts") for x in block(layout.pad(rows), gate, up, down))
        out = layout.unpad(padded)

    def step(out: Array, windows: Windows) -> Array:
        weights = (windows.of_group(w) for w in (gate, up, down))
        values = block(windows.take(rows), *weights)[0]
        return windows.each(lambda i, out: windows.put(i, out, values), out)

    return layout.overflow(step, out), (rows, gate, up, down, metadata, a, b)


def _blocks_backward(activation, residuals, grad):
    rows, gate, up, down, metadata, a, b = residuals
    layout, dtype = Layout.of(rows.shape[0], metadata), rows.dtype
    _, D, F = gate.shape
    # On CPU XLA's product is a quarter faster with the narrow factor on the left: weights' gradients are kept turned
    # so, (E, F, D) where F is less than D, and put right at the end.
    turned = F < D

    def weight_gradient(width, hidden):
        return dot_rows(hidden, width) if turned else dot_rows(width, hidden)

    def block(x, a, b, grad, gate, up, down):
        """The gradient of rows and, in float32, of the three weights, each (E, F, D) if turned, else (E, D, F)."""
        hidden, pull = jax.vjp(functools.partial(_gated, activation), a, b)
        da, db = pull(dot(grad, down, dtype, transpose=True))
        dx = dot(da, gate, jnp.float32, transpose=True) + dot(db, up, jnp.float32, transpose=True)
        return dx.astype(dtype), (weight_gradient(x, da), weight_gradient(x, db), weight_gradient(grad, hidden))

    dx = jnp.zeros_like(rows)
    dweights = (jnp.zeros_like(down if turned else gate, dtype=jnp.float32),) * 3
    if layout.base:
        padded, dweights = block(layout.pad(rows), a, b, layout.pad(grad), gate, up, down)
        dx = layout.unpad(padded)

    def step(carry: tuple, windows: Windows) -> tuple:
        weights = [windows.of_group(w) for w in (gate, up, down)]
        x = windows.take(rows)
        # the overflow's a and b are computed again: kept, they would take room for all rows that might overflow
        a, b = dot(x, weights[0], dtype), dot(x, weights[1], dtype)
        dwindow, terms = block(x, a, b, windows.take(grad), *weights)

        def put(i, carry: tuple) -> tuple:
            dx, dweights = carry
            sums = (windows.add_to_group(i, total, term) for total, term in zip(dweights, terms, strict=True))
            return windows.put(i, dx, dwindow), tuple(sums)

        return windows.each(put, carry)

    dx, dweights = layout.overflow(step, (dx, dweights))
    dgate, dup, ddown = (d.astype(dtype) for d in dweights)
    if turned:
        dgate, dup = jnp.swapaxes(dgate, 1, 2), jnp.swapaxes(dup, 1, 2)
    else:
        ddown = jnp.swapaxes(ddown, 1, 2)
    return dx, dgate, dup, ddown, None


_blocks.defvjp(_blocks_forward, _blocks_backward)
