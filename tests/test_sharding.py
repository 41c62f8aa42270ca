"""Meshes, and the one table from logical to mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import AxisType, PartitionSpec

from moejax import sharding
from moejax.errors import UserError
from moejax.models.lm import LM


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (8, 1, 1, 1)),
        ({}, (1, 1, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1, 1)),
        ({"data": -1, "expert": 2}, (4, 1, 2, 1)),
        ({"fsdp": -1, "data": 1, "tensor": 2}, (1, 4, 1, 2)),
        ({"data": 3}, (3, 1, 1, 1)),  # the first three of the eight devices
    ],
)
def test_meshes(sizes, shape):
    mesh = sharding.make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.shape == shape
    assert list(mesh.devices.flat) == jax.devices()[: np.prod(shape)]
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 16}, "need 16 devices and there are 8"),
        ({"data": -1, "fsdp": 3}, "need a multiple of 3 devices and there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "each must be positive"),
        ({"data": -2}, "each must be positive"),
    ],
)
def test_meshes_that_cannot_be_formed(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes)


def test_specs_by_hand():
    assert sharding.spec(("experts", "embed", "expert_mlp")) == PartitionSpec("expert", "fsdp", "tensor")
    assert sharding.spec(("batch", "length", None)) == PartitionSpec(("data", "fsdp", "expert"), None, None)
    assert sharding.spec(("embed",), {"embed": None}) == PartitionSpec(None)


def test_two_axes_on_one_mesh_axis_are_an_error():
    with pytest.raises(UserError, match="'heads' and 'mlp' both land on mesh axis 'tensor'"):
        sharding.spec(("heads", "mlp"))
    with pytest.raises(UserError, match="'batch' and 'embed' both land on mesh axis 'fsdp'"):
        sharding.spec(("batch", "embed"))


def test_an_unknown_axis_is_an_error():
    with pytest.raises(UserError, match="logical axis 'embde' is not in the table; it has batch, length"):
        sharding.spec(("embde",))


def test_every_parameter_of_the_model_has_a_place_and_large_ones_are_split():
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    model = LM(small.model_config(small.ROUTERS["aux_free"]))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    places = sharding.shardings(mesh, boxed)
    moe = places["layers"]["moe"]
    assert moe["gate"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")  # layers, E, D, F
    assert moe["down"].spec == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert moe["router"].spec == PartitionSpec(None, "fsdp", None)
    assert places["layers"]["attention"]["query"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert places["embedding"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert places["final_norm"]["scale"].spec == PartitionSpec(None)


def test_an_axis_that_does_not_divide_is_named():
    """Two key-value heads over four devices."""
    mesh = sharding.make_mesh({"tensor": 4})
    model = LM(small.model_config())
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    with pytest.raises(UserError, match=r"'kv_heads' of size 2 .* mesh axis 'tensor' of size 4"):
        sharding.shardings(mesh, boxed)


def test_constraints_do_nothing_without_a_mesh_and_hold_with_one():
    x = jnp.ones((8, 4, 2))
    assert sharding.constrain(x, "batch", "length", "activation") is x
    assert sharding.batch_axes() == ()
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        assert sharding.batch_axes() == ("data", "fsdp")
        held = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "activation"))(x)
    assert held.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
