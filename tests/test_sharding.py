"""Meshes, and the one table from logical to mesh axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from moejax import sharding
from moejax.config import MoEConfig
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


@pytest.mark.parametrize(
    ("shape", "groups", "inside", "across"),
    [
        ((4, 1, 2, 1), 2, (2, 1, 2, 1), (2, 1, 1, 1)),
        ((1, 16, 4, 1), 8, (1, 2, 4, 1), (1, 8, 1, 1)),
        ((2, 4, 1, 1), 4, (1, 2, 1, 1), (2, 2, 1, 1)),  # data can't take them all: fsdp goes across too
        ((1, 1, 8, 1), 2, (1, 1, 4, 1), (1, 1, 2, 1)),
    ],
)
def test_the_outer_axes_lie_across_hosts(shape, groups, inside, across):
    assert sharding.over_groups(shape, groups) == (inside, across)


@given(st.tuples(*[st.integers(1, 12)] * 4), st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_a_mesh_over_groups_is_the_whole_mesh_or_an_error(shape, groups):
    try:
        inside, across = sharding.over_groups(shape, groups)
    except UserError as error:
        assert f"over {groups} slices or hosts" in str(error)
        # One factor at a time may be refused only where the groups don't divide the mesh at all.
        assert np.prod(shape) % groups
    else:
        assert tuple(np.multiply(inside, across)) == shape
        assert np.prod(across) == groups


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device, of a machine that isn't here."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "some chip"


def test_two_hosts_of_four_lie_along_data():
    chips = [Chip(id=i, process_index=i, slice_index=i // 4) for i in (4, 5, 6, 7, 0, 1, 2, 3)]  # in any order
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "expert": 2}, chips)
    assert [chip.slice_index for chip in mesh.devices[0].flat] == [0] * 4
    assert [chip.slice_index for chip in mesh.devices[1].flat] == [1] * 4
    with pytest.raises(UserError, match="do not divide over 2 slices or hosts"):
        sharding.over_groups((1, 3, 1, 1), 2)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"data": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"fsdp": 2, "expert": 4}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes hold the same rows
        ({"tensor": 8}, [(0, 1)] * 4),
    ],
)
def test_each_process_reads_the_rows_that_its_devices_hold(sizes, parts):
    """Eight devices, two of each of four processes."""
    mesh = sharding.make_mesh(sizes, [Chip(id=i, process_index=i // 2) for i in range(8)])
    assert [sharding.reading(mesh, process) for process in range(4)] == parts


def test_processes_that_would_read_overlapping_rows_are_an_error():
    """Rows 0 1 | 1 2: four devices of process 0, then two of process 1, over three parts of the batch."""
    chips = [Chip(id=i, process_index=int(i >= 3)) for i in range(6)]
    with pytest.raises(UserError, match="splits the batch unevenly over 2 processes"):
        sharding.reading(sharding.make_mesh({"data": 3, "tensor": 2}, chips), 0)


def test_experts_that_do_not_divide_over_what_fills_up_are_one_line():
    mesh = sharding.make_mesh({"expert": -1})
    moe = MoEConfig(router="moejax.routing:top_k", num_experts=6, experts_per_token=2, expert_width=16)
    boxed = jax.eval_shape(LM(small.model_config(moe)).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(UserError, match="'experts' of size 6 does not divide over mesh axis 'expert' of size 8"):
        sharding.shardings(mesh, boxed["params"])


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


def test_what_runs_on_each_device_by_itself():
    asked = []

    def ask(x):
        asked.append(sharding.on_one_device())
        return x

    ask(None)  # no mesh, eight devices
    for sizes in ({}, {"data": 2, "expert": 4}):
        with jax.set_mesh(sharding.make_mesh(sizes)):
            jax.jit(ask)(jnp.zeros(8))
    part = PartitionSpec(("data", "expert"))
    with jax.set_mesh(sharding.make_mesh({"data": 2, "expert": 4})):
        jax.jit(sharding.on_each_device(ask, part, part))(jnp.zeros(8))
        data = PartitionSpec("data")
        jax.jit(jax.shard_map(ask, in_specs=data, out_specs=data, axis_names={"data"}))(jnp.zeros(8))
    assert asked == [False, True, False, True, False]
