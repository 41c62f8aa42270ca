"""A training step on random tokens: tokens/s, model TFLOP/s, memory, and where its time goes.

  python experiments/benchmark_step.py --config=experiments/configs/olmoe_1b_7b.py
  python experiments/benchmark_step.py --config=experiments/configs/olmoe_1b_7b.py --peer_python=PATH

Always labelled: "real", of an untrained router; "no losses", the same without router losses and without the bias rule;
"forced", every expert with the same number of tokens. Model FLOPs are 6 × active parameters without the input embedding
per token ("6N"), and the same with attention scores. Time by named scope is from a profile of the last that is timed.

PATH is an interpreter that has torch and transformers: there an OLMoE of the config's sizes takes steps on as many
tokens, bfloat16 throughout, without router losses, with grouped experts, compiled on a GPU.
"""

import concurrent.futures
import dataclasses
import json
import os
import sys
import time

import jax
from absl import flags

from experiments import cli
from experiments.peer_process import Peer
from experiments.step import Step, cases
from moejax import accounting, environment, scopes
from moejax import config as configs
from moejax.config import Config
from moejax.errors import UserError
from pallas_kernels import timing

_CONFIG = cli.config_flag()
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats of each case; the median counts.", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer(
    "documents", 1, "Documents in each row of the batch. One needs no mask in attention, as the peer.", lower_bound=1
)
_ROUTING = flags.DEFINE_list("routing", [], "Those to time, of forced, no losses, real; all where left out.")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "An interpreter with torch and transformers.")


def prepared(name: str, config: Config) -> Step:
    """The compiled step, and on stderr how long that took beside the others."""
    start = time.perf_counter()
    step = Step(config, config.data.batch_size, config.data.sequence_length, _DOCUMENTS.value)
    print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return step


def report(config: Config, seconds: dict[str, float], step: Step) -> None:
    """The table of a model: one line for each routing, then the shares."""
    counts = accounting.account(config.model, config.data.sequence_length)
    tokens = config.data.batch_size * config.data.sequence_length
    devices = step.mesh.devices.size
    flops = 6 * (counts.active_params - counts.embedding_params)
    peak = environment.peak_flops(jax.devices()[0].device_kind)
    print(f"{accounting.describe(config.model, config.data.sequence_length)}")
    dtypes = f"{config.model.dtype} compute, {config.model.param_dtype} parameters"
    print(f"{tokens} tokens a step, {_DOCUMENTS.value} documents a row, {devices} devices; {dtypes}")
    for name, each in seconds.items():
        rate = tokens / each
        teraflops, all_of_it = (rate * f / devices / 1e12 for f in (flops, counts.train_flops_per_token))
        mfu = "" if peak is None else f", MFU {all_of_it * 1e12 / peak:.1%}"
        print(f"  {name:14}{each * 1e3:8.1f} ms {rate:10,.0f} tokens/s  {teraflops:6.1f} TFLOP/s a device (6N), "
              f"{all_of_it:.1f} with attention{mfu}")  # fmt: skip
    if {"no losses", "real"} <= seconds.keys():
        print(f"  speed of real over no losses: {seconds['no losses'] / seconds['real']:.3f}")
    print(f"  memory a device, by the compiler: {step.bytes() / 1e9:.1f} GB")
    print(
        f"  by scope ({list(seconds)[-1]}): "
        + ", ".join(f"{scope} {share:.1%}" for scope, share in scopes.shares(step.compiled, step).items())
    )


def peer(python: str, config: Config, repeats: int) -> dict:
    """What transformers takes, in a process of its own: seconds, bytes (None: not known) and versions."""
    model, moe = config.model, config.model.moe
    assert moe is not None
    sizes = {
        "vocab_size": model.vocab_size, "hidden_size": model.width, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": moe.expert_width, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token, "tie_word_embeddings": model.tie_embeddings,
    }  # fmt: skip
    batch, length = config.data.batch_size, config.data.sequence_length
    asked = json.dumps({"config": sizes, "batch": batch, "length": length, "repeats": repeats})
    with Peer(python, "hf_train_step.py", asked) as process:
        return process.answer()


def report_peer(found: dict, config: Config, ours: dict[str, float]) -> None:
    """The peer's own, and the ratio to our seconds of each case."""
    memory_used = "" if found["bytes"] is None else f", {found['bytes'] / 1e9:.1f} GB"
    versions = f"transformers {found['transformers']}, torch {found['torch']}"
    rate = config.data.batch_size * config.data.sequence_length / found["seconds"]
    print(f"  {versions}: {found['seconds'] * 1e3:.1f} ms {rate:,.0f} tokens/s{memory_used}")
    ratios = ", ".join(f"{name} {found['seconds'] / each:.2f}" for name, each in ours.items())
    print(f"  moejax over transformers: {ratios}")


def main() -> None:
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a file of experiments/configs")
    # In a CUDA graph a profile doesn't tell one operation from the next. Without, a large step takes as long.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    config = configs.settle(configs.from_config_dict(_CONFIG.value))
    if config.model.vocab_size is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=257))
    todo, theirs = cases(config, _ROUTING.value), None
    if _PEER_PYTHON.value is not None:
        if config.model.moe is None:
            raise UserError("--peer_python compares sparse models: give a config with model.moe")
        # Before anything of ours is on the device: jax doesn't give a GPU's memory back.
        theirs = peer(_PEER_PYTHON.value, config, _REPEATS.value)
        print(f"transformers: {theirs['seconds'] * 1e3:.1f} ms", file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = dict(zip(todo, pool.map(prepared, todo, todo.values()), strict=True))
    seconds = {}
    for name, step in steps.items():
        seconds[name] = timing.rounds({name: step}, _REPEATS.value)[name][0] / 1e6
        print(f"{name}: {seconds[name] * 1e3:.1f} ms", file=sys.stderr, flush=True)
        if name != list(steps)[-1]:
            step.stop()  # two states may not fit
    report(config, seconds, step)
    if theirs is not None:
        report_peer(theirs, config, seconds)


if __name__ == "__main__":
    cli.run(main)
