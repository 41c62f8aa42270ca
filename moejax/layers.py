"""Small layers that every family shares: norm, rotary positions, SwiGLU, embedding."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moejax import sharding
from pallas_kernels.search import count_below

Initializer = Callable[..., Any]


def fan_in_init(in_axis: int | tuple[int, ...], out_axis: int | tuple[int, ...], scale: float = 1.0, experts=()):
    """Truncated normal of standard deviation scale / √(product of the input axes); `experts`: axes of a batch."""
    return nn.initializers.variance_scaling(
        scale**2, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis, batch_axis=experts
    )


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """A float32 parameter of `module`, annotated with its logical axes (the table is in sharding.py)."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


def linear(x: jax.Array, kernel: jax.Array, out_dtype: jnp.dtype | None = None, inputs: int = 1) -> jax.Array:
    """x (…, *in) times kernel (*in, *out) over its first `inputs` axes, as one matrix product of T rows.

    kernel is cast to x's dtype. On CPU the weight gradient of a product over (B, L) takes almost twice as long as the
    same over T = B·L (410 against 231 ms of processor time for a SwiGLU of D 256, F 1024, T 4096).
    """
    rows = x.shape[: x.ndim - inputs]
    if rows and math.prod(rows) == 1 and jax.default_backend() == "gpu":
        # Of one row XLA makes a multiplication that goes to memory, as large as the kernel, and a sum over it.
        return linear(jnp.broadcast_to(x, (16, *x.shape[1:])), kernel, out_dtype, inputs)[:1]
    # The kernel keeps its shape: reshaped, it would be kept a second time for the gradient.
    axes = tuple(range(inputs))
    flat = lax.dot_general(
        x.reshape(math.prod(rows), *kernel.shape[:inputs]),
        kernel.astype(x.dtype),
        ((tuple(1 + axis for axis in axes), axes), ((), ())),
        preferred_element_type=out_dtype,
    )
    return flat.reshape(*rows, *kernel.shape[inputs:])


def scores(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (B, L, D) · kernel (D, E) -> (B, L, E) f32: a product of float32 precision, for decisions hang on it."""
    rows, on_gpu = math.prod(x.shape[:-1]), sharding.platform() == "gpu"
    if rows >= 128 and x.dtype == jnp.bfloat16 and on_gpu:  # of few rows XLA makes no matrix product
        return _scores(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
    wide = x.astype(jnp.float32)
    if rows == 1 and on_gpu:
        return _scores_of_one(wide.reshape(-1), kernel.astype(jnp.float32)).reshape(*x.shape[:-1], -1)
    return jnp.einsum("bld,de->ble", wide, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)


# A float32 product takes a GPU ten times as long as one of bfloat16, and x is rounded to that already. What isn't comes
# as three bfloat16 numbers that sum to it, so that products lose no more than in float32.
@jax.custom_vjp
def _scores(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(T, D) bf16 · (D, E) -> (T, E) f32."""
    return _times_pieces(x, kernel)


def _scores_backward(inputs, grad):
    x, kernel = inputs
    of_grad, of_kernel = pieces(grad), pieces(kernel)
    pairs = [(a, b) for i, a in enumerate(of_grad) for j, b in enumerate(of_kernel) if i + j < 3]
    left, right = (jnp.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    dx = lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), _times_pieces(x.T, grad).astype(kernel.dtype)


_scores.defvjp(lambda x, kernel: (_scores(x, kernel), (x, kernel)), _scores_backward)


def _scores_of_one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(D,) · (D, E) -> (E,) f32, in parts: of a whole sum XLA makes a kernel of E / 32 blocks, and waits for memory."""
    D, E = kernel.shape
    parts = math.gcd(D, 16)
    each = jnp.sum(x.reshape(parts, D // parts, 1) * kernel.reshape(parts, D // parts, E), axis=1)
    # behind a barrier, or every reader adds the parts up again: choosing experts reads each score many times
    return lax.optimization_barrier(functools.reduce(operator.add, each))


def _times_pieces(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """rows (A, C) bf16 · matrix (C, E) -> (A, E) f32."""
    of_matrix = pieces(matrix)
    out = jnp.dot(rows, jnp.concatenate(of_matrix, axis=1), preferred_element_type=jnp.float32)
    return jnp.sum(out.reshape(rows.shape[0], len(of_matrix), -1), axis=1)


def pieces(a: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays that sum to `a`: itself, or three of a float32 array (8 of its 24 bits each)."""
    if a.dtype == jnp.bfloat16:
        return [a]
    found = []
    for _ in range(3):
        # not astype: XLA may leave a cast there and back out, and then nothing would be left for the next
        head = lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        found.append(head.astype(jnp.bfloat16))
        a = a - head
    return found


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (Zhang & Sennrich 2019), computed in float32, in x's dtype again."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("norm",))
        return _rms_norm(x, scale, self.epsilon)


# Only x is kept for the gradient, not the three arrays of its size on the way: a pass over x is cheaper than they are.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))  # it may be stored in less
    return (wide * inverse * scale).astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su 2021) on x (B, L, H, head_dim), first half against second half; positions (B, L) int."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class GatedFFN(nn.Module):
    """SwiGLU (Shazeer 2020): (silu(x·gate) ∘ x·up)·down, on x (…, D) in `dtype`."""

    hidden: int
    dtype: jnp.dtype
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, init = x.shape[-1], fan_in_init(0, 1, self.init_scale)
        gate = parameter(self, "gate", init, (width, self.hidden), ("embed", "mlp"))
        up = parameter(self, "up", init, (width, self.hidden), ("embed", "mlp"))
        down = parameter(self, "down", init, (self.hidden, width), ("mlp", "embed"))
        x = x.astype(self.dtype)
        return linear(nn.silu(linear(x, gate)) * linear(x, up), down)


class Embedding(nn.Module):
    """Token embedding (V, D): `__call__` looks tokens (B, L) up, `unembedding` is it turned, (D, V)."""

    vocab_size: int
    width: int
    dtype: jnp.dtype

    def setup(self):
        init = nn.initializers.normal(1.0 / self.width**0.5)
        self.embedding = parameter(self, "embedding", init, (self.vocab_size, self.width), ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # The rows are scaled back to unit variance; the small table then also serves as a tied unembedding.
        rows = lookup(self.embedding, tokens).astype(self.dtype) * jnp.asarray(self.width**0.5, self.dtype)
        return sharding.constrain(rows, "batch", "length", "activation")

    def unembedding(self) -> jax.Array:
        return self.embedding.T


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows (B, L, D) of table (V, D) at tokens (B, L), in [0, V)."""
    if sharding.platform() == "gpu":
        return _lookup(table, tokens)
    return jnp.take(table, tokens, axis=0)


# The gradient of a lookup is a scatter, which on a GPU adds a token's terms in whatever order threads come: two runs
# would differ. Here they are sorted by token and added in a fixed order.
@jax.custom_vjp
def _lookup(table, tokens):
    return jnp.take(table, tokens, axis=0)


def _lookup_forward(table, tokens):
    return _lookup(table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _lookup_backward(inputs, grad):
    tokens, like = inputs
    axes = sharding.batch_axes()

    def of_my_rows(tokens, grad):
        total = sum_by_token(tokens.reshape(-1), grad.reshape(-1, grad.shape[-1]), like.shape[0])
        return lax.psum(total, axes) if axes else total

    rows = PartitionSpec(axes or None)
    everywhere = sharding.on_each_device(of_my_rows, in_specs=(rows, rows), out_specs=PartitionSpec())
    return everywhere(tokens, grad).astype(like.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def sum_by_token(tokens: jax.Array, rows: jax.Array, vocab_size: int) -> jax.Array:
    """(V, D) f32: for each token the sum of the rows (T, D) that are its, by tokens (T,) i32; zeros where there's none.

    In round n every row takes the one 2^n places on, if of its token: after log2(longest run) rounds a run's first row
    has the sum of all. Gathers alone, and the same order of sums in every run.
    """
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    token, order = lax.sort((tokens, place), num_keys=1)
    bounds = count_below(token, jnp.arange(vocab_size + 1, dtype=jnp.int32))
    count, end = jnp.diff(bounds), bounds.at[token + 1].get(mode="clip")

    def unfinished(carry):
        return carry[0] < jnp.max(count)

    def double(carry):
        step, sums = carry
        more = sums.at[place + step].get(mode="clip")
        return 2 * step, sums + jnp.where((place + step < end)[:, None], more, 0)

    terms = rows.at[order].get(mode="clip").astype(jnp.float32)
    _, sums = lax.while_loop(unfinished, double, (jnp.ones_like(place[0]), terms))
    return jnp.where((count > 0)[:, None], sums.at[bounds[:-1]].get(mode="clip"), 0)
