"""Multi-head latent attention (DeepSeek-V2 2024, §2.1): keys and values of all heads from one small latent.

The cache holds the latent (rank c) and the one rotary key (r) that all heads share, and nothing else. A prefill expands
them to keys and values; a decode step does not: it takes the key's matrix into the query and the value's into the
output (the absorbed form, §2.1.2), so it reads c + r numbers per token for any number of heads. Same logits.
Letters: B batch, L length, D model width, H heads, M places of the cache.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import attention, layers, rope
from moejax.models import parts
from moejax.rope import Rope


def score_scale(settings: Rope, width: int) -> float:
    """width^-½, times the square of YaRN's temperature over all features where `mscale_all_dim` asks for it."""
    scale = width**-0.5
    if settings.rope_type != "default" and settings.mscale_all_dim:
        assert settings.factor is not None
        scale *= rope.yarn_mscale(settings.factor, settings.mscale_all_dim) ** 2
    return scale


class LatentAttention(nn.Module):
    """x (B, L, D) -> (B, L, D).

    Parameters: query (D, H, nope + rope), or query_down (D, q_rank), query_norm and query_up (q_rank, H, nope + rope);
    latent_down (D, kv_rank + rope), latent_norm, latent_up (kv_rank, H, nope + value); out (H, value, D). With `bias`
    the two downs and out have one. The inner norms have an ε of their own, 1e-6, whatever the config says.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    rope_pairs: bool
    bias: bool
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, inputs: parts.Inputs):
        turns = rope.table(self.rope, self.rope_dim, inputs.positions, inputs.mask)
        q = self._query(x)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        q_rope = rope.rotate(q_rope, turns, pairs=self.rope_pairs)
        down = self._down("latent_down", x, self.kv_rank + self.rope_dim)
        latent = layers.RMSNorm(1e-6, name="latent_norm")(down[..., : self.kv_rank])
        k_rope = rope.rotate(down[:, :, None, self.kv_rank :], turns, pairs=self.rope_pairs)
        shape = (self.kv_rank, self.num_heads, self.nope_dim + self.value_dim)
        up = layers.parameter(self, "latent_up", parts.INIT, shape, ("norm", "heads", "head_dim")).astype(x.dtype)
        scale = score_scale(self.rope, self.nope_dim + self.rope_dim)
        out = None
        if inputs.cache_length:
            cache, first = parts.cached(self, inputs, latent=latent, rotary_key=k_rope[:, :, 0])
            if not first:
                out = self._absorbed(q_nope, q_rope, cache["latent"], cache["rotary_key"], up, scale, inputs)
        if out is None:
            out = self._expanded(q_nope, q_rope, latent, k_rope, up, scale, inputs)
        return parts.merge_heads(self, out, x.shape[-1], bias=self.bias)

    def _down(self, name, x, rank):
        kernel = layers.parameter(self, name, parts.INIT, (x.shape[-1], rank), ("embed", "norm"))
        out = layers.linear(x, kernel)
        if self.bias:
            added = layers.parameter(self, f"{name}_bias", nn.initializers.zeros, (rank,), ("norm",))
            out += added.astype(x.dtype)[None, None]
        return out

    def _query(self, x):
        width = self.nope_dim + self.rope_dim
        if self.q_rank is None:
            return parts.heads(self, "query", x, self.num_heads, width)
        low = layers.RMSNorm(1e-6, name="query_norm")(self._down("query_down", x, self.q_rank))
        return parts.heads(self, "query_up", low, self.num_heads, width)

    def _expanded(self, q_nope, q_rope, latent, k_rope, up, scale, inputs):
        expanded = layers.linear(latent, up)
        k_nope, v = expanded[..., : self.nope_dim], expanded[..., self.nope_dim :]
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(k_rope, (*k_nope.shape[:3], self.rope_dim))], axis=-1)
        # one width for all: attend's implementations want values as wide as keys
        width = max(q.shape[-1], self.value_dim)
        q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) for x in (q, k, v))
        # attend divides by √width: what is left of the scale goes into the query
        q *= jnp.asarray(scale * width**0.5, q.dtype)
        out = attention.attend(q, k, v, inputs.segment_ids, implementation=self.implementation)
        return out[..., : self.value_dim]

    def _absorbed(self, q_nope, q_rope, latent, rotary_key, up, scale, inputs):
        q_latent = jnp.einsum("blhn,chn->blhc", q_nope, up[..., : self.nope_dim])
        scores = jnp.einsum("blhc,bmc->bhlm", q_latent, latent, preferred_element_type=jnp.float32)
        scores += jnp.einsum("blhr,bmr->bhlm", q_rope, rotary_key, preferred_element_type=jnp.float32)
        mask = attention.slot_mask(inputs.positions, inputs.cache_length)
        weights = attention.softmax(scores * scale, mask[:, None]).astype(latent.dtype)
        mixed = jnp.einsum("bhlm,bmc->blhc", weights, latent)
        return jnp.einsum("blhc,chv->blhv", mixed, up[..., self.nope_dim :])


def cache_bytes(cache: dict) -> int:
    """Bytes of the arrays (or shapes) of a cache."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
