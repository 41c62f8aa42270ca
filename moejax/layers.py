"""Small layers that every family shares: norm, rotary positions, SwiGLU, embedding."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from moejax import sharding

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
        rows = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype) * jnp.asarray(self.width**0.5, self.dtype)
        return sharding.constrain(rows, "batch", "length", "activation")

    def unembedding(self) -> jax.Array:
        return self.embedding.T
