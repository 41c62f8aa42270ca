"""OLMoE (Muennighoff et al. 2024): 64 small experts top-8, gates as they are, norms over all of queries and keys."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from moejax import hf_tensors, layers, rope
from moejax.config import MoEConfig
from moejax.models import family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class OlmoeConfig:
    """config.json of `OlmoeForCausalLM`, with its names and defaults."""

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default=Rope())
    attention_bias: bool = False
    clip_qkv: float | None = None
    router_aux_loss_coef: float = 0.01
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096


class Attention(nn.Module):
    """RMSNorm over the whole width of queries and of keys, and clipping: x (B, L, D) -> (B, L, D)."""

    config: OlmoeConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width, bias = config.hidden_size // count, config.attention_bias

        def whole_norm(name, y):
            flat = y.reshape(*y.shape[:2], -1)
            return layers.RMSNorm(config.rms_norm_eps, name=name)(flat).reshape(y.shape)

        q = whole_norm("query_norm", parts.heads(self, "query", x, count, width, bias=bias))
        k = whole_norm("key_norm", parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias))
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        out = parts.attend(self, q, k, v, inputs, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size, bias=bias)


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        x += Attention(config, self.implementation, name="attention")(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        moe = MoEConfig(
            router="moejax.models.routers:softmax_top_k",
            router_options={"norm": 1.0 if config.norm_topk_prob else None},
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
        )
        h = self.rms_norm("ffn_norm")(x)
        y, losses = MoE(moe, config.intermediate_size, inputs.mode, name="moe")(h, inputs.tokens, inputs.mask)
        return x + y, losses


class Olmoe(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: OlmoeConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkvo" if config.attention_bias else "")
        for name in ("query", "key"):
            norm = f"{theirs}.self_attn.{name[0]}_norm.weight"
            found += [hf_tensors.copy(f"{ours}/attention/{name}_norm/scale", norm)]
        found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.gate.weight")]
        found += family.expert_rules(f"{ours}/moe", f"{theirs}.mlp.experts", config.num_experts)
    return found


FAMILY = family.Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    config=OlmoeConfig,
    model=Olmoe,
    rules=rules,
    # The published config says intermediate_size 1024, the width of one expert.
    presets={"olmoe-1b-7b": OlmoeConfig(intermediate_size=1024)},
    aliases={"num_local_experts": "num_experts"},
    fixed={"hidden_act": ("silu",)},
)
