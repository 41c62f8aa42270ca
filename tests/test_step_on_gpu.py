"""The training step as a GPU runs it: which implementations it picks, no host inside it, and equal bits each time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from experiments.step import random_batch
from moejax import optimizer, routing, sharding
from moejax.config import MoEConfig
from moejax.models.lm import LM
from moejax.train_step import compiled_step, create, state_shardings, to_devices

ROWS, LENGTH, VOCABULARY = 2, 256, 640
MOE = MoEConfig(
    router="moejax.routing:top_k", num_experts=8, experts_per_token=2, shared_experts=1, expert_width=256,
    load_balance_weight=0.01, router_z_weight=0.001,
)  # fmt: skip
MODEL = {
    "width": 256, "ffn_width": 256, "vocab_size": VOCABULARY, "dtype": "bfloat16", "param_dtype": "bfloat16",
    "remat": "dots", "scan_layers": False,
}  # fmt: skip


# The same by other ways throughout: every expert on every token, scores of attention in memory, float32 arithmetic.
SLOW = MODEL | {"dtype": "float32", "remat": "none", "scan_layers": True, "attention_implementation": "plain"}


def pinned(logits, *, experts_per_token, mask):
    """Two experts by the token's place, unevenly, with gates by the logits: no rounding moves a choice."""
    assert experts_per_token == 2
    place, E = jnp.arange(logits.shape[0], dtype=jnp.int32), logits.shape[1]
    first = place * place // 7 % E
    experts = jnp.stack([first, (first + 1 + place % (E - 1)) % E], axis=1)
    weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=1))
    return routing.Routing(experts, weights, jax.nn.softmax(logits), jnp.broadcast_to(mask[:, None], experts.shape))


PINNED = dataclasses.replace(MOE, router="test_step_on_gpu:pinned")
ALL = dataclasses.replace(MOE, experts_per_token=MOE.num_experts)


@functools.cache
def started(documents: int, slow: bool = False, moe: MoEConfig = MOE):
    """The compiled step, a fresh state by each call of a function, and the batch on the device."""
    moe = dataclasses.replace(moe, dispatch="dense") if slow else moe
    config = small.config(moe, model=SLOW if slow else MODEL)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices=jax.devices()[:1])
    model, tx = LM(config.model), optimizer.make(config.optimizer)
    with jax.set_mesh(mesh):
        batch = to_devices(random_batch(VOCABULARY, ROWS, LENGTH, documents), sharding.batch_sharding(mesh))

        def start():
            return create(model, tx, mesh, config.seed)

        step = compiled_step(model, tx, config, state_shardings(model, tx, mesh))
        return step.lower(start(), batch).compile(), start, batch


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [1, 2])
def test_three_steps_twice_have_equal_bits(documents):
    compiled, start, batch = started(documents)

    def run():
        state, found = start(), []
        for _ in range(3):
            state, metrics = compiled(state, batch)
            found.append(jax.tree.map(np.asarray, metrics))
        return jax.tree.map(np.asarray, state), found

    once, again = run(), run()
    assert once[1][0]["loss"] != once[1][2]["loss"], "nothing was learned"
    jax.tree.map(np.testing.assert_array_equal, once, again)


def has_moments(part):
    return hasattr(part, "mu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "moe, bound, but", [(PINNED, 0.05, None), (ALL, 0.05, None), (MOE, 0.1, "router")], ids=["pinned", "all", "top_2"]
)
def test_a_step_is_that_of_the_slow_way(moe, bound, but):
    """Within bfloat16's rounding. In `top_2` that sends a few of 1024 choices to another expert, which moves the
    router's moments most, by 10% or so on a CPU too; the other two hold them, twice as tightly."""
    found = []
    for slow in (False, True):
        compiled, start, batch = started(2, slow, moe)
        state, metrics = compiled(start(), batch)
        # the slow way's layers are stacked; as AdamW's moments they lie two levels down, a tree like the parameters
        adam = next(part for part in jax.tree.leaves(state.opt_state, is_leaf=has_moments) if has_moments(part))
        config = small.config(moe, model=MODEL).model
        moments = [LM(config).arranged(tree) if slow else tree for tree in (adam.mu, adam.nu)]
        found.append((jax.tree.map(np.asarray, metrics), moments))
    fast, right = found[0][0], found[1][0]
    for name in ("loss", "total_loss", "grad_norm", "load_balance_loss", "router_z_loss", "routing_entropy"):
        np.testing.assert_allclose(fast[name], right[name], rtol=2e-2, err_msg=name)
    np.testing.assert_allclose(fast["load"], right["load"], atol=16)
    moments = [jax.tree_util.tree_leaves_with_path(each) for _, each in found]
    for (path, ours), (same, theirs) in zip(*moments, strict=True):
        name = jax.tree_util.keystr(path)
        assert path == same
        if but is None or f"'{but}'" not in name:
            ours, theirs = (np.asarray(a).astype(np.float64) for a in (ours, theirs))  # moments: the gradients, scaled
            assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs), name


@pytest.mark.gpu
def test_kernels_and_cudnn_are_picked_and_nothing_goes_to_the_host():
    text = started(documents=1)[0].as_text()
    for name in ("mosaic_gpu", "cudnn$fmha"):
        assert name in text
    assert not re.search("callback|infeed|outfeed", text)
    # remat "dots" keeps what attention gave: no layer's runs a second time
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == small.config(MOE, model=MODEL).model.num_layers
