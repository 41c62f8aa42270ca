"""Mixtral (Jiang et al. 2024): top-2 of 8 experts, gates by a softmax over the two, grouped queries."""

import dataclasses

import flax.linen as nn

from moejax import hf_tensors, rope
from moejax.config import MoEConfig
from moejax.models import family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class MixtralConfig:
    """config.json of `MixtralForCausalLM`, with its names and defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default=Rope(1e6))
    sliding_window: int | None = None
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072


class Attention(nn.Module):
    """Grouped queries with rotary positions: x (B, L, D) -> (B, L, D)."""

    config: MixtralConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width = config.head_dim or config.hidden_size // count
        q = parts.heads(self, "query", x, count, width)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads")
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads")
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        window = config.sliding_window
        out = parts.attend(self, q, k, v, inputs, window=window, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size)


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        x += Attention(config, self.implementation, name="attention")(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        moe = MoEConfig(
            router="moejax.models.routers:softmax_top_k",
            router_options={"norm": 1.0},
            num_experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            input_jitter=config.router_jitter_noise,
        )
        h = self.rms_norm("ffn_norm")(x)
        y, losses = MoE(moe, config.intermediate_size, inputs.mode, name="moe")(h, inputs.tokens, inputs.mask)
        return x + y, losses


class Mixtral(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: MixtralConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}/moe", f"model.layers.{i}.block_sparse_moe"
        found += family.norm_rules(i) + family.attention_rules(i)
        found += [hf_tensors.linear(f"{ours}/router", f"{theirs}.gate.weight")]
        found += family.expert_rules(ours, f"{theirs}.experts", config.num_local_experts, ("w1", "w3", "w2"))
    return found


FAMILY = family.Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    config=MixtralConfig,
    model=Mixtral,
    rules=rules,
    presets={
        "mixtral-8x7b": MixtralConfig(max_position_embeddings=32768),
        "mixtral-8x22b": MixtralConfig(
            vocab_size=32768, hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
            max_position_embeddings=65536,
        ),
    },
    aliases={"num_experts": "num_local_experts"},
    fixed={"hidden_act": ("silu",)},
)  # fmt: skip
