"""DeepSeek-V3, R1 (2024) and Kimi K2 (2025): latent attention, sigmoid scores with a selection bias inside groups."""

import dataclasses
from typing import Any

from moejax import hf_tensors
from moejax.config import MoEConfig
from moejax.models import deepseek_v2, family, parts
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class DeepseekV3Config:
    """config.json of `DeepseekV3ForCausalLM`, with its names and defaults."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default=Rope())
    rope_interleave: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096

    def sparse(self, layer: int) -> bool:
        """Whether a layer's FFN is sparse."""
        return layer >= self.first_k_dense_replace

    def moe(self) -> MoEConfig:
        """The sparse FFN."""
        return MoEConfig(
            router="moejax.models.routers:sigmoid_groups",
            router_options={
                "groups": self.n_group, "groups_kept": self.topk_group, "normalize": self.norm_topk_prob,
                "scale": self.routed_scaling_factor,
            },
            num_experts=self.n_routed_experts,
            experts_per_token=self.num_experts_per_tok,
            shared_experts=self.n_shared_experts,
        )  # fmt: skip


class DeepseekV3(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = deepseek_v2.Block


def rules(config: DeepseekV3Config) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        found += deepseek_v2.block_rules(config, i, biased_selection=True)
    return found


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """Drops widths that follow from others and how the weights are stored; Kimi K2's name for the same thing."""
    skipped = ("head_dim", "qk_head_dim", "quantization_config")
    return {key: value for key, value in raw.items() if key not in skipped}


FAMILY = family.Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    config=DeepseekV3Config,
    model=DeepseekV3,
    rules=rules,
    presets={
        "deepseek-v3": DeepseekV3Config(
            rope=Rope(10000.0, "yarn", 40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
            max_position_embeddings=163840,
        ),
        "kimi-k2": DeepseekV3Config(
            vocab_size=163840, num_attention_heads=64, num_key_value_heads=64, n_routed_experts=384,
            first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=2.827, num_nextn_predict_layers=0,
            rope=Rope(50000.0, "yarn", 32.0, 4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
            max_position_embeddings=131072,
        ),
    },
    aliases={
        "num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    fixed={
        "hidden_act": ("silu",), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
    },
    harmless=frozenset({"aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size"}),
    read=read,
)  # fmt: skip
