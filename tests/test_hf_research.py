"""The research LM as a published family: the same logits, and every reason why a config is none."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from experiments.configs import fine_grained
from moejax import config as config_module
from moejax import hf_export, hf_research, models
from moejax.config import MoEConfig
from moejax.errors import UserError
from moejax.models.lm import LM

MOE = MoEConfig(router="moejax.routing:top_k", num_experts=8, experts_per_token=3, expert_width=16)
TOKENS = np.random.default_rng(0).integers(0, small.VOCABULARY, (2, 12)).astype(np.int32)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"num_layers": 5, "first_dense_layers": 1, "moe_every": 2, "head_dim": 16, "rope_theta": 50.0}),
        ("qwen2_moe", {"num_layers": 3, "first_dense_layers": 1, "qk_norm": False, "rope_theta": 50.0}),
        ("qwen2_moe", {"num_layers": 5, "first_dense_layers": 1, "moe_every": 2, "qk_norm": False}),
    ],
    ids=["plain", "pattern", "shared", "shared pattern"],
)
def test_an_exported_research_lm_has_the_same_logits(name, fields, tmp_path):
    config = small.model_config(dataclasses.replace(MOE, shared_experts=2 * (name == "qwen2_moe")), **fields)
    variables = nn.unbox(jax.jit(LM(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    wanted = np.asarray(jax.jit(LM(config).apply)(variables, TOKENS))
    family, theirs, exported = hf_research.as_published(config, variables["params"])
    assert family is models.FAMILIES[name]
    apart = LM(dataclasses.replace(config, scan_layers=False)).arranged(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, hf_research.as_published(config, apart)[2], exported)
    if "moe_every" in fields:  # one dense layer, then two periods of a dense and a sparse one
        assert theirs.mlp_only_layers == (0, 1, 3)
    hf_export.export_variables(tmp_path / "out", family, theirs, exported)
    model, loaded = models.load_hf(tmp_path / "out")
    logits = np.asarray(jax.jit(model.apply)(loaded, TOKENS))
    assert np.max(np.abs(logits - wanted)) <= 1e-5 * np.std(wanted)


def test_fine_grained_as_it_is_exports_as_qwen2_moe():
    config = config_module.from_config_dict(fine_grained.get_config()).model
    config = dataclasses.replace(config, num_layers=1, width=16, ffn_width=32, vocab_size=257)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_width=8))
    variables = nn.unbox(jax.jit(LM(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    assert hf_research.as_published(config, variables["params"])[0] is models.FAMILIES["qwen2_moe"]


def test_what_is_no_case_of_a_family_is_refused_with_every_reason():
    moe = dataclasses.replace(MOE, shared_experts=1, capacity_factor=1.0)
    config = small.model_config(moe, tie_embeddings=True, head_dim=5, moe_every=2)
    every = r"Qwen2.*capacity_factor.*tie_embeddings.*qk_norm must be False.*head_dim"
    with pytest.raises(UserError, match=every):
        hf_research.as_published(config, {})
    with pytest.raises(UserError, match=r"Qwen3.*qk_norm must be True"):
        hf_research.as_published(small.model_config(MOE, qk_norm=False), {})
    one = small.model_config(dataclasses.replace(MOE, experts_per_token=1))
    with pytest.raises(UserError, match="'renormalize': False"):
        hf_research.as_published(one, {})
    with pytest.raises(UserError, match="dense model"):
        hf_research.as_published(small.model_config(None), {})
