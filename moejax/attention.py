"""Attention: one function, and grouped-query attention (Ainslie 2023) around it."""

import functools
import logging
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moejax import attention_blocks, layers, sharding

IMPLEMENTATIONS = ("plain", "blocks", "xla", "cudnn", "splash")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of q (B, L, H, hd) over k, v (B, L, H_kv, hd), inside segments; (B, L, H, hd) in q's dtype.

    Scores are scaled by hd^-½ and normalised in float32. `segment_ids` (B, L) int: positions see their own segment
    only. `window`: each position sees itself and the window − 1 before it. `sinks` (H,) are learned logits that take
    part of the mass (gpt-oss). `softcap` c bounds scores to c·tanh(s/c). Implementations: `plain` (the oracle, any
    option), `blocks` (CPU), `xla`, `cudnn` (GPU, half precision) and `splash` (TPU); None picks by platform, and
    `plain` where sinks or softcap ask for it.
    """
    if implementation is None:
        implementation = _pick(q, v, sinks, softcap)
        _log_once(f"attention: {implementation} on {jax.default_backend()}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: one of {', '.join(IMPLEMENTATIONS)}, or None")
    if implementation == "splash":
        return _splash(q, k, v, segment_ids, window, softcap)
    if implementation == "plain":
        return _plain(q, k, v, _mask(q.shape[1], segment_ids, window), sinks, softcap)
    if sinks is not None or softcap is not None:
        raise NotImplementedError(f"attention by {implementation!r} takes no sinks or softcap; use 'plain'")
    if implementation == "blocks":
        return attention_blocks.attend(q, k, v, segment_ids, window)
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    # Its own arithmetic mixes dtypes for bfloat16, which strict promotion would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=cast(Any, implementation),
        )


def _pick(q: jax.Array, v: jax.Array, sinks: jax.Array | None, softcap: float | None) -> str:
    backend, length = jax.default_backend(), q.shape[1]
    # On an accelerator a step must not hold an array of scores.
    if backend == "tpu" and sinks is None and length % 128 == 0:
        return "splash"
    if sinks is not None or softcap is not None:  # jax's own function takes neither
        return "plain"
    if backend == "gpu" and _fits_cudnn(q, v):
        return "cudnn"
    return "blocks" if backend == "cpu" else "xla"


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger(__name__).info(line)


def _fits_cudnn(q: jax.Array, v: jax.Array) -> bool:
    """What every version of cuDNN on every GPU since Ampere takes, with a mask and gradients."""
    if float(getattr(jax.local_devices()[0], "compute_capability", 0)) < 8.0:  # a T4 has 7.5
        return False
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    width = q.shape[-1]
    return half and width == v.shape[-1] and width <= 128 and width % 8 == 0 and q.shape[1] % 2 == 0


def write_slots(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """cache (B, H_kv, M, hd) with new (B, L, H_kv, hd) in the slots that are its positions (B, L).

    Or both without heads: (B, M, n) and (B, L, n).
    """
    if new.ndim == 3:
        return write_slots(cache[:, None], new[:, :, None], positions)[:, 0]
    if new.shape[:2] == (1, 1):  # one slot of one row: XLA copies, where it would scatter, in half the time on a GPU
        return lax.dynamic_update_slice(cache, jnp.swapaxes(new, 1, 2), (0, 0, positions[0, 0], 0))
    row, head = jnp.arange(new.shape[0])[:, None, None], jnp.arange(new.shape[2])[None, None, :]
    return cache.at[row, head, positions[:, :, None]].set(new)


def slot_mask(positions: jax.Array, slots: int, window: int | None = None) -> jax.Array:
    """(B, L, M) bool: which slots of a cache a query at `positions` (B, L) reads.

    A slot past the query's own position is not read, so slots that hold padding or old rows don't matter.
    """
    query, slot = positions[:, :, None], jnp.arange(slots, dtype=positions.dtype)[None, None, :]
    mask = slot <= query
    if window is not None:
        mask &= slot > query - window
    return mask


def attend_slots(q, k, v, mask, sinks=None, softcap=None) -> jax.Array:
    """Attention of q (B, L, H, hd) over a cache k, v (B, H_kv, M, hd) where mask (B, L, M); (B, L, H, hd).

    The cache has heads first: products then read it as it lies, where (B, M, H_kv, hd) was turned at every step.
    """
    B, L, H, width = q.shape
    q = q.reshape(B, L, k.shape[1], H // k.shape[1], width)
    scores = jnp.einsum("blkgh,bkmh->bkglm", q, k, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, None, None], sinks, softcap, width)
    out = jnp.einsum("bkglm,bkmh->blkgh", weights.astype(v.dtype), v)
    return out.reshape(B, L, H, v.shape[-1])


def _mask(length: int, segment_ids: jax.Array | None, window: int | None) -> jax.Array:
    """(B or 1, 1, L, L) bool, True where a query (third axis) sees a key (last axis)."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    mask = mask[None, None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return mask


def _plain(q, k, v, mask, sinks, softcap):
    B, L, H, width = q.shape
    q = q.reshape(B, L, k.shape[2], H // k.shape[2], width)
    scores = jnp.einsum("blkgh,bmkh->bkglm", q, k, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, :, None], sinks, softcap, width)
    out = jnp.einsum("bkglm,bmkh->blkgh", weights.astype(v.dtype), v)
    return out.reshape(B, L, H, v.shape[-1])


def _weights(scores, mask, sinks, softcap, width):
    """What the values of scores (B, H_kv, H/H_kv, L, M) count for: they sum to 1, less what `sinks` (H,) take."""
    scores = scores * width**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    return softmax(scores, mask, sinks)


def softmax(scores: jax.Array, mask: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """Softmax in float32 over the last axis where `mask`; `sinks` (…, 1) are logits that only take mass away."""
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = top if sinks is None else jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / (total if sinks is None else total + jnp.exp(sinks - top))


def _splash(q, k, v, segment_ids, window, softcap):
    """jax's splash attention for TPU: block-sparse, never L×L. Each device takes its rows and its heads."""
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    rows = sharding.batch_axes() or None
    heads = PartitionSpec(rows, None, "tensor" if sharding.splits("tensor") else None)
    # Its results don't say along which axes they vary, so what check_vma checks is said here: every axis of more than
    # one device splits all of its arguments that have gradients, and the result; nothing is summed over devices.
    run = sharding.on_each_device(
        functools.partial(_splash_local, window=window, softcap=softcap),
        in_specs=(heads, heads, heads, PartitionSpec(rows)),
        out_specs=heads,
        check_vma=False,
    )
    return run(q, k, v, segment_ids)


def _splash_local(q, k, v, segment_ids, *, window, softcap):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q.shape[1]
    shape = (length, length)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * q.shape[2]), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap
    )
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v))
    k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
    out = jax.vmap(attention)(q, k, v, segment_ids=kernel.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(out, 1, 2)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, on request, RMSNorm on each head's queries and keys.

    x (B, L, D), positions (B, L), segment_ids (B, L) -> (B, L, D) in `dtype`. With `cache_length` M > 0 keys and
    values go to and come from the collection `cache` (B, H_kv, M, hd), at the slot that is their position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool
    norm_eps: float
    init_scale: float
    dtype: jnp.dtype
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, positions, segment_ids, cache_length: int = 0):
        width = x.shape[-1]

        def project(name, heads, axis):
            init, shape = layers.fan_in_init(0, (1, 2), self.init_scale), (width, heads, self.head_dim)
            kernel = layers.parameter(self, name, init, shape, ("embed", axis, "head_dim"))
            return layers.linear(x, kernel)

        x = x.astype(self.dtype)
        q = project("query", self.num_heads, "heads")
        k = project("key", self.num_kv_heads, "kv_heads")
        v = project("value", self.num_kv_heads, "kv_heads")
        if self.qk_norm:
            q = layers.RMSNorm(self.norm_eps, name="query_norm")(q)
            k = layers.RMSNorm(self.norm_eps, name="key_norm")(k)
        q, k = (layers.rotary(y, positions, self.rope_theta) for y in (q, k))
        if cache_length:
            out = self._cached(q, k, v, positions, cache_length)
        else:
            out = attend(q, k, v, segment_ids, implementation=self.implementation)
            out = checkpoint_name(out, "attention")
        init, shape = layers.fan_in_init((0, 1), 2, self.init_scale), (self.num_heads, self.head_dim, width)
        kernel = layers.parameter(self, "out", init, shape, ("heads", "head_dim", "embed"))
        out = layers.linear(out, kernel, inputs=2)
        return sharding.constrain(out, "batch", "length", "activation")

    def _cached(self, q, k, v, positions, cache_length):
        B, _, heads, width = k.shape

        def updated(name, new):
            cache = self.variable("cache", name, jnp.zeros, (B, heads, cache_length, width), new.dtype)
            cache.value = write_slots(cache.value, new, positions)
            return cache.value

        return attend_slots(q, updated("key", k), updated("value", v), slot_mask(positions, cache_length))
