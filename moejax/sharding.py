"""Meshes, and the one table from logical axes to mesh axes.

Every parameter carries logical axis names; `spec` turns them into a PartitionSpec. Meshes come from `make_mesh`
alone: it pins Auto axes, because `jax.make_mesh` defaults to Explicit ones, which Linen's annotations don't take.
"""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
# Outside the MoE layer the expert axis is one more data axis.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "expert_mlp": "tensor",
    "router_experts": None,
    "norm": None,
    "activation": None,
}


def make_mesh(sizes: dict[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """An Auto mesh of axes `data`, `fsdp`, `expert`, `tensor`.

    `sizes` gives the size of each axis (1 where left out); one may be -1 and fills up. A mesh smaller than
    `devices` takes the first ones. Where jax tells of groups with slower links between them (`slice_index`: TPU
    slices, hosts of GPUs), the outer axes lie across the groups (`over_groups`). Raises UserError for a mesh that the
    devices can't form.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(AXES, 1) | (sizes if sizes is not None else {"data": -1})
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh sizes {sizes}: each must be positive, and at most one -1 (fills up)")
    if fixed > len(devices) or (free and len(devices) % fixed):
        raise UserError(
            f"mesh sizes {sizes} need {'a multiple of ' if free else ''}{fixed} devices and there are {len(devices)}: "
            "change config.mesh"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape, devices = tuple(sizes[axis] for axis in AXES), devices[: math.prod(sizes.values())]
    idle = set(range(jax.process_count())) - {device.process_index for device in devices}
    if idle:
        raise UserError(f"mesh sizes {sizes} leave out all devices of process {min(idle)}: let config.mesh use them")
    types = (AxisType.Auto,) * len(AXES)
    groups = len({getattr(device, "slice_index", 0) for device in devices})
    inside, across = over_groups(shape, groups)
    try:
        if groups == 1:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices), AXES, axis_types=types)
    except (AssertionError, NotImplementedError, ValueError) as error:  # a torus takes few shapes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"mesh sizes {sizes} can't be laid over these {len(devices)} {devices[0].device_kind} devices "
                        f"({reason}): use all of them, with powers of two") from error  # fmt: skip


def over_groups(shape: Sequence[int], groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(inside, across): how a mesh of `shape` lies over equal groups of devices, shape = inside · across on each axis.

    The outermost axes go across as far as they divide: data first, then fsdp, whose exchanges are the rarest.
    UserError where the groups don't divide the mesh.
    """
    inside, across, left = [], [], groups
    for size in shape:
        part = math.gcd(size, left)
        left //= part
        inside.append(size // part)
        across.append(part)
    if left > 1:
        sizes = dict(zip(AXES, shape, strict=False))
        raise UserError(f"mesh sizes {sizes} do not divide over {groups} slices or hosts: make config.mesh.data (or "
                        f"fsdp) a multiple of {groups}")  # fmt: skip
    return tuple(inside), tuple(across)


def reading(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """(index, count): which of how many equal parts of each batch this process reads, the default or the one named.

    Processes whose devices hold the same rows (an axis that does not split the batch lies across them) read the same
    part. Raises UserError where parts of processes overlap.
    """
    me = jax.process_index() if process_index is None else process_index
    batch = [AXES.index(axis) for axis in RULES["batch"] or ()]
    order = [*batch, *(i for i in range(len(AXES)) if i not in batch)]
    parts = mesh.devices.transpose(order).reshape(math.prod(mesh.devices.shape[i] for i in batch), -1)
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(parts):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    distinct = sorted({tuple(sorted(mine)) for mine in held.values()})
    if sum(map(len, distinct)) != len(parts) or len({*map(len, distinct)}) != 1:
        raise UserError(f"mesh {dict(mesh.shape)} splits the batch unevenly over {len(held)} processes: make "
                        "config.mesh.data, fsdp or expert a multiple of them")  # fmt: skip
    return distinct.index(tuple(sorted(held[me]))), len(distinct)


def spec(names: Sequence[str | None], rules: dict | None = None) -> PartitionSpec:
    """The PartitionSpec of logical axis `names`; UserError for an unknown name or a mesh axis taken twice."""
    rules = RULES if rules is None else rules
    taken: dict[str, str] = {}
    axes = []
    for name in names:
        if name is not None and name not in rules:
            raise UserError(f"logical axis {name!r} is not in the table; it has {', '.join(rules)}")
        axis = None if name is None else rules[name]
        for mesh_axis in (axis,) if isinstance(axis, str) else axis or ():
            if mesh_axis in taken:
                raise UserError(
                    f"axes {tuple(names)}: {taken[mesh_axis]!r} and {name!r} both land on mesh axis {mesh_axis!r}; "
                    "give one of them another axis in the table"
                )
            taken[mesh_axis] = str(name)
        axes.append(axis)
    return PartitionSpec(*axes)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` held to the layout of its logical axis names; the identity where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh in use that split the batch and have more than one device; () without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = RULES["batch"]
    assert isinstance(axes, tuple)
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def splits(axis: str) -> bool:
    """Whether the mesh in use has more than one device along `axis`."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1


def on_one_device() -> bool:
    """Whether what is traced here runs on each device by itself: there is one, or every axis of the mesh is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or mesh.are_all_axes_manual


def platform() -> str:
    """Of the mesh in use where it tells, which may be of devices that aren't here; else of this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def on_each_device(function: Callable, in_specs, out_specs, check_vma: bool = True) -> Callable:
    """`function` of each device's part of its arguments, by shard_map; itself on one device or without a mesh.

    Manual over every axis of the mesh, those of one device too: a TPU kernel isn't compiled where any is automatic.
    Specs name axes of more than one device alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(mesh.axis_names), check_vma=check_vma
    )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts `mesh` splits the batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def shardings(mesh: Mesh, boxed) -> dict:
    """NamedShardings for a tree whose leaves may be boxed with logical names (`nn.with_logical_partitioning`).

    Raises UserError, naming the parameter and the axes, where a size does not divide over the mesh.
    """

    def place(path, names, leaf):
        found = spec(tuple(names))
        for name, size, axes in zip(names, leaf.shape, found, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % parts:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: axis {name!r} of size {size} "
                    f"does not divide over mesh axis {axes!r} of size {parts}: change config.mesh or the model"
                )
        return NamedSharding(mesh, found)

    return jax.tree_util.tree_map_with_path(
        place, nn.get_partition_spec(boxed), nn.unbox(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def of_slice(stack: NamedSharding, i: int) -> NamedSharding:
    """Of the i-th array, whichever that is, of a stack of them."""
    del i
    return NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays (B, …) split over the batch axes."""
    return NamedSharding(mesh, spec(("batch",)))
