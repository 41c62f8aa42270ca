"""Llama 4, the text model (Meta 2025): top-1 sigmoid on the expert's input, a shared expert, chunked attention, layers
without positions whose queries grow with the position."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import attention, hf_config, hf_tensors, layers, rope
from moejax.errors import UserError
from moejax.models import family, mixture, parts
from moejax.models.routers import sigmoid_scores
from moejax.rope import Rope
from moejax.routing import Routing


@dataclasses.dataclass(frozen=True)
class Llama4Config:
    """config.json of `Llama4ForCausalLM`, or `text_config` of the multimodal one, with its names and defaults."""

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16384
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    interleave_moe_layer_step: int = 1
    moe_layers: tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default=Rope(500000.0))
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4
    use_qk_norm: bool = True
    attention_bias: bool = False
    attention_chunk_size: int | None = 8192
    layer_types: tuple[Literal["chunked_attention", "full_attention"], ...] | None = None
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def rotary(self, layer: int) -> bool:
        """Whether a layer has rotary positions."""
        if self.no_rope_layers:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def chunk(self, layer: int) -> int | None:
        """The chunk that a layer's attention stays in; None: it sees everything before it."""
        chunked = self.rotary(layer) if self.layer_types is None else self.layer_types[layer] == "chunked_attention"
        return self.attention_chunk_size if chunked else None


class Attention(nn.Module):
    """Grouped queries, rotary or with a temperature that grows with the position: x (B, L, D) -> (B, L, D)."""

    config: Llama4Config
    index: int
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config, bias = self.config, self.config.attention_bias
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width = config.head_dim or config.hidden_size // count
        q = parts.heads(self, "query", x, count, width, bias=bias)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias)
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
        if config.rotary(self.index):
            turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
            q, k = rope.rotate(q, turns, pairs=True), rope.rotate(k, turns, pairs=True)
            if config.use_qk_norm:
                q, k = (self._unit(y) for y in (q, k))
        elif config.attn_temperature_tuning:
            steps = jnp.floor((inputs.positions.astype(jnp.float32) + 1) / config.floor_scale)
            q = (q * (jnp.log1p(steps) * config.attn_scale + 1)[:, :, None, None]).astype(q.dtype)
        chunk = config.chunk(self.index)
        if chunk is None:
            out = parts.attend(self, q, k, v, inputs, implementation=self.implementation)
        else:
            out = self._attend_in_chunks(q, k, v, inputs, chunk)
        return parts.merge_heads(self, out, config.hidden_size, bias=bias)

    def _attend_in_chunks(self, q, k, v, inputs, chunk):
        """`parts.attend` where a position sees its own chunk of so many positions alone."""
        mine = inputs.positions // chunk
        if inputs.cache_length:
            cache, first = parts.cached(self, inputs, key=k, value=v)
            if not first:
                mask = attention.slot_mask(inputs.positions, inputs.cache_length)
                mask &= jnp.arange(inputs.cache_length)[None, None, :] // chunk == mine[:, :, None]
                return attention.attend_slots(q, cache["key"], cache["value"], mask)
        # A chunk of a segment is a segment of its own; 4096 chunks fit between two segments.
        segment_ids = inputs.segment_ids * 4096 + mine
        return attention.attend(q, k, v, segment_ids, implementation=self.implementation)

    def _unit(self, y):
        wide = y.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(square + self.config.rms_norm_eps)).astype(y.dtype)


class ScaledInputExperts(nn.Module):
    """Experts fed with tokens times their gate, and a shared one: x (B, L, D), inputs -> (y (B, L, D), losses)."""

    config: Llama4Config

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        weights = {name: layers.parameter(self, name, parts.INIT, (E, D, F), into) for name in ("gate", "up")}
        weights["down"] = layers.parameter(self, "down", parts.INIT, (E, F, D), out)
        weights = {name: weight.astype(x.dtype) for name, weight in weights.items()}
        logits = mixture.router_logits(self, x, E)
        decision, losses = mixture.route(
            self, logits, inputs, sigmoid_scores, experts_per_token=config.num_experts_per_tok
        )
        copies, one_each = _scaled(x, decision)
        y = mixture.over_rows(copies, one_each, weights)
        y = jnp.sum(y.reshape(*x.shape[:2], -1, D), axis=2, dtype=jnp.float32).astype(x.dtype)
        return y + layers.GatedFFN(F, x.dtype, name="shared")(x), losses


def _scaled(x, decision):
    """K copies of each token, times their gates, (B, L · K, D), and a decision that sends each to its one expert."""
    (B, L, D), K = x.shape, decision.experts.shape[-1]
    copies = x[:, :, None] * decision.weights[..., None].astype(x.dtype)
    expert, weight, keep = (y.reshape(B, L * K, 1) for y in (decision.experts, decision.weights, decision.keep))
    one_each = Routing(expert, jnp.ones_like(weight), jnp.repeat(decision.scores, K, axis=1), keep)
    return copies.reshape(B, L * K, D), one_each


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        attention = Attention(config, self.index, self.implementation, name="attention")
        x += attention(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        h = self.rms_norm("ffn_norm")(x)
        if not config.sparse(self.index):
            return x + layers.GatedFFN(config.intermediate_size_mlp, self.dtype, name="ffn")(h), {}
        y, losses = ScaledInputExperts(config, name="moe")(h, inputs)
        return x + y, losses


class Llama4(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: Llama4Config) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkvo" if config.attention_bias else "")
        if config.sparse(i):
            moe, its = f"{ours}/moe", f"{theirs}.feed_forward"
            found += [hf_tensors.linear(f"{moe}/router", f"{its}.router.weight")]
            pair = (f"{moe}/gate", f"{moe}/up")
            found += [hf_tensors.joined(pair, f"{its}.experts.gate_up_proj", 2)]
            found += [hf_tensors.copy(f"{moe}/down", f"{its}.experts.down_proj")]
            found += family.ffn_rules(f"{moe}/shared", f"{its}.shared_expert")
        else:
            found += family.ffn_rules(f"{ours}/ffn", f"{theirs}.feed_forward")
    return found


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """`text_config` where there is one; a temperature switch that early files give as a number."""
    if text := hf_config.inner(raw, "text_config"):
        _check_outer(raw, text)
        raw = text
    raw = dict(raw)
    if raw.get("no_rope_layers") == []:  # transformers' word for none given
        del raw["no_rope_layers"]
    if isinstance(raw.get("attn_temperature_tuning", ""), int | None):
        raw["attn_temperature_tuning"] = bool(raw["attn_temperature_tuning"])
    return raw


# Beside text_config: of the vision part, or of both and harmless in the text's.
_OUTER = {
    "text_config", "vision_config", "tie_word_embeddings", "boi_token_index", "eoi_token_index", "image_token_index",
    "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip


def _check_outer(raw: dict[str, Any], text: dict[str, Any]) -> None:
    """UserError where the multimodal config says something that the text model would miss."""
    for key in sorted(raw.keys() - _OUTER - hf_config.HARMLESS.keys() - _HARMLESS.keys()):
        raise UserError(f"config.json: unknown attribute {key}={str(raw[key])[:60]!r} beside text_config")
    if raw.get("tie_word_embeddings") and not text.get("tie_word_embeddings"):
        raise UserError("config.json: tie_word_embeddings=True beside a text_config without it: give both the same")


_HARMLESS = {
    "for_llm_compressor": "of a tool",
    "cache_implementation": "of transformers' cache",
    "_attn_implementation_autoset": "of transformers' attention",
    "router_jitter_noise": "no code applies it, transformers' neither",
}

_SCOUT = Llama4Config(
    rope=Rope(500000.0, "llama3", 16.0, 8192, low_freq_factor=1.0, high_freq_factor=1.0),
    max_position_embeddings=10485760,
)

FAMILY = family.Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    config=Llama4Config,
    model=Llama4,
    rules=rules,
    presets={
        "llama-4-scout": _SCOUT,
        "llama-4-maverick": dataclasses.replace(
            _SCOUT, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, rope=Rope(500000.0),
            attn_temperature_tuning=True, max_position_embeddings=1048576,
        ),
    },
    aliases={"num_experts": "num_local_experts"},
    fixed={"hidden_act": ("silu",)},
    harmless=_HARMLESS,
    ignored=r".*rotary_emb\.inv_freq|(model\.)?(vision_model|multi_modal_projector)\..*",
    wrapped=("Llama4ForConditionalGeneration",),
    prefix="language_model.",
    read=read,
)  # fmt: skip
