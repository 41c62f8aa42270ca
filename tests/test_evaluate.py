"""Evaluation: sums over the whole set, on any mesh, and no change of anything."""

import jax
import numpy as np
import pytest
import small

from moejax import sharding
from moejax.evaluate import evaluate


def batches():
    """Two batches that differ in how much of them counts."""
    return [small.batch(rows=8, seed=0), small.batch(rows=8, seed=1, padded=5)]


def run(name, **mesh):
    model, variables = small.initialised(name)
    mesh = sharding.make_mesh(mesh, None if mesh else jax.devices()[:1])
    return evaluate(model, variables["params"], variables.get("router_state", {}), batches(), mesh)


@pytest.mark.parametrize("name", ["dense", "gshard"])
def test_is_the_mean_over_targets_and_the_violation_of_summed_loads(name):
    model, variables = small.initialised(name)
    nats, targets, selected, dropped, assignments = 0.0, 0, 0, 0, 0
    for batch in batches():
        (logits, _), sown = jax.jit(
            lambda b: model.apply(
                variables, b["tokens"], b["positions"], b["segment_ids"], True, mutable=["intermediates"]
            )
        )({key: value for key, value in batch.items() if key != "target_bytes"})
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        picked = np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        nats -= picked[batch["mask"]].sum()
        targets += batch["mask"].sum()
        if name != "dense":
            tallies = jax.tree.map(np.asarray, sown["intermediates"]["layers"]["moe"]["routing"])
            selected += tallies["selected"]
            dropped += tallies["dropped"]
            assignments += tallies["assignments"]
    result = run(name)
    assert targets == result["targets"] == 8 * 16 + 8 * 11
    np.testing.assert_allclose(result["loss"], nats / targets, rtol=1e-6)
    # small.batch counts one byte for each target
    np.testing.assert_allclose(result["bits_per_byte"], nats / np.log(2) / targets, rtol=1e-6)
    routing = ("max_violation", "max_violation_per_layer", "dropped_fraction", "routing_entropy")
    if name == "dense":
        assert all(result[field] is None for field in routing)
        return
    violations = selected.max(axis=-1) / selected.mean(axis=-1) - 1
    np.testing.assert_allclose(result["max_violation_per_layer"], violations, rtol=1e-6)
    np.testing.assert_allclose(result["max_violation"], violations.mean(), rtol=1e-6)
    np.testing.assert_allclose(result["dropped_fraction"], (dropped / assignments).mean(), rtol=1e-6)
    assert result["dropped_fraction"] > 0
    load = selected / selected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(result["routing_entropy"], -(load * np.log(load)).sum(-1).mean() / np.log(4), rtol=1e-5)


def test_is_the_same_on_eight_devices_and_changes_no_state():
    _, variables = small.initialised("aux_free")
    before = jax.tree.map(np.array, variables)
    one, eight = run("aux_free"), run("aux_free", data=2, fsdp=4)
    for field, value in one.items():
        found, wanted = np.asarray(eight[field], float), np.asarray(value, float)  # None, of no exchange, is NaN
        np.testing.assert_allclose(found, wanted, rtol=1e-5, err_msg=field)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
