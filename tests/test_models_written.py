"""The families that transformers does not have, against their definitions written out in numpy; prediction modules."""

import dataclasses
import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cached_decode import Cached

from moejax import hf_checkpoint, hf_export, hf_import, models, rope, safetensors, sharding
from moejax.errors import UserError
from moejax.models import __main__, deepseek, deepseek_v3, grok, mla
from moejax.rope import Rope

TINY = Path(__file__).parent / "data" / "hf_tiny"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11)).astype(np.int32)

DEEPSEEK = deepseek.DeepseekConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, moe_intermediate_size=8, n_shared_experts=2, n_routed_experts=6, num_experts_per_tok=3,
    first_k_dense_replace=1, rope=Rope(100.0),
)  # fmt: skip
GROK = grok.GrokConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_output_multiplier=0.7, max_attn_value=2.0, embedding_multiplier_scale=3.0,
    output_multiplier_scale=0.5, num_experts=4, rope=Rope(100.0),
)  # fmt: skip


@functools.lru_cache
def initialised(family, config):
    """(model, variables) with every parameter at random, norms about 1."""
    model = family.model(config)
    shapes = hf_import.abstract(model)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    values = {}
    for key, (path, leaf) in zip(keys, shapes.items(), strict=True):
        scale = 0.2 if path.endswith("scale") else 0.5
        values[path] = scale * jax.random.normal(key, leaf.shape) + (1.0 if path.endswith("scale") else 0.0)
    return model, hf_import.hf_tensors.unflatten(values)


def exported(tmp_path, family, config):
    """Tensors by the published names, float64, as `export` writes them."""
    _, variables = initialised(family, config)
    hf_export.export_variables(tmp_path / "out", family, config, variables)
    shards = safetensors.open_folder(tmp_path / "out")
    return {name: shard.read(name).astype(np.float64) for name, shard in shards.items()}


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def attention(x, w, prefix, heads, kv_heads, scale, theta, cap=None):
    """x (L, D): rotary halves, grouped queries, causal."""
    length, width = x.shape[0], x.shape[1] // heads
    q, k, v = ((x @ w[f"{prefix}.{name}_proj.weight"].T).reshape(length, -1, width) for name in "qkv")
    angles = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turn(y):
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = turn(q), turn(k)
    out = np.zeros_like(q)
    for head in range(heads):
        of_kv = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, of_kv].T * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        out[:, head] = softmax(scores) @ v[:, of_kv]
    return out.reshape(length, -1) @ w[f"{prefix}.o_proj.weight"].T


def gated(x, w, prefix, act, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (w[f"{prefix}.{name}.weight"].T for name in names)
    return (act(x @ gate) * (x @ up)) @ down


def mixture(x, w, gate, count, k, expert):
    """Σ over the K likeliest experts of probability · expert, token by token."""
    probabilities = softmax(x @ w[gate].T)
    out = np.zeros_like(x)
    for t, row in enumerate(probabilities):
        for e in np.argsort(-row)[:k]:
            out[t] += row[e] * expert(x[t : t + 1], e)[0]
    return out


def deepseek_by_hand(tokens, w, c):
    def silu(x):
        return x / (1 + np.exp(-x))

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        h = rms(x, w[f"{at}.input_layernorm.weight"], c.rms_norm_eps)
        x = x + attention(h, w, f"{at}.self_attn", 4, 2, 4**-0.5, c.rope.rope_theta)
        h = rms(x, w[f"{at}.post_attention_layernorm.weight"], c.rms_norm_eps)
        if i < c.first_k_dense_replace:
            x = x + gated(h, w, f"{at}.mlp", silu)
        else:
            expert = lambda y, e, at=at: gated(y, w, f"{at}.mlp.experts.{e}", silu)  # noqa: E731
            x = x + mixture(h, w, f"{at}.mlp.gate.weight", c.n_routed_experts, c.num_experts_per_tok, expert)
            x = x + gated(h, w, f"{at}.mlp.shared_experts", silu)
    return rms(x, w["model.norm.weight"], c.rms_norm_eps) @ w["lm_head.weight"].T


def grok_by_hand(tokens, w, c):
    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    names = ("linear", "linear_v", "linear_1")
    x = w["model.embed_tokens.weight"][tokens] * c.embedding_multiplier_scale
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        h = rms(x, w[f"{at}.pre_attn_norm.scale"], c.rms_norm_eps)
        h = attention(h, w, f"{at}.attn", 4, 2, c.attn_output_multiplier, c.rope.rope_theta, c.max_attn_value)
        x = x + rms(h, w[f"{at}.post_attn_norm.scale"], c.rms_norm_eps)
        h = rms(x, w[f"{at}.pre_moe_norm.scale"], c.rms_norm_eps)
        expert = lambda y, e, at=at: gated(y, w, f"{at}.moe_block.experts.{e}", gelu, names)  # noqa: E731
        h = mixture(h, w, f"{at}.moe_block.gate.weight", c.num_experts, c.num_experts_per_tok, expert)
        x = x + rms(h, w[f"{at}.post_moe_norm.scale"], c.rms_norm_eps)
    x = rms(x, w["model.norm.scale"], c.rms_norm_eps)
    return x @ w["model.embed_tokens.weight"].T * c.output_multiplier_scale


WRITTEN = [(deepseek.FAMILY, DEEPSEEK, deepseek_by_hand), (grok.FAMILY, GROK, grok_by_hand)]


@pytest.mark.parametrize(("family", "config", "by_hand"), WRITTEN, ids=["deepseek", "grok"])
def test_logits_are_those_of_the_definition_and_cached_decode_agrees(family, config, by_hand, tmp_path):
    model, variables = initialised(family, config)
    tensors = exported(tmp_path, family, config)
    wanted = np.stack([by_hand(row, tensors, config) for row in TOKENS])
    logits = np.asarray(jax.jit(model.apply)(variables, TOKENS))
    assert np.max(np.abs(logits - wanted)) <= 2e-5 * np.std(wanted)

    again, loaded = models.load_hf(tmp_path / "out")
    assert again.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    cached = Cached(model, variables, TOKENS, (5, 8), 16)
    cached.check(logits, 1e-5)


# ---- DeepSeek-V3's multi-token prediction

MTP = deepseek_v3.DeepseekV3Config(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=16,
    moe_intermediate_size=8, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1, n_group=2,
    topk_group=1, num_nextn_predict_layers=1,
)  # fmt: skip


def test_prediction_modules_change_only_their_loss_and_are_saved_with_the_tables_they_share(tmp_path):
    model, variables = initialised(deepseek_v3.FAMILY, MTP)
    run = jax.jit(functools.partial(model.apply, return_losses=True))
    logits, losses = run(variables, TOKENS)
    changed = jax.tree.map(lambda a: a, variables)
    changed["params"]["mtp_0"]["joint"] = -changed["params"]["mtp_0"]["joint"]
    other, other_losses = run(changed, TOKENS)
    np.testing.assert_array_equal(logits, other)
    assert losses["mtp_loss"] != other_losses["mtp_loss"]
    # a token two places before the end of the row has no target; the last one is no input but a target
    last = TOKENS.copy()
    last[:, 0] = (last[:, 0] + 1) % 64
    assert run(variables, last)[1]["mtp_loss"] != losses["mtp_loss"]

    tensors = exported(tmp_path, deepseek_v3.FAMILY, MTP)
    assert np.array_equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert np.array_equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    again, loaded = models.load_hf(tmp_path / "out")
    assert again.config == MTP and jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))


def test_a_tied_model_with_prediction_modules_exports_its_head_and_takes_it_back(tmp_path):
    config = dataclasses.replace(MTP, tie_word_embeddings=True)
    tensors = exported(tmp_path, deepseek_v3.FAMILY, config)
    assert "lm_head.weight" not in tensors
    head = "model.layers.2.shared_head.head.weight"
    assert np.array_equal(tensors[head], tensors["model.embed_tokens.weight"])
    again, loaded = models.load_hf(tmp_path / "out")
    _, variables = initialised(deepseek_v3.FAMILY, config)
    assert again.config == config and jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    file = tmp_path / "out" / safetensors.SINGLE
    values = {name: shard.read(name).copy() for name, shard in safetensors.open_folder(tmp_path / "out").items()}
    values[head] += 1
    specs = {name: (safetensors.NAMES[value.dtype], value.shape) for name, value in values.items()}
    safetensors.write(file, specs, values.values())
    with pytest.raises(UserError, match=r"shared_head\.head\.weight differs from model\.embed_tokens\.weight"):
        models.load_hf(tmp_path / "out")
    # without the repeated head it comes back without, and with the repeated embedding
    del values[head], specs[head]
    safetensors.write(file, specs, values.values())
    hf_checkpoint.convert(tmp_path / "out", tmp_path / "run", models.FAMILIES)
    stored = hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES)
    assert stored.repeated == ["model.layers.2.embed_tokens.weight"]
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    hf_export.export(tmp_path / "again", stored.family, stored.config, stored.read, dtypes, repeated=stored.repeated)
    assert safetensors.open_folder(tmp_path / "again").keys() == specs.keys()


def test_the_prediction_loss_by_hand():
    """Eq. 21-25 with the block's own output: token i sees h_i and the embedding of i + 1, and predicts i + 2."""
    model, variables = initialised(deepseek_v3.FAMILY, MTP)
    segments = np.where(np.arange(11) < 6, 1, 2)[None].repeat(2, 0)
    positions = np.where(np.arange(11) < 6, np.arange(11), np.arange(11) - 6)[None].repeat(2, 0)
    keep = lambda module, method: module.name == "final_norm" and method == "__call__"  # noqa: E731
    apply = functools.partial(model.apply, return_losses=True, capture_intermediates=keep, mutable=["intermediates"])
    (_, losses), seen = jax.jit(apply)(variables, TOKENS, positions, segments)
    params, seen = variables["params"]["mtp_0"], seen["intermediates"]
    h, w = np.asarray(seen["final_norm"]["__call__"][0], np.float64), np.asarray(params["joint"], np.float64)
    ahead = np.asarray(variables["params"]["embedding"], np.float64)[np.pad(TOKENS, [(0, 0), (0, 1)])[:, 1:]]
    joined = [rms(a, np.asarray(params[n]["scale"]), 1e-6) for a, n in ((ahead, "token_norm"), (h, "hidden_norm"))]
    block = deepseek_v3.deepseek_v2.Block(MTP, 2)
    inputs = deepseek_v3.parts.Inputs(jnp.asarray(TOKENS), jnp.asarray(positions), jnp.asarray(segments))
    state = {"params": params["block"], "router_state": variables["router_state"]["mtp_0"]["block"]}
    x = jnp.asarray(np.concatenate(joined, -1) @ w, jnp.float32)
    out = np.asarray(jax.jit(block.apply)(state, x, inputs)[0], np.float64)
    logits = rms(out, np.asarray(params["norm"]["scale"]), 1e-6) @ np.asarray(variables["params"]["unembedding"])
    # predicted: 0 … 3 of the first segment (6 long), 6 … 8 of the second (5 long)
    nats = [-np.log(softmax(logits[b, i])[TOKENS[b, i + 2]]) for b in range(2) for i in (0, 1, 2, 3, 6, 7, 8)]
    np.testing.assert_allclose(losses["mtp_loss"], np.mean(nats), rtol=1e-4)


def test_a_half_present_prediction_module_is_an_error_and_an_absent_one_is_none(tmp_path):
    exported(tmp_path, deepseek_v3.FAMILY, MTP)
    file = tmp_path / "out" / safetensors.SINGLE
    whole = {name: shard.read(name).copy() for name, shard in safetensors.open_folder(file.parent).items()}

    def keep(wanted):
        kept = {name: value for name, value in whole.items() if wanted(name)}
        specs = {name: (safetensors.NAMES[value.dtype], value.shape) for name, value in kept.items()}
        safetensors.write(file, specs, kept.values())

    keep(lambda name: not name.startswith("model.layers.2."))
    model, variables = models.load_hf(tmp_path / "out")
    assert model.config.num_nextn_predict_layers == 0 and "mtp_0" not in variables["params"]
    keep(lambda name: name != "model.layers.2.eh_proj.weight")
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.2\.eh_proj\.weight"):
        models.load_hf(tmp_path / "out")
    whole["model.layers.2.embed_tokens.weight"] += 1
    keep(lambda _: True)
    with pytest.raises(UserError, match="differs from"):
        models.load_hf(tmp_path / "out")


# ---- the cache of latent attention, and positions at length


@pytest.mark.parametrize(
    ("preset", "saved", "layers"),
    # (512 + 64) of 128 · (192 + 128) numbers a token: 98.6% less; of 64 heads 97.2%, of 16 heads 88.75%
    [("deepseek-v3", 0.9859, 61), ("deepseek-v2", 0.9859, 60), ("deepseek-v2-lite", 0.8875, 27),
     ("kimi-k2", 0.9719, 61)],
)  # fmt: skip
def test_the_cache_holds_the_latent_and_the_shared_key_alone(preset, saved, layers):
    family = next(family for family in models.FAMILIES.values() if preset in family.presets)
    cache = models.layer_cache(family, family.presets[preset], 131072)
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(1, 131072, 512), (1, 131072, 64)}
    assert mla.cache_bytes(cache) == 131072 * 576 * 2
    (told,) = (each for each in models.latent_caches() if each.name == preset)
    assert told.latent == layers * 576 * 2 and round(told.saved, 4) == saved


def test_the_published_saving_of_deepseek_v2_is_told_with_what_it_compares(capsys, monkeypatch):
    """60 · 576 numbers in 6 bits are 25,920 bytes; 95 · 2 · 8 · 128 in 16 bits 389,120: 93.3% less."""
    monkeypatch.setattr(models, "presets", lambda: [models.Preset("one", "family", 10, 5, 1)])
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one", "family", "10", "5", "9", "4", "0.0", "0.0"]
    assert ["deepseek-v2", "69,120", "4,915,200", "98.59%"] in [line.split() for line in lines]
    assert "93.3% less" in lines[-1] and "(25,920 bytes)" in lines[-1] and "(389,120)" in lines[-1]


def test_yarn_positions_at_128k():
    """DeepSeek-V3's settings: fast pairs turn as without scaling, slow ones 40 times slower, at any position."""
    yarn = deepseek_v3.FAMILY.presets["deepseek-v3"].rope
    frequencies, plain = rope.frequencies(yarn, 64), rope.frequencies(Rope(10000.0), 64)
    # pair(32) = 64 · ln(4096 / (32 · 2π)) / (2 · ln 10⁴) = 10.5 -> 10; pair(1) = 22.5 -> 23
    np.testing.assert_array_equal(frequencies[:11], plain[:11])
    np.testing.assert_allclose(frequencies[23:], plain[23:] / 40, rtol=1e-6)
    assert np.all((frequencies[11:23] < plain[11:23]) & (frequencies[11:23] > plain[11:23] / 40))
    positions = np.array([[0, 131071]])
    cos, sin = rope.table(yarn, 64, jnp.asarray(positions), jnp.ones(positions.shape, bool))
    # mscale = mscale_all_dim: cosines keep their size, the scores are multiplied by (0.1 · ln 40 + 1)² instead
    np.testing.assert_allclose(np.asarray(cos) ** 2 + np.asarray(sin) ** 2, 1, rtol=1e-5)
    angle = np.float32(131071) * frequencies[-1]
    np.testing.assert_allclose(cos[0, 1, 0, -1], np.cos(np.float64(angle)), atol=1e-5)
    np.testing.assert_allclose(mla.score_scale(yarn, 192), 192**-0.5 * (0.1 * np.log(40) + 1) ** 2)


# ---- Llama 4 out of the multimodal file


def test_llama4_is_read_out_of_the_multimodal_file(tmp_path):
    source = TINY / "llama4_text"
    text = json.loads((source / "config.json").read_text())
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "vision_config": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text}))
    tensors = {f"language_model.{name}": shard.read(name) for name, shard in safetensors.open_folder(source).items()}
    tensors |= {"vision_model.class_embedding": np.ones(3), "multi_modal_projector.linear_1.weight": np.ones((2, 2))}
    specs = {name: (safetensors.NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    safetensors.write(tmp_path / safetensors.SINGLE, specs, tensors.values())
    found, family, config, raw = hf_import.open_checkpoint(tmp_path, models.FAMILIES)
    assert found.left_out == 2
    _, variables = models.load_hf(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, models.load_hf(source)[1]))
    hf_export.export_variables(tmp_path / "out", family, config, variables, raw=raw)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == text

    for more, line in (
        ({"foo": 3}, "foo='3' beside text_config"),
        ({"tie_word_embeddings": True}, "give both the same"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text} | more))
        with pytest.raises(UserError, match=line):
            models.load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text}))
    name = "model.norm.weight"
    specs[name], tensors[name] = ("F32", (1,)), np.ones(1, np.float32)
    safetensors.write(tmp_path / safetensors.SINGLE, specs, tensors.values())
    with pytest.raises(
        UserError, match=r"language_model.model.norm.weight with and without 'language_model\.' before it"
    ):
        models.load_hf(tmp_path)


# ---- training on a mesh


# One sparse layer each: what a family's step has of its own.
ONE_LAYER = {
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "deepseek_v2": {"first_k_dense_replace": 0},
    "gpt_oss": {"layer_types": None},
    "dbrx": {},
    "llama4_text": {"layer_types": None, "moe_layers": None, "no_rope_layers": None, "interleave_moe_layer_step": 1},
}
# With experts of their own; the others have the layer of DeepSeek-V3, which tests/test_hf_training.py trains.
IN_TIME = ("gpt_oss", "llama4_text")


@pytest.mark.parametrize(
    "name", [name if name in IN_TIME else pytest.param(name, marks=pytest.mark.long) for name in ONE_LAYER]
)
def test_a_training_step_of_one_layer_on_eight_devices_is_the_one_of_one_device(name):
    family = models.FAMILIES[name]
    config = models.load_hf(TINY / name)[0].config
    depth = "n_layers" if name == "dbrx" else "num_hidden_layers"
    config = dataclasses.replace(config, **{depth: 1}, **ONE_LAYER[name])
    check_step(*initialised(family, config))


@pytest.mark.long  # tests/test_hf_training.py trains one on a mesh
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "deepseek_v3"])
def test_a_training_step_on_eight_devices_is_the_one_of_one_device(name):
    if name == "deepseek_v3":
        check_step(*initialised(deepseek_v3.FAMILY, MTP))
    else:
        model, variables = models.load_hf(TINY / name)
        check_step(dataclasses.replace(model, remat=True), variables)


def check_step(model, variables):
    """Loss and updated parameters, batch over data × fsdp × expert, parameters sharded by their logical axes."""
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (8, 6)).astype(np.int32)
    state = {key: value for key, value in variables.items() if key != "params"}

    def step(params, tokens):
        def loss(params):
            logits, losses = model.apply({"params": params} | state, tokens, return_losses=True, mode="evaluate")
            nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return jnp.mean(nats) + 0.01 * sum(losses.values())

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    value, updated = jax.jit(step)(variables["params"], tokens)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    boxed = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))["params"]
    places = sharding.shardings(mesh, boxed)
    with jax.set_mesh(mesh):
        params = jax.device_put(variables["params"], places)
        rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
        on_mesh, updated_there = jax.jit(step, out_shardings=(None, places))(params, rows)
    np.testing.assert_allclose(on_mesh, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(updated), jax.tree.leaves(updated_there), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(updated_there))
    assert nn.unbox(boxed).keys() == updated.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmoe", pytest.param("deepseek_v3", marks=pytest.mark.long)])
def test_generation_on_a_mesh_is_the_one_of_one_device(name):
    """Eight prompts of different lengths over data × expert, parameters and experts sharded; the same greedy tokens."""
    model, variables = models.load_hf(TINY / name)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 128, length).tolist() for length in (3, 5, 1, 4, 2, 5, 3, 1)]
    one = models.generate(model, variables, prompts, max_new_tokens=3)
    mesh = sharding.make_mesh({"data": 2, "expert": 4})
    boxed = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))
    there = {"params": jax.device_put(variables["params"], sharding.shardings(mesh, boxed["params"]))}
    if "router_state" in variables:
        there["router_state"] = jax.device_put(variables["router_state"], sharding.replicated(mesh))
    experts = there["params"]["layer_1"]["moe"]["gate"]
    assert experts.sharding.shard_shape(experts.shape)[0] == experts.shape[0] // 4
    with jax.set_mesh(mesh):
        assert models.generate(model, there, prompts, max_new_tokens=3) == one
