"""A published family in the training loop: from an import, on a mesh, continued, evaluated, and exported again."""

import dataclasses
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from moejax import checkpoint, hf_checkpoint, hf_export, metrics, models, published, train, train_step
from moejax.config import Config, DataConfig, MeshConfig, MoEConfig, OptimizerConfig, TrainConfig
from moejax.errors import UserError

TINY = Path(__file__).parent / "data" / "hf_tiny"
RATE = 0.01


def test_layers_are_stacked_in_their_order_and_prediction_modules_come_last():
    def layer(n):
        return {"moe": {"routing": {"selected": jnp.array([n, 0])}}}

    sown = {"mtp_0": {"block": layer(99)}, "layer_10": layer(10), "layer_2": layer(2)}
    np.testing.assert_array_equal(train_step.layer_tallies(sown)["selected"][:, 0], [2, 10, 99])
    assert train_step.layer_tallies({"layer_0": {}}) == {}
    scanned = {"layers": {"moe": {"routing": {"selected": jnp.ones((3, 2), jnp.int32)}}}}
    assert train_step.layer_tallies(scanned)["selected"].shape == (3, 2)


def test_each_layers_bias_moves_by_its_own_counts():
    """b += rate · sign(mean − count): layer 2 overloads its first expert, layer 10 its second, mtp_0 none."""
    state = {name: {"moe": {"bias": jnp.zeros(2)}} for name in ("layer_10", "layer_2")}
    state["mtp_0"] = {"block": {"moe": {"bias": jnp.ones(2)}}}
    counts = jnp.array([[6, 2], [1, 3], [4, 4]])
    moved = train_step.moved_biases(state, counts, RATE)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    np.testing.assert_allclose(moved["layer_2"]["moe"]["bias"], [-RATE, RATE])
    np.testing.assert_allclose(moved["layer_10"]["moe"]["bias"], [RATE, -RATE])
    np.testing.assert_allclose(moved["mtp_0"]["block"]["moe"]["bias"], [1, 1])
    assert train_step.moved_biases({}, counts, RATE) == {}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A workdir of the tiny DeepSeek-V3 with a prediction module and a vocabulary for the 257 tokens of bytes."""
    folder = tmp_path_factory.mktemp("imported")
    model, variables = models.load_hf(TINY / "deepseek_v3")
    family, config = models.FAMILIES["deepseek_v3"], dataclasses.replace(model.config, vocab_size=384)
    config = dataclasses.replace(config, num_nextn_predict_layers=1)
    fresh = nn.unbox(jax.jit(family.model(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    params = fresh["params"] | variables["params"]
    state = fresh["router_state"] | variables["router_state"]
    params["embedding"] = jnp.tile(params["embedding"], (3, 1))
    params["unembedding"] = jnp.tile(params["unembedding"], (1, 3))
    hf_export.export_variables(folder / "source", family, config, {"params": params, "router_state": state})
    hf_checkpoint.convert(folder / "source", folder / "run", models.FAMILIES, "bfloat16")
    return folder / "run"


def run_config(imported, folder, **mesh):
    small.write_text(folder / "text")
    return Config(
        data=DataConfig(
            source=f"text:{folder}/text/*.txt", sequence_length=16, batch_size=8, cache_dir=str(folder / "cache")
        ),
        model=small.model_config(
            MoEConfig(
                router="moejax.routing:sigmoid_top_k", load_balance_weight=0.01, bias_update_rate=RATE, mtp_weight=0.3
            ),
            vocab_size=None,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        train=TrainConfig(steps=2, log_every=1, eval_every=0, eval_batches=1, init_from=str(imported)),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.slow
def test_a_run_from_an_import_is_the_same_on_a_mesh_that_it_goes_on_from(imported, tmp_path):
    config = run_config(imported, tmp_path, data=2, fsdp=2, expert=2)
    one = dataclasses.replace(config, mesh=MeshConfig(data=1))
    train.run(one, tmp_path / "one", progress=False)
    first = train.run(config, tmp_path / "mesh", stop_at=1, progress=False)
    assert first["step"] == 1
    on_mesh = train.run(one, tmp_path / "mesh", progress=False)
    assert on_mesh["step"] == 2 and np.isfinite(on_mesh["loss"])

    stored = {name: checkpoint.restore(tmp_path / name).trees for name in ("one", "mesh")}
    before = hf_checkpoint.Stored(imported, models.FAMILIES).load(jnp.float32)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-4), stored["one"], stored["mesh"])
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - np.asarray(b))), stored["one"], before)
    assert all(value > 1e-5 for value in jax.tree.leaves(moved["params"]))
    # two steps of ± RATE each
    assert all(RATE * 0.99 <= value <= 2 * RATE * 1.01 for value in jax.tree.leaves(moved["router_state"]))
    lines = list(metrics.read_lines(tmp_path / "mesh" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2]
    assert len(lines[0]["max_violation_per_layer"]) == 3 and lines[0]["load_balance_loss"] > 0
    assert all(0 < line["mtp_loss"] < 10 for line in lines)  # ln 384 = 6.0 at random
    assert "mtp_0" in moved["params"]  # its loss has a gradient, or the check above would have failed

    # its checkpoint names the family, so that the other commands read it as they read an import
    run = hf_checkpoint.Stored(tmp_path / "mesh", models.FAMILIES)
    assert run.family.name == "deepseek_v3" and run.step == 2 and run.run["train"]["steps"] == 2
    assert metrics.read_config(shutil.copytree(tmp_path / "mesh" / "checkpoints", tmp_path / "copy")) is not None
    np.testing.assert_array_equal(
        run.read("params/layer_1/moe/gate"), stored["mesh"]["params"]["layer_1"]["moe"]["gate"]
    )


def test_what_a_run_may_ask_of_an_import(imported, tmp_path):
    described = published.description(imported)
    assert described is not None and described["family"] == "deepseek_v3"
    config = run_config(imported, tmp_path)
    assert published.description(None) is None and published.description(tmp_path / "none") is None
    with pytest.raises(UserError, match=r"model has 384 tokens and data.tokenizer=bytes has 500"):
        published.model(described, config, 500)
    with pytest.raises(UserError, match="experts_per_token=9: give 1 to 8"):
        published.model(described, config, 257, 9)
    assert published.model(described, config, 257, 3).config.num_experts_per_tok == 3
    assert published.with_tokenizer(config) == config
    (imported / "tokenizer").mkdir(exist_ok=True)
    (imported / "tokenizer" / "tokenizer.json").write_text("{}")
    assert published.with_tokenizer(config).data.tokenizer == str(imported / "tokenizer" / "tokenizer.json")
    published.keep_beside(imported, tmp_path / "run", None)
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    published.keep_beside(tmp_path / "none", tmp_path / "run", "another")  # what is there stays
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "other").mkdir()
    published.keep_beside(tmp_path / "none", tmp_path / "other", "its own")
    assert (tmp_path / "other" / "tokenizer" / "tokenizer.json").read_text() == "its own"
    shutil.rmtree(imported / "tokenizer")
