"""The research LM: what it may see, and that its ways of running agree."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from moejax import sharding
from moejax.errors import UserError
from moejax.models.lm import LM, layer_plan

ALL = list(small.ROUTERS)
# These decide over a whole sequence, so later tokens reach earlier ones: capacity with more than one choice each, and
# experts that choose their tokens.
LEAKS = ["gshard", "expert_choice"]
CAUSAL = [name for name in ALL if name not in LEAKS]
PLACES = np.arange(16)[None, :]  # small.batch has rows of 16: two documents of 8


def logits(name, batch):
    return small.outputs(name, batch)["logits"]


def changed(batch, where):
    """The batch with other tokens where the mask (B, L) says so."""
    tokens = np.where(where, (batch["tokens"] + 7) % small.VOCABULARY, batch["tokens"])
    return batch | {"tokens": tokens.astype(np.int32)}


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_and_other_documents_change_nothing_before(name):
    batch = small.batch(rows=2)
    before = logits(name, batch)
    later = logits(name, changed(batch, PLACES >= 5))
    np.testing.assert_allclose(later[:, :5], before[:, :5], atol=1e-6)
    assert np.abs(later[:, 5:] - before[:, 5:]).max() > 1e-2
    if small.ROUTERS[name] is not None and small.ROUTERS[name].capacity_factor:
        return  # a full expert in the first document does reach the second: capacity is the sequence's
    second = logits(name, changed(batch, PLACES < 8))
    np.testing.assert_allclose(second[:, 8:], before[:, 8:], atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_gradient_flows_backwards_in_time_or_across_documents_and_rows(name):
    # Every place of the batch has its own row of the embedding table: row r, place p has token 16·r + p.
    batch = small.batch(rows=2) | {"tokens": np.arange(32, dtype=np.int32).reshape(2, 16)}
    first_row = np.array([[1.0], [0.0]])
    for seen in (np.arange(0, 5), np.arange(8, 16)):  # the outputs asked for, and the only tokens they may see
        grads = small.outputs(name, batch, first_row * np.isin(PLACES, seen))["grads"]["embedding"]["embedding"]
        reached = np.abs(grads).max(axis=1) > 0
        np.testing.assert_array_equal(np.flatnonzero(reached[:32]), seen)


@pytest.mark.parametrize("name", LEAKS)
def test_documented_leaks_are_there_and_stay_inside_their_sequence(name):
    batch = small.batch(rows=2, seed=3)
    before = logits(name, batch)
    later = logits(name, changed(batch, (PLACES >= 5) & np.array([[True], [False]])))  # of the first row alone
    assert np.abs(later[0, :5] - before[0, :5]).max() > 1e-4, "no longer leaks: take it off the list"
    np.testing.assert_allclose(later[1], before[1], atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_other_rows_change_nothing(name):
    batch = small.batch(rows=2)
    other = logits(name, changed(batch, np.arange(2)[:, None] == 1))
    before = logits(name, batch)
    np.testing.assert_allclose(other[0], before[0], atol=1e-6)
    assert np.abs(other[1] - before[1]).max() > 1e-2


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    """Not the outputs before it, and it counts in no loss and no statistic."""
    batch = small.batch(rows=2, padded=4)
    clean = small.outputs(name, batch)
    noisy = small.outputs(name, changed(batch, batch["segment_ids"] == 0))
    np.testing.assert_allclose(noisy["logits"][:, :12], clean["logits"][:, :12], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), noisy["losses"], clean["losses"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), noisy["changed"], clean["changed"])
    if small.ROUTERS[name] is not None:
        assert ("router_z_loss" in clean["losses"]) == (name != "hash")  # which has no logits
        assert clean["losses"]["load_balance_loss"].shape == ()
        assignments = clean["changed"]["intermediates"]["layers"]["moe"]["routing"]["assignments"]
        per_token = 1 if name == "expert_choice" else small.ROUTERS[name].experts_per_token
        np.testing.assert_array_equal(assignments, [2 * 12 * per_token] * 2)  # 2 rows of 12, in each of 2 layers


@pytest.mark.parametrize("fields", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_rematerialised_and_other_ways_to_keep_layers_equal_scanned(fields):
    """With parameters as `init` makes them, stacked."""
    batch = small.batch(rows=2)
    scanned, other = small.outputs("aux_free", batch), small.outputs("aux_free", batch, **fields)
    assert small.largest_difference(scanned, other) < 1e-5


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layer_by_layer_equals_scanned(remat, monkeypatch):
    """Values, losses, gradients and statistics; as on a GPU, in lookups without scatters, with `dots`."""
    batch = small.batch(rows=2)
    scanned = small.outputs("aux_free", batch)
    if remat == "dots":
        monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    model, variables = small.initialised("aux_free")
    config = dataclasses.replace(model.config, scan_layers=False, remat=remat)
    split = {name: LM(config).arranged(tree) for name, tree in variables.items()}
    assert set(split["params"]["layers"]) == {"layer_0", "layer_1"}
    arrays = {key: batch[key] for key in ("tokens", "positions", "segment_ids")}
    weight, rest = np.ones((2, 16), np.float32), {"router_state": split["router_state"]}
    other = jax.tree.map(np.asarray, small.program(config)(split["params"], rest, arrays, weight))
    tallies = [each.pop("changed")["intermediates"] for each in (scanned, other)]
    assert small.largest_difference(*tallies) < 1e-5
    assert small.largest_difference(scanned | {"grads": LM(config).arranged(scanned["grads"])}, other) < 1e-5


def test_layers_of_two_kinds_one_by_one():
    """A dense layer, then two periods of a dense and a sparse one."""
    moe = small.ROUTERS["aux_free"]
    config = small.model_config(moe, num_layers=5, first_dense_layers=1, moe_every=2)
    apart = LM(dataclasses.replace(config, scan_layers=False))
    tokens = small.batch(rows=2)["tokens"]
    variables = nn.unbox(jax.jit(LM(config).init)(jax.random.key(0), tokens))
    split = {name: apart.arranged(tree) for name, tree in variables.items()}
    assert list(split["router_state"]["layers"]) == ["layer_0", "layer_1"]
    assert split["params"]["dense_layers"]["layer_0"]["ffn"]["gate"].shape == (32, 32)
    assert split["params"]["layers"]["layer_1"]["block_1"]["moe"]["gate"].shape == (8, 32, 16)
    found, losses = jax.jit(functools.partial(apart.apply, return_losses=True))(split, tokens)
    wanted, same = jax.jit(functools.partial(LM(config).apply, return_losses=True))(variables, tokens)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert small.largest_difference(losses, same) < 1e-5


def test_router_learns_when_one_expert_is_chosen():
    grads = small.outputs("switch", small.batch(rows=2))["grads"]
    assert np.abs(grads["layers"]["moe"]["router"]).max() > 1e-6


def test_evaluation_changes_no_state():
    """Even where the caller lets the router state be changed, and where there is something to lose."""
    model, variables = small.initialised("aux_free")
    bias = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    rest = {"router_state": {"layers": {"moe": {"bias": bias}}}}
    batch = small.batch(rows=2)
    arrays = {key: batch[key] for key in ("tokens", "positions", "segment_ids")}
    out = small.program(model.config)(variables["params"], rest, arrays, np.ones((2, 16), np.float32))
    np.testing.assert_array_equal(out["changed"]["router_state"]["layers"]["moe"]["bias"], bias)
    unbiased = small.outputs("aux_free", batch)["logits"]
    assert np.abs(out["logits"] - unbiased).max() > 1e-3, "the bias is not read"


def test_dense_layers_first_and_between():
    moe = small.ROUTERS["top_k"]
    config = small.model_config(moe, num_layers=5, first_dense_layers=1, moe_every=2)
    assert layer_plan(config) == (1, 2)
    params = nn.unbox(jax.eval_shape(LM(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    assert params["dense_layers"]["ffn"]["gate"].shape == (1, 32, 32)
    assert params["layers"]["block_0"]["ffn"]["gate"].shape == (2, 32, 32)
    assert params["layers"]["block_1"]["moe"]["gate"].shape == (2, 8, 32, 16)
    with pytest.raises(UserError, match="moe_every=3"):
        layer_plan(dataclasses.replace(config, moe_every=3))


def test_tied_embeddings_have_no_unembedding():
    model = LM(small.model_config(tie_embeddings=True))
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert "unembedding" not in variables["params"]
    logits = jax.eval_shape(model.apply, variables, tokens)
    assert (logits.shape, logits.dtype) == ((1, 4, small.VOCABULARY), jnp.float32)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters_and_logits():
    batch = small.batch(rows=2)
    model, variables = small.initialised("aux_free")
    half = LM(dataclasses.replace(model.config, dtype="bfloat16"))
    arrays = (batch["tokens"], batch["positions"], batch["segment_ids"])
    found, wanted = jax.jit(half.apply)(variables, *arrays), small.outputs("aux_free", batch)["logits"]
    gap = np.abs(found - wanted)
    assert 0 < np.median(gap) < 0.05 < np.abs(wanted).max()  # the median: a flipped expert moves a token far
    # Parameters, their gradients and the logits are float32; the gradient too is traced under strict promotion.
    shapes = jax.eval_shape(jax.value_and_grad(lambda v: jnp.sum(half.apply(v, *arrays))), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes, variables))} == {found.dtype} == {np.dtype("float32")}
