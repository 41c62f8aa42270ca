"""What the published families are composed of: projections, attention with a cache, the skeleton of a decoder.

Layers are not stacked by a scan, unlike the research LM's: published models mix kinds of layers in patterns, a decode
step then reads each weight where it lies, and a checkpoint streams in layer by layer.
Letters: B batch, L length, D model width, H heads, hd head width, M places of the cache, V vocabulary.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import attention, layers, loss, sharding
from moejax.moe import Mode

INIT = nn.initializers.normal(0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every layer may look at: tokens, positions, segment_ids (B, L) i32, and two static values.

    wanted (B,) i32: the one place of each row that is needed after a layer's attention, in the last layer before a next
    token; None: all are.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    mode: Mode = dataclasses.field(default="evaluate", metadata={"static": True})
    cache_length: int = dataclasses.field(default=0, metadata={"static": True})
    wanted: jax.Array | None = None

    def at_wanted(self, x: jax.Array) -> "tuple[jax.Array, Inputs]":
        """x (B, L, D) and these at the wanted places, (B, 1, …), for what follows attention."""
        if self.wanted is None:
            return x, self
        place = self.wanted[:, None]
        tokens, positions, segment_ids = (
            jnp.take_along_axis(a, place, axis=1) for a in (self.tokens, self.positions, self.segment_ids)
        )
        here = Inputs(tokens, positions, segment_ids, self.mode, self.cache_length)
        return jnp.take_along_axis(x, place[:, :, None], axis=1), here

    @property
    def mask(self) -> jax.Array:
        """(B, L) bool: False where padded."""
        return self.segment_ids != 0


def heads(module: nn.Module, name: str, x: jax.Array, count: int, head_dim: int, *, axis="heads", bias=False):
    """x (B, L, D) -> (B, L, H, hd) by the parameter `name` (D, H, hd), and with `bias` name_bias (H, hd)."""
    kernel = layers.parameter(module, name, INIT, (x.shape[-1], count, head_dim), ("embed", axis, "head_dim"))
    out = layers.linear(x, kernel)
    if bias:
        added = layers.parameter(module, f"{name}_bias", nn.initializers.zeros, (count, head_dim), (axis, "head_dim"))
        out += added.astype(x.dtype)[None, None]
    return out


def merge_heads(module: nn.Module, x: jax.Array, width: int, *, bias=False) -> jax.Array:
    """x (B, L, H, hd) -> (B, L, D) by the parameter `out` (H, hd, D), and with `bias` out_bias (D,)."""
    kernel = layers.parameter(module, "out", INIT, (*x.shape[2:], width), ("heads", "head_dim", "embed"))
    out = layers.linear(x, kernel, inputs=2)
    if bias:
        added = layers.parameter(module, "out_bias", nn.initializers.zeros, (width,), ("norm",))
        out += added.astype(x.dtype)[None, None]
    return sharding.constrain(out, "batch", "length", "activation")


def cached(module: nn.Module, inputs: Inputs, **new: jax.Array) -> tuple[dict[str, jax.Array], bool]:
    """Writes `new`, (B, L, H, n) or (B, L, n), into the module's cache, each at the slot that is its position.

    Returns the whole cache by name, (B, H, M, n) or (B, M, n), and whether it was empty before: then attention over
    `new` alone says the same.
    """
    first = not module.has_variable("cache", next(iter(new)))
    whole = {}
    for name, value in new.items():
        B, _, *heads, width = value.shape
        cache = module.variable("cache", name, jnp.zeros, (B, *heads, inputs.cache_length, width), value.dtype)
        cache.value = attention.write_slots(cache.value, value, inputs.positions)
        whole[name] = cache.value
    return whole, first


def attend(
    module: nn.Module,
    q,
    k,
    v,
    inputs: Inputs,
    *,
    window=None,
    sinks=None,
    softcap=None,
    implementation=None,
) -> jax.Array:
    """Causal attention of q (B, L, H, hd) over k, v (B, L, H_kv, hd), through the cache where there is one.

    window: a position sees itself and the window − 1 before it. sinks (H,) and softcap as in `attention.attend`.
    """
    if inputs.cache_length:
        cache, first = cached(module, inputs, key=k, value=v)
        if not first:
            mask = attention.slot_mask(inputs.positions, inputs.cache_length, window)
            return attention.attend_slots(q, cache["key"], cache["value"], mask, sinks, softcap)
    return attention.attend(q, k, v, inputs.segment_ids, window, sinks, softcap, implementation)


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + ε) · scale over the last axis, without a bias, in float32, in x's dtype again."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = layers.parameter(self, "scale", nn.initializers.ones, x.shape[-1:], ("norm",))
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Block(nn.Module):
    """One layer of a family: (x (B, L, D), inputs) -> (x, losses of its MoE layer, {} where dense)."""

    config: Any
    index: int
    dtype: Any = jnp.float32
    implementation: str | None = None

    def rms_norm(self, name: str) -> nn.Module:
        return layers.RMSNorm(self.config.rms_norm_eps, name=name)


class Decoder(nn.Module):
    """The skeleton of a published decoder: embedding, blocks `layer_0` …, norm, unembedding.

    `apply(variables, tokens, positions=None, segment_ids=None)` gives float32 logits (B, L, V) for tokens (B, L) int;
    positions default to 0 … L − 1, segment_ids (0 where padded) to one segment. With `return_losses=True` also the
    unweighted losses of the MoE layers, each the mean over layers. `cache_length` M > 0 reads and writes the collection
    `cache`; `logits_at` (B,) int asks for the logits (B, 1, V) of one place of each row alone; `targets` (B, L) int
    and `mask` (B, L) bool for Σ −log p(target) over unmasked targets, f32, in place of logits. A family sets `block`,
    and overrides what it has of its own.

    config: the family's. dtype: of the compute. param_dtype: of parameters in training; `init` makes float32, and
    `apply` takes any. remat: recompute each layer in the backward pass.
    """

    config: Any
    dtype: Any = jnp.float32
    implementation: str | None = None
    remat: bool = False
    param_dtype: Any = jnp.float32

    block: ClassVar[type[Block]]

    @nn.compact
    def __call__(
        self,
        tokens,
        positions=None,
        segment_ids=None,
        return_losses=False,
        mode: Mode = "evaluate",
        cache_length=0,
        logits_at=None,
        targets=None,
        mask=None,
    ):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        inputs = Inputs(tokens, positions, segment_ids, mode, cache_length)
        shape = (self.config.vocab_size, self.config.hidden_size)
        table = layers.parameter(self, "embedding", INIT, shape, ("vocab", "embed"))
        x = layers.lookup(table, tokens).astype(self.dtype)
        x = sharding.constrain(self.scale_embedding(x), "batch", "length", "activation")
        block = nn.remat(self.block) if self.remat else self.block
        losses: list[dict[str, jax.Array]] = []
        alone = logits_at is not None and targets is None and tokens.shape[1] > 1 and not return_losses
        for i in range(self.config.num_hidden_layers):
            layer = block(self.config, i, jnp.dtype(self.dtype), self.implementation, name=f"layer_{i}")
            last = i == self.config.num_hidden_layers - 1
            x, found = layer(x, dataclasses.replace(inputs, wanted=logits_at) if alone and last else inputs)
            losses += [found] if found else []
        x, kernel = self.final_norm()(x), self.head(table)
        if targets is not None:
            out = loss.of_hidden(x, kernel, targets, mask, self.scale_logits)
        else:
            with jax.named_scope("head"):
                there = alone or logits_at is None
                wanted = x if there else jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
                out = self.scale_logits(layers.linear(wanted, kernel, jnp.float32))
        if not return_losses and not self.is_initializing():
            return out
        means = {name: jnp.mean(jnp.stack([one[name] for one in losses])) for name in (losses or [{}])[0]}
        means |= self.further_losses(x, inputs, table, kernel)
        return (out, means) if return_losses else out

    def scale_embedding(self, x: jax.Array) -> jax.Array:
        return x

    def final_norm(self) -> nn.Module:
        return layers.RMSNorm(self.config.rms_norm_eps, name="final_norm")

    def scale_logits(self, logits: jax.Array) -> jax.Array:
        return logits

    def head(self, table: jax.Array) -> jax.Array:
        """The unembedding (D, V): the embedding (V, D) turned where it is tied."""
        if self.config.tie_word_embeddings:
            return table.T
        shape = (self.config.hidden_size, self.config.vocab_size)
        return layers.parameter(self, "unembedding", INIT, shape, ("embed", "vocab"))

    def further_losses(self, x, inputs: Inputs, table, kernel) -> dict[str, jax.Array]:
        """Losses beside the MoE layers', from the last hidden states x (B, L, D), the embedding and the unembedding."""
        return {}

    @staticmethod
    def further_blocks(config: Any) -> dict[str, int]:
        """Path of each block that stands outside `layer_0` …, and the index it is made with."""
        return {}
