"""Grok-1 (xAI 2024): 8 experts top-2 with GELU, capped attention logits, norms before and after, output multipliers.

There is no transformers class: this follows the published definition, which is in JAX, and reads the tensor names of
the public safetensors conversion (hpcai-tech/grok-1). GELU is the tanh form, JAX's own.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from moejax import experts, hf_tensors, layers, rope
from moejax.models import family, mixture, parts
from moejax.models.routers import softmax_top_k
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class GrokConfig:
    """config.json of `Grok1ModelForCausalLM`, with its names and defaults."""

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int | None = 8
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    num_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default=Rope())
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192


class Attention(nn.Module):
    """Grouped queries, scores times a multiplier and capped: x (B, L, D) -> (B, L, D)."""

    config: GrokConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width = config.hidden_size // count
        q = parts.heads(self, "query", x, count, width)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads")
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads")
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        # attend divides by √width
        q *= jnp.asarray(config.attn_output_multiplier * width**0.5, q.dtype)
        cap = config.max_attn_value
        out = parts.attend(self, q, k, v, inputs, softcap=cap, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size)


class GeluExperts(nn.Module):
    """Router and experts gated by GELU: x (B, L, D), inputs -> (y (B, L, D), losses)."""

    config: GrokConfig

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        weights = {name: layers.parameter(self, name, parts.INIT, (E, D, F), into) for name in ("gate", "up")}
        weights["down"] = layers.parameter(self, "down", parts.INIT, (E, F, D), out)
        weights = {name: weight.astype(x.dtype) for name, weight in weights.items()}
        logits = mixture.router_logits(self, x, E)
        decision, losses = mixture.route(
            self, logits, inputs, softmax_top_k, experts_per_token=config.num_experts_per_tok, norm=None
        )
        return mixture.over_rows(x, decision, weights, _experts), losses


def _experts(rows, weights, group_sizes):
    gate, up, down = weights["gate"], weights["up"], weights["down"]
    return experts.gated_ffn(rows, gate, up, down, group_sizes, activation="gelu")


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        attention = Attention(self.config, self.implementation, name="attention")
        y = attention(self.rms_norm("attention_norm")(x), inputs)
        x += self.rms_norm("attention_out_norm")(y)
        x, inputs = inputs.at_wanted(x)
        y, losses = GeluExperts(self.config, name="moe")(self.rms_norm("ffn_norm")(x), inputs)
        return x + self.rms_norm("ffn_out_norm")(y), losses


class Grok(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block

    def scale_embedding(self, x):
        return x * jnp.asarray(self.config.embedding_multiplier_scale, x.dtype)

    def scale_logits(self, logits):
        return logits * self.config.output_multiplier_scale


def rules(config: GrokConfig) -> list[hf_tensors.Rule]:
    found = [
        hf_tensors.copy("params/embedding", "model.embed_tokens.weight"),
        hf_tensors.copy("params/final_norm/scale", "model.norm.scale"),
    ]
    if not config.tie_word_embeddings:
        found.append(hf_tensors.linear("params/unembedding", "lm_head.weight"))
    norms = {
        "attention_norm": "pre_attn_norm",
        "attention_out_norm": "post_attn_norm",
        "ffn_norm": "pre_moe_norm",
        "ffn_out_norm": "post_moe_norm",
    }
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        for name, its in norms.items():
            found += [hf_tensors.copy(f"{ours}/{name}/scale", f"{theirs}.{its}.scale")]
        for name in ("query", "key", "value"):
            found += [hf_tensors.linear(f"{ours}/attention/{name}", f"{theirs}.attn.{name[0]}_proj.weight")]
        found += [hf_tensors.linear(f"{ours}/attention/out", f"{theirs}.attn.o_proj.weight", 2)]
        found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.moe_block.gate.weight")]
        names = ("linear", "linear_v", "linear_1")
        found += family.expert_rules(f"{ours}/moe", f"{theirs}.moe_block.experts", config.num_experts, names)
    return found


FAMILY = family.Family(
    name="grok-1",
    architecture="Grok1ModelForCausalLM",
    config=GrokConfig,
    model=Grok,
    rules=rules,
    presets={"grok-1": GrokConfig()},
    wrapped=("Grok1ForCausalLM",),
    write=family.in_old_spelling,
)
