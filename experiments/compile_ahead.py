"""Compiles the training step for a TPU slice on this machine, before it is rented: does it fit, what does it move.

  make .venv/libtpu-0.0.48.1      # the TPU compiler, 0.7 GB, once
  python experiments/compile_ahead.py --config=experiments/configs/deepseek_v3_sized.py --topology=v5p:8x8x4

Prints memory per device (arguments, temporaries, peak) against the device's, FLOPs and each collective with its bytes,
those of a loop's body times its turns. No TPU is asked for and no array is made. --slices=2 compiles for two such
slices.
"""

import contextlib
import functools
import glob
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # ask no metadata server what machine this is
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
sys.path.extend(glob.glob(os.path.join(sys.prefix, "libtpu-*")))

import dataclasses
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies

from experiments import cli
from moejax import accounting, optimizer, sharding, tokenizers, train
from moejax import config as configs
from moejax.collectives import collectives
from moejax.config import Config
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.train_step import compiled_step, init, state_shardings

CONFIG = cli.config_flag()
TOPOLOGY = flags.DEFINE_string("topology", None, "KIND:SHAPE in chips, as v5p:8x8x4 or v5e:4x4.", required=True)
SLICES = flags.DEFINE_integer("slices", 1, "So many of these, joined by the data centre's network.", 1)

# HBM of one jax device in GiB, from the maker's pages, by device_kind. A TPU7x chip (192) is two devices.
HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5e": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32, "TPU7x": 96}


def main() -> None:
    config = configs.settle(configs.from_config_dict(CONFIG.value))
    if config.train.init_from:
        raise UserError("train.init_from: compile_ahead compiles the research LM; leave it out")
    config = train.with_vocabulary(config, tokenizers.load(config.data.tokenizer).vocab_size)
    devices = described(TOPOLOGY.value, SLICES.value)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), devices)
    train.check_batch(config, mesh)
    train.check_exchange(config, mesh)
    print(f"{mesh.devices.size} of {len(devices)} {devices[0].device_kind} devices, mesh {dict(mesh.shape)}")
    print(accounting.describe(config.model, config.data.sequence_length))
    clock = time.perf_counter()
    try:
        compiled = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"it does not compile for {TOPOLOGY.value}: {reason(error)}") from error
    print(f"compiled in {time.perf_counter() - clock:.0f} s")
    report(compiled, config, mesh.devices.size, devices[0].device_kind)


def described(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU slice that isn't here; UserError where there is no such slice, or no libtpu."""
    if find_spec("libtpu") is None:
        raise UserError("the TPU compiler (libtpu) is missing: make .venv/libtpu-0.0.48.1")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(f"another process holds the TPU compiler, which takes one at a time ({reason(error)}): "
                            "run this again when it is done") from error  # fmt: skip
        raise UserError(f"--topology={topology}: there is no such slice ({reason(error)}); give KIND:SHAPE in chips, "
                        "as v5p:8x8x4, v5e:4x4, v6e:8x8 or tpu7x:4x4x4") from error  # fmt: skip


def reason(error: Exception) -> str:
    """The telling line of the compiler's error: how much memory it wanted, or its first one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "hbm" in line.lower()), lines[0])[:300].strip()


@contextlib.contextmanager
def as_on_tpu() -> Iterator[None]:
    """What picks its implementation by jax.default_backend() picks a TPU's."""
    before = jax.default_backend
    jax.default_backend = lambda: "tpu"
    try:
        yield
    finally:
        jax.default_backend = before


def compile_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The training step of experiments/train.py, compiled for the mesh's devices from shapes alone."""
    model, tx = LM(config.model), optimizer.make(config.optimizer)
    shardings = state_shardings(model, tx, mesh)
    shapes = jax.eval_shape(functools.partial(init, model, tx), jax.random.key(0))

    def on_mesh(shape: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    rows, place = (config.data.batch_size, config.data.sequence_length), sharding.batch_sharding(mesh)
    batch = {name: on_mesh(np.empty(rows, jnp.int32), place) for name in ("tokens", "targets", "positions")}
    batch["segment_ids"], batch["mask"] = batch["tokens"], on_mesh(np.empty(rows, bool), place)
    batch["target_bytes"] = on_mesh(np.empty(rows[:1], jnp.int32), place)
    state, step = jax.tree.map(on_mesh, shapes, shardings), compiled_step(model, tx, config, shardings)
    with as_on_tpu(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return train.compiled(lambda: step.trace(state, batch).lower(lowering_platforms=("tpu",)), config)


def report(compiled: jax.stages.Compiled, config: Config, devices: int, kind: str) -> None:
    held: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    peak = getattr(held, "peak_memory_in_bytes", 0) or held.argument_size_in_bytes + held.temp_size_in_bytes
    rows = {
        "arguments": held.argument_size_in_bytes,
        "temporaries": held.temp_size_in_bytes,
        "peak": peak,
    }
    for name, size in rows.items():
        print(f"  {name:12} {size / 2**30:8.2f} GiB per device")
    if kind in HBM:
        print(f"  of {HBM[kind]} GiB: {peak / 2**30 / HBM[kind]:.0%}")
    length = config.data.sequence_length
    forward = accounting.account(config.model, length).active_flops_per_token * config.data.batch_size * length
    print(f"  FLOPs        {3 * forward / devices:8.3g} per device and step: the model's forward pass, three times")
    print(f"               {cost.get('flops', math.nan):8.3g} as XLA counts: a loop's body once, kernels not at all")
    text = compiled.as_text() or ""
    print(f"  kernels      {text.count('custom_call_target="tpu_custom_call"'):8} in the program's text")
    print("collectives of one step, bytes of their results per device:")
    found = sorted(collectives(text).items(), key=lambda item: -item[1][1])
    for kind in sorted({name for (name, _), _ in found}):
        count, size = (sum(sizes) for sizes in zip(*(row for (name, _), row in found if name == kind), strict=True))
        print(f"  {kind:20} {count:6} in all{'':26} {size / 2**30:10.3f} GiB")
    for (name, shape), (count, size) in found:
        print(f"  {name:20} {count:6} × {shape:30} {size / 2**30:10.3f} GiB")


if __name__ == "__main__":
    cli.run(main)
