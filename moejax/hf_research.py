"""The research LM as the published family that it is a case of: Qwen3-MoE, or with shared experts Qwen2-MoE.

Both gate SwiGLU experts by a softmax over E. Qwen3-MoE normalises each head's queries and keys and has no shared
experts, Qwen2-MoE is the reverse. Its shared expert has a gate, σ(x · w), which w = 0 makes ½ everywhere: an export
doubles what comes out of it, exactly. Its biases can be switched off. The LM's embedding rows are multiplied by √D
after the look-up; an export multiplies the table. D width, L layers, E experts.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from moejax.config import ModelConfig, MoEConfig
from moejax.errors import UserError
from moejax.models import family, qwen2_moe, qwen3_moe
from moejax.models.lm import layer_by_layer, layer_name, stacks
from moejax.rope import Rope


def as_published(config: ModelConfig, params: Mapping[str, Any]) -> tuple[family.Family, Any, dict[str, Any]]:
    """(family, config, variables) of the published model with the same logits; params are the LM's, layers stacked or
    one by one.

    Raises:
      UserError: the config is no case of a family; every reason is named.
    """
    if config.moe is None or config.vocab_size is None:
        raise UserError("a dense model is no case of a published sparse family, and can't be exported")
    shared = config.moe.shared_experts > 0
    target = qwen2_moe.FAMILY if shared else qwen3_moe.FAMILY
    reasons = _reasons(config, config.moe) + (_no_qwen2(config) if shared else _no_qwen3(config))
    if reasons:
        raise UserError(
            f"this research LM is no case of {target.architecture}, and can't be exported: {'; '.join(reasons)}"
        )
    layers = [_gated(layer) for layer in _layers(config, params)] if shared else _layers(config, params)
    table = np.asarray(params["embedding"]["embedding"], np.float32)
    out = {f"layer_{i}": layer for i, layer in enumerate(layers)} | {
        "embedding": table * np.float32(math.sqrt(config.width)),
        "final_norm": params["final_norm"],
        "unembedding": params["unembedding"],
    }
    dense = tuple(i for i, layer in enumerate(layers) if "ffn" in layer)
    return target, (_qwen2 if shared else _qwen3)(config, config.moe, dense), {"params": out}


def _reasons(config: ModelConfig, moe: MoEConfig) -> list[str]:
    """Why neither family has this model."""
    reasons = []
    if moe.router != "moejax.routing:top_k" or set(moe.router_options) - {"renormalize"}:
        reasons.append("model.moe.router must be moejax.routing:top_k")
    if _normalised(moe) and moe.experts_per_token == 1:
        reasons.append("with model.moe.experts_per_token=1, router_options must be {'renormalize': False}")
    if (moe.eval_capacity_factor or moe.capacity_factor) is not None:
        reasons.append("model.moe.capacity_factor must be None: nothing is dropped there")
    if config.tie_embeddings:
        reasons.append("model.tie_embeddings must be False: the rows are scaled by √D and the unembedding is not")
    return reasons


def _no_qwen3(config: ModelConfig) -> list[str]:
    return [] if config.qk_norm else ["without shared experts model.qk_norm must be True"]


def _no_qwen2(config: ModelConfig) -> list[str]:
    reasons = ["with shared experts model.qk_norm must be False"] if config.qk_norm else []
    if config.head_dim not in (None, config.width // config.num_heads):
        reasons.append("with shared experts model.head_dim must be width / num_heads")
    return reasons


def _normalised(moe: MoEConfig) -> bool:
    return bool(moe.router_options.get("renormalize", True))


def _layers(config: ModelConfig, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each layer, from first to last."""
    found = []
    for name, count, sparse in stacks(config):
        if layer_name(0) not in params[name]:
            params = layer_by_layer(config, dict(params), lambda a, i: np.asarray(a[i]))
        for layer in (params[name][layer_name(i)] for i in range(count)):
            periodic = sparse and config.moe_every > 1
            found += [layer[f"block_{i}"] for i in range(config.moe_every)] if periodic else [layer]
    return found


def _gated(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with its shared experts where Qwen2-MoE has them, behind a gate of ½ and twice as large."""
    if "moe" not in layer:
        return layer
    moe = dict(layer["moe"])
    shared = dict(moe.pop("shared"))
    shared["down"] = 2 * np.asarray(shared["down"])
    return layer | {"moe": moe, "shared": shared, "shared_gate": np.zeros_like(shared["gate"][:, :1])}


def _qwen3(config: ModelConfig, moe: MoEConfig, dense: tuple[int, ...]) -> qwen3_moe.Qwen3MoeConfig:
    return qwen3_moe.Qwen3MoeConfig(
        vocab_size=cast(int, config.vocab_size),
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim or config.width // config.num_heads,
        moe_intermediate_size=moe.expert_width or config.ffn_width,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.experts_per_token,
        norm_topk_prob=_normalised(moe),
        decoder_sparse_step=1,
        mlp_only_layers=dense,
        rms_norm_eps=config.norm_eps,
        rope=Rope(config.rope_theta),
        sliding_window=None,
    )


def _qwen2(config: ModelConfig, moe: MoEConfig, dense: tuple[int, ...]) -> qwen2_moe.Qwen2MoeConfig:
    width = moe.expert_width or config.ffn_width
    return qwen2_moe.Qwen2MoeConfig(
        vocab_size=cast(int, config.vocab_size),
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=moe.shared_experts * width,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.experts_per_token,
        norm_topk_prob=_normalised(moe),
        decoder_sparse_step=1,
        mlp_only_layers=dense,
        rms_norm_eps=config.norm_eps,
        rope=Rope(config.rope_theta),
        qkv_bias=False,
        sliding_window=None,
    )
