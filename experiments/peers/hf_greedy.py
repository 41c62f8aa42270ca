"""Greedy continuations of a checkpoint by transformers, for experiments/verify_hf.py: a process of its own.

  PEER_PYTHON experiments/peers/hf_greedy.py DIR PROMPTS.json COUNT

PROMPTS.json holds lists of token ids, of any lengths. Prints {"new": COUNT tokens of each}; or {"refused": why} where
transformers doesn't take the checkpoint. float32, CPU, eager attention, no cache: the whole sequence for each token,
each prompt alone. It stands alone: torch and transformers are not moejax's.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main(folder: str, prompts: str, count: str) -> None:
    version = {"transformers": transformers.__version__}
    try:
        found = greedy(folder, json.loads(Path(prompts).read_text()), int(count))
    except Exception as error:
        print(json.dumps(version | {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:400]}))
    else:
        print(json.dumps(version | {"new": found}))


def greedy(folder: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(count):
                logits = model(ids, use_cache=False).logits[:, -1]
                ids = torch.cat([ids, torch.argmax(logits, dim=-1, keepdim=True)], dim=1)
        found.append(ids[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
