"""Small layers that every family shares: norm, rotary positions, SwiGLU, embedding."""

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


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (Zhang & Sennrich 2019), computed in float32, in x's dtype again."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("norm",))
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


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
        hidden = nn.silu(x @ gate.astype(self.dtype)) * (x @ up.astype(self.dtype))
        return hidden @ down.astype(self.dtype)


class Embedding(nn.Module):
    """Token embedding (V, D): `__call__` looks tokens (B, L) up, `attend` gives float32 logits (B, L, V) with it."""

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

    def attend(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(
            "bld,vd->blv", x, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32
        )
