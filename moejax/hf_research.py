"""The research LM as the published family that it is a case of: Qwen3-MoE.

Both normalise each head's queries and keys, gate SwiGLU experts by a softmax over E and have no biases. The LM's
embedding rows are multiplied by √D after the look-up; an export multiplies the table. D width, L layers, E experts.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.models.lm import layer_plan
from moejax.models.qwen3_moe import Qwen3MoeConfig
from moejax.rope import Rope


def as_qwen3(config: ModelConfig, params: Mapping[str, Any]) -> tuple[Qwen3MoeConfig, dict[str, Any]]:
    """(config, variables) of the Qwen3-MoE with the same logits; params are the LM's, layers stacked.

    Raises:
      UserError: the config is no case of Qwen3-MoE; every reason is named.
    """
    moe = config.moe
    if moe is None or config.vocab_size is None:
        raise UserError("a dense model is no case of a published sparse family, and can't be exported")
    reasons = []
    if moe.shared_experts:
        reasons.append("model.moe.shared_experts must be 0")
    if moe.router != "moejax.routing:top_k" or set(moe.router_options) - {"renormalize"}:
        reasons.append("model.moe.router must be moejax.routing:top_k")
    normalised = moe.router_options.get("renormalize", True)
    if normalised and moe.experts_per_token == 1:
        reasons.append("with model.moe.experts_per_token=1, router_options must be {'renormalize': False}")
    if (moe.eval_capacity_factor or moe.capacity_factor) is not None:
        reasons.append("model.moe.capacity_factor must be None: nothing is dropped there")
    if not config.qk_norm:
        reasons.append("model.qk_norm must be True")
    if config.tie_embeddings:
        reasons.append("model.tie_embeddings must be False: the rows are scaled by √D and the unembedding is not")
    if reasons:
        raise UserError("this research LM is no case of Qwen3-MoE, and can't be exported: " + "; ".join(reasons))
    dense, periods = layer_plan(config)
    layers = [jax.tree.map(lambda a, i=i: np.asarray(a[i]), params["dense_layers"]) for i in range(dense)]
    for period in range(periods):
        stack = jax.tree.map(lambda a, i=period: np.asarray(a[i]), params["layers"])
        layers += [stack] if config.moe_every == 1 else [stack[f"block_{i}"] for i in range(config.moe_every)]
    table = np.asarray(params["embedding"]["embedding"], np.float32)
    out = {f"layer_{i}": layer for i, layer in enumerate(layers)} | {
        "embedding": table * np.float32(math.sqrt(config.width)),
        "final_norm": params["final_norm"],
        "unembedding": params["unembedding"],
    }
    return Qwen3MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim or config.width // config.num_heads,
        moe_intermediate_size=moe.expert_width or config.ffn_width,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.experts_per_token,
        norm_topk_prob=bool(normalised),
        decoder_sparse_step=1,
        mlp_only_layers=tuple(i for i, layer in enumerate(layers) if "ffn" in layer),
        rms_norm_eps=config.norm_eps,
        rope=Rope(config.rope_theta),
        sliding_window=None,
    ), {"params": out}
