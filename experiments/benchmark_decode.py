"""Prefill and decode of a small OLMoE-shaped model on a CPU, ours and transformers', in one run.

  python experiments/benchmark_decode.py --peer_python=PATH

PATH is an interpreter that has torch and transformers; without it ours alone is timed. Random weights, float32, greedy.
"""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli
from moejax import hf_import, hf_tensors, models
from moejax.errors import UserError
from moejax.models.olmoe import OlmoeConfig

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "An interpreter with torch and transformers.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats of each case; the median counts.", lower_bound=1)

PEER = Path(__file__).parent / "peers" / "hf_generate.py"
CONFIG: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
SIZES: dict[str, Any] = {"batch": 8, "prompt": 128, "new": 32, "threads": 2}


def random_model(config: OlmoeConfig):
    """A model of `config` and variables drawn at random: norms near 1, everything else small."""
    model = models.FAMILIES["olmoe"].model(config)
    rng = np.random.default_rng(0)
    flat = {
        path: np.float32(path.endswith("scale")) + 0.02 * rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in hf_import.abstract(model).items()
    }
    return model, jax.tree.map(jax.numpy.asarray, hf_tensors.unflatten(flat))


def ours(repeats: int) -> dict[str, float]:
    """Median seconds: `prefill` of the prompts with the first token, `decode` of the `new` ones after it."""
    config = OlmoeConfig(**CONFIG)
    model, variables = random_model(config)
    prompts = np.random.default_rng(1).integers(1, config.vocab_size, (SIZES["batch"], SIZES["prompt"])).tolist()

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        models.generate(model, variables, prompts, new_tokens)
        return time.perf_counter() - start

    for count in (1, 1 + SIZES["new"]):  # compiles: the cache's length is part of the program
        seconds(count)
    pairs = [(seconds(1), seconds(1 + SIZES["new"])) for _ in range(repeats)]
    return {
        "prefill": statistics.median(first for first, _ in pairs),
        "decode": statistics.median(whole - first for first, whole in pairs),
    }


def peers(python: str, repeats: int) -> list[dict[str, Any]]:
    """The same of transformers, one for each of its expert implementations."""
    command = [python, str(PEER), json.dumps(SIZES | {"config": CONFIG, "repeats": repeats})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"--peer_python={python} could not run {PEER.name}: {last}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    batch, prompt, new = SIZES["batch"], SIZES["prompt"], SIZES["new"]
    print("OLMoE-shaped: D 512, F 256, 8 layers, 64 experts top-8, vocabulary 50304, float32")
    print(f"{batch} prompts of {prompt} tokens, {new} new; medians of {_REPEATS.value}; load average "
          f"{os.getloadavg()[0]:.1f} at the start")  # fmt: skip
    found = ours(_REPEATS.value)
    rows = [("moejax", found)]
    if _PEER_PYTHON.value:
        for peer in peers(_PEER_PYTHON.value, _REPEATS.value):
            rows.append((f"transformers {peer['transformers']}, {peer['experts']}", peer))
    for name, times in rows:
        print(f"  {name:34}{batch * prompt / times['prefill']:9,.0f} prefill tokens/s"
              f"{batch * new / times['decode']:8,.0f} decode tokens/s")  # fmt: skip
    if len(rows) > 1:
        best = {what: min(times[what] for _, times in rows[1:]) for what in ("prefill", "decode")}
        print(f"  moejax over the better of them: prefill {best['prefill'] / found['prefill']:.2f}, "
              f"decode {best['decode'] / found['decode']:.2f}")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
