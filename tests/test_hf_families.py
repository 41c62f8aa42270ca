"""Published families against transformers' logits, against themselves through the cache, and back to their files."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_decode import Cached

from moejax import hf_export, hf_import, hf_tensors, models, safetensors

TINY = Path(__file__).parent / "data" / "hf_tiny"
NAMES = sorted(path.name for path in TINY.iterdir() if path.is_dir())


@functools.lru_cache
def loaded(name):
    """(model, variables, tokens (2, 12), transformers' logits, ours)."""
    model, variables = models.load_hf(TINY / name)
    tokens = np.load(TINY / name / "input_ids.npy").astype(np.int32)
    return (
        model,
        variables,
        tokens,
        np.load(TINY / name / "logits.npy"),
        np.asarray(jax.jit(model.apply)(variables, tokens)),
    )


def test_every_reference_has_a_family_and_the_other_way_round():
    assert set(NAMES) <= models.FAMILIES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    _, _, _, reference, logits = loaded(name)
    assert logits.dtype == np.float32
    # the issue asks for 1e-4; 2e-6 was measured
    assert np.max(np.abs(logits - reference)) <= 2e-5 * np.std(reference)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_cached_decode_are_the_full_forward_at_every_position(name):
    """Row 0 is padded: its prompt has 4 tokens, row 1's has 7. Windows (4 in gpt-oss) are shorter than the sequence.

    Then 20 greedy tokens more, which are those of transformers (hf_variants.py made greedy.json).
    """
    model, variables, tokens, _, full = loaded(name)
    cached = Cached(model, variables, tokens, (4, 7), 32)
    state = cached.check(full, 1e-5)
    told = json.loads((TINY / name / "greedy.json").read_text())
    assert told["prompts"] == [tokens[0, :9].tolist(), tokens[1, :12].tolist()]
    assert cached.greedy(state, 20) == told["new"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_one_place_of_each_row_alone(name):
    """The last layer's experts then run for these tokens alone."""
    model, variables, tokens, _, full = loaded(name)
    places = np.array([3, 8], np.int32)
    alone = jax.jit(lambda v, t, p: model.apply(v, t, logits_at=p))(variables, tokens, places)
    np.testing.assert_allclose(alone[:, 0], full[np.arange(2), places], rtol=0, atol=1e-5 * np.std(full))


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_bfloat16_is_close(name):
    """Parameters and compute in bfloat16, 8 bits of mantissa: a router may choose otherwise, most logits are near."""
    model, variables = models.load_hf(TINY / name, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(variables, loaded(name)[2])
    assert logits.dtype == jnp.float32
    gap = np.abs(np.asarray(logits) - loaded(name)[4]) / np.std(loaded(name)[4])
    assert np.median(gap) < 0.03 and gap.max() < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_import_then_export_gives_the_same_tensors_bit_for_bit(name, tmp_path):
    source, family, config, raw = hf_import.open_checkpoint(TINY / name, models.FAMILIES)
    found = dict(hf_import.parameters(source, family, config))
    variables = hf_tensors.unflatten(found)
    total = hf_export.export_variables(tmp_path / "one", family, config, variables, raw=raw)
    before, after = safetensors.open_folder(TINY / name), safetensors.open_folder(tmp_path / "one")
    assert before.keys() == after.keys()
    for tensor in before:
        old, new = before[tensor].read(tensor), after[tensor].read(tensor)
        assert old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes(), tensor
    assert total == sum(shard.read(tensor).nbytes for tensor, shard in after.items())
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == raw

    # in several shards, with a config.json of our own: the same model again
    hf_export.export_variables(tmp_path / "many", family, config, variables, shard_bytes=30_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    source, again, same, _ = hf_import.open_checkpoint(tmp_path / "many", models.FAMILIES)
    assert again is family and same == config
    for path, array in hf_import.parameters(source, family, config):
        assert array.tobytes() == found[path].tobytes(), path


@pytest.mark.parametrize("name", NAMES)
def test_the_abstract_tree_is_that_of_init(name):
    """`abstract` traces one layer of each kind; `init` makes them all."""
    model, variables, *_ = loaded(name)
    shapes = {path: leaf.shape for path, leaf in hf_import.abstract(model).items()}
    assert shapes == {path: leaf.shape for path, leaf in hf_tensors.flatten(variables).items()}
    whole = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert jax.tree.map(lambda a: a.shape, nn.unbox(whole)) == jax.tree.map(lambda a: a.shape, variables)


# Published totals. DeepSeek's selection biases are state and not counted.
TOTALS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_404_352,
    "kimi-k2": 1_026_408_209_408,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "dbrx": 131_596_523_520,
    "llama-4-scout": 107_769_861_120,
    "llama-4-maverick": 400_711_848_960,
}


def test_presets_have_the_published_sizes_and_every_tensor_a_name():
    sizes = {preset.name: preset for preset in models.presets()}
    for family in models.FAMILIES.values():
        for config in family.presets.values():
            shapes = {path: leaf.shape for path, leaf in hf_import.abstract(family.model(config)).items()}
            assert hf_tensors.expected(family.rules(config), shapes)  # it asserts that each parameter has its tensors
    assert {name: sizes[name].total for name in TOTALS} == TOTALS
    # published: 12.9B active of Mixtral 8x7B, 1.3B of OLMoE, 37B of DeepSeek-V3, 5.1B of gpt-oss-120b
    rounded = {name: round(sizes[name].active / 1e9, 1) for name in ("mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-120b")}
    assert rounded == {"mixtral-8x7b": 12.9, "olmoe-1b-7b": 1.3, "gpt-oss-120b": 5.7}
    assert round(sizes["gpt-oss-120b"].active_without_embedding / 1e9, 1) == 5.1
    assert 36.5e9 < sizes["deepseek-v3"].active_without_embedding < 37.5e9
