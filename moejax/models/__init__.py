"""Models: the research LM (lm.py) and the published families, one file each.

model, variables = moejax.models.load_hf(DIR, dtype=jnp.float32)
logits = model.apply(variables, tokens)                       # (B, L, V) float32
new = moejax.models.generate(model, variables, prompts, max_new_tokens=20)
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax import hf_import
from moejax.generate import generate
from moejax.models import (
    dbrx,
    deepseek,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    grok,
    llama4,
    mixtral,
    mla,
    olmoe,
    parts,
    qwen2_moe,
    qwen3_moe,
)  # fmt: skip
from moejax.models.family import Family

__all__ = ["FAMILIES", "Preset", "generate", "load_hf", "presets"]

_MODULES = (mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek, deepseek_v2, deepseek_v3, gpt_oss, dbrx, llama4, grok)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def load_hf(folder: str | Path, dtype: Any = jnp.float32) -> tuple[nn.Module, dict]:
    """(model, variables) of the Hugging Face checkpoint in `folder`, parameters and compute in `dtype`.

    Raises:
      UserError: an architecture or attribute that isn't known, a tensor that is missing, unused, of another shape or
        NaN, a file that is missing or cut short.
    """
    return hf_import.load(folder, FAMILIES, dtype)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published size, counted from an abstract tree.

    total, active: parameters, and those that a token uses: K of E experts, everything else. embedding: the input
    table's part of both, 0 where it is tied. Selection biases are state, and not counted; nor are the modules that
    predict further tokens.
    """

    name: str
    family: str
    total: int
    active: int
    embedding: int

    @property
    def active_without_embedding(self) -> int:
        return self.active - self.embedding


def presets() -> list[Preset]:
    """Every preset of every family; takes seconds and no memory."""
    return [count(name, family, config) for family in FAMILIES.values() for name, config in family.presets.items()]


def count(name: str, family: Family, config: Any) -> Preset:
    """The sizes of one config."""
    leaves = {p: leaf for p, leaf in hf_import.abstract(family.model(config)).items() if re.match("params/(?!mtp_)", p)}
    used, all_experts = family.experts(config)
    total = active = 0
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        routed = path.count("/") == 3 and "/moe/" in path and not path.rpartition("/")[2].startswith("router")
        assert not routed or leaf.shape[0] == all_experts, path
        total += size
        active += size * used // all_experts if routed else size
    table = 0 if config.tie_word_embeddings else math.prod(leaves["params/embedding"].shape)
    return Preset(name, family.name, total, active, table)


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Bytes that the cache of a preset with latent attention takes for each token, over all layers, counted from the
    arrays; and what full keys and values of the same heads would take."""

    name: str
    latent: int
    full: int

    @property
    def saved(self) -> float:
        """The share of `full` that is not needed."""
        return 1 - self.latent / self.full


def latent_caches(length: int = 131072, dtype: Any = jnp.bfloat16) -> list[LatentCache]:
    """One of each preset with latent attention, from caches of `length` places; nothing is allocated."""
    found = []
    for family in FAMILIES.values():
        for name, config in family.presets.items() if issubclass(family.model.block, deepseek_v2.Block) else ():
            layer = mla.cache_bytes(layer_cache(family, config, length, dtype)) // length
            values = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
            full = config.num_attention_heads * values * jnp.dtype(dtype).itemsize
            found.append(LatentCache(name, layer * config.num_hidden_layers, full * config.num_hidden_layers))
    return found


def layer_cache(family: Family, config: Any, length: int, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The cache of a config's first layer for one sequence of `length` places, as shapes."""
    block = family.model.block(config, 0, jnp.dtype(dtype))
    tokens = jnp.zeros((1, 1), jnp.int32)
    inputs = parts.Inputs(tokens, tokens, tokens + 1, "generate", length)
    x = jnp.zeros((1, 1, config.hidden_size), dtype)
    return jax.eval_shape(block.init, jax.random.key(0), x, inputs)["cache"]
