"""Logits and hidden states of a checkpoint by transformers, for experiments/verify_hf.py: a process of its own.

  PEER_PYTHON experiments/peers/hf_logits.py DIR INPUT_IDS.npy OUT

Writes OUT/logits.npy (B, L, V), OUT/layer_0.npy … (B, L, D), each layer's output, and OUT/peer.json; all float32, CPU,
eager attention; or prints {"refused": why} where transformers doesn't take the checkpoint. It stands alone: torch and
transformers are not moejax's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: str, ids: str, out: str) -> None:
    try:
        compute(folder, ids, Path(out))
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        print(json.dumps({"refused": why, "transformers": transformers.__version__}))


def compute(folder: str, ids: str, target: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    outputs: list[np.ndarray] = []

    def keep(_, __, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).float().numpy())

    decoder = model.get_decoder()
    if not (hasattr(decoder, "layers") or hasattr(decoder, "blocks")):  # a multimodal model gives its language model
        decoder = decoder.model
    for layer in decoder.layers if hasattr(decoder, "layers") else decoder.blocks:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids)), use_cache=False).logits.float().numpy()
    np.save(target / "logits.npy", logits)
    for i, hidden in enumerate(outputs):
        np.save(target / f"layer_{i}.npy", hidden)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "layers": len(outputs)}
    (target / "peer.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(*sys.argv[1:])
