"""Counts by hand, against the model's own parameters, and of the arms that are to be equal."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from moejax import accounting
from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, ablation_from_config_dict, from_config_dict
from moejax.errors import UserError
from moejax.models.lm import LM

SMALL = ModelConfig(num_layers=2, width=8, num_heads=2, num_kv_heads=1, ffn_width=16, vocab_size=32)


def test_a_dense_model_by_hand():
    # hd = 4. Per layer: q 8·8 + k 8·4 + v 8·4 + out 8·8 = 192; SwiGLU 3·8·16 = 384; norms 2·8 + 2·4 = 24.
    # Two layers: 2 · 600 = 1200; final norm 8; tables 2 · 32·8 = 512.
    counts = accounting.account(SMALL, sequence_length=10)
    assert counts.total_params == counts.active_params == 1200 + 8 + 512
    assert (counts.embedding_params, counts.expert_params) == (256, 2 * 384)
    # Products: 2 · (2 · (192 + 384) + 256) = 2816; scores: 2 layers · 2·2 · 2 heads · 4 · (10 + 1)/2 = 352.
    assert counts.active_flops_per_token == 2816 + 352
    assert counts.router_flops_per_token == 0
    assert counts.train_flops_per_token == 3 * (2816 + 352)


def test_a_sparse_model_by_hand():
    # One dense layer, one sparse: 6 routed experts of width 4 (3·8·4 = 96 each), 2 of them used, 1 shared; router 8·6.
    moe = MoEConfig(num_experts=6, experts_per_token=2, shared_experts=1, expert_width=4)
    counts = accounting.account(dataclasses.replace(SMALL, moe=moe, first_dense_layers=1), sequence_length=10)
    common = 2 * (192 + 24) + 384 + 8 + 512 + 48
    assert (counts.total_params, counts.active_params) == (common + 7 * 96, common + 3 * 96)
    assert counts.expert_params == 7 * 96
    assert counts.router_flops_per_token == 2 * 48
    assert counts.active_flops_per_token == 2 * (2 * 192 + 384 + 3 * 96 + 256) + 352


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "qk_norm": False, "head_dim": 6},
        {"moe": MoEConfig(num_experts=6, experts_per_token=2, shared_experts=2, expert_width=4)},
        {"num_layers": 5, "first_dense_layers": 1, "moe_every": 2, "moe": MoEConfig(num_experts=4)},
        {"moe": MoEConfig(router="moejax.routing:noisy_top_k", num_experts=4, experts_per_token=2)},
        {"moe": MoEConfig(router="moejax.routing:hash", num_experts=4)},
        {"moe": MoEConfig(router="moejax.routing:expert_choice", num_experts=4, experts_per_token=2)},
    ],
)
def test_the_count_is_the_models(changes):
    config = dataclasses.replace(SMALL, **changes)
    shapes = jax.eval_shape(LM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    wanted = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert accounting.account(config, 8).total_params == wanted


def test_experts_that_choose_tokens_count_in_the_mean(tmp_path):
    """A user's own router tells by what it returns: C = ceil(1.5 · 10 · 1 / 4) = 4, so 4 · 4 / 10 experts per token."""
    (tmp_path / "mine.py").write_text(
        "from moejax import routing\n"
        "def route(logits, *, experts_per_token, mask):\n"
        "    return routing.expert_choice(logits, experts_per_token=1, mask=mask, capacity_factor=1.5)\n"
    )
    moe = MoEConfig(router=f"{tmp_path}/mine.py:route", num_experts=4, expert_width=5)
    counts, dense = (accounting.account(dataclasses.replace(SMALL, moe=m), sequence_length=10) for m in (moe, None))
    # An expert is 3 · 8 · 5 = 120, an FFN 3 · 8 · 16 = 384; 1.6 · 120 = 192 in each of two layers.
    assert counts.active_flops_per_token - dense.active_flops_per_token == 2 * 2 * (192 - 384)
    assert counts.active_params - dense.active_params == 2 * (192 + 32 - 384)  # the router is 8 · 4


def test_a_hash_router_is_no_product():
    counts = accounting.account(dataclasses.replace(SMALL, moe=MoEConfig(router="moejax.routing:hash")), 10)
    assert counts.router_flops_per_token == 0


def ablation(name: str):
    values = importlib.import_module(f"experiments.configs.ablations.{name}").get_config()
    values.model.vocab_size = 257
    return ablation_from_config_dict(values)


def test_switch_against_fine_grained_is_equal_in_flops_and_in_expert_parameters():
    arms = ablation("switch_vs_fine_grained").arms
    counts = accounting.equal_flops_check(arms, tolerance=0.0)
    dense = counts["dense"].expert_params
    assert {name: count.expert_params / dense for name, count in counts.items()} == {
        "dense": 1, "hash": 16, "switch": 16, "gshard": 16, "fine_grained": 16, "fine_grained_aux_free": 16
    }  # fmt: skip


def test_deepseekmoes_validation_is_equal_inside_its_classes_alone():
    given = ablation("deepseekmoe_validation")
    counts = accounting.equal_flops_check(given.arms, given.classes, tolerance=0.0)
    assert {counts[name].expert_params for name in ("hash", "switch", "gshard", "deepseekmoe")} == {
        16 * counts["dense"].expert_params
    }
    with pytest.raises(UserError, match=r"declare config\.classes"):
        accounting.equal_flops_check(given.arms)


def test_unequal_arms_are_refused_with_both_named():
    wide = dataclasses.replace(SMALL, ffn_width=32)
    arms = {name: Config(model=model, data=DataConfig(sequence_length=10)) for name, model in
            (("narrow", SMALL), ("wide", wide))}  # fmt: skip
    # 3168 FLOPs against 3168 + 2 · 2 · 384 = 4704: 48.5% more
    with pytest.raises(UserError, match=r"narrow 3168, wide 4704, 48.5% more where 2% is allowed"):
        accounting.equal_flops_check(arms)
    accounting.equal_flops_check(arms, tolerance=0.5)
    assert set(accounting.equal_flops_check(arms, classes={"a": ("narrow",), "b": ("wide",)})) == {"narrow", "wide"}


@pytest.mark.parametrize("name", ["hash", "switch", "gshard", "fine_grained", "fine_grained_aux_free", "expert_choice"])
def test_the_small_configs_cost_what_the_dense_one_does(name):
    def flops(name):
        values = importlib.import_module(f"experiments.configs.{name}").get_config()
        values.model.vocab_size = 257
        config = from_config_dict(values)
        return accounting.account(config.model, config.data.sequence_length).active_flops_per_token

    assert flops(name) == flops("dense")
