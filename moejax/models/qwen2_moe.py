"""Qwen2-MoE (Yang et al. 2024): a shared expert behind a sigmoid gate, biased queries, keys and values."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax

from moejax import hf_tensors, layers, rope
from moejax.config import MoEConfig
from moejax.models import family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class Qwen2MoeConfig:
    """config.json of `Qwen2MoeForCausalLM`, with its names and defaults."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts: int = 60
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default=Rope())
    qkv_bias: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        dense = layer in (self.mlp_only_layers or ()) or self.num_experts == 0
        return not dense and (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None: it sees everything before it."""
        if not self.use_sliding_window:
            return None
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None
        return self.sliding_window if layer % 2 == 0 and layer < self.max_window_layers else None


class Attention(nn.Module):
    """Grouped queries with biases: x (B, L, D) -> (B, L, D)."""

    config: Qwen2MoeConfig
    window: int | None
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width, bias = config.hidden_size // count, config.qkv_bias
        q = parts.heads(self, "query", x, count, width, bias=bias)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias)
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        out = parts.attend(self, q, k, v, inputs, window=self.window, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size)


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        attention = Attention(config, config.window(self.index), self.implementation, name="attention")
        x += attention(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        h = self.rms_norm("ffn_norm")(x)
        if not config.sparse(self.index):
            return x + layers.GatedFFN(config.intermediate_size, self.dtype, name="ffn")(h), {}
        moe = MoEConfig(
            router="moejax.models.routers:softmax_top_k",
            router_options={"norm": 1.0 if config.norm_topk_prob else None},
            num_experts=config.num_experts,
            experts_per_token=config.num_experts_per_tok,
        )
        y, losses = MoE(moe, config.moe_intermediate_size, inputs.mode, name="moe")(h, inputs.tokens, inputs.mask)
        shared = layers.GatedFFN(config.shared_expert_intermediate_size, self.dtype, name="shared")(h)
        kernel = layers.parameter(self, "shared_gate", parts.INIT, (config.hidden_size, 1), ("embed", "norm"))
        return x + y + jax.nn.sigmoid(layers.linear(h, kernel)) * shared, losses


class Qwen2Moe(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: Qwen2MoeConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkv" if config.qkv_bias else "")
        if config.sparse(i):
            found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.gate.weight")]
            found += [hf_tensors.linear(f"{ours}/shared_gate", f"{theirs}.mlp.shared_expert_gate.weight")]
            found += family.ffn_rules(f"{ours}/shared", f"{theirs}.mlp.shared_expert")
            found += family.expert_rules(f"{ours}/moe", f"{theirs}.mlp.experts", config.num_experts)
        else:
            found += family.ffn_rules(f"{ours}/ffn", f"{theirs}.mlp")
    return found


FAMILY = family.Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    config=Qwen2MoeConfig,
    model=Qwen2Moe,
    rules=rules,
    presets={
        "qwen1.5-moe-a2.7b": Qwen2MoeConfig(rope=Rope(1e6), max_position_embeddings=8192),
        "qwen2-57b-a14b": Qwen2MoeConfig(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_experts=64,
            num_experts_per_tok=8, rope=Rope(1e6), sliding_window=65536, max_position_embeddings=131072,
        ),
    },
    aliases={"num_local_experts": "num_experts"},
    fixed={"hidden_act": ("silu",)},
    zero=frozenset({"num_experts", "max_window_layers"}),
    read=family.without_unused_window,
)  # fmt: skip
