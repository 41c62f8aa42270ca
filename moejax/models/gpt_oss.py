"""gpt-oss (OpenAI 2025): attention sinks, every other layer in a sliding window, biased experts, clamped SwiGLU."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import hf_config, hf_tensors, layers, rope
from moejax.models import family, mixture, parts
from moejax.models.routers import softmax_top_k
from moejax.rope import Rope
from pallas_kernels.grouped_matmul import group_metadata, grouped_matmul

_YARN = Rope(150000.0, "yarn", 32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False)


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """config.json of `GptOssForCausalLM`, with its names and defaults."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default=_YARN)
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131072

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None: it sees everything before it."""
        sliding = layer % 2 == 0 if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


class Attention(nn.Module):
    """Grouped queries with biases and one sink per head: x (B, L, D) -> (B, L, D)."""

    config: GptOssConfig
    window: int | None
    implementation: str | None

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        count, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        width, bias = config.head_dim or config.hidden_size // count, config.attention_bias
        q = parts.heads(self, "query", x, count, width, bias=bias)
        k = parts.heads(self, "key", x, kv, width, axis="kv_heads", bias=bias)
        v = parts.heads(self, "value", x, kv, width, axis="kv_heads", bias=bias)
        turns = rope.table(config.rope, width, inputs.positions, inputs.mask)
        q, k = rope.rotate(q, turns), rope.rotate(k, turns)
        sinks = layers.parameter(self, "sinks", parts.INIT, (count,), ("heads",))
        out = parts.attend(self, q, k, v, inputs, window=self.window, sinks=sinks, implementation=self.implementation)
        return parts.merge_heads(self, out, config.hidden_size, bias=bias)


class BiasedExperts(nn.Module):
    """Router and experts, all with biases: x (B, L, D), inputs -> (y (B, L, D), losses).

    An expert is ((up + 1) ∘ gate · sigmoid(alpha · gate)) · down, gate bounded from above by the limit and up on both
    sides. Gates are a softmax over the K largest router logits.
    """

    config: GptOssConfig

    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        axes = {"gate": ("embed", "expert_mlp"), "up": ("embed", "expert_mlp"), "down": ("expert_mlp", "embed")}
        weights = {}
        for name, shape in shapes.items():
            of_bias = ("experts", axes[name][1])
            weights[name] = layers.parameter(self, name, parts.INIT, shape, ("experts", *axes[name]))
            added = layers.parameter(self, f"{name}_bias", nn.initializers.zeros, (E, shape[2]), of_bias)
            weights[f"{name}_bias"] = added
        weights = {name: weight.astype(x.dtype) for name, weight in weights.items()}
        bias = layers.parameter(self, "router_bias", nn.initializers.zeros, (E,), ("router_experts",))
        logits = mixture.router_logits(self, x, E) + bias.astype(jnp.float32)[None, None]
        decision, losses = mixture.route(
            self, logits, inputs, softmax_top_k, experts_per_token=config.num_experts_per_tok, norm=1.0
        )
        apply = _experts(config.swiglu_limit, config.swiglu_alpha)
        return mixture.over_rows(x, decision, weights, apply), losses


@functools.cache  # one function for all layers, which are then traced once
def _experts(limit: float, alpha: float):
    def experts(rows, weights, group_sizes):
        R = rows.shape[0]
        metadata = group_metadata(group_sizes, R)
        # the expert of each row; rows past the sum get the last one's, and are never read
        expert = jnp.repeat(jnp.arange(group_sizes.shape[0], dtype=jnp.int32), group_sizes, total_repeat_length=R)

        def product(rows, name):
            return grouped_matmul(rows, weights[name], group_sizes, metadata=metadata) + weights[f"{name}_bias"][expert]

        gate = jnp.minimum(product(rows, "gate"), limit)
        up = jnp.clip(product(rows, "up"), -limit, limit)
        return product((up + 1) * (gate * jax.nn.sigmoid(gate * alpha)), "down")

    return experts


class Block(parts.Block):
    @nn.compact
    def __call__(self, x, inputs):
        config = self.config
        attention = Attention(config, config.window(self.index), self.implementation, name="attention")
        x += attention(self.rms_norm("attention_norm")(x), inputs)
        x, inputs = inputs.at_wanted(x)
        y, losses = BiasedExperts(config, name="moe")(self.rms_norm("ffn_norm")(x), inputs)
        return x + y, losses


class GptOss(parts.Decoder):
    __doc__ = parts.Decoder.__doc__
    block = Block


def rules(config: GptOssConfig) -> list[hf_tensors.Rule]:
    found = family.outer_rules(config)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"params/layer_{i}", f"model.layers.{i}"
        found += family.norm_rules(i) + family.attention_rules(i, "qkvo" if config.attention_bias else "")
        found += [hf_tensors.copy(f"{ours}/attention/sinks", f"{theirs}.self_attn.sinks")]
        found += [hf_tensors.linear(f"{ours}/moe/router", f"{theirs}.mlp.router.weight")]
        found += [hf_tensors.copy(f"{ours}/moe/router_bias", f"{theirs}.mlp.router.bias")]
        for suffix, their in (("", ""), ("_bias", "_bias")):
            pair = (f"{ours}/moe/gate{suffix}", f"{ours}/moe/up{suffix}")
            its, E = f"{theirs}.mlp.experts", config.num_local_experts
            found += [hf_tensors.interleaved(pair, f"{its}.gate_up_proj{their}", E)]
            found += [hf_tensors.copy(f"{ours}/moe/down{suffix}", f"{its}.down_proj{their}", parts=E)]
    return found


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """Drops a context length that the rotary settings say too."""
    raw = dict(raw)
    context = raw.pop("initial_context_length", None)
    for spelling in ("rope_scaling", "rope_parameters"):
        if context is not None and raw.get(spelling):
            raw[spelling] = {"original_max_position_embeddings": context} | hf_config.inner(raw, spelling)
    return raw


FAMILY = family.Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    config=GptOssConfig,
    model=GptOss,
    rules=rules,
    presets={
        "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
        "gpt-oss-120b": GptOssConfig(),
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    fixed={"hidden_act": ("silu",)},
    harmless={"quantization_config": "how the weights are stored, which the tensors say"},
    read=read,
)
