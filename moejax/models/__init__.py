"""Models: the research LM (lm.py) and the published families, one file each.

model, variables = moejax.models.load_hf(DIR, dtype=jnp.float32)
logits = model.apply(variables, tokens)                       # (B, L, V) float32
new = moejax.models.generate(model, variables, prompts, max_new_tokens=20)
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from moejax import hf_import
from moejax.generate import generate
from moejax.models import dbrx, deepseek_v2, deepseek_v3, gpt_oss, llama4, mixtral, olmoe, qwen2_moe, qwen3_moe
from moejax.models.family import Family

__all__ = ["FAMILIES", "generate", "load_hf"]

_MODULES = (mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v2, deepseek_v3, gpt_oss, dbrx, llama4)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def load_hf(folder: str | Path, dtype: Any = jnp.float32) -> tuple[nn.Module, dict]:
    """(model, variables) of the Hugging Face checkpoint in `folder`, parameters and compute in `dtype`.

    Raises:
      UserError: an architecture or attribute that isn't known, a tensor that is missing, unused, of another shape or
        NaN, a file that is missing or cut short.
    """
    return hf_import.load(folder, FAMILIES, dtype)
