"""DeepSeek-V3, R1 (2024) and Kimi K2 (2025): latent attention, sigmoid scores with a selection bias inside groups."""

import dataclasses
import functools
from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import hf_tensors, layers, loss
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

    def __post_init__(self):
        deepseek_v2.check_heads(self)

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


class NextToken(nn.Module):
    """A multi-token-prediction module (DeepSeek-V3 2024, §2.2, eq. 21-23): from the hidden states h (B, L, D) of the
    depth before and the embeddings of the tokens ahead (B, L, D), the hidden states of this depth."""

    config: DeepseekV3Config
    depth: int
    implementation: str | None

    @nn.compact
    def __call__(self, h, ahead, inputs: parts.Inputs):
        config = self.config
        norm = functools.partial(layers.RMSNorm, config.rms_norm_eps)
        joined = jnp.concatenate([norm(name="token_norm")(ahead), norm(name="hidden_norm")(h)], axis=-1)
        shape = (2 * config.hidden_size, config.hidden_size)
        joined = layers.linear(joined, layers.parameter(self, "joint", parts.INIT, shape, ("embed", "norm")))
        index = config.num_hidden_layers + self.depth
        block = deepseek_v2.Block(config, index, h.dtype, self.implementation, name="block")
        return norm(name="norm")(block(joined, inputs)[0])


class DeepseekV3(parts.Decoder):
    """As `parts.Decoder`. With multi-token-prediction modules, `return_losses=True` adds `mtp_loss`: the mean over the
    depths k = 1, 2 … of the mean cross-entropy (nats) of the token k + 1 places on. The modules do nothing else."""

    block = deepseek_v2.Block

    @staticmethod
    def further_blocks(config):
        last = config.num_hidden_layers
        return {f"mtp_{k}/block": last + k for k in range(config.num_nextn_predict_layers)}

    def further_losses(self, x, inputs, table, kernel):
        nats = []
        for k in range(self.config.num_nextn_predict_layers):
            ahead = layers.lookup(table, _shifted(inputs.tokens, k + 1)).astype(x.dtype)
            x = NextToken(self.config, k, self.implementation, name=f"mtp_{k}")(x, ahead, inputs)
            counted = inputs.mask & (_shifted(inputs.segment_ids, k + 2) == inputs.segment_ids)
            total = loss.of_hidden(x, kernel, _shifted(inputs.tokens, k + 2), counted)
            nats.append(total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0))
        return {"mtp_loss": jnp.mean(jnp.stack(nats))} if nats else {}


def _shifted(a: jax.Array, steps: int) -> jax.Array:
    """a (B, L) int of `steps` places further on, 0 past the end."""
    return jnp.pad(a, [(0, 0), (0, steps)])[:, steps:]


def rules(config: DeepseekV3Config) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        found += deepseek_v2.block_rules(config, i, biased_selection=True)
    for name, i in DeepseekV3.further_blocks(config).items():
        ours, theirs = f"params/{name.removesuffix('/block')}", f"model.layers.{i}"
        found += deepseek_v2.block_rules(config, i, biased_selection=True, name=name)
        found += [hf_tensors.copy(f"{ours}/token_norm/scale", f"{theirs}.enorm.weight")]
        found += [hf_tensors.copy(f"{ours}/hidden_norm/scale", f"{theirs}.hnorm.weight")]
        found += [hf_tensors.copy(f"{ours}/norm/scale", f"{theirs}.shared_head.norm.weight")]
        found += [hf_tensors.linear(f"{ours}/joint", f"{theirs}.eh_proj.weight")]
    return found


def reconcile(config: DeepseekV3Config, names: Collection[str]) -> DeepseekV3Config:
    """Without prediction modules where the checkpoint has none, whatever config.json says."""
    extra = (f"model.layers.{i}." for i in DeepseekV3.further_blocks(config).values())
    if any(name.startswith(prefix) for prefix in extra for name in names):
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def duplicates(config: DeepseekV3Config) -> dict[str, str]:
    """Prediction modules share the embedding and the unembedding, and published files repeat them."""
    found = {}
    for i in DeepseekV3.further_blocks(config).values():
        found[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
        unembedding = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        found[f"model.layers.{i}.shared_head.head.weight"] = unembedding
    return found


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
    harmless=deepseek_v2.HARMLESS | {"quantization_config": "how the weights are stored, which the tensors say"},
    zero=frozenset({"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"}),
    reconcile=reconcile,
    duplicates=duplicates,
)  # fmt: skip
