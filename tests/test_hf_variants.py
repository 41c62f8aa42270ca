"""Published families in settings that the shared references don't have, against transformers (see hf_variants.py).

Windows and chunks shorter than the sequence, rope scaling past its original length, tied embeddings, patterns of
layers, latent attention without query compression.
"""

import hf_variants
import jax
import numpy as np
import pytest
from cached_decode import Cached

from moejax import models

NAMES = sorted(hf_variants.VARIANTS)


@pytest.fixture(scope="module", params=NAMES)
def variant(request, tmp_path_factory):
    """(name, model, variables, transformers' logits (2, L, V), its 20 greedy tokens of each prompt)."""
    name = request.param
    model, variables = models.load_hf(hf_variants.write(tmp_path_factory.mktemp("variants") / name, name))
    stored = np.load(hf_variants.STORED / f"{name}.npz")
    return name, model, variables, stored["logits"], stored["new"]


def test_logits_are_those_of_transformers(variant):
    name, model, variables, reference, _ = variant
    assert reference.shape == (2, hf_variants.LENGTH, model.config.vocab_size)
    logits = jax.jit(model.apply)(variables, hf_variants.tokens(name).astype(np.int32))
    # the issue asks for 1e-4; 2.5e-5 was measured (gpt_oss, at four of 80 positions), 1.1e-5 of the others
    assert np.max(np.abs(logits - reference)) <= 1e-4 * np.std(reference)


def test_prefill_and_cached_decode_are_transformers_at_every_position_and_go_on_as_it_does(variant):
    """Prompts of 5 and 17 tokens, the shorter one padded, then one token at a time: first those of the sequence,
    against the logits of the whole; then, from the prompts again, the likeliest, against transformers' continuation."""
    name, model, variables, reference, new = variant
    cached = Cached(model, variables, hf_variants.tokens(name), hf_variants.PROMPTS, 48)
    cached.check(reference, 1e-4)
    assert cached.greedy(cached.state, hf_variants.NEW) == new.tolist()


@pytest.mark.parametrize("name", ["llama4_text"])
def test_generate_continues_as_transformers_does(name, tmp_path):
    """The same through `generate`, whose cache is longer: all in one batch."""
    model, variables = models.load_hf(hf_variants.write(tmp_path / name, name))
    prompts = hf_variants.prompts(hf_variants.tokens(name), hf_variants.PROMPTS)
    new = models.generate(model, variables, prompts, max_new_tokens=hf_variants.NEW)
    assert new == np.load(hf_variants.STORED / f"{name}.npz")["new"].tolist()


def test_the_variants_are_what_they_say():
    """Settings that would change nothing would test nothing."""
    configs = {name: models.FAMILIES[name].read_config(hf_variants.config_json(name)) for name in NAMES}
    assert configs["mixtral"].sliding_window == 6 and configs["mixtral"].rope.rope_type == "yarn"
    assert [configs["qwen2_moe"].window(i) for i in range(3)] == [5, None, 5] and not configs["qwen2_moe"].sparse(1)
    assert configs["qwen3_moe"].use_sliding_window and not configs["qwen3_moe"].sparse(0)
    assert [configs["gpt_oss"].window(i) for i in range(3)] == [None, 5, 5]
    assert [configs["llama4_text"].chunk(i) for i in range(2)] == [6, None]
    assert configs["deepseek_v2"].q_lora_rank is None and configs["deepseek_v3"].q_lora_rank is None
