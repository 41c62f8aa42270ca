"""Tiny checkpoints in settings that the shared references don't have, with what transformers gives for them.

Only what transformers gave is stored; the weights are made again from a seed. What made it, tests/data/hf_variants and
greedy.json beside the shared references, of all families or of those named:

  PYTHONPATH=. .venv/bin/python tests/hf_variants.py PEER_PYTHON [FAMILY …]      (PEER_PYTHON has torch, transformers)
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from experiments.peer_process import Peer
from moejax import hf_import, hf_tensors, models, safetensors

DATA = Path(__file__).parent / "data"
TINY, STORED = DATA / "hf_tiny", DATA / "hf_variants"
NEW = 20
LENGTH = 40
PROMPTS = (5, 17)  # tokens of each row that are continued

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip

# family -> what differs from the shared reference's config.json
VARIANTS = {
    # a sliding window, YaRN past its original length, a tied embedding, one head of keys
    "mixtral": {
        "sliding_window": 6, "rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1,
    },
    # clipping that clips, gates renormalised, grouped queries, positions stretched
    "olmoe": {
        "clip_qkv": 0.7, "norm_topk_prob": True, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    # two layers in windows and a dense one among them
    "qwen2_moe": {
        "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "mlp_only_layers": [1],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": LLAMA3,
        "norm_topk_prob": True,
    },
    # every other layer sparse, windows in all
    "qwen3_moe": {
        "use_sliding_window": True, "sliding_window": 7, "decoder_sparse_step": 2, "tie_word_embeddings": True,
        "attention_bias": True, "norm_topk_prob": False, "rope_parameters": YARN,
    },
    # no query compression, YaRN whose temperature scales the scores, the best experts of all
    "deepseek_v2": {
        "num_hidden_layers": 2, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 2.0,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    },
    # no query compression, halves that turn together, gates as they are
    "deepseek_v3": {
        "num_hidden_layers": 2, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False,
        "num_nextn_predict_layers": 0, "tie_word_embeddings": True, "n_group": 2, "topk_group": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # another pattern of windows, one expert, YaRN at length
    "gpt_oss": {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 5, "num_experts_per_tok": 1, "rope_parameters": YARN | {"truncate": True},
    },
    # gates divided by their 2-norm, clipping that clips
    "dbrx": {
        "attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 10_000.0}, "num_key_value_heads": 1,
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": 4,
            "moe_top_k": 3, "moe_normalize_expert_weights": 2.0, "moe_jitter_eps": 0.0, "moe_loss_weight": 0.01,
        },
    },
    # chunks shorter than the sequence, a temperature that grows inside it, queries and keys as they are, two experts
    "llama4_text": {
        "attention_chunk_size": 6, "floor_scale": 8, "use_qk_norm": False, "tie_word_embeddings": True,
        "num_experts_per_tok": 2,
        "rope_parameters": LLAMA3,
    },
}  # fmt: skip


def config_json(name: str) -> dict:
    return json.loads((TINY / name / "config.json").read_text()) | VARIANTS[name]


def write(folder: Path, name: str) -> Path:
    """The variant of a family as a checkpoint in the new folder `folder`; float32, every parameter at random."""
    family = models.FAMILIES[name]
    raw = config_json(name)
    config = family.read_config(raw)
    shapes = {path: leaf.shape for path, leaf in hf_import.abstract(family.model(config)).items()}
    expected = hf_tensors.expected(family.rules(config), shapes)
    rng, tensors = np.random.default_rng(0), {}
    for tensor in sorted(expected):
        values = rng.normal(size=expected[tensor]).astype(np.float32)
        is_norm = "norm" in tensor and tensor.endswith("weight") and values.ndim == 1
        tensors[tensor] = 1 + np.float32(0.2) * values if is_norm else np.float32(0.3) * values
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    specs = {tensor: ("F32", value.shape) for tensor, value in tensors.items()}
    safetensors.write(folder / safetensors.SINGLE, specs, tensors.values())
    return folder


def tokens(name: str) -> np.ndarray:
    """(2, LENGTH) int64 of a variant."""
    return np.random.default_rng(1).integers(0, 128, (2, LENGTH))


def prompts(rows: np.ndarray, lengths: tuple[int, ...]) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def _continued(peer_python: str, source: Path, given: list[list[int]], work: Path) -> dict:
    (work / "prompts.json").write_text(json.dumps(given))
    arguments = (str(source), str(work / "prompts.json"), str(NEW))
    with Peer(peer_python, "hf_greedy.py", *arguments) as peer:
        return {"prompts": given} | peer.answer()


def _reference(peer_python: str, name: str, work: Path) -> None:
    """STORED/name.npz: what transformers gives for a variant."""
    source = write(work / name, name)
    np.save(work / "ids.npy", tokens(name))
    with Peer(peer_python, "hf_logits.py", str(source), str(work / "ids.npy"), str(work)) as peer:
        for refused in peer:
            raise SystemExit(f"{name}: {refused}")
    new = _continued(peer_python, source, prompts(tokens(name), PROMPTS), work)["new"]
    np.savez_compressed(STORED / f"{name}.npz", logits=np.load(work / "logits.npy"), new=np.array(new, np.int32))


def main(peer_python: str, *names: str) -> None:
    STORED.mkdir(exist_ok=True)
    for name in names or VARIANTS:
        with tempfile.TemporaryDirectory() as work:
            given = prompts(np.load(TINY / name / "input_ids.npy"), (9, 12))
            found = _continued(peer_python, TINY / name, given, Path(work))
            (TINY / name / "greedy.json").write_text(json.dumps(found) + "\n")
            _reference(peer_python, name, Path(work))
        print(name, found["transformers"])


if __name__ == "__main__":
    main(*sys.argv[1:])
