"""Families with experts of their own, over devices: biases, gates that come first."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from moejax import models, sharding
from moejax.collectives import collectives

TINY = Path(__file__).parent / "data" / "hf_tiny"
E, D, F = 4, 32, 16  # of both tiny models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_experts_stay_on_their_devices_and_logits_are_those_of_one_device(name):
    """Over fsdp × expert × tensor: of experts' weights each device gathers its half of the experts, and of these its
    half of the hidden width; an output's bias counts once."""
    model, variables = models.load_hf(TINY / name)
    tokens = np.random.default_rng(1).integers(0, 128, (4, 6)).astype(np.int32)
    wanted = jax.jit(model.apply)(variables, tokens)
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    boxed = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))
    variables = variables | {"params": jax.device_put(variables["params"], sharding.shardings(mesh, boxed["params"]))}
    with jax.set_mesh(mesh):
        run = jax.jit(model.apply).lower(variables, jax.device_put(tokens, sharding.batch_sharding(mesh))).compile()
        found = run(variables, jax.device_put(tokens, sharding.batch_sharding(mesh)))
    assert small.largest_difference(wanted, found) < 1e-5
    gathered = [shape for kind, shape in collectives(run.as_text()) if kind == "all-gather"]
    assert any(f"[{E // 2},{D},{F // 2}]" in shape for shape in gathered), gathered
    whole = rf"\[{E},({D},\d+|{F},\d+|\d+,{D})\]|,{D},{F}\]|,{F},{D}\]"
    assert not [shape for shape in gathered if re.search(whole, shape)], gathered
