"""Rotary positions (Su 2021) with the scalings that published checkpoints use.

A checkpoint's `rope_parameters` become a frozen `Rope`; `table` gives cosines and sines for positions, `rotate` applies
them. Letters: B batch, L length, H heads, hd head width.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn into angles; the fields are those of transformers 5's `rope_parameters`.

    rope_theta: the base. default: frequencies theta^(-2i/hd). linear: all divided by `factor`. llama3 (Llama 3.1): long
    wavelengths divided by `factor`, short ones kept, a ramp between. yarn (Peng 2023, §3.2-3.4): a ramp by the number
    of rotations inside `original_max_position_embeddings`, and a temperature on cosines and sines.
    Two look at the length, which is the largest position of a row in a call, for all its positions: dynamic (NTK),
    whose base grows with it from `original_max_position_embeddings` on; longrope (Ding 2024), where each frequency is
    divided by its entry of `short_factor`, or of `long_factor` past `original_max_position_embeddings`, and a
    temperature. As in transformers, keys that are in a cache keep the frequencies of their own call. There the length
    is that of a batch's longest row: here a row is what it is alone.
    """

    rope_theta: float = 10_000.0
    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None
    beta_fast: float | None = None  # yarn: rotations above which a frequency is kept; 32
    beta_slow: float | None = None  # yarn: rotations below which it is divided by factor; 1
    mscale: float | None = None  # yarn, DeepSeek: the temperature's numerator …
    mscale_all_dim: float | None = None  # … and denominator; it also scales the scores of latent attention
    attention_factor: float | None = None  # yarn, longrope: the temperature itself
    truncate: bool = True  # yarn: the ramp's ends are rounded outwards
    short_factor: tuple[float, ...] | None = None  # longrope: one for each pair of features
    long_factor: tuple[float, ...] | None = None

    def __post_init__(self):
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor", "original_max_position_embeddings"),
            "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_max_position_embeddings"),
            "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        }[self.rope_type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise UserError(f"rope type {self.rope_type!r} needs {', '.join(missing)}; the config does not give it")


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of features: (hd / 2,) float32; not of the types that look at the length."""
    exponents = _exponents(head_dim)
    plain = (1.0 / (np.float32(rope.rope_theta) ** exponents)).astype(np.float32)
    if rope.rope_type == "default":
        return plain
    assert rope.factor is not None
    scaled = (plain / np.float32(rope.factor)).astype(np.float32)
    if rope.rope_type == "linear":
        return scaled
    kept = _llama3_kept(rope, plain) if rope.rope_type == "llama3" else _yarn_kept(rope, head_dim)
    return (scaled * (1 - kept) + plain * kept).astype(np.float32)


def frequencies_at(rope: Rope, head_dim: int, length: jax.Array) -> jax.Array:
    """`frequencies` (B, hd / 2) of the types that look at the length of the call, (B,) i32."""
    assert rope.factor is not None and rope.original_max_position_embeddings is not None
    exponents, context = _exponents(head_dim)[None], rope.original_max_position_embeddings
    length = length[:, None]
    if rope.rope_type == "dynamic":
        longest = jnp.maximum(length, context).astype(jnp.float32)
        stretched = rope.factor * longest / context - (rope.factor - 1)
        return 1.0 / ((rope.rope_theta * stretched ** (head_dim / (head_dim - 2))) ** exponents)
    factors = [rope.short_factor or (), rope.long_factor or ()]
    if any(len(each) != head_dim // 2 for each in factors):
        raise UserError(f"longrope: short_factor and long_factor have {len(factors[0])} and {len(factors[1])} entries; "
                        f"the {head_dim} rotary features of a head need {head_dim // 2}")  # fmt: skip
    base = np.float32(rope.rope_theta) ** exponents
    short, long = (1.0 / (np.asarray([each], np.float32) * base) for each in factors)
    return jnp.where(length > context, long, short)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _llama3_kept(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """1 where a frequency is kept, 0 where it is divided: by how many times it turns in the original context."""
    assert rope.original_max_position_embeddings and rope.low_freq_factor and rope.high_freq_factor
    turns = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)
    if rope.high_freq_factor == rope.low_freq_factor:  # Llama 4 Scout: no ramp
        return (turns >= rope.low_freq_factor).astype(np.float32)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)


def _yarn_kept(rope: Rope, head_dim: int) -> np.ndarray:
    context = rope.original_max_position_embeddings
    assert context

    def pair(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times in the original context."""
        wavelength = context / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32), pair(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1 (Peng 2023, eq. 22), 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def temperature(rope: Rope) -> float:
    """What cosines and sines are multiplied by."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.factor is not None
    if rope.rope_type == "longrope":
        context = rope.original_max_position_embeddings
        assert context is not None
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(context))
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def table(rope: Rope, head_dim: int, positions: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, L, 1, hd / 2) float32 of positions (B, L) int; mask (B, L) bool: False where padded."""
    if rope.rope_type in ("dynamic", "longrope"):
        length = jnp.max(jnp.where(mask, positions, 0), axis=1) + 1
        each = frequencies_at(rope, head_dim, length)[:, None, None]
    else:
        each = jnp.asarray(frequencies(rope, head_dim))[None, None, None]
    angles = positions.astype(jnp.float32)[:, :, None, None] * each
    scale = temperature(rope)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], *, pairs: bool = False) -> jax.Array:
    """x (B, L, H, hd) rotated, in x's dtype. Feature i turns with i + hd/2; with `pairs`, 2i with 2i + 1.

    With `pairs` the result holds first the even, then the odd features: a permutation that queries and keys share and
    that their product does not see.
    """
    cos, sin = cos_sin
    wide = x.astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if pairs else jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
