"""Importing: what is quantised, streamed, spelled in the old way, or wrong."""

import json
import re
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moejax
from moejax import checkpoint, hf_checkpoint, hf_export, hf_import, hf_tensors, models, rope, safetensors
from moejax.errors import UserError
from moejax.rope import Rope

TINY = Path(__file__).parent / "data" / "hf_tiny"


def copy(tmp_path, name, config=None, tensors=None, drop=()):
    """A changed copy of a tiny checkpoint: config keys (None drops one), further tensors, dropped ones."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    raw = json.loads((TINY / name / "config.json").read_text())
    raw = {
        key: value for key, value in (raw | (config or {})).items() if value is not None or key not in (config or {})
    }
    (folder / "config.json").write_text(json.dumps(raw))
    old = {key: shard.read(key) for key, shard in safetensors.open_folder(TINY / name).items() if key not in drop}
    new = {key: np.asarray(value) for key, value in (old | (tensors or {})).items()}
    specs = {key: (safetensors.NAMES[value.dtype], value.shape) for key, value in new.items()}
    safetensors.write(folder / safetensors.SINGLE, specs, new.values())
    return folder


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        models.load_hf(folder)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---- streamed into a checkpoint and back


def test_import_writes_a_checkpoint_that_restores_and_exports_the_same_files(tmp_path):
    source = TINY / "deepseek_v3"
    told = hf_checkpoint.convert(source, tmp_path / "run", models.FAMILIES)
    _, variables = models.load_hf(source)
    found = checkpoint.restore(tmp_path / "run")
    wanted = hf_tensors.flatten(variables)
    restored = hf_tensors.flatten(found.trees)
    assert restored.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(restored[path], array)
    assert told["parameters"] == sum(a.size for p, a in wanted.items() if p.startswith("params"))
    assert found.step == 0 and found.config["family"] == "deepseek_v3"

    stored = hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES)
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    hf_export.export(
        tmp_path / "out", stored.family, stored.config, stored.read, dtypes, raw=stored.raw, beside=stored.beside()
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    again = models.load_hf(tmp_path / "out")[1]
    for path, array in hf_tensors.flatten(again).items():
        np.testing.assert_array_equal(array, wanted[path])
    with pytest.raises(UserError, match="already"):
        hf_checkpoint.convert(source, tmp_path / "run", models.FAMILIES)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_repeated_tables_and_biases_come_back_as_they_were(tmp_path, name):
    old = {key: shard.read(key) for key, shard in safetensors.open_folder(TINY / name).items()}
    biases = {k: v.astype(ml_dtypes.bfloat16) for k, v in old.items() if k.endswith("e_score_correction_bias")}
    assert bool(biases) == (name == "deepseek_v3")
    tied = {"lm_head.weight": old["model.embed_tokens.weight"]} if name == "olmoe" else {}
    folder = copy(tmp_path, name, {"tie_word_embeddings": True} if tied else {}, biases | tied)
    hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)
    stored = hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES)
    dtypes = {path: stored.dtype(path) for path in stored.shapes}
    options = {"raw": stored.raw, "repeated": stored.repeated}
    hf_export.export(tmp_path / "out", stored.family, stored.config, stored.read, dtypes, **options)
    before, after = (safetensors.open_folder(each) for each in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        was, is_now = before[key].read(key), after[key].read(key)
        assert was.dtype == is_now.dtype and was.tobytes() == is_now.tobytes(), key


def test_a_failed_import_leaves_no_checkpoint(tmp_path):
    bad = np.full((32,), np.nan, np.float32)
    folder = copy(tmp_path, "olmoe", tensors={"model.layers.1.input_layernorm.weight": bad})
    with pytest.raises(UserError, match=r"model\.layers\.1\.input_layernorm\.weight holds a NaN"):
        hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)
    assert checkpoint.restore(tmp_path / "run") is None


def test_arrays_larger_than_a_piece_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_checkpoint, "PIECE_BYTES", 4096)
    hf_checkpoint.convert(TINY / "mixtral", tmp_path, models.FAMILIES, "bfloat16")
    found = hf_tensors.flatten(checkpoint.restore(tmp_path).trees)
    _, variables = models.load_hf(TINY / "mixtral", jnp.bfloat16)
    for path, array in hf_tensors.flatten(variables).items():
        assert found[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_folder_that_can_not_be_made_ends_in_one_line(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.* can't be written .*: .*name another folder"):
        hf_checkpoint.convert(TINY / "mixtral", tmp_path / below, models.FAMILIES)
    source, family, config, _ = hf_import.open_checkpoint(TINY / "mixtral", models.FAMILIES)
    variables = hf_tensors.unflatten(dict(hf_import.parameters(source, family, config)))
    with pytest.raises(UserError, match=r"file.* can't be written .*: .*name another folder"):
        hf_export.export_variables(tmp_path / "file" / "out", family, config, variables)


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(UserError, match="GB are needed"):
        hf_checkpoint.convert(TINY / "mixtral", tmp_path / "run", models.FAMILIES)
    assert checkpoint.restore(tmp_path / "run") is None


# ---- dequantised


def test_float8_blocks_by_hand():
    """200 × 130 in blocks of 128: rows 0-127 and 128-199, columns 0-127 and 128-129, each with its factor."""
    tensor = np.full((200, 130), 1.5, ml_dtypes.float8_e4m3fn)
    scale = np.array([[2.0, 4.0], [0.5, 1.0]], np.float32)
    out = hf_import.dequantise_fp8(tensor, scale)
    assert out.dtype == ml_dtypes.bfloat16
    assert [float(out[i, j]) for i, j in ((0, 0), (127, 128), (128, 127), (199, 129))] == [3.0, 6.0, 0.75, 1.5]
    with pytest.raises(UserError, match=r"needs scales of \(2, 2\)"):
        hf_import.dequantise_fp8(tensor, scale[:1])


def test_float8_is_rounded_once_to_the_dtype_asked_for(tmp_path):
    """1.125 · 1.01 has more digits than bfloat16's eight: in float32 they stay."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    scale = np.full((1, 1), 1.01, np.float32)
    tensors = {name: np.full((16, 32), 1.125, ml_dtypes.float8_e4m3fn), name + "_scale_inv": scale}
    folder = copy(tmp_path, "deepseek_v3", tensors=tensors)
    exact = np.float32(1.125) * scale[0, 0]
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        up = models.load_hf(folder, dtype)[1]["params"]["layer_1"]["moe"]["up"]
        np.testing.assert_array_equal(up[3], np.full((32, 16), exact, dtype))
    source, family, config, _ = hf_import.open_checkpoint(folder, models.FAMILIES)
    assert source.read(name).dtype == ml_dtypes.bfloat16 and exact != np.float32(source.read(name)[0, 0])
    assert dict(hf_import.parameters(source, family, config))["params/layer_1/moe/up"].dtype == np.float32
    with pytest.raises(UserError, match="for matrices alone"):
        hf_import.dequantise_fp8(np.ones((2, 2, 2), ml_dtypes.float8_e4m3fn), scale)


def test_mxfp4_by_hand():
    """One expert, one output, 32 inputs. Byte 0x21 is code 1 (0.5) then code 2 (1.0); 0xF9: 9 (−0.5) then 15 (−6)."""
    blocks = np.zeros((1, 1, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = 0x21, 0xF9
    out = hf_import.dequantise_mxfp4(blocks, np.array([[[128]]], np.uint8))  # 2^(128 − 127) = 2
    assert out.shape == (1, 32, 1) and out.dtype == ml_dtypes.bfloat16
    assert out[0, :5, 0].astype(float).tolist() == [1.0, 2.0, -1.0, -12.0, 0.0]


def test_a_quantised_checkpoint_is_the_one_of_its_dequantised_tensors(tmp_path):
    rng = np.random.default_rng(0)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    small = rng.normal(size=(16, 32)).astype(ml_dtypes.float8_e4m3fn)
    tensors = {name: small, name + "_scale_inv": np.full((1, 1), 0.25, np.float32)}
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    _, variables = models.load_hf(copy(tmp_path, "deepseek_v3", quantised, tensors))
    np.testing.assert_array_equal(variables["params"]["layer_1"]["moe"]["up"][3], small.astype(np.float32).T * 0.25)

    name = "model.layers.0.mlp.experts.gate_up_proj"  # (4, 32, 32): 32 inputs are one block
    blocks = rng.integers(0, 256, (4, 32, 1, 16), dtype=np.uint8)
    scales = rng.integers(120, 130, (4, 32, 1), dtype=np.uint8)
    tensors = {name + "_blocks": blocks, name + "_scales": scales}
    _, variables = models.load_hf(copy(tmp_path, "gpt_oss", tensors=tensors, drop=(name,)))
    whole = hf_import.dequantise_mxfp4(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(variables["params"]["layer_0"]["moe"]["gate"], whole[..., ::2])
    np.testing.assert_array_equal(variables["params"]["layer_0"]["moe"]["up"], whole[..., 1::2])


def test_a_tensor_is_there_once_and_has_scales_only_where_it_needs_them(tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    scales = {name + "_scale_inv": np.full((1, 1), 3, np.float32)}
    with pytest.raises(
        UserError, match=rf"tensor {re.escape(name)} is F32 and has .*_scale_inv beside it.*dequantised"
    ):
        models.load_hf(copy(tmp_path / "a", "deepseek_v3", tensors=scales))
    eights = {name: np.ones((16, 32), ml_dtypes.float8_e4m3fn)}
    for held in (np.ones((1, 1), np.int32), np.ones((2, 1), np.float32)):
        with pytest.raises(UserError, match=rf"tensor {re.escape(name)}: float8 .* needs scales of \(1, 1\) in floats"):
            models.load_hf(
                copy(tmp_path / str(held.dtype), "deepseek_v3", tensors=eights | {name + "_scale_inv": held})
            )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = {name + "_blocks": np.zeros((4, 32, 1, 16), np.uint8), name + "_scales": np.zeros((4, 32, 1), np.uint8)}
    with pytest.raises(UserError, match=rf"holds {re.escape(name)} and {re.escape(name)}_blocks: take away one"):
        models.load_hf(copy(tmp_path / "b", "gpt_oss", tensors=blocks))


def test_bytes_of_a_file_belong_to_one_tensor_each(tmp_path):
    path = tmp_path / "a.safetensors"
    for offsets, tail, line in (
        (((0, 8), (4, 12)), b"", "tensor b begins at byte 4, the one before it ends at 8"),
        (((0, 8), (12, 20)), b"", "tensor b begins at byte 12, the one before it ends at 8"),
        (((0, 8), (8, 16)), b"12", "2 bytes longer than its tensors"),
    ):
        header = {n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offsets[1][1]) + tail)
        with pytest.raises(UserError, match=line):
            safetensors.Shard(path)


# ---- spellings


def test_rope_scaling_is_read_in_place_of_rope_parameters_as_transformers_does(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "rope_scaling": scaling}
    _, config, _ = hf_import.read_config(copy(tmp_path / "a", "mixtral", both | {"rope_theta": 500.0}), models.FAMILIES)
    assert config.rope == Rope(500.0, "yarn", 4.0, 16)
    both["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}
    with pytest.raises(UserError, match=r"rope_theta=77.0 in rope_parameters, in whose place rope_scaling is read"):
        hf_import.read_config(copy(tmp_path / "b", "mixtral", both), models.FAMILIES)


def test_the_spelling_of_transformers_4_says_the_same(tmp_path):
    old = {
        "rope_parameters": None, "rope_theta": 5000.0, "torch_dtype": "float32", "dtype": None,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32},
        "num_experts": 8, "num_local_experts": None,
    }  # fmt: skip
    _, config, _ = hf_import.read_config(copy(tmp_path, "qwen3_moe", old), models.FAMILIES)
    assert config.rope == Rope(5000.0, "yarn", 4.0, 16, beta_fast=32.0)
    assert config.num_experts == 8


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_preset_survives_its_config_json(name):
    family = models.FAMILIES[name]
    for config in family.presets.values():
        assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config


def test_a_tied_embedding_may_be_there_twice_and_must_be_the_same(tmp_path):
    tied = {"tie_word_embeddings": True}
    table = safetensors.open_folder(TINY / "mixtral")["model.embed_tokens.weight"].read("model.embed_tokens.weight")
    (tmp_path / "same").mkdir()
    _, variables = models.load_hf(copy(tmp_path / "same", "mixtral", tied, {"lm_head.weight": table}))
    assert "unembedding" not in variables["params"]
    refused(copy(tmp_path, "mixtral", tied), "lm_head.weight differs")


def test_the_ids_that_end_a_text(tmp_path):
    file = tmp_path / "generation_config.json"
    assert hf_import.eos_ids(tmp_path, {}) == [] and hf_import.eos_ids(tmp_path, {"eos_token_id": 3}) == [3]
    assert hf_import.eos_ids(tmp_path, {"text_config": {"eos_token_id": [4]}}) == [4]
    for text, ids in (('{"eos_token_id": [5, 6]}', [5, 6]), ('{"eos_token_id": 0}', [0]), ("{}", [3])):
        file.write_text(text)
        assert hf_import.eos_ids(tmp_path, {"eos_token_id": 3}) == ids
    for text, words in (("{", "can't be read as JSON"), ("[]", "needs an id"), ('{"eos_token_id": "x"}', "='x'")):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"generation_config\.json.*{words}"):
            hf_import.eos_ids(tmp_path, {})


# ---- refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["GrandForCausalLM"]}, ("GrandForCausalLM is not known", "OlmoeForCausalLM")),
        ({"norm_topk_probs": True}, ("unknown attribute norm_topk_probs", "nearest is norm_topk_prob")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "'silu'")),
        ({"num_experts": "eight"}, ("num_experts='eight'", "an int")),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ("rope_type='spiral'", "yarn")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ("yarn", "needs factor")),
        ({"num_hidden_layers": 3}, ("missing", "model.layers.2.")),
        ({"num_hidden_layers": 1}, ("unused", "model.layers.1.")),
        ({"intermediate_size": 16}, ("wrong shape", "(24, 32)", "(16, 32)")),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(tmp_path, config, words):
    refused(copy(tmp_path, "olmoe", config), *words)


@pytest.mark.parametrize(
    ("name", "config", "line"),
    [
        ("gpt_oss", {"layer_types": ["full_attention", "foo_attention"]},
         "config.layer_types='foo_attention': it needs one of: sliding_attention, full_attention"),
        ("qwen2_moe", {"layer_types": ["chunked_attention", "full_attention"]},
         "config.layer_types='chunked_attention': it needs one of: sliding_attention, full_attention"),
        ("llama4_text", {"layer_types": ["sliding_attention", "full_attention"]},
         "config.layer_types='sliding_attention': it needs one of: chunked_attention, full_attention"),
        ("llama4_text", {"layer_types": "full_attention"},
         "config.layer_types='full_attention': it needs a tuple of strs or None"),
        ("gpt_oss", {"layer_types": ["full_attention"]},
         "config.json: layer_types has 1 entries and num_hidden_layers=2: give one entry for each layer"),
        ("llama4_text", {"no_rope_layers": [1]},
         "config.json: no_rope_layers has 1 entries and num_hidden_layers=2: give one entry for each layer"),
        ("olmoe", {"num_attention_heads": 5},
         "config.json: num_attention_heads=5 does not divide hidden_size=32: give a divisor of it"),
        ("mixtral", {"num_key_value_heads": 3},
         "config.json: num_key_value_heads=3 does not divide num_attention_heads=4: give a divisor of it"),
        ("dbrx", {"n_heads": 5}, "config.json: n_heads=5 does not divide d_model=32: give a divisor of it"),
        ("olmoe", {"num_attention_heads": 32, "num_key_value_heads": 32},
         "config.json: hidden_size / num_attention_heads=1 is odd: rotary positions turn features in pairs"),
        ("deepseek_v3", {"qk_rope_head_dim": 5},
         "config.json: qk_rope_head_dim=5 is odd: rotary positions turn features in pairs"),
        ("olmoe", {"hidden_size": -32}, "config.json: hidden_size=-32: it must be a number of at least 1"),
        ("olmoe", {"num_attention_heads": 0}, "config.json: num_attention_heads=0: it must be a number of at least 1"),
        ("olmoe", {"rms_norm_eps": float("inf")}, "config.json: rms_norm_eps=inf: it must be a number of at least 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0},
         "config.json: decoder_sparse_step=0: it must be a number of at least 1"),
        ("mixtral", {"sliding_window": 0}, "config.json: sliding_window=0: it must be a number of at least 1"),
        ("qwen2_moe", {"sliding_window": 0, "use_sliding_window": True},
         "config.json: sliding_window=0: it must be a number of at least 1"),
        ("olmoe", {"rope_parameters": "yarn"},
         "config.json: rope_parameters='yarn': it needs an object, {...}, or to be left out"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "16"}},
         "config.rope.original_max_position_embeddings='16': it needs an int or None"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
         "config.json: rope_parameters' original_max_position_embeddings=0: it must be above 0"),
        ("olmoe", {"rope_parameters": {"rope_theta": -1.0}},
         "config.json: rope_parameters' rope_theta=-1.0: it must be a number of at least 0"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16},
                   "max_position_embeddings": "64"},
         "config.max_position_embeddings='64': it needs an int"),
        ("dbrx", {"attn_config": "x"}, "config.json: attn_config='x': it needs an object, {...}, or to be left out"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": "silu"}},
         "config.json: ffn_act_fn='silu': it needs an object, {...}, or to be left out"),
        ("llama4_text", {"text_config": "x"},
         "config.json: text_config='x': it needs an object, {...}, or to be left out"),
        ("olmoe", {"architectures": 5}, "config.json's architectures=5: it needs a list of names"),
        ("olmoe", {"architectures": "OlmoeForCausalLM"},
         "config.json's architectures='OlmoeForCausalLM': it needs a list of names"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused_by_key_and_value(tmp_path, name, config, line):
    refused(copy(tmp_path, name, config), line)


def test_deepseekmoe_needs_to_be_told_how_many_experts_a_token_takes():
    with pytest.raises(UserError, match="n_routed_experts=4 needs num_experts_per_tok"):
        models.FAMILIES["deepseek"].read_config({"n_routed_experts": 4})


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ([1, 2], "its header is no JSON object"),
        (None, "its header is no JSON object"),
        *(({"a": entry}, "the header's entry of tensor a is wrong: it needs a dtype's name, a list of sizes and two")
          for entry in ({"shape": [1]}, "x", None, ENTRY | {"data_offsets": ["a", "b"]}, ENTRY | {"data_offsets": [0]},
                        ENTRY | {"shape": "ab"}, ENTRY | {"shape": [-1, -1]}, ENTRY | {"dtype": ["F32"]})),
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused_by_its_file(tmp_path, header, line):
    folder = copy(tmp_path, "olmoe")
    text = json.dumps(header).encode()
    (folder / safetensors.SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(folder, str(folder / safetensors.SINGLE), line)


@pytest.mark.parametrize("where", [[], {"a": 1}, "x", None])
def test_a_malformed_index_is_refused_by_its_file(tmp_path, where):
    folder = copy(tmp_path, "olmoe")
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": where}))
    refused(folder, str(folder / safetensors.INDEX), "`weight_map` must be an object, a file's name for each tensor")


@pytest.mark.parametrize("dtype", ["float8", "int32", jnp.int32])
def test_parameters_are_floats(dtype):
    with pytest.raises(UserError, match="is no float that parameters can have"):
        models.load_hf(TINY / "olmoe", dtype)


def test_damaged_files_are_refused_by_name(tmp_path):
    refused(tmp_path, "no config.json")
    folder = copy(tmp_path, "olmoe")
    file = folder / safetensors.SINGLE
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(folder, "cut short", "model.safetensors")
    file.write_bytes(whole[:5])
    refused(folder, "cut short")
    file.write_bytes(whole.replace(b'"F32"', b'"F3X"', 1))
    refused(folder, "F3X", "can't be held")
    file.unlink()
    refused(folder, "no safetensors files")
    (folder / "model-1.safetensors").symlink_to(folder / "gone")  # as a cache of downloads that lost a file
    refused(folder, "model-1.safetensors can't be read (No such file or directory)")
    (folder / "model-1.safetensors").unlink()
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(folder, "lacks 1 of 1 shards", "model-00001-of-00002.safetensors")


UP = "model.layers.0.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize("narrow", [ml_dtypes.bfloat16, np.float16])
def test_experts_of_several_dtypes_are_held_in_the_one_that_rounds_none(tmp_path, narrow):
    first = np.full((24, 32), 0.5, narrow)
    second = np.full((24, 32), 1 + 2**-20, np.float32)  # bfloat16 would round it to 1
    third = np.full((24, 32), 2.0**100, ml_dtypes.bfloat16)  # beyond float16
    folder = copy(tmp_path, "olmoe", tensors={UP.format(i): up for i, up in enumerate((first, second, third))})
    hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)
    stored = hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES).read("params/layer_0/moe/up")
    found = hf_tensors.flatten(models.load_hf(folder)[1])["params/layer_0/moe/up"]
    for up in (stored, found):
        assert up.dtype == np.float32
        np.testing.assert_array_equal(up[0], first.astype(np.float32).T)
        np.testing.assert_array_equal(up[1], second.T)
        np.testing.assert_array_equal(up[2], third.astype(np.float32).T)


@pytest.mark.parametrize(
    "value, dtype, line",
    [
        (np.full((32,), 1e6, np.float32), "float16", "tensor model.norm.weight goes beyond what float16 holds"),
        (np.full((32,), 1e300, np.float64), "float32", "tensor model.norm.weight goes beyond what float32 holds"),
        (np.ones((32,), np.int32), None, "tensor model.norm.weight is int32: parameters are floats"),
    ],
)
def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path, value, dtype, line):
    folder = copy(tmp_path, "olmoe", tensors={"model.norm.weight": value})
    with pytest.raises(UserError, match=line):
        hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES, dtype)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_expert_whose_number_is_too_large_is_named(tmp_path):
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    folder = copy(tmp_path, "olmoe", tensors={name: np.full((24, 32), 1e6, np.float32)})
    with pytest.raises(UserError, match=f"tensor {re.escape(name)} goes beyond what float16 holds"):
        hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES, "float16")


def test_mxfp4_that_is_damaged_is_refused():
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.full((1, 2, 1), 127, np.uint8)
    assert not np.any(hf_import.dequantise_mxfp4(blocks, scales))
    with pytest.raises(UserError, match="255 is a NaN; these hold it"):
        hf_import.dequantise_mxfp4(blocks, np.where(np.arange(2)[:, None] == 1, np.uint8(255), scales))
    with pytest.raises(UserError, match="these are float32"):
        hf_import.dequantise_mxfp4(blocks, scales.astype(np.float32))


@pytest.mark.parametrize("blocks", [np.zeros((4, 24, 16), np.uint8), np.zeros((4, 24, 1, 16), np.float32)])
def test_mxfp4_blocks_of_another_form_are_refused_by_name(tmp_path, blocks):
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": np.zeros(blocks.shape[:-1], np.uint8)}
    refused(copy(tmp_path, "olmoe", tensors=tensors, drop=[name]), f"{name}_blocks", "four axes")


def test_a_killed_import_can_be_run_again_and_code_goes_along(tmp_path):
    folder = copy(tmp_path, "olmoe")
    (folder / "modeling_own.py").write_text("# named by auto_map")
    left = tmp_path / "run" / "checkpoints" / "0.orbax-checkpoint-tmp-import" / "params"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0"]
    assert "modeling_own.py" in hf_checkpoint.Stored(tmp_path / "run", models.FAMILIES).beside()
    with pytest.raises(UserError, match="has checkpoints already"):
        hf_checkpoint.convert(folder, tmp_path / "run", models.FAMILIES)


def test_float8_without_its_scales_is_refused(tmp_path):
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    refused(copy(tmp_path, "olmoe", tensors={name: np.ones((24, 32), ml_dtypes.float8_e4m3fn)}), "float8", "_scale_inv")


def test_the_published_spelling_of_deepseek_v3_is_its_preset():
    """config.json as it lies on the Hub: transformers 4's names, float8, keys of the published code."""
    raw = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {},
        "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
        "vocab_size": 129280,
    }  # fmt: skip
    family = models.FAMILIES["deepseek_v3"]
    assert family.read_config(raw) == family.presets["deepseek-v3"]


def test_models_are_there_after_importing_moejax_alone():
    assert moejax.__getattr__("models") is models
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        moejax.__getattr__("model")


def test_rope_types_that_look_at_the_length():
    """By hand, heads of 4 features (two pairs) and a context of 8, at lengths 8 and 16."""
    dynamic = Rope(100.0, "dynamic", factor=3.0, original_max_position_embeddings=8)
    # 3 · 16/8 − 2 = 4; base 100 · 4^(4/2) = 1600, whose root is 40; up to 8 the base is 100
    long = Rope(100.0, "longrope", 4.0, 8, short_factor=(1.0, 2.0), long_factor=(4.0, 5.0))
    wanted = {dynamic: [(1, 1 / 10), (1, 1 / 40)], long: [(1, 1 / 20), (1 / 4, 1 / 50)]}
    for settings, frequencies in wanted.items():
        for length, expected in zip((8, 16), frequencies, strict=True):
            found = rope.frequencies_at(settings, 4, jnp.array([length]))
            np.testing.assert_allclose(found, [expected], rtol=1e-6)
    # √(1 + ln 4 / ln 8) = √(5/3)
    assert rope.temperature(dynamic) == 1 and rope.temperature(long) == pytest.approx((5 / 3) ** 0.5)
    # the call's largest position sets the frequencies of all: 16 positions, the second with 1/40
    cos, _ = rope.table(dynamic, 4, jnp.arange(16)[None], jnp.ones((1, 16), bool))
    np.testing.assert_allclose(cos[0, 1, 0], np.cos([1, 1 / 40]), rtol=1e-6)
    with pytest.raises(UserError, match="2 and 2 entries; the 8 rotary features of a head need 4"):
        rope.table(long, 8, jnp.arange(4)[None], jnp.ones((1, 4), bool))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0,
         "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 5.0, 7.0]},
    ],
)  # fmt: skip
def test_a_row_is_what_it_is_alone_by_rope_types_that_look_at_the_length(tmp_path, scaling):
    config = {"rope_parameters": scaling | {"rope_theta": 100.0}, "max_position_embeddings": 16}
    model, variables = models.load_hf(copy(tmp_path, "mixtral", config))
    assert model.config.rope.rope_type == scaling["rope_type"]
    tokens, apply = np.random.default_rng(0).integers(0, 128, (2, 30)), jax.jit(model.apply)
    place = np.broadcast_to(np.arange(30), (2, 30))
    real = place < np.array([[20], [30]])  # a row of 20 is past the context of 16 too, with a base of its own
    together = apply(variables, tokens, place, real.astype(np.int32))
    alone = apply(variables, tokens[:1, :20])
    np.testing.assert_allclose(together[0, :20], alone[0], atol=1e-5 * np.std(alone))


def test_dynamic_rope_grows_from_the_longest_that_the_config_tells():
    raw = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 2.0},
        "max_position_embeddings": 64,
    }
    family = models.FAMILIES["olmoe"]
    config = family.read_config(raw)
    assert config.rope == Rope(50.0, "dynamic", 2.0, 64)
    assert family.read_config(family.write_config(config)) == config
