"""The sections of benchmark_cpu.py that run whole training steps: against dense, against a peer, and compiling."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.configs import dense, fine_grained
from experiments.peer_process import Peer
from experiments.step import Step, random_batch
from moejax import config as configs
from moejax import dispatch, experts, moe, optimizer, sharding
from moejax.config import Config, ModelConfig, MoEConfig, OptimizerConfig
from moejax.models.lm import LM
from moejax.train_step import compiled_step, init, state_shardings, to_devices

Medians = Callable[[dict[str, Callable[[], object]], int], dict[str, float]]
# The model of the peer: qwen3_moe-shaped.
SIZES = {
    "batch": 8, "length": 256, "vocab_size": 512, "num_layers": 4, "width": 256, "num_heads": 8, "num_kv_heads": 4,
    "head_dim": 32, "ffn_width": 768, "num_experts": 32, "experts_per_token": 6, "expert_width": 128, "threads": 2,
}  # fmt: skip


def peer_config() -> Config:
    """Our model of the peer's sizes and optimizer, with softmax top-k gates that sum to 1 and no router loss."""
    sparse = MoEConfig(
        num_experts=SIZES["num_experts"],
        experts_per_token=SIZES["experts_per_token"],
        expert_width=SIZES["expert_width"],
    )
    names = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "ffn_width")
    sizes: dict[str, Any] = {name: SIZES[name] for name in names}
    # Unrolled: on CPU a scan's copies of each layer's weights and gradients are a seventh of this step.
    model = ModelConfig(moe=sparse, tie_embeddings=True, scan_layers=False, **sizes)
    plain_adamw = OptimizerConfig(schedule="constant", learning_rate=1e-4, decay_steps=1000, clip_norm=None)
    return Config(model=model, optimizer=plain_adamw)


def benchmark_step(medians: Medians, repeats: int) -> None:
    """fine_grained against dense at equal active FLOPs (D 256, 4 layers, T 4096), and what routing costs of it."""
    batch, length = 16, 256
    runs, sparse = {}, None
    for file in (dense, fine_grained):
        values = file.get_config()
        values.model.update(width=256, num_heads=8, num_kv_heads=8, ffn_width=1024, vocab_size=257)
        config = configs.settle(configs.from_config_dict(values))
        runs[file.__name__.rpartition(".")[2]] = Step(config, batch, length)
        sparse = config
    assert sparse is not None
    seconds = medians(runs | layer_parts(sparse, batch, length), repeats)
    tokens = batch * length
    print(f"\ntraining step: D 256, 4 layers, T {tokens}, float32; medians of {repeats}")
    for name in runs:
        print(f"  {name:14}{seconds[name] * 1e3:7.0f} ms {tokens / seconds[name]:8,.0f} tokens/s")
    print(f"  fine_grained of dense's tokens/s: {seconds['dense'] / seconds['fine_grained']:.2f}")
    apart = sparse.model.num_layers * (seconds["layer"] - seconds["products"])
    print(
        f"  router, dispatch and combine apart from expert products: {apart / seconds['fine_grained']:.1%} of the step "
        f"(a layer forward and backward {seconds['layer'] * 1e3:.1f} ms, its products {seconds['products'] * 1e3:.1f})"
    )


def layer_parts(config: Config, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of one MoE layer without its shared experts, and of the same rows' expert products alone."""
    assert config.model.moe is not None
    sparse = dataclasses.replace(config.model.moe, shared_experts=0)
    hidden = sparse.expert_width or config.model.ffn_width
    layer = moe.MoE(sparse, hidden, "train")
    x = jax.random.normal(jax.random.key(0), (batch, length, config.model.width))
    tokens, mask = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
    variables = jax.jit(layer.init)({"params": jax.random.key(1), "routing": jax.random.key(2)}, x, tokens, mask)
    params = nn.unbox(variables)["params"]

    def whole(params, x):
        def loss(params, x):
            y, losses = layer.apply({"params": params}, x, tokens, mask, rngs={"routing": jax.random.key(2)})
            return jnp.mean(y**2) + 0.01 * losses["load_balance_loss"] + 0.001 * losses["router_z_loss"]

        return jax.grad(loss, argnums=(0, 1))(params, x)

    logits = jnp.einsum("bld,de->ble", x, params["router"])
    decision = moe.decide(sparse, logits, tokens=tokens, mask=mask)
    plan = dispatch.plan(dispatch.flatten(decision, batch * length), sparse.num_experts)
    rows = dispatch.gather(x.reshape(-1, x.shape[-1]), plan)
    weights = {name: params[name] for name in ("gate", "up", "down")}

    def products(rows, weights):
        def loss(rows, weights):
            return jnp.mean(experts.gated_ffn(rows, group_sizes=plan.group_sizes, **weights) ** 2)

        return jax.grad(loss, argnums=(0, 1))(rows, weights)

    return {
        "layer": functools.partial(jax.jit(whole), params, x),
        "products": functools.partial(jax.jit(products), rows, weights),
    }


def benchmark_peer(medians: Medians, repeats: int, peer_python: str | None) -> None:
    """Our training step and transformers' grouped_mm in turns, on the same sizes, tokens and optimizer."""
    tokens = SIZES["batch"] * SIZES["length"]
    steps: dict[str, Callable[[], object]] = {"moejax": Step(peer_config(), SIZES["batch"], SIZES["length"])}
    print(f"\ntraining step of a qwen3_moe-shaped model ({tokens} tokens, AdamW, float32); medians of {repeats}")
    with contextlib.ExitStack() as stack:
        if peer_python is not None:
            peer = stack.enter_context(Peer(peer_python, "cpu_train_step.py", json.dumps(SIZES)))
            versions, steps["transformers"] = peer.answer(), peer.go_on
        seconds = medians(steps, repeats)
    for name, each in seconds.items():
        print(f"  {name:14}{each * 1e3:7.0f} ms {tokens / each:8,.0f} tokens/s")
    if peer_python is None:
        print("  transformers: not run; give --peer_python=PATH of an interpreter that has torch and transformers")
    else:
        ratio = seconds["transformers"] / seconds["moejax"]
        print(f"  moejax over transformers: {ratio:.2f} (torch {versions['torch']}, {SIZES['threads']} threads)")


def benchmark_compile() -> None:
    """Trace, lower and compile of a 24-layer scanned model's training step on 8 simulated devices, without a cache."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    code = "from experiments import benchmark_cpu_model; benchmark_cpu_model.compile_once()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def compile_once() -> None:
    """What `benchmark_compile` runs in a process of its own."""
    config = peer_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=24, scan_layers=True))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    model, tx = LM(config.model), optimizer.make(config.optimizer)
    shardings = state_shardings(model, tx, mesh)
    shapes = jax.eval_shape(functools.partial(init, model, tx), jax.random.key(0))
    state = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)
    with jax.set_mesh(mesh):
        batch = to_devices(random_batch(512, 8, 256), sharding.batch_sharding(mesh))
        start = time.perf_counter()
        lowered = compiled_step(model, tx, config, shardings).lower(state, batch)
        between = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
    print(f"\n24-layer scanned model, training step on {mesh.devices.size} simulated devices (2 data × 4 fsdp)")
    print(f"  trace and lower {between - start:.1f} s, compile {end - between:.1f} s, together {end - start:.1f} s")
