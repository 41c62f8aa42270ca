"""Whether a step fits: the check in numbers, and the state's bytes on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import small

from moejax import memory, optimizer, sharding
from moejax.config import Config, MeshConfig
from moejax.errors import UserError
from moejax.models.lm import LM
from moejax.train_step import init, state_shardings


def config(batch_size=16, accumulation=1, remat="none", param_dtype="float32"):
    base = Config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, remat=remat, param_dtype=param_dtype),
        data=dataclasses.replace(base.data, batch_size=batch_size),
        train=dataclasses.replace(base.train, accumulation_steps=accumulation),
    )


def apart():
    one = config()
    return dataclasses.replace(one, model=dataclasses.replace(one.model, scan_layers=False))


def test_what_fits_is_let_through():
    memory.check_sizes(60, 40, 0, 100, config(), shards=1)


@pytest.mark.parametrize(
    ("setting", "temporary", "gradients", "wanted"),
    [
        # 16 rows take 60 of the 40 that are left, of which 10 stay free: 8 fit.
        (config(), 60, 0, "accumulation_steps=2; or config.data.batch_size=8; or perhaps config.model.remat=full; or "),
        # Gradients take 5 of 30, activations 55: 16 · 25 / 55 = 7 rows; with their sum, 16 · 20 / 55 = 5.
        (config(), 60, 5, "accumulation_steps=4; or config.data.batch_size=7; or "),
        # Two microbatches of 8 rows; two copies of gradients leave 10 of 30, 80 are activations: 1 row.
        (config(accumulation=2), 100, 10, "accumulation_steps=16; or config.data.batch_size=2; or "),
        # Layers one by one: all 60 may be activations, 16 · 30 / 60 = 8 rows; with a sum of gradients 16 · 10 / 60 = 2.
        (apart(), 60, 10, "accumulation_steps=8; or config.data.batch_size=8; or "),
        # 3 rows of 7 fit: only single rows are an equal share of 7.
        (config(batch_size=7), 60, 0, "accumulation_steps=7; or config.data.batch_size=3; or "),
        # Not one row of 16 fits in 40 of 800: only other ways help.
        (config(remat="full", param_dtype="bfloat16"), 800, 0, "; give perhaps config.model.dtype=bfloat16; or more"),
    ],
)
def test_the_error_names_what_would_fit(setting, temporary, gradients, wanted):
    with pytest.raises(UserError, match="a step needs") as error:
        memory.check_sizes(60 * 10**9, temporary * 10**9, gradients * 10**9, 100 * 10**9, setting, shards=1)
    assert wanted in str(error.value)
    assert f"{60 + temporary}.0 GB of each device, which has 100.0: 60.0 for" in str(error.value)
    assert "\n" not in str(error.value)


def test_room_for_all_rows_is_named_where_experts_are_on_several_devices():
    one = config()
    moe = dataclasses.replace(small.ROUTERS["top_k"], exchange="remote")
    split = dataclasses.replace(one, model=dataclasses.replace(one.model, moe=moe), mesh=MeshConfig(expert=4))
    with pytest.raises(UserError, match=r"perhaps config\.model\.moe\.exchange_factor=1\.5, which counts"):
        memory.check_sizes(60, 60, 0, 100, split, shards=4)


def test_rows_are_those_of_a_device():
    # 16 rows over 4 shards are 4 a device, of which half fit beside a tenth that is free: a batch of 8.
    with pytest.raises(UserError, match=r"accumulation_steps=2; or config\.data\.batch_size=8;"):
        memory.check_sizes(60, 60, 0, 100, config(), shards=4)


def test_what_the_compiler_finds_too_large_is_one_line():
    text = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nRan out of memory on HBM. Used 181.08G of 15.75G hbm."
    said = str(memory.too_large(jax.errors.JaxRuntimeError(text), config()))
    assert "\n" not in said and "does not fit: RESOURCE_EXHAUSTED" in said and "config.model.remat=full; or" in said
    assert memory.too_large(jax.errors.JaxRuntimeError("INTERNAL: of another kind"), config()) is None


def test_a_state_that_is_too_large_by_itself():
    memory.check_state(100, 100, config())
    memory.check_state(10**15, None, config())  # CPU doesn't say what it has
    with pytest.raises(UserError, match=r"optimizer state take 120\.0 GB of each device, which has 100\.0: .*bfloat16"):
        memory.check_state(120 * 10**9, 100 * 10**9, config())


def test_bytes_of_the_state_on_a_mesh():
    setting = small.config(small.ROUTERS["top_k"])
    model, tx = LM(setting.model), optimizer.make(setting.optimizer)
    shapes = jax.eval_shape(functools.partial(init, model, tx), jax.random.key(0))
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    one = memory.of_state(shapes, state_shardings(model, tx, sharding.make_mesh({"data": 8})))
    eight = memory.of_state(shapes, state_shardings(model, tx, sharding.make_mesh({"fsdp": 8})))
    assert one == whole
    # Embedding, projections and experts are split; norms and counts, under a tenth here, are on every device.
    assert whole / 8 < eight < whole * (1 / 8 + 0.1)


def test_bfloat16_parameters_halve_the_state():
    setting = small.config(small.ROUTERS["top_k"])
    low = dataclasses.replace(setting.model, param_dtype="bfloat16")
    states = [
        jax.eval_shape(functools.partial(init, LM(model), optimizer.make(setting.optimizer)), jax.random.key(0))
        for model in (setting.model, low)
    ]
    full, half = (jax.tree.leaves((state.params, state.opt_state)) for state in states)
    assert [a.shape for a in full] == [a.shape for a in half]
    assert {a.dtype for a in half} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}  # int32: optax's counts
