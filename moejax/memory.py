"""Whether a run fits its devices, before the first step: bytes per device, from shapes and the compiler's figures."""

import math
import os
from typing import Any

import jax

from moejax.config import Config
from moejax.errors import UserError

_GB = 1e9
_SPARE = 0.9  # of what there is, for what is suggested


def limit() -> int | None:
    """What XLA may allocate on one device; None where the platform doesn't say (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def of_state(shapes: Any, shardings: Any) -> int:
    """What one device holds of a tree of shapes under a tree of shardings."""

    def held(shape, sharding):
        return math.prod(sharding.shard_shape(shape.shape)) * shape.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, shapes, shardings)))


def check_state(held: int, available: int | None, config: Config) -> None:
    """UserError where the state alone, parameters and moments, is more than a device has."""
    if available is not None and held > available:
        raise UserError(
            f"parameters and optimizer state take {held / _GB:.1f} GB of each device, which has {available / _GB:.1f}: "
            + "; or ".join(_smaller_state(config))
        )


def check_step(
    compiled: jax.stages.Compiled, gradients: int, available: int | None, config: Config, shards: int
) -> None:
    """UserError where the compiled step needs more than a device has, with what would fit.

    gradients: bytes of one copy of them on a device; shards: of the batch.
    """
    found = compiled.memory_analysis()
    if available is not None and found is not None:
        kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        check_sizes(kept, found.temp_size_in_bytes, gradients, available, config, shards)


def check_sizes(kept: int, temporary: int, gradients: int, available: int, config: Config, shards: int) -> None:
    """`check_step` in numbers: bytes of arguments and results, and of what lives only during the step.

    What would fit is reckoned with activations in proportion to the rows of a microbatch, beside one copy of the
    gradients, and with microbatches a second one, their sum; a tenth is left free, since neither is exact. Where layers
    are kept one by one a gradient takes the room of activations that have gone: all that is temporary may then be
    activations. What can't be reckoned is given with a "perhaps".
    """
    if kept + temporary <= available:
        return
    batch, parts = config.data.batch_size, config.train.accumulation_steps
    rows = batch // (shards * parts)  # of a microbatch on a device
    copies = 1 if parts == 1 else 2
    if parts == 1 and not config.model.scan_layers:
        copies = 0
    activations = max(temporary - copies * gradients, 1)

    def fitting(copies: int) -> int:
        return int(rows * (_SPARE * available - kept - copies * gradients) / activations)

    ways = []
    more = next((n for n in range(2, rows + 1) if rows % n == 0 and rows // n <= fitting(2)), None)
    if more is not None:
        ways.append(f"config.train.accumulation_steps={parts * more}")
    if fitting(copies) >= 1:
        ways.append(f"config.data.batch_size={batch // rows * fitting(copies)}")
    if config.model.remat != "full":
        ways.append("perhaps config.model.remat=full")
    if config.model.dtype == "float32":
        ways.append("perhaps config.model.dtype=bfloat16")
    ways += _less_room(config) + _smaller_state(config)
    raise UserError(
        f"a step needs {(kept + temporary) / _GB:.1f} GB of each device, which has {available / _GB:.1f}: "
        f"{kept / _GB:.1f} for parameters, moments and the batch, {temporary / _GB:.1f} for gradients and activations; "
        "give " + "; or ".join(ways)
    )


def too_large(error: jax.errors.JaxRuntimeError, config: Config) -> UserError | None:
    """Where the compiler itself found that a step doesn't fit, as on TPU: its first words, and what to try."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    reason = next(line.strip() for line in text.splitlines() if "emory" in line or "EXHAUSTED" in line)
    ways = ["fewer rows, with config.data.batch_size or config.train.accumulation_steps"]
    ways += ["config.model.remat=full"] if config.model.remat != "full" else []
    ways += _less_room(config)
    return UserError(f"the step does not fit: {reason[:200]}; try " + "; or ".join(ways + _smaller_state(config)))


def _less_room(config: Config) -> list[str]:
    """Where experts are on several devices and each has room for all rows that could come."""
    moe = config.model.moe
    if moe is None or config.mesh.expert == 1 or moe.exchange == "gather" or moe.exchange_factor is not None:
        return []
    named = "" if moe.exchange else " with config.model.moe.exchange named"
    return [f"perhaps config.model.moe.exchange_factor=1.5{named}, which counts what it leaves out"]


def _smaller_state(config: Config) -> list[str]:
    ways = []
    if config.model.param_dtype == "float32":
        ways.append("config.model.param_dtype=bfloat16")
    ways.append("more devices, with config.mesh.fsdp to share the state")
    if jax.default_backend() == "gpu" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        ways.append(
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: without it jax takes three quarters of a GPU"
        )
    return ways
