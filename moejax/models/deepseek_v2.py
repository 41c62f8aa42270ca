"""DeepSeek-V2 and V2-Lite (2024): latent attention, shared experts, softmax gates inside the best groups."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn

from moejax import hf_config, hf_tensors, layers
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.models import family, parts
from moejax.models.mla import LatentAttention
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class DeepseekV2Config:
    """config.json of `DeepseekV2ForCausalLM`, with its names and defaults."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    moe_intermediate_size: int = 1407
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 2
    first_k_dense_replace: int = 0
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default=Rope())
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    def __post_init__(self):
        check_heads(self)

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        return layer >= self.first_k_dense_replace

    def moe(self) -> MoEConfig:
        """The sparse FFN; without groups the best K of all, as one group that is kept."""
        limited = self.topk_method == "group_limited_greedy"
        groups = {"groups": self.n_group or 1, "groups_kept": self.topk_group or 1} if limited else {}
        return MoEConfig(
            router="moejax.routing:group_limited_softmax",
            router_options={"groups": 1, "groups_kept": 1, "scale": self.routed_scaling_factor} | groups,
            num_experts=self.n_routed_experts,
            experts_per_token=self.num_experts_per_tok,
            shared_experts=self.n_shared_experts,
        )


def check_heads(config: Any) -> None:
    """UserError where config.json names fewer heads of keys: the latent attention of V2 and V3 has no such groups."""
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    if kv not in (None, heads):
        raise UserError(f"config.json: num_key_value_heads={kv} is not supported; latent attention has as many as "
                        f"num_attention_heads={heads}")  # fmt: skip


class Block(parts.Block):
    """A block of DeepSeek-V2 or V3: they differ in `config.moe()` and in how rotary features pair up."""

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        attention = LatentAttention(
            num_heads=config.num_attention_heads,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            rope=config.rope,
            rope_pairs=getattr(config, "rope_interleave", True),
            bias=config.attention_bias,
            implementation=self.implementation,
            name="attention",
        )
        x += attention(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        h = self.rms_norm("ffn_norm")(x)
        if not config.sparse(self.index):
            return x + layers.GatedFFN(config.intermediate_size, self.dtype, name="ffn")(h), {}
        moe = MoE(config.moe(), config.moe_intermediate_size, inputs.mode, name="moe")
        y, losses = moe(h, inputs.tokens, inputs.mask)
        return x + y, losses


class DeepseekV2(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def block_rules(config: Any, layer: int, biased_selection: bool, name: str | None = None) -> list[hf_tensors.Rule]:
    """The tensors of one layer, of V2 and of V3; `name`: ours of the block, where it isn't layer_…"""
    name = name or f"layer_{layer}"
    ours, theirs = f"params/{name}", f"model.layers.{layer}"
    mine, its = f"{ours}/attention", f"{theirs}.self_attn"
    found = family.norm_rules(layer, ours)
    downs = {"latent_down": "kv_a_proj_with_mqa"}
    found += [hf_tensors.copy(f"{mine}/latent_norm/scale", f"{its}.kv_a_layernorm.weight")]
    found += [hf_tensors.linear(f"{mine}/latent_up", f"{its}.kv_b_proj.weight")]
    if config.q_lora_rank is None:
        found += [hf_tensors.linear(f"{mine}/query", f"{its}.q_proj.weight")]
    else:
        downs["query_down"] = "q_a_proj"
        found += [hf_tensors.copy(f"{mine}/query_norm/scale", f"{its}.q_a_layernorm.weight")]
        found += [hf_tensors.linear(f"{mine}/query_up", f"{its}.q_b_proj.weight")]
    found += [hf_tensors.linear(f"{mine}/out", f"{its}.o_proj.weight", 2)]
    found += [hf_tensors.linear(f"{mine}/{our}", f"{its}.{name}.weight") for our, name in downs.items()]
    if config.attention_bias:
        found += [hf_tensors.copy(f"{mine}/{our}_bias", f"{its}.{name}.bias") for our, name in downs.items()]
        found += [hf_tensors.copy(f"{mine}/out_bias", f"{its}.o_proj.bias")]
    if not config.sparse(layer):
        return found + family.ffn_rules(f"{ours}/ffn", f"{theirs}.mlp")
    found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.gate.weight")]
    if biased_selection:
        state = f"router_state/{name}/moe/bias"
        found += [hf_tensors.copy(state, f"{theirs}.mlp.gate.e_score_correction_bias")]
    found += family.expert_rules(f"{ours}/moe", f"{theirs}.mlp.experts", config.n_routed_experts)
    if config.n_shared_experts:
        found += family.ffn_rules(f"{ours}/moe/shared", f"{theirs}.mlp.shared_experts")
    return found


def rules(config: DeepseekV2Config) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        found += block_rules(config, i, biased_selection=False)
    return found


HARMLESS = {
    "aux_loss_alpha": hf_config.LOSSES,
    "seq_aux": "whether these losses are taken per sequence",
    "pretraining_tp": "how many devices shared a matrix",
    "ep_size": "how many devices shared the experts",
    "head_dim": "a width that follows from others",
    "qk_head_dim": "a width that follows from others",
}

_YARN = Rope(
    10000.0, "yarn", 40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707
)  # fmt: skip

FAMILY = family.Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    config=DeepseekV2Config,
    model=DeepseekV2,
    rules=rules,
    presets={
        "deepseek-v2-lite": DeepseekV2Config(
            hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
            num_key_value_heads=16, q_lora_rank=None, moe_intermediate_size=1408, num_experts_per_tok=6,
            first_k_dense_replace=1, n_group=1, topk_group=1, rope=_YARN, max_position_embeddings=163840,
        ),
        "deepseek-v2": DeepseekV2Config(
            hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
            num_key_value_heads=128, moe_intermediate_size=1536, n_routed_experts=160, num_experts_per_tok=6,
            first_k_dense_replace=1, n_group=8, topk_group=3, topk_method="group_limited_greedy",
            routed_scaling_factor=16.0, rope=dataclasses.replace(_YARN), max_position_embeddings=163840,
        ),
    },
    aliases={"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
    fixed={
        "hidden_act": ("silu",), "norm_topk_prob": (False,), "scoring_func": ("softmax",), "moe_layer_freq": (1,),
        "mlp_bias": (False,),
    },
    harmless=HARMLESS,
    zero=frozenset({"first_k_dense_replace", "n_shared_experts"}),
)  # fmt: skip
