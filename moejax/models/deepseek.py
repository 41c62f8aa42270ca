"""DeepSeekMoE-16B (Dai et al. 2024): fine-grained experts, shared experts, the first layers dense.

There is no transformers class: this follows the code and tensor names published with the checkpoint.
"""

import dataclasses

import flax.linen as nn

from moejax import hf_tensors, layers, rope
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.models import deepseek_v2, family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class DeepseekConfig:
    """config.json of `DeepseekForCausalLM`, with its names and defaults."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    moe_intermediate_size: int = 1407
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default=Rope())
    attention_bias: bool = False
    aux_loss_alpha: float = 0.001
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    def __post_init__(self):
        if self.n_routed_experts is not None and self.num_experts_per_tok is None:
            raise UserError(f"config.json: n_routed_experts={self.n_routed_experts} needs num_experts_per_tok")

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        late = layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        return late and self.n_routed_experts is not None


class Attention(nn.Module):
    """Grouped queries with rotary positions: x (B, L, D) -> (B, L, D)."""

    config: DeepseekConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config, bias = self.config, self.config.attention_bias
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width = config.hidden_size // count
        q = parts.heads(self, "query", x, count, width, bias=bias)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias)
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
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
        h = self.rms_norm("ffn_norm")(x)
        if not config.sparse(self.index):
            return x + layers.GatedFFN(config.intermediate_size, self.dtype, name="ffn")(h), {}
        renormalised = config.norm_topk_prob and config.num_experts_per_tok > 1
        moe = MoEConfig(
            router="moejax.models.routers:softmax_top_k",
            router_options={"norm": 1.0 if renormalised else None},
            num_experts=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
            shared_experts=config.n_shared_experts or 0,
        )
        y, losses = MoE(moe, config.moe_intermediate_size, inputs.mode, name="moe")(h, inputs.tokens, inputs.mask)
        return x + y, losses


class Deepseek(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: DeepseekConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkvo" if config.attention_bias else "")
        if config.sparse(i):
            assert config.n_routed_experts is not None
            found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.gate.weight")]
            found += family.expert_rules(f"{ours}/moe", f"{theirs}.mlp.experts", config.n_routed_experts)
            if config.n_shared_experts:
                found += family.ffn_rules(f"{ours}/moe/shared", f"{theirs}.mlp.shared_experts")
        else:
            found += family.ffn_rules(f"{ours}/ffn", f"{theirs}.mlp")
    return found


FAMILY = family.Family(
    name="deepseek",
    architecture="DeepseekForCausalLM",
    config=DeepseekConfig,
    model=Deepseek,
    rules=rules,
    presets={
        "deepseek-moe-16b": DeepseekConfig(
            hidden_size=2048, intermediate_size=10944, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=16, moe_intermediate_size=1408, n_shared_experts=2, n_routed_experts=64,
            num_experts_per_tok=6, first_k_dense_replace=1, max_position_embeddings=4096,
        )
    },
    fixed={"hidden_act": ("silu",), "scoring_func": ("softmax",)},
    harmless={name: deepseek_v2.HARMLESS[name] for name in ("aux_loss_alpha", "seq_aux", "pretraining_tp")},
    zero=frozenset({"first_k_dense_replace", "n_shared_experts"}),
    write=family.in_old_spelling,
)  # fmt: skip
