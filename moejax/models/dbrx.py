"""DBRX (Databricks 2024): 16 experts top-4, one clipped projection to queries, keys and values, LayerNorm."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moejax import hf_config, hf_tensors, rope
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.models import family, parts
from moejax.moe import MoE
from moejax.rope import Rope


@dataclasses.dataclass(frozen=True)
class DbrxConfig:
    """config.json of `DbrxForCausalLM`, whose `attn_config` and `ffn_config` are taken apart; its names and defaults.

    clip_qkv, kv_n_heads come from attn_config; ffn_hidden_size and the moe_… from ffn_config.
    """

    vocab_size: int = 32000
    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    clip_qkv: float | None = None
    kv_n_heads: int = 1
    ffn_hidden_size: int = 3584
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_jitter_eps: float | None = None
    moe_loss_weight: float = 0.01
    moe_normalize_expert_weights: float | None = 1.0
    rope: Rope = dataclasses.field(default=Rope())
    max_seq_len: int = 2048

    tie_word_embeddings = False  # DBRX has no tied form

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layers


class Attention(nn.Module):
    """Grouped queries from one clipped projection: x (B, L, D) -> (B, L, D)."""

    config: DbrxConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        width = config.d_model // config.n_heads
        counts = {"query": config.n_heads, "key": config.kv_n_heads, "value": config.kv_n_heads}
        axes = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}
        q, k, v = (parts.heads(self, name, x, count, width, axis=axes[name]) for name, count in counts.items())
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        out = parts.attend(self, q, k, v, inputs, implementation=self.implementation)
        return parts.merge_heads(self, out, config.d_model)


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        attention = Attention(config, self.implementation, name="attention")
        x += attention(parts.LayerNorm(name="attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        moe = MoEConfig(
            router="moejax.models.routers:softmax_top_k",
            router_options={"norm": config.moe_normalize_expert_weights},
            num_experts=config.moe_num_experts,
            experts_per_token=config.moe_top_k,
            input_jitter=config.moe_jitter_eps or 0.0,
        )
        h = parts.LayerNorm(name="ffn_norm")(x)
        y, losses = MoE(moe, config.ffn_hidden_size, inputs.mode, name="moe")(h, inputs.tokens, inputs.mask)
        return x + y, losses


class Dbrx(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block

    def final_norm(self):
        return parts.LayerNorm(name="final_norm")


def rules(config: DbrxConfig) -> list[hf_tensors.Rule]:
    found = [
        hf_tensors.copy("params/embedding", "transformer.wte.weight"),
        hf_tensors.copy("params/final_norm/scale", "transformer.norm_f.weight"),
        hf_tensors.linear("params/unembedding", "lm_head.weight"),
    ]
    rows = (config.moe_num_experts * config.ffn_hidden_size, config.d_model)
    for i in range(config.n_layers):
        ours, theirs = f"params/layer_{i}", f"transformer.blocks.{i}"
        attention, norms = f"{ours}/attention", f"{theirs}.norm_attn_norm"
        three = [f"{attention}/{name}" for name in ("query", "key", "value")]
        found += [
            hf_tensors.copy(f"{ours}/attention_norm/scale", f"{norms}.norm_1.weight"),
            hf_tensors.copy(f"{ours}/ffn_norm/scale", f"{norms}.norm_2.weight"),
            hf_tensors.joined(three, f"{norms}.attn.Wqkv.weight", 0, transpose=True),
            hf_tensors.linear(f"{attention}/out", f"{norms}.attn.out_proj.weight", 2),
            hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.ffn.router.layer.weight"),
            hf_tensors.swapped(f"{ours}/moe/gate", f"{theirs}.ffn.experts.mlp.w1"),
            hf_tensors.swapped(f"{ours}/moe/up", f"{theirs}.ffn.experts.mlp.v1"),
            hf_tensors.copy(f"{ours}/moe/down", f"{theirs}.ffn.experts.mlp.w2", rows),
        ]
    return found


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """The two inner configs taken apart into one, without what transformers writes into any config.

    The rotary base: `rope_parameters` where it is given, as transformers 5 takes it; else attn_config's `rope_theta`.
    """
    attention, ffn = hf_config.inner(raw, "attn_config"), hf_config.inner(raw, "ffn_config")
    raw = {key: value for key, value in raw.items() if key not in ("attn_config", "ffn_config")}
    theta = attention.pop("rope_theta", None)
    if theta is not None and not raw.get("rope_parameters"):
        raw["rope_theta"] = theta
    activation = hf_config.inner(ffn, "ffn_act_fn") or {"name": "silu"}
    width = ffn.pop("hidden_size", None)
    if width is not None and width != raw.get("d_model", width):
        raise UserError(f"config.json: ffn_config's hidden_size={width} is not d_model={raw['d_model']}: give one")
    inner = {key: value for key, value in (attention | ffn).items() if key not in hf_config.HARMLESS}
    return raw | inner | {"ffn_act_fn": activation.get("name")}


def write(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested form again."""
    flat = dict(flat)
    flat.pop("ffn_act_fn")
    attention = {name: flat.pop(name) for name in ("clip_qkv", "kv_n_heads")}
    attention["rope_theta"] = flat["rope_parameters"]["rope_theta"]
    ffn = {name: flat.pop(name) for name in list(flat) if name.startswith("moe_") or name == "ffn_hidden_size"}
    return flat | {"attn_config": attention, "ffn_config": ffn | {"ffn_act_fn": {"name": "silu"}}}


FAMILY = family.Family(
    name="dbrx",
    architecture="DbrxForCausalLM",
    config=DbrxConfig,
    model=Dbrx,
    rules=rules,
    presets={
        "dbrx": DbrxConfig(
            vocab_size=100352, d_model=6144, n_heads=48, n_layers=40, clip_qkv=8.0, kv_n_heads=8,
            ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4, moe_loss_weight=0.05, rope=Rope(500000.0),
            max_seq_len=32768,
        )
    },
    aliases={"num_key_value_heads": "kv_n_heads"},
    fixed={"ffn_act_fn": ("silu",), "tie_word_embeddings": (False,)},
    harmless={
        **dict.fromkeys(("resid_pdrop", "emb_pdrop", "attn_pdrop"), hf_config.DROPOUT),
        "moe_loss_weight": hf_config.LOSSES,
        "max_seq_len": hf_config.HARMLESS["max_position_embeddings"],
    },
    read=read,
    write=write,
)  # fmt: skip
