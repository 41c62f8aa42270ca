"""Greedy continuations of a checkpoint by transformers, for experiments/verify_hf.py: a process of its own.

  PEER_PYTHON experiments/peers/hf_greedy.py DIR PROMPTS.json COUNT

PROMPTS.json holds lists of token ids, of any lengths. Prints {"new": COUNT tokens of each}; or {"refused": why} where
transformers doesn't take the checkpoint. float32, CPU, eager attention, no cache: the whole sequence for each token,
each prompt alone. Where rotary frequencies follow the length, a cache keeps old ones: there with a cache, and a model
of its own for each prompt, since it remembers lengths. It stands alone: torch and transformers are not moejax's.
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
    model = load(folder)
    found: list[list[int]] = []
    rope = getattr(model.config, "rope_parameters", None) or {}
    by_length = rope.get("rope_type") in ("dynamic", "longrope")
    for prompt in prompts:
        model = load(folder) if by_length and found else model
        seen, cache, new = torch.tensor([prompt]), None, []
        with torch.no_grad():
            for _ in range(count):
                out = model(seen, past_key_values=cache, use_cache=by_length)
                token = torch.argmax(out.logits[:, -1], dim=-1, keepdim=True)
                new.append(token.item())
                seen, cache = (token, out.past_key_values) if by_length else (torch.cat([seen, token], dim=1), None)
        found.append(new)
    return found


def load(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


if __name__ == "__main__":
    main(*sys.argv[1:])
