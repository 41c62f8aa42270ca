"""Prefill and decode of an OLMoE, ours and transformers', in one run.

  python experiments/benchmark_decode.py --peer_python=PATH
  python experiments/benchmark_decode.py --preset=olmoe-1b-7b --dtype=bfloat16 --batch=1,64 --new=128 --peer_python=PATH

PATH is an interpreter that has torch and transformers; without it ours alone is timed. Random weights, greedy. The
default is a small OLMoE for a CPU (D 512, F 256, 8 layers, 64 experts top-8, vocabulary 50304). The limit of a decode
step on a GPU is the time to read its weights and its cache once, at the rate of a copy measured in the same run: of E
experts those that B tokens choose, E · (1 − (1 − K/E)^B) of them when each chooses at random.
"""

import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli
from experiments.peer_process import Peer
from moejax import hf_import, hf_tensors, models
from moejax.errors import UserError
from moejax.models.olmoe import OlmoeConfig
from pallas_kernels import timing

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "An interpreter with torch and transformers.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats of each case; the median counts.", lower_bound=1)
_PRESET = flags.DEFINE_string("preset", None, "A published size of OLMoE; None: the small one.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of parameters and compute.")
_BATCH = flags.DEFINE_list("batch", ["8"], "Numbers of prompts, one case each.")
_NEW = flags.DEFINE_integer("new", 32, "New tokens of each prompt.", lower_bound=2)

SMALL = OlmoeConfig(hidden_size=512, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8)
PROMPT = 128  # tokens


def random_model(config: OlmoeConfig, dtype: str = "float32"):
    """A model of `config` and variables drawn at random: norms near 1, everything else small."""
    model = models.FAMILIES["olmoe"].model(config, dtype=jnp.dtype(dtype))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    flat = {}
    for i, (path, leaf) in enumerate(sorted(hf_import.abstract(model).items())):
        noise = draw(jax.random.key(i), leaf.shape, jnp.dtype(dtype))
        flat[path] = noise * jnp.asarray(0.02, dtype) + jnp.asarray(path.endswith("scale"), dtype)
    return model, hf_tensors.unflatten(flat)


def ours(model, variables, batch: int, new: int, repeats: int) -> dict[str, float]:
    """Median seconds: `prefill` of the prompts with the first token, `decode` of the new − 1 after it."""
    prompts = np.random.default_rng(1).integers(1, model.config.vocab_size, (batch, PROMPT)).tolist()

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        models.generate(model, variables, prompts, new_tokens)
        return time.perf_counter() - start

    for count in (1, new):  # compiles: the cache's length is part of the program
        seconds(count)
    pairs = [(seconds(1), seconds(new)) for _ in range(repeats)]
    return {
        "prefill": statistics.median(first for first, _ in pairs),
        "decode": statistics.median(whole - first for first, whole in pairs),
    }


def step_bytes(model, variables, batch: int, new: int) -> float:
    """The least that a decode step reads: weights, those of experts as far as they are chosen, and half-full caches."""
    config = model.config
    share = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    total = 0.0
    for path, leaf in hf_tensors.flatten(variables).items():
        routed = "/moe/" in path and not path.endswith("router")
        total += 0 if path.endswith("embedding") and "un" not in path else leaf.nbytes * (share if routed else 1)
    item = jnp.dtype(model.dtype).itemsize
    return total + 2 * batch * (PROMPT + new / 2) * config.num_hidden_layers * config.hidden_size * item


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    x = jnp.ones((2**30,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    microseconds, _, _ = timing.rounds({"copy": lambda: copy(x)}, launches=5)["copy"]
    return 2 * x.nbytes / microseconds * 1e6


def peers(python: str, config: OlmoeConfig, dtype: str, batches: list[int], new: int, repeats: int):
    """The same of transformers, one for each of its ways."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_experts", "num_experts_per_tok")  # fmt: skip
    sizes = {
        "config": {name: getattr(config, name) for name in kept}, "dtype": dtype, "batches": batches, "prompt": PROMPT,
        "new": new, "repeats": repeats, "threads": os.cpu_count(), "gpu": jax.default_backend() == "gpu",
    }  # fmt: skip
    with Peer(python, "hf_generate.py", json.dumps(sizes)) as process:
        yield from process


def show(name: str, batch: int, new: int, times: dict[str, float], limit: float) -> None:
    rate = batch * (new - 1) / times["decode"]
    of_limit = f", {rate / limit:.0%} of the limit" if limit else ""
    print(f"  {name:52}{batch * PROMPT / times['prefill']:10,.0f} prefill tokens/s"
          f"{rate:9,.0f} decode tokens/s{of_limit}", flush=True)  # fmt: skip


def main() -> None:
    config = SMALL
    if _PRESET.value:
        presets = models.FAMILIES["olmoe"].presets
        if _PRESET.value not in presets:
            raise UserError(f"--preset={_PRESET.value}: give one of {', '.join(presets)}, or none for the small one")
        config = presets[_PRESET.value]
    try:
        batches = [int(text) for text in _BATCH.value]
    except ValueError:
        raise UserError(f"--batch={','.join(_BATCH.value)}: give numbers, such as 1,64") from None
    dtype, new = _DTYPE.value, _NEW.value
    print(f"{_PRESET.value or 'small OLMoE'}, {dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"prompts of {PROMPT} tokens, {new} new; medians of {_REPEATS.value}; load average "
          f"{os.getloadavg()[0]:.1f} at the start", flush=True)  # fmt: skip
    copied = copy_rate() if jax.default_backend() == "gpu" else 0.0
    model, variables = random_model(config, dtype)
    found, limits = {}, {}
    for batch in batches:
        limits[batch] = batch * copied / step_bytes(model, variables, batch, new)
        if copied:
            print(f"batch {batch}: at most {limits[batch]:,.0f} tokens/s, at the {copied / 1e9:,.0f} GB/s of a copy")
        found[batch] = ours(model, variables, batch, new, _REPEATS.value)
        show(f"batch {batch}: moejax", batch, new, found[batch], limits[batch])
    if not _PEER_PYTHON.value:
        return
    jax.tree.map(lambda a: a.delete(), variables)  # the peer wants the memory
    best: dict[int, dict[str, float]] = {}
    for peer in peers(_PEER_PYTHON.value, config, dtype, batches, new, _REPEATS.value):
        batch = peer["batch"]
        show(f"batch {batch}: transformers {peer['transformers']}, {peer['way']}", batch, new, peer, limits[batch])
        before = best.get(batch, peer)
        best[batch] = {what: min(peer[what], before[what]) for what in ("prefill", "decode")}
    for batch, peer in best.items():
        over = {what: seconds / found[batch][what] for what, seconds in peer.items()}
        print(
            f"batch {batch}: moejax over the best of them: prefill {over['prefill']:.2f}, decode {over['decode']:.2f}"
        )


if __name__ == "__main__":
    cli.run(main)
