"""The cross-entropy of next tokens, from logits or, without ever holding them all, from the last hidden states.

float32 logits are the largest array of a language model's step: 3.3 GB at T = 16384 and V = 50304, and as much again
for their gradient. They are only needed a few rows at a time.

Letters: B sequences, L length, D model width, V vocabulary, n pieces.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moejax import layers, sharding

LARGEST = 2**27  # logits that a device holds at a time, 512 MB; fewer make products too small for an accelerator


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Σ −log p(target) in nats over unmasked targets: logits (B, L, V) f32, targets (B, L) int, mask (B, L) bool."""
    with jax.named_scope("loss"):
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(jnp.where(mask, nats, 0.0))


def _same(logits: jax.Array) -> jax.Array:
    return logits


def of_hidden(
    x: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    scale: Callable[[jax.Array], jax.Array] = _same,
    pieces: int | None = None,
) -> jax.Array:
    """`cross_entropy` of scale(x · unembedding), in pieces of the length: a f32 scalar.

    x (B, L, D), unembedding (D, V), targets (B, L) int, mask (B, L) bool; scale: elementwise on float32 logits. pieces:
    how many, a divisor of L; None: enough that no device holds more than LARGEST logits. With more than one piece the
    gradients of x and unembedding are taken piece by piece in the forward pass, so that no logits are computed twice
    or kept; sums over pieces are float32.
    """
    if pieces is None:
        shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in sharding.batch_axes())
        pieces = number_of_pieces(x.shape[0] // shards, x.shape[1], unembedding.shape[1])
    with jax.named_scope("head"):
        if pieces == 1:
            return _nats(scale, x, unembedding, targets, mask)
        return _in_pieces(scale, pieces, x, unembedding, targets, mask)


def number_of_pieces(rows: int, length: int, vocabulary: int) -> int:
    """The fewest equal pieces of `length` with at most LARGEST logits each; `length` where no number is enough.

    Twice as many logits on a GPU, where each piece reads and writes unembedding's gradient once more.
    """
    largest = LARGEST * (2 if sharding.platform() == "gpu" else 1)
    fits = (n for n in range(1, length + 1) if length % n == 0 and rows * (length // n) * vocabulary <= largest)
    return next(fits, length)


def _nats(scale, x, unembedding, targets, mask):
    return cross_entropy(scale(_logits(x, unembedding)), targets, mask)


@jax.custom_vjp
def _logits(x, unembedding):
    return layers.linear(x, unembedding, jnp.float32)


def _products_backward(x, unembedding, grad):
    """The gradients of x, in its dtype, and of unembedding, in float32."""
    # Against a float32 gradient XLA would take both products in float32, at a third of bfloat16's rate.
    rows, grad = x.reshape(-1, x.shape[-1]), grad.astype(x.dtype).reshape(-1, grad.shape[-1])
    dx = jnp.einsum("tv,dv->td", grad, unembedding.astype(x.dtype)).reshape(x.shape)
    return dx, jnp.einsum("td,tv->dv", rows, grad, preferred_element_type=jnp.float32)


def _logits_backward(inputs, grad):
    x, unembedding = inputs
    dx, dkernel = _products_backward(x, unembedding, grad)
    return dx, dkernel.astype(unembedding.dtype)


_logits.defvjp(lambda x, unembedding: (_logits(x, unembedding), (x, unembedding)), _logits_backward)


def _nats_and_gradient(scale, logits, targets, mask):
    """`cross_entropy` of scale(logits), and its gradient of the logits in one pass over them: p, less 1 at the target,
    where optax's would be stored in float32 and scattered into."""
    scaled, pull = jax.vjp(scale, logits)
    with jax.named_scope("loss"):
        shares = jnp.exp(scaled - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
        target = jax.nn.one_hot(targets, scaled.shape[-1], dtype=scaled.dtype)
        (grad,) = pull(jnp.where(mask[..., None], shares - target, 0.0))
    return cross_entropy(scaled, targets, mask), grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_pieces(scale, pieces, x, unembedding, targets, mask):
    def add(total, piece):
        x, targets, mask = piece
        return total + _nats(scale, x, unembedding, targets, mask), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), _split((x, targets, mask), pieces))[0]


def _forward(scale, pieces, x, unembedding, targets, mask):
    def add(carry, piece):
        total, sums = carry
        x, targets, mask = piece
        nats, grad = _nats_and_gradient(scale, _logits(x, unembedding), targets, mask)
        dx, dkernel = _products_backward(x, unembedding, grad)  # float32: its product then adds to the sum itself
        return (total + nats, sums + dkernel), dx

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(unembedding.shape, jnp.float32)
    (total, dkernel), dx = jax.lax.scan(add, zeros, _split((x, targets, mask), pieces))
    # An array of the dtype's own keeps it for the backward pass: a residual can't be a dtype.
    return total, (_join(dx), dkernel, jnp.zeros((), unembedding.dtype))


def _backward(scale, pieces, residuals, grad):
    dx, dkernel, like = residuals
    # grad stays float32: rounded to bfloat16, it would scale all of dx by up to 0.4%
    return (dx.astype(jnp.float32) * grad).astype(dx.dtype), (dkernel * grad).astype(like.dtype), None, None


_in_pieces.defvjp(_forward, _backward)


def _split(arrays, pieces):
    """(B, L, …) -> (n, B, L/n, …): by length, so that every device keeps its rows of the batch."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0], pieces, -1, *a.shape[2:]), 1, 0), arrays)


def _join(pieces):
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])
