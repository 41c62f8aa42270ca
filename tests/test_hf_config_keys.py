"""Every key of a config.json is read by the model, or stands in a short list with a reason; docs/models.md has it."""

import dataclasses
import re
from pathlib import Path

import hf_variants
import jax
import jax.numpy as jnp
import pytest

from moejax import hf_config, hf_import, models
from moejax.errors import UserError

DOCS = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


def recording(config, seen: set[str]):
    """The config as one that notes in `seen` which fields are read."""

    class Recording(type(config)):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = Recording(**fields)
    seen.clear()  # what its own checks read
    return found


def read_by_the_model(family, config) -> set[str]:
    """Fields that tracing the model and naming its tensors reads."""
    seen: set[str] = set()
    found = recording(config, seen)
    model = family.model(found)
    if config.num_hidden_layers > 3:
        hf_import.abstract(model)
    else:
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    family.rules(found)
    return seen


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_field_is_read_or_named_as_harmless(name):
    family = models.FAMILIES[name]
    configs = list(family.presets.values())
    if name in hf_variants.VARIANTS:
        configs.append(family.read_config(hf_variants.config_json(name)))
        if hasattr(configs[-1], "layer_types"):  # what stands in for it
            configs.append(dataclasses.replace(configs[-1], layer_types=None))
    seen = set().union(*(read_by_the_model(family, config) for config in configs))
    fields = {field.name for field in dataclasses.fields(family.config)}
    harmless = hf_config.HARMLESS.keys() | family.harmless
    allowed = {"num_key_value_heads"} if "kv_lora_rank" in fields else set()  # must be num_attention_heads there
    assert fields - seen <= harmless | allowed


def test_the_documented_list_is_the_one_of_the_code():
    (section,) = re.findall(r"## Keys that change nothing\n(.*?)\n## ", DOCS, re.DOTALL)
    documented = set(re.findall(r"`([a-z0-9_A-Z]+)`", section))
    lists = [hf_config.HARMLESS, *(family.harmless for family in models.FAMILIES.values())]
    assert documented == set().union(*lists)
    assert all(reason for each in lists for reason in each.values())


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("olmoe", {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported; latent attention has"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported; latent attention has"),
        ("dbrx", {"ffn_config": {"hidden_size": 64}}, "ffn_config's hidden_size=64 is not d_model=32"),
    ],
)
def test_values_that_would_be_passed_over_are_refused(name, config, words):
    with pytest.raises(UserError, match=words):
        models.FAMILIES[name].read_config(hf_variants.config_json(name) | config)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", hf_variants.VARIANTS)
def test_the_older_spelling_says_the_same(name, old):
    """transformers 4: rope_theta and rope_scaling with a `type`, torch_dtype, its names for the number of experts."""
    family, raw = models.FAMILIES[name], hf_variants.config_json(name)
    turns = dict(raw.pop("rope_parameters"))
    kind = turns.pop("rope_type")
    spelled = raw | {"torch_dtype": raw["dtype"], "rope_theta": turns.pop("rope_theta")}
    spelled["rope_scaling"] = None if kind == "default" else turns | {"type" if old else "rope_type": kind}
    del spelled["dtype"]
    for new in ("num_local_experts", "n_routed_experts"):
        if new in spelled and old:
            spelled["num_experts"] = spelled.pop(new)
    assert family.read_config(spelled) == family.read_config(hf_variants.config_json(name))
