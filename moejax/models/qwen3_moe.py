"""Qwen3-MoE (Yang et al. 2025): RMSNorm on each head's queries and keys, sparse layers in a pattern."""

import dataclasses

import flax.linen as nn

from moejax import hf_tensors, layers, rope
from moejax.config import MoEConfig
from moejax.models import family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig:
    """config.json of `Qwen3MoeForCausalLM`, with its names and defaults."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default=Rope())
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        dense = layer in (self.mlp_only_layers or ()) or self.num_experts == 0
        return not dense and (layer + 1) % self.decoder_sparse_step == 0


class Attention(nn.Module):
    """Grouped queries, each head's queries and keys normalised: x (B, L, D) -> (B, L, D)."""

    config: Qwen3MoeConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width, bias = config.head_dim or config.hidden_size // count, config.attention_bias
        q = parts.heads(self, "query", x, count, width, bias=bias)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias)
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
        q = layers.RMSNorm(config.rms_norm_eps, name="query_norm")(q)
        k = layers.RMSNorm(config.rms_norm_eps, name="key_norm")(k)
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        window = config.sliding_window if config.use_sliding_window else None
        out = parts.attend(self, q, k, v, inputs, window=window, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size, bias=bias)


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        x += Attention(config, self.implementation, name="attention")(self.rms_norm("attention_norm")(x), inputs)
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
        return x + y, losses


class Qwen3Moe(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: Qwen3MoeConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkvo" if config.attention_bias else "")
        for name in ("query", "key"):
            norm = f"{theirs}.self_attn.{name[0]}_norm.weight"
            found += [hf_tensors.copy(f"{ours}/attention/{name}_norm/scale", norm)]
        if config.sparse(i):
            found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.gate.weight")]
            found += family.expert_rules(f"{ours}/moe", f"{theirs}.mlp.experts", config.num_experts)
        else:
            found += family.ffn_rules(f"{ours}/ffn", f"{theirs}.mlp")
    return found


_30B = Qwen3MoeConfig(
    num_hidden_layers=48, head_dim=128, norm_topk_prob=True, rope=Rope(1e6), max_position_embeddings=40960,
    sliding_window=None,
)  # fmt: skip

FAMILY = family.Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config=Qwen3MoeConfig,
    model=Qwen3Moe,
    rules=rules,
    presets={
        "qwen3-30b-a3b": _30B,
        "qwen3-235b-a22b": dataclasses.replace(
            _30B, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64,
            moe_intermediate_size=1536,
        ),
    },
    aliases={"num_local_experts": "num_experts"},
    fixed={"hidden_act": ("silu",)},
    harmless={"max_window_layers": "all layers have the window, in transformers too"},
    zero=frozenset({"num_experts"}),
    read=family.without_unused_window,
)  # fmt: skip
