"""Small models and batches that several tests share."""

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moejax.models.lm import LM

VOCABULARY = 64

ROUTERS = {
    "dense": None,
    "switch": MoEConfig(router="moejax.routing:switch", num_experts=4, experts_per_token=1, capacity_factor=1.0),
    "gshard": MoEConfig(router="moejax.routing:gshard", num_experts=4, experts_per_token=2, capacity_factor=1.0),
    "top_k": MoEConfig(router="moejax.routing:top_k", num_experts=8, experts_per_token=3, expert_width=16),
    "aux_free": MoEConfig(
        router="moejax.routing:sigmoid_top_k",
        num_experts=8,
        experts_per_token=2,
        shared_experts=1,
        expert_width=16,
        bias_update_rate=0.01,
    ),
    "hash": MoEConfig(router="moejax.routing:hash", num_experts=4, experts_per_token=1),
    "expert_choice": MoEConfig(router="moejax.routing:expert_choice", num_experts=4, experts_per_token=2),
}


def model_config(moe: MoEConfig | None = None, **fields) -> ModelConfig:
    base = ModelConfig(
        num_layers=2, width=32, num_heads=4, num_kv_heads=2, ffn_width=32, vocab_size=VOCABULARY, moe=moe
    )
    return dataclasses.replace(base, **fields)


def config(moe: MoEConfig | None = None, *, model: dict | None = None, train: dict | None = None, **fields) -> Config:
    return Config(
        model=model_config(moe, **(model or {})),
        optimizer=OptimizerConfig(decay_steps=100, warmup_steps=1),
        train=TrainConfig(**(train or {})),
        **fields,
    )


def batch(rows: int = 8, length: int = 16, seed: int = 0, padded: int = 0) -> dict[str, np.ndarray]:
    """A packed batch: the second half of each row is another document; the last `padded` places are padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, length + 1), dtype=np.int32)
    half = length // 2
    positions = np.broadcast_to(np.concatenate([np.arange(half), np.arange(length - half)]), (rows, length))
    segments = np.broadcast_to(np.where(np.arange(length) < half, 1, 2), (rows, length)).copy()
    if padded:
        segments[:, -padded:] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "mask": segments > 0,
        "target_bytes": int((segments > 0).sum()),
    }


def write_text(folder: Path, files: int = 24) -> None:
    """Text files that a small model can learn something of: sums, in a few words."""
    folder.mkdir()
    for i in range(files):
        sums = (f"the sum of {a} and {i} is {a + i}.\n" for a in range(20))
        (folder / f"{i:03}.txt").write_text("".join(sums))


@functools.lru_cache(maxsize=32)
def initialised(name: str, seed: int = 0):
    """(model, variables) of the small model with the router called `name`."""
    model = LM(model_config(ROUTERS[name]))
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32)))


@functools.lru_cache(maxsize=64)
def program(config: ModelConfig):
    """What the tests ask of a model, in one compiled function, for compiling is what tests cost.

    (params, other variables, batch, weight (B, L)) -> {"logits", "losses", "changed", "value", "grads"} in mode
    "evaluate": `changed` holds the mutated collections, `value` is Σ weight · logits² and `grads` its gradients.
    """
    model = LM(config)

    @jax.jit
    def run(params, rest, batch, weight):
        def objective(params):
            (logits, losses), changed = model.apply(
                rest | {"params": params},
                batch["tokens"],
                batch["positions"],
                batch["segment_ids"],
                return_losses=True,
                mutable=["intermediates", "router_state"],
            )
            value = jnp.sum(weight[..., None] * logits**2)
            return value, {"logits": logits, "losses": losses, "changed": changed, "value": value}

        grads, out = jax.grad(objective, has_aux=True)(params)
        return out | {"grads": grads}

    return run


def outputs(name: str, batch: dict, weight=1.0, **fields) -> dict:
    """`program` of the router called `name` with its variables, as numpy arrays; `fields` change its config."""
    model, variables = initialised(name)
    rest = {key: value for key, value in variables.items() if key != "params"}
    arrays = {key: batch[key] for key in ("tokens", "positions", "segment_ids")}
    weight = np.broadcast_to(np.asarray(weight, np.float32), batch["tokens"].shape)
    run = program(dataclasses.replace(model.config, **fields))
    return jax.tree.map(np.asarray, run(variables["params"], rest, arrays, weight))


def largest_difference(a, b) -> float:
    """The largest |a − b| over two trees, over the largest |value| of that leaf pair."""
    gaps = jax.tree.map(
        lambda x, y: float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))
                           / max(1e-12, float(np.max(np.abs(np.asarray(x)))))), a, b)  # fmt: skip
    return max(jax.tree.leaves(gaps), default=0.0)
