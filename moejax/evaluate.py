"""Evaluation on held-out text: loss, bits per byte, and balance over the whole evaluation set."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax import sharding
from moejax.train_step import forward, layer_statistics, to_devices


@functools.partial(jax.jit, static_argnames="model")
def _sums(params, router_state, batch, *, model):
    nats, _, tallies = forward(model, params, router_state, batch, "evaluate")
    return {
        "nats": nats,
        "targets": jnp.sum(batch["mask"], dtype=jnp.float32),
        "bytes": jnp.sum(batch["target_bytes"]).astype(jnp.float32),
        "tallies": tallies,
    }


def evaluate(
    model: nn.Module, params: Any, router_state: Any, batches: Iterable[dict[str, Any]], mesh: Mesh
) -> dict[str, Any]:
    """Evaluates `batches` (as `data.eval_batches` gives them) on `mesh`. Changes nothing.

    Returns loss (nats per unmasked target), bits_per_byte, targets, and for a sparse model max_violation (mean over
    layers of the MaxVio of the loads summed over all batches), max_violation_per_layer, dropped_fraction and
    routing_entropy, else None for these; overflow_fraction likewise, None where no exchange can overflow.
    """
    placement = sharding.batch_sharding(mesh)
    total: dict[str, Any] | None = None
    with jax.set_mesh(mesh):
        for batch in batches:
            sums = _sums(params, router_state, to_devices(batch, placement), model=model)
            # Summed in float64 on the host: float32 loses whole tokens past 2²⁴ of them.
            sums = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(sums))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert total is not None, "no evaluation batches"
    result: dict[str, Any] = {
        "loss": float(total["nats"] / total["targets"]),
        "bits_per_byte": float(total["nats"] / np.log(2) / total["bytes"]),
        "targets": int(total["targets"]),
    }
    names = ("max_violation", "max_violation_per_layer", "dropped_fraction", "overflow_fraction",
             "routing_entropy")  # fmt: skip
    if not total["tallies"]:
        return result | dict.fromkeys(names)
    statistics = layer_statistics(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), total["tallies"]))
    return result | {name: np.asarray(statistics.get(name)).tolist() for name in names}
