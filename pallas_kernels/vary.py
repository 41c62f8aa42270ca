"""One manual-axis type for several arrays, so that a kernel and its custom gradient also run inside `shard_map`."""

import jax
from jax import lax


def vary_alike(*trees):
    """Casts every array to vary over the mesh axes that any of them varies over; outside shard_map, nothing.

    The cast's own transpose is the psum that the cotangent of a replicated operand needs, so a custom_vjp whose inputs
    went through here needn't know of meshes.
    """
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes), trees)


def _vary(array, axes):
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return lax.pcast(array, missing, to="varying") if missing else array
